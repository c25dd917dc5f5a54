"""The report in a real browser, headless Chromium: it draws, sorts, slides, and fetches nothing.

Skipped where selenium, chromium or chromedriver is not installed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments import compare
from experiments.cli import app
from experiments.compare import CompareOptions, make_plan
from experiments.reporting.page import write_report
from experiments.reporting.sources import load_source
from experiments.runs import load_run
from tests.test_compare import Silent

pytest.importorskip("plotly", reason="the report needs the extra report")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
PHONE = {"width": 390, "height": 740, "deviceScaleFactor": 2, "mobile": True}
PATIENCE = 30.0  # seconds for the page to do what was asked, on a busy machine


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of points and of images, of more samplers than there are colours."""
    folder = tmp_path_factory.mktemp("run")
    solvers = ("ancestral", "ddim", "euler_maruyama", "probability_flow:method=rk4")
    options = CompareOptions(
        targets=("ring", "digits"),
        sdes=("vp", "ve"),
        solvers=solvers,
        budgets=(4, 12),
        samples=20,
        repeats=2,
        out=str(folder),
    )
    compare.run(make_plan(options), Silent())
    return write_report(load_run(folder))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def opened(driver: Any, page: Path) -> Iterator[Any]:
    """The page, freshly loaded in light; no error on its console and no request, whatever a test
    does."""
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    scheme(driver, "light")
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(page.as_uri())
    yield driver
    complaints = [entry for entry in driver.get_log("browser") if entry["level"] != "INFO"]
    assert complaints == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked[0] == page.as_uri()  # the log does see requests
    assert [url for url in asked[1:] if not url.startswith("data:")] == []


def scheme(driver: Any, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(found: Callable[[], Any]) -> Any:
    """What ``found`` gives once it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)
    return value


def draw_all(driver: Any) -> int:
    """Every chart; how many there are."""
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    count = driver.execute_script("return document.querySelectorAll('.plot').length")
    script = "return document.querySelectorAll('.plot .cartesianlayer .subplot').length"
    wait(lambda: driver.execute_script(script) == count)
    return int(count)


def test_charts_are_drawn_and_only_as_they_come_near(opened: Any) -> None:
    script = "return document.querySelectorAll('.plot .main-svg').length"
    opened.execute_script("window.scrollTo(0, 0)")
    opened.find_element("css selector", "#nfe .plot").location_once_scrolled_into_view  # noqa: B018
    wait(lambda: opened.execute_script(script))
    drawn = "return document.querySelectorAll('.plot[data-drawn]').length"
    early = opened.execute_script(drawn)
    assert draw_all(opened) == 2 * 4 + 2 * 5 + 1  # curves; ring's samples and truth; its slider
    assert early < opened.execute_script(drawn)
    lines = opened.execute_script(
        "return [...document.querySelectorAll('#nfe .plot')].map("
        "p => [p.querySelectorAll('.scatterlayer .trace').length,"
        " p.querySelectorAll('.errorbar').length])"
    )
    # Four samplers, floor, front and its rings; a bar at each of two numbers of evaluations.
    assert lines == [[7, 8]] * 4
    shown = "return [...document.images].every(i => i.complete && i.naturalWidth > 30)"
    assert opened.execute_script(shown)
    assert opened.execute_script("return document.images.length") == 2 * 5 + 1


@pytest.mark.parametrize("column", ["sampler", "NFE", "Energy distance (squared)"])
def test_headings_sort(opened: Any, column: str) -> None:
    heads = opened.find_elements("css selector", "#rows thead th")
    index = [head.text.strip() for head in heads].index(column)
    button = heads[index].find_element("css selector", "button")

    def values() -> list[str]:
        script = (
            "return [...document.querySelectorAll('#rows tbody tr')]"
            ".map(r => r.cells[%d].dataset.value)"
        )
        return list(opened.execute_script(script % index))

    before = values()
    for turn in ("ascending", "descending"):
        opened.execute_script("arguments[0].click()", button)
        assert heads[index].get_attribute("aria-sort") == turn
        now = values()
        assert sorted(now) == sorted(before)
        known = [value for value in now if value]
        assert now[: len(known)] == known  # what is not known comes last
        keys = known if column == "sampler" else [float(value) for value in known]
        assert keys == sorted(keys, reverse=turn == "descending")
        assert len(set(keys)) > 1


def test_the_filter_hides_rows(opened: Any) -> None:
    visible = (
        "return [...document.querySelectorAll('#rows tbody tr')].filter(r => !r.hidden).length"
    )
    assert opened.execute_script(visible) == 32
    opened.find_element("id", "filter").send_keys("ring ddim")
    assert opened.execute_script(visible) == 4


def test_sliders_move_points_and_images(opened: Any) -> None:
    draw_all(opened)
    journeys = opened.find_elements("css selector", ".journey")
    assert len(journeys) == 2
    state = (
        "const j = arguments[0], p = j.querySelector('.plot');"
        "return [p ? JSON.stringify([p.data[0].x, p._fullLayout.xaxis.range]) :"
        " j.querySelector('img').src, j.querySelector('output').textContent]"
    )
    for journey in journeys:
        slider = journey.find_element("css selector", "input")
        before = opened.execute_script(state, journey)
        slider.send_keys("\ue011")  # Home: by keyboard, as everything on the page
        after = opened.execute_script(state, journey)
        assert after[0] != before[0]
        assert "state 0 of" in after[1]
        journey.find_element("css selector", ".play").click()
        last = slider.get_attribute("max")
        wait(lambda s=slider, v=last: s.get_property("value") == v)
        wait(lambda j=journey, b=before: opened.execute_script(state, j) == b)


def test_samplers_can_be_hidden(opened: Any) -> None:
    draw_all(opened)
    lines = (
        "return [...document.querySelectorAll('#nfe .plot')].map("
        "p => p.querySelectorAll('.scatterlayer .trace').length)"
    )
    button = opened.find_element("css selector", "#seconds .key button")
    opened.execute_script("arguments[0].click()", button)
    assert button.get_attribute("aria-pressed") == "false"
    wait(lambda: opened.execute_script(lines) == [6] * 4)
    opened.execute_script("arguments[0].click()", button)
    wait(lambda: opened.execute_script(lines) == [7] * 4)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(opened: Any, mode: str) -> None:
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    scheme(opened, mode)
    draw_all(opened)
    width = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wait(lambda: opened.execute_script(width) == [390, 390])
    beyond = (
        "return [...document.querySelectorAll('.card, .plot .main-svg, h1, pre, nav, input')]"
        ".filter(e => e.getBoundingClientRect().right > 391).length"
    )
    wait(lambda: opened.execute_script(beyond) == 0)


def test_the_scheme_is_followed_while_the_page_is_open(opened: Any) -> None:
    draw_all(opened)
    script = (
        "const p = document.querySelector('#nfe .plot'); return ["
        "getComputedStyle(document.body).backgroundColor,"
        "getComputedStyle(p.querySelector('.xtitle')).fill,"
        "p.data.find(t => t.name === 'ancestral').line.color]"
    )
    light = opened.execute_script(script)
    assert light == ["rgb(255, 255, 255)", "rgb(22, 25, 29)", "#0072b2"]
    scheme(opened, "dark")
    dark = ["rgb(20, 23, 27)", "rgb(232, 234, 237)", "#3391d1"]
    wait(lambda: opened.execute_script(script) == dark)
    scheme(opened, "light")
    wait(lambda: opened.execute_script(script) == light)


def test_text_can_be_told_from_its_background(opened: Any) -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: contrast of text 4.5, of lines and markers 3, in both schemes."""
    names = ["back", "card", "ink", "faint", "accent", "warn", *(f"c{k}" for k in range(7))]
    script = (
        "const s = getComputedStyle(document.documentElement);"
        "return arguments[0].map(n => s.getPropertyValue('--' + n).trim())"
    )
    for mode in ("light", "dark"):
        scheme(opened, mode)
        found = dict(zip(names, opened.execute_script(script, names), strict=True))
        for name in ("ink", "faint", "accent", "warn"):
            for back in ("back", "card"):
                assert contrast(found[name], found[back]) >= 4.5, (mode, name, back)
        # Of seven colours told apart by the colour-blind some must be pale: markers differ too.
        strong = [k for k in range(7) if contrast(found[f"c{k}"], found["card"]) >= 3]
        assert len(strong) >= 4, mode


def test_other_experiments_are_drawn_too(driver: Any, tmp_path: Path) -> None:
    """Steps with an error budget and certificates beside them, on a phone, in the dark."""
    runs = {
        "steps": "steps --sde vp --solver ddim --steps 4,8,16",
        "error-budget": "error-budget --sde vp --nfe 4 --solver ddim --samples 20 --repeats 2",
        "orders": "orders --quick --solver ddim",
    }
    for name, arguments in runs.items():
        out = str(tmp_path / name)
        done = CliRunner().invoke(app, [*arguments.split(), "--out", out])
        assert done.exit_code == 0, done.output
    first, *more = [load_source(tmp_path / name) for name in runs]
    page = write_report(first, more=more)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    scheme(driver, "dark")
    driver.get_log("browser")
    driver.get(page.as_uri())
    assert draw_all(driver) == 2
    bars = "return document.querySelectorAll('#budget .barlayer .point').length"
    assert driver.execute_script(bars) >= 2
    width = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wait(lambda: driver.execute_script(width) == [390, 390])
    assert driver.execute_script("return document.querySelectorAll('#orders tbody tr').length") == 1
    assert [entry for entry in driver.get_log("browser") if entry["level"] != "INFO"] == []
    # Certificates alone: no table to sort, and nothing that fails for want of it.
    driver.get(write_report(more[1]).as_uri())
    assert [entry for entry in driver.get_log("browser") if entry["level"] != "INFO"] == []


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of relative luminances of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
