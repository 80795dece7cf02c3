"""Learning curves of a comparison: which runs are a line, what is drawn of them, and that it can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.figure import Figure
from tests.platform.test_comparison import section, trial

from piste import catalog, learning_curves
from piste.ledger import Ledger
from piste.workload import Curve

CURVE = Curve("valid/score", "score (points)", "rounds", mode="max")


class Book:
    """A ledger of runs whose histories are given: by run, its cell, its method and its values."""

    def __init__(self) -> None:
        self._rows: dict[str, Any] = {}
        self._values: dict[str, Sequence[float]] = {}

    def add(
        self, run_id: str, values: Sequence[float], cell: str = "", workload: str = "has", **method: Any
    ) -> None:
        config = {"rule": {"name": "rule", **method}, "optimizer": {"name": "adamw"}}
        self._rows[run_id] = SimpleNamespace(config=config, cell=cell or run_id, workload=workload)
        self._values[run_id] = values

    def run(self, run_id: str) -> Any:
        return self._rows[run_id]

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        if key == CURVE.metric:
            return list(enumerate(self._values[run_id], start=1))
        assert key == CURVE.seconds
        return [(step, step / 2.0) for step in range(1, len(self._values[run_id]) + 1)]


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    curves = {"has": CURVE, "other": Curve("valid/loss", "loss (nats)"), "none": None}
    modules = {name: SimpleNamespace(curve=curve) for name, curve in curves.items()}
    monkeypatch.setattr(catalog, "load_workload", modules.__getitem__)
    return Book()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the files."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def of_runs(book: Book, runs: Sequence[str], path: Path) -> Path | None:
    return learning_curves.of_runs(cast(Ledger, book), runs, path)


def lines(figure: Figure) -> Mapping[str, tuple[list[float], list[float], list[float]]]:
    """By label: the steps, the seconds and the values that are drawn."""
    left, right = figure.axes[:2]
    return {
        str(one.get_label()): (list(one.get_xdata()), list(other.get_xdata()), list(one.get_ydata()))  # type: ignore[arg-type]
        for one, other in zip(left.lines, right.lines, strict=True)
    }


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_seeds_are_one_line_of_their_mean_over_the_steps_that_all_have(
    book: Book, tmp_path: Path, drawn: list[Figure]
) -> None:
    book.add("a", [1.0, 2.0, 3.0], cell="x")
    book.add("b", [3.0, 6.0], cell="x")
    assert of_runs(book, ["a", "b"], tmp_path / "new" / "curves.png") == tmp_path / "new" / "curves.png"
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert lines(figure) == {"rule": ([1.0, 2.0], [0.5, 1.0], [2.0, 4.0])}
    left, right = figure.axes  # no second row for one line
    assert (left.get_xlabel(), right.get_xlabel()) == ("rounds", "seconds of training")
    assert figure.get_supylabel() == "score (points)"
    assert "means of 2 runs" in figure.get_suptitle()
    pale = left.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in np.asarray(pale)} == {(1.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 6.0)}


def test_methods_of_one_name_are_told_apart(book: Book, tmp_path: Path, drawn: list[Figure]) -> None:
    book.add("a", [1.0], step_size=0.1, decay=1.0)
    book.add("b", [2.0], step_size=0.4, decay=1.0)
    book.add("c", [3.0])
    book.add("d", [4.0], name="adam", lr=0.03)
    book.add("e", [5.0], name="em")
    book.add("f", [6.0], name="em")
    of_runs(book, ["a", "b", "c", "d", "e", "f", "a"], tmp_path / "curves.png")
    assert [*lines(drawn[0])] == [
        "rule step_size 0.1, decay 1",
        "rule step_size 0.4, decay 1",
        "rule",
        "adam",
        "em (e)",
        "em (f)",
    ]
    assert legend(drawn[0])[:2] == ["em (f): 6", "em (e): 5"]  # the best first


@pytest.mark.parametrize("workloads", [("none", "none"), ("has", "other"), ("has", "none")])
def test_there_is_no_picture_without_a_curve_in_common(
    workloads: Sequence[str], book: Book, tmp_path: Path
) -> None:
    for run, workload in zip("ab", workloads, strict=True):
        book.add(run, [1.0, 2.0], workload=workload)
    assert of_runs(book, ["a", "b"], tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()


def test_values_that_are_no_numbers_leave_gaps(book: Book, tmp_path: Path, drawn: list[Figure]) -> None:
    book.add("a", [-math.inf, 2.0, math.nan])
    book.add("b", [math.nan, math.nan])
    book.add("c", [])
    assert of_runs(book, ["a", "b", "c"], tmp_path / "curves.png") is not None
    assert legend(drawn[0]) == ["rule (a): 2"]
    assert of_runs(book, ["b", "c"], tmp_path / "nothing.png") is None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_where_one_line_squeezes_the_others_their_ends_are_shown_again(
    mode: Any, book: Book, tmp_path: Path
) -> None:
    sign = 1.0 if mode == "max" else -1.0
    ends = {"good": -1.0, "better": -0.8, "worse": -1.2, "far": -90.0}
    steps = np.arange(1.0, 11.0)
    given = {
        name: learning_curves.Points(steps, steps / 2, *([sign * (end - 50.0 / steps**3)] * 3))
        for name, end in ends.items()
    }
    figure = learning_curves.figure(given, CURVE._replace(mode=mode))
    whole, _, near, _ = figure.axes
    low, high = whole.get_ylim()
    assert all(low < value < high for points in given.values() for value in points.mean)
    assert abs(np.diff(near.get_ylim())[0]) < (high - low) / learning_curves.SQUEEZED
    low, high = near.get_ylim()
    shown = [name for name, points in given.items() if low < points.mean[-1] < high]
    assert shown == ["good", "better", "worse"]
    assert legend(figure)[0].startswith("better")
    del given["far"], given["worse"]
    alike = {name: points._replace(mean=points.mean[-2:], steps=steps[-2:]) for name, points in given.items()}
    ranges = {name: p._replace(least=p.mean, largest=p.mean) for name, p in alike.items()}
    short = {name: p._replace(seconds=p.steps / 2) for name, p in ranges.items()}
    assert len(learning_curves.figure(short, CURVE._replace(mode=mode)).axes) == 2


def test_a_sweep_has_the_best_cell_of_each_group(book: Book, tmp_path: Path, drawn: list[Figure]) -> None:
    space = {
        "rule.name": {"grid": ["em", "anemone", "adam"]},
        "rule.step_size": {"grid": [0.1, 0.4], "when": {"rule.name": ["anemone", "em"]}},
        "seed": {"repeats": 2},
    }
    given = section(space, metric="best/score", mode="max", searcher="grid", trials=10)
    trials = [
        trial(0, 3.0, cell=0, seed=0, rule__name="adam"),
        trial(1, 4.0, cell=0, seed=1, rule__name="adam"),
        trial(2, 1.0, cell=1, rule__name="anemone", rule__step_size=0.1),
        trial(3, 5.0, cell=2, seed=0, rule__name="anemone", rule__step_size=0.4),
        trial(4, 7.0, cell=2, seed=1, rule__name="anemone", rule__step_size=0.4),
        trial(5, None, cell=3, outcome="failed", rule__name="em", rule__step_size=0.1),
    ]
    for each in trials:
        book.add(each.run_id, [0.0, each.value or 0.0])
    path = tmp_path / "curves.png"
    assert learning_curves.of_sweep(cast(Ledger, book), trials, given, path) == path
    assert lines(drawn[0]) == {
        "anemone step_size 0.4": ([1.0, 2.0], [0.5, 1.0], [0.0, 6.0]),
        "adam": ([1.0, 2.0], [0.5, 1.0], [0.0, 3.5]),
    }
    given_up = [*trials[:3], trials[3], trial(4, None, cell=2, seed=1, outcome="failed"), trials[5]]
    learning_curves.of_sweep(cast(Ledger, book), given_up, given, path)  # the best seed is one that is left
    assert "anemone step_size 0.1" in lines(drawn[1])
    assert "means of 1 to 2 runs" in drawn[1].get_suptitle()
    assert learning_curves.of_sweep(cast(Ledger, book), trials[5:], given, tmp_path / "none.png") is None


def test_nothing_covers_anything(book: Book, tmp_path: Path, drawn: list[Figure]) -> None:
    for number in range(20):
        values = [-100.0 / step - 40.0 * (number == 3) - number for step in range(1, 200)]
        book.add(f"run-{number}", values, step_size=number / 20.0)
    of_runs(book, [f"run-{number}" for number in range(20)], tmp_path / "curves.png")
    (figure,) = drawn
    figure.set_dpi(130)
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    boxes = [axis.get_tightbbox() for axis in figure.axes] + [figure.legends[0].get_window_extent()]
    for place, box in enumerate(boxes):
        assert box is not None
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -1.0
        assert not any(box.overlaps(other) for other in boxes[place + 1 :] if other is not None)
