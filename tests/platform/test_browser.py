"""A real browser on a real MLflow server: a sweep's pages show its runs, its parameters and its charts."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.platform.driving import end_server, free_port, start_server, write

from piste import tracking
from piste.reporting import comparison_url
from piste.sweeping import SweepResult, sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 120.0

pytest_plugins = ["tests.platform.fixtures"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium"),
]

RECIPE = """
workload = "quadratic"
[problem]
dimension = 4
steps = 20
[sweep]
metric = "train/loss"
trials = 12
pack = false
[sweep.space]
"optimizer.name" = { grid = ["sgd", "adamw"] }
"optimizer.lr" = { log_uniform = [0.01, 1.0] }
seed = { repeats = 2 }
"""


class Browser:
    """A headless Chromium, driven over the pipe that its debugger listens on.

    Args:
        folder: Its profile.
    """

    def __init__(self, folder: Path) -> None:
        theirs, to_browser = os.pipe()
        from_browser, ours = os.pipe()
        options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        command = f'exec "$0" {options} --window-size=1600,1200 --user-data-dir="$1" --remote-debugging-pipe'
        with (folder / "browser.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", f"{command} about:blank 3<&{theirs} 4>&{ours}", str(CHROMIUM), str(folder)],
                pass_fds=(theirs, ours),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(theirs)
        os.close(ours)
        self._to, self._from = to_browser, from_browser
        self._asked, self._read, self._session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._asked += 1
        message: dict[str, Any] = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 2 * SECONDS
        while True:
            while b"\0" not in self._read:
                ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, f"the browser does not answer {method}"
                part = os.read(self._from, 1 << 16)
                assert part, "the browser is gone"
                self._read += part
            line, _, self._read = self._read.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._asked:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value on the page; that of a promise once it is kept."""
        wanted = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", **wanted)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str, *conditions: str) -> str:
        """Opens a page and waits in it until all conditions hold; returns its text."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        for condition in conditions:
            held = self.evaluate(
                f"""new Promise(done => {{
                    const start = Date.now();
                    const look = setInterval(() => {{
                        const late = Date.now() - start > {SECONDS * 1000};
                        if (late || (document.body && ({condition}))) {{ clearInterval(look); done(!late); }}
                    }}, 100);
                }})"""
            )
            text = self.evaluate("document.body.innerText")
            assert held, f"{url}: not within {SECONDS:g} s: {condition}\n{text}"
        return str(self.evaluate("document.body.innerText"))

    def close(self) -> None:
        """Ends the browser with all its processes."""
        os.close(self._to)  # it ends when its pipe does
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        os.close(self._from)


def says(*texts: str) -> str:
    """The condition that a page shows all these texts."""
    return " && ".join(f"document.body.innerText.includes({json.dumps(text)})" for text in texts)


def has(selector: str, least: int = 1) -> str:
    """The condition that a page has so many elements."""
    return f"document.querySelectorAll({json.dumps(selector)}).length >= {least}"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    folder = tmp_path / "browser"
    folder.mkdir()
    opened = Browser(folder)
    yield opened
    opened.close()


@pytest.fixture
def shown(shown_home: Path) -> SweepResult:
    result = sweep(write(shown_home.parent / "bowl.toml", RECIPE), local=True)
    assert (result.status, result.pending) == ("finished", 0)
    return result


@pytest.fixture
def address(shown: SweepResult, shown_home: Path) -> Iterator[str]:
    """Where MLflow's server has the sweep."""
    port = free_port()
    server = start_server(shown_home / "mlflow.db", port)
    yield f"http://127.0.0.1:{port}"
    end_server(server)


def test_the_pages_of_a_sweep(shown: SweepResult, address: str, browser: Browser) -> None:
    view = tracking.client(address)
    experiment = view.get_experiment_by_name("piste")
    assert experiment is not None
    runs = view.search_runs([experiment.experiment_id], max_results=100)
    kinds = {
        kind: [r for r in runs if r.data.tags["piste.kind"] == kind] for kind in ("sweep", "cell", "trial")
    }
    assert {kind: len(found) for kind, found in kinds.items()} == {"sweep": 1, "cell": 6, "trial": 12}
    root = f"{address}/#/experiments/{experiment.experiment_id}/runs"
    training = "workflowType=machine_learning"

    # The experiment: the sweep on top, its cells and trials folded into it.
    text = browser.open(f"{root}?{training}", says(shown.id, "matching runs"))
    assert "(trial 0)" not in text
    assert "(cell 0)" not in text

    # The sweep's run: what was best, its cells, where to compare, its curve.
    (own,) = kinds["sweep"]
    browser.open(
        f"{root}/{own.info.run_id}?{training}",
        says(shown.id, "Best train/loss", "Child runs", "(cell 5)", "best/train/loss", "optimizer.name"),
        has("a[href*='compare-runs']", 2),
        has("a[href*='viewStateShareKey']"),
    )
    charts = f"{root}/{own.info.run_id}/model-metrics?{training}"
    browser.open(charts, says("best/train"), has(".js-plotly-plot .scatterlayer path.js-line"))
    files = f"{root}/{own.info.run_id}/artifacts?{training}"
    browser.open(files, says("pictures", "recipe.toml", "trials.json"))

    # A trial's run.
    best = shown.best
    assert best is not None
    (trial,) = [r for r in kinds["trial"] if r.data.tags["piste.trial"] == str(best.number)]
    lr = str(best.values["optimizer.lr"])
    browser.open(
        f"{root}/{trial.info.run_id}?{training}",
        says(trial.info.run_name, "Parent run", "train/loss", "optimizer.lr", lr, "optimizer.name", "seed"),
    )

    # The comparison of trials opens on what differs, against the objective.
    page = comparison_url(address, experiment.experiment_id, [r.info.run_id for r in kinds["trial"]])
    browser.open(
        page,
        says("Comparing 12 Runs from 1 Experiment", "Parallel Coordinates Plot", "Box Plot", "Contour Plot"),
        has(".js-plotly-plot .parcoords"),
    )
    axes = browser.evaluate(
        "[...document.querySelectorAll('.parcoords .axis-title')].map(e => e.textContent)"
    )
    assert axes == ["optimizer.lr", "optimizer.name", "seed", "train/loss"]

    # What `piste compare --sweep` prints: all trials, best first, with charts of the objective.
    printed = tracking.sweep_address(address, shown.id)
    assert printed.startswith(address)
    browser.open(
        printed,
        says("train/loss of all trials", "12 matching runs"),
        has(".parcoords text.label", 3),
        has(".js-plotly-plot .scatterlayer .point", 24),
        has(".ag-row a", 12),
    )
    axes = browser.evaluate("[...document.querySelectorAll('.parcoords text.label')].map(e => e.textContent)")
    assert axes == ["optimizer.name", "optimizer.lr", "train/loss"]
    rows = browser.evaluate(
        "[...document.querySelectorAll('.ag-row a')]"
        ".map(e => [Number(e.closest('.ag-row').getAttribute('row-index')), e.textContent])"
    )
    ranked = sorted(shown.trials, key=lambda t: t.value if t.value is not None else math.inf)
    titles = {int(r.data.tags["piste.trial"]): r.info.run_name for r in kinds["trial"]}
    assert [name for _, name in sorted(rows)] == [titles[t.number] for t in ranked]
