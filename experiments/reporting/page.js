"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("data").textContent);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set();
  const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };

  // Colours are names in the figures ("@0"); their values are the style sheet's, light or dark.
  function colours() {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    const found = { ink: value("--ink"), grey: value("--faint"), line: value("--line"), back: value("--back"), band: scheme.matches ? "rgba(255,255,255,0.16)" : "rgba(20,30,50,0.12)" };
    for (let k = 0; k < 7; k++) found[k] = value(`--c${k}`);
    return found;
  }
  function template(found) {
    const axis = { gridcolor: found.line, linecolor: found.grey, zerolinecolor: found.line, automargin: true };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: found.ink, size: 12, family: "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif" },
        xaxis: axis, yaxis: axis, margin: { l: 62, r: 12, t: 12, b: 52 },
        dragmode: false, hoverlabel: { font: { size: 12 } },
      },
    };
  }
  function resolved(figure) {
    const found = colours();
    const text = JSON.stringify(figure).replace(/"@(\w+)"/g, (all, name) => (name in found ? JSON.stringify(found[name]) : all));
    const copy = JSON.parse(text);
    for (const trace of copy.data) if (trace.meta === "sampler" && hidden.has(trace.name)) trace.visible = false;
    copy.layout.template = template(found);
    return copy;
  }
  function draw(plot) {
    const figure = resolved(figures[plot.dataset.figure]);
    const journey = plot.closest(".journey");
    if (journey) {
      const frame = figures[journey.dataset.frames].frames[+journey.querySelector("input").value];
      Object.assign(figure.data[0], { x: frame.x, y: frame.y });
      figure.layout.xaxis.range = frame.range.slice();
      figure.layout.yaxis.range = frame.range.slice();
    }
    plot.dataset.drawn = "yes";
    return Plotly.react(plot, figure.data, figure.layout, config);
  }
  const plots = [...document.querySelectorAll(".plot")];
  const redraw = () => plots.filter((plot) => plot.dataset.drawn).forEach(draw);

  // Charts are drawn as they come near the screen; all of them for paper.
  for (const plot of plots) plot.style.minHeight = `${figures[plot.dataset.figure].layout.height}px`;
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
  }, { rootMargin: "500px" });
  plots.forEach((plot) => near.observe(plot));
  window.addEventListener("beforeprint", () => plots.forEach((plot) => plot.dataset.drawn || draw(plot)));
  scheme.addEventListener("change", redraw);

  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => {
      const name = button.dataset.sampler;
      if (!hidden.delete(name)) hidden.add(name);
      for (const other of document.querySelectorAll(".key button"))
        if (other.dataset.sampler === name) other.setAttribute("aria-pressed", String(!hidden.has(name)));
      redraw();
    });
  }

  const body = document.querySelector("#rows tbody"); // none of certificates alone
  const heads = body ? [...document.querySelectorAll("#rows thead th")] : [];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const numeric = button.dataset.numeric === "1";
      const value = (row) => row.cells[column].dataset.value;
      const order = (a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last
        const found = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
        return up ? found : -found;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
  document.getElementById("filter")?.addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });

  for (const journey of document.querySelectorAll(".journey")) {
    const { moments, images } = figures[journey.dataset.frames];
    const slider = journey.querySelector("input");
    const play = journey.querySelector(".play");
    const plot = journey.querySelector(".plot");
    let timer = 0;
    const show = () => {
      journey.querySelector("output").textContent = moments[+slider.value];
      slider.setAttribute("aria-valuetext", moments[+slider.value]);
      if (plot) draw(plot);
      else journey.querySelector("img").src = images[+slider.value];
    };
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
    };
    slider.addEventListener("input", () => { stop(); show(); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (+slider.value === moments.length - 1) slider.value = 0;
      play.textContent = "Stop";
      show();
      timer = setInterval(() => {
        slider.value = +slider.value + 1;
        show();
        if (+slider.value === moments.length - 1) stop();
      }, 350);
    });
  }
})();
