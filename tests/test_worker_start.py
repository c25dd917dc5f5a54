"""Processes that are started before torch is loaded: they compute what one process does, and end
with the command, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from experiments import worker_start
from experiments.results import load_results
from experiments.runs import load_run

ROOT = Path(__file__).parents[1]
MACHINE = {"seconds", "seconds_interval", "peak_bytes", "batch_size"}
SMALL = ("--target", "ring", "--sde", "vp", "--nfe", "4,6", "--samples", "50", "--repeats", "2")
LONG = ("--target", "ring", "--sde", "vp", "--nfe", "400", "--samples", "2000", "--repeats", "30")
linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


@pytest.mark.parametrize(
    ("jobs", "scheduler", "device", "started"),
    [
        (2, None, "cpu", True),
        (3, None, "cuda", True),
        (1, None, "cpu", False),
        (2, "tcp://127.0.0.1:8786", "cpu", False),
        (None, None, "cuda", False),
    ],
)
@linux
def test_processes_are_started_where_some_will_be_needed(
    jobs: int | None,
    scheduler: str | None,
    device: str,
    started: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from joblib.externals.loky.backend import context

    done: list[Any] = []
    monkeypatch.setattr(forkserver, "ensure_running", lambda: done.append("server"))
    monkeypatch.setattr("multiprocessing.set_forkserver_preload", done.append)
    monkeypatch.setattr(context, "set_start_method", lambda name, force: done.append(name))
    worker_start.prepare_workers(jobs, scheduler, device)
    assert done == ([["experiments.work"], "server", "forkserver"] if started else [])


@pytest.mark.parametrize("command", ["compare", "guidance", "error-budget"])
def test_they_are_started_before_torch_is_loaded(command: str) -> None:
    """Else both would load it one after the other."""
    module = f"experiments.{command.replace('-', '_')}_command"
    script = (
        f"import sys, {module} as own\n"
        "def seen(*given):\n"
        "    sys.exit(f'{given} ' + ('late' if 'torch' in sys.modules else 'early'))\n"
        "own.prepare_workers = seen\n"
        "from experiments.cli import app\n"
        f"app(['{command}', '--jobs', '2', '--device', 'cpu'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.strip() == "(2, None, 'cpu') early"


@linux
@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "guidance", "error-budget"])
def test_two_processes_give_the_bits_of_one(command: str, tmp_path: Path) -> None:
    words = [command, *SMALL, "--solver", "ddim", "--solver", "ancestral"]
    words += ["--guidance", "cfg", "--scale", "1,3"] if command == "guidance" else []
    for name, jobs in (("one", "1"), ("two", "2")):
        with running(*words, "--jobs", jobs, "--out", str(tmp_path / name)) as process:
            assert process.wait(240) == 0
            gone(process)
    assert table(tmp_path / "one") == table(tmp_path / "two")
    one, two = (load_run(tmp_path / name).records for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[key].metrics == two[key].metrics for key in one)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nobody_is_left_when_a_run_is_ended(how: signal.Signals, tmp_path: Path) -> None:
    words = ["compare", *LONG, "--solver", "ddim", "--solver", "ancestral", "--jobs", "2"]
    with running(*words, "--out", str(tmp_path)) as process:
        at_work(process, tmp_path)
        assert len(session(process)) >= 4  # itself, the server, two workers
        if how is signal.SIGKILL:
            process.kill()
        else:  # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == (-signal.SIGKILL if how is signal.SIGKILL else 130)
        gone(process)
    status = load_results(tmp_path)["status"]
    assert status == ("running" if how is signal.SIGKILL else "interrupted")


@linux
@pytest.mark.slow
def test_a_sampler_that_kills_its_process_costs_only_its_cells(tmp_path: Path) -> None:
    words = ["compare", *SMALL, "--solver", "ddim", "--solver", "tests.misbehaving:DiesOfMany"]
    with running(*words, "--jobs", "2", "--out", str(tmp_path / "bad")) as process:
        assert process.wait(240) == 3
        gone(process)
    rows = load_results(tmp_path / "bad")["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed"]
    assert all("its process died" in row["error"] for row in rows[2:])
    words = ["compare", *SMALL, "--solver", "ddim", "--jobs", "1"]
    with running(*words, "--out", str(tmp_path / "good")) as process:
        assert process.wait(240) == 0
    beside = {"rank", "versus_best"}
    good = [{k: v for k, v in row.items() if k not in beside} for row in table(tmp_path / "good")]
    bad = [{k: v for k, v in row.items() if k not in beside} for row in table(tmp_path / "bad")]
    assert bad[:2] == good


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a session of its own, by which all its processes are known."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for member in session(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        process.wait()


def session(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes of its session that are not yet dead; a zombie is."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            text = (entry / "stat").read_text() if entry.name.isdigit() else ""
        except OSError:  # it has ended
            continue
        state, _, _, owner = text.rpartition(")")[2].split()[:4] if text else ("Z", "", "", "0")
        if int(owner) == process.pid and state not in "ZX":
            found.append(int(entry.name))
    return found


def gone(process: subprocess.Popen[bytes], seconds: float = 15.0) -> None:
    """They notice that the main process has ended, and end."""
    until = time.monotonic() + seconds
    while session(process) and time.monotonic() < until:
        time.sleep(0.1)
    assert session(process) == []


def at_work(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until cells are being computed."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if len(list(folder.glob("cells/*.json"))) > 32:  # floors, and more
            return
        time.sleep(0.05)
    raise AssertionError(f"no cells were computed; it ended with {process.poll()}")


def table(folder: Path) -> list[dict[str, Any]]:
    rows = load_results(folder)["rows"]
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in rows]
