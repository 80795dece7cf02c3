"""Pictures of a sweep: what is drawn, and that nothing covers anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from tests.platform.test_comparison import section, trial
from tests.platform.test_thresholds import bisected, bisection, converged

from piste import sweep_pictures
from piste.comparison import cells
from piste.ledger.tables import TrialRecord
from piste.space import Sweep
from piste.thresholds import clopper_pearson

NAMES = [f"optimizer_{i}" for i in range(19)] + ["some.package.with.a.LongName"]
SPACE = {
    "optimizer.name": {"choice": NAMES},
    "optimizer.lr": {"log_uniform": [1e-4, 1e-1]},
    "model.layers": {"int": [1, 12]},
    "optimizer.betas": {"choice": [[0.9, 0.95], [0.9, 0.999]]},
    "optimizer.momentum": {"normal": [0.0, 1.0], "when": {"model.layers": [1, 2, 3]}},
    "optimizer.decay": {"choice": [0.1]},
}
PICTURES = ["parallel_coordinates", "importances", "best_so_far", "time_to_target", "parameters"]


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


def recipe(**table: Any) -> Sweep:
    return section(SPACE, **({"target": 0.1} | table))


def swept(count: int = 200, sign: float = 1.0) -> list[TrialRecord]:
    """One trial a cell; above a step size of 0.05 all diverge."""
    generator, made = np.random.default_rng(0), []
    for n in range(count):
        layers, lr = int(generator.integers(1, 13)), float(10.0 ** generator.uniform(-4.0, -1.0))
        searched: dict[str, Any] = {"optimizer__betas": [[0.9, 0.95], [0.9, 0.999]][n % 2]}
        if layers <= 3:
            searched["optimizer__momentum"] = float(generator.normal())
        value = sign * (math.log10(lr) + 2.0) ** 2 if lr < 0.05 else [math.nan, math.inf][n % 2]
        made.append(
            trial(
                n, value, seconds=2.0, optimizer__name=NAMES[n % 20], optimizer__lr=lr, model__layers=layers,
                optimizer__decay=0.1, **searched,
            )
        )  # fmt: skip
    return made


def texts(axis: Axes) -> list[Text]:
    """What is written on an axis and beside it, and can be seen."""
    labels = [
        *axis.get_xticklabels(),
        *axis.get_yticklabels(),
        axis.xaxis.label,
        axis.yaxis.label,
        axis.title,
    ]
    ends = (*axis.get_xlim(), *axis.get_ylim())
    places = [label.get_position() for label in labels]
    inside = [
        label for label, (x, y) in zip(labels, places, strict=True)
        if label not in axis.get_xticklabels() or min(ends[:2]) <= x <= max(ends[:2])
        if label not in axis.get_yticklabels() or min(ends[2:]) <= y <= max(ends[2:])
    ]  # fmt: skip
    return [label for label in [*inside, *axis.texts] if label.get_visible() and label.get_text()]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("name", PICTURES)
def test_twenty_groups_make_a_readable_picture(
    name: str, mode: str, tmp_path: Path, drawn: list[Figure]
) -> None:
    path = tmp_path / "new" / f"{name}.png"
    trials = swept(sign=1.0 if mode == "min" else -1.0)
    assert getattr(sweep_pictures, name)(trials, recipe(mode=mode, target=0.1), path) == path
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    figure.set_dpi(130)  # as it was saved
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    for axis in figure.axes:
        boxes = []
        for text in texts(axis):
            box = text.get_window_extent()
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -1.0, text
            if text.get_rotation() == 0.0:
                boxes.append((text.get_text(), box))
        for i, (first, a) in enumerate(boxes):
            assert not [second for second, b in boxes[i + 1 :] if a.overlaps(b)], first


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    "trials",
    [[], [trial(n, None, outcome=None) for n in range(9)], [trial(0, math.nan, optimizer__name="a")]],
)
def test_where_there_is_nothing_to_draw_there_is_no_file(
    name: str, trials: list[TrialRecord], tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    given = recipe(target=None)
    assert getattr(sweep_pictures, name)(trials, given, path) is None
    assert sweep_pictures.thresholds(trials, given, path, converged) is None
    assert not path.exists()


def test_parallel_coordinates_have_a_line_a_cell(tmp_path: Path, drawn: list[Figure]) -> None:
    trials = swept(40)
    sweep_pictures.parallel_coordinates(trials, recipe(), tmp_path / "p.png")
    (axis,) = drawn[0].axes
    grey, good = (c for c in axis.collections if isinstance(c, LineCollection))
    found = cells(trials, "min")
    lost = [c for c in found if c.failed]
    assert (len(grey.get_segments()), len(good.get_segments())) == (len(lost), len(found) - len(lost))
    assert np.asarray(grey.get_edgecolor())[0, :3] == pytest.approx(to_rgba("0.7")[:3])
    best = good.get_segments()[-1]  # on top of all others
    searched = found[0].values
    expected = [
        NAMES.index(searched["optimizer.name"]) / 19.0,
        (math.log10(searched["optimizer.lr"]) + 4.0) / 3.0,
        (searched["model.layers"] - 1) / 11.0,
        float(searched["optimizer.betas"] == [0.9, 0.999]),
    ]
    assert best[:4, 1] == pytest.approx(expected)
    absent = [line[4, 1] for line in good.get_segments() if line[4, 1] < 0.0]
    assert len(absent) == sum("optimizer.momentum" not in c.values for c in found if not c.failed)
    ends = [line[-1, 1] for line in good.get_segments()]
    assert ends == sorted(ends, reverse=True)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["optimizer", "lr", "layers", "betas", "momentum", "valid/loss"]  # decay is constant


def test_of_many_cells_a_part_is_drawn_with_the_best(tmp_path: Path, drawn: list[Figure]) -> None:
    trials = swept(2500)
    sweep_pictures.parallel_coordinates(trials, recipe(), tmp_path / "p.png")
    sweep_pictures.best_so_far(trials, recipe(), tmp_path / "b.png")
    axis = drawn[0].axes[0]
    lines = [c.get_segments() for c in axis.collections if isinstance(c, LineCollection)]
    assert sum(map(len, lines)) == 834  # every third
    assert axis.get_title().startswith("834 of 2500 cells, ")
    best = cells(trials, "min")[0].values["optimizer.lr"]
    assert lines[1][-1][1, 1] == pytest.approx((math.log10(best) + 4.0) / 3.0)
    assert drawn[1].axes[0].get_xscale() == "linear"  # 125 trials a group
    one = [t._replace(values={**t.values, "optimizer.name": NAMES[0]}) for t in trials]
    sweep_pictures.best_so_far(one, recipe(), tmp_path / "b.png")
    assert [axis.get_xscale() for axis in drawn[2].axes] == ["log", "log"]
    sweep_pictures.best_so_far([t._replace(seconds=0.0) for t in one], recipe(), tmp_path / "b.png")
    assert [axis.get_xscale() for axis in drawn[3].axes] == ["log", "linear"]


def test_parameters_have_a_dot_a_cell_and_a_cross_where_it_was_lost(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    trials = swept(60)
    sweep_pictures.parameters(trials, recipe(), tmp_path / "p.png")
    panel = next(axis for axis in drawn[0].axes if axis.get_xlabel() == "lr")
    dots = [c for c in panel.collections if isinstance(c, PathCollection)]
    places = np.concatenate([np.asarray(c.get_offsets()) for c in dots])
    inside = places[(places[:, 1] >= 0.0) & (places[:, 1] <= 1.0)]
    lost = sorted(t.values["optimizer.lr"] for t in trials if not math.isfinite(t.value or 0.0))
    assert panel.get_xscale() == "log"
    assert sorted(places[places[:, 1] > 1.0][:, 0]) == pytest.approx(lost)
    assert len(inside) + len(lost) == 60
    # the objective falls towards a step size of 0.01
    lowest = inside[np.argmin(inside[:, 1]), 0]
    assert abs(math.log10(lowest) + 2.0) == min(abs(math.log10(x) + 2.0) for x in inside[:, 0])


def test_an_objective_that_explodes_does_not_squeeze_the_others(tmp_path: Path, drawn: list[Figure]) -> None:
    trials = [t._replace(value=1e300) if t.number % 25 == 0 else t for t in swept(100)]
    for name in PICTURES:
        getattr(sweep_pictures, name)(trials, recipe(), tmp_path / f"{name}.png")
    (axis,) = drawn[0].axes
    good = axis.collections[1]
    assert isinstance(good, LineCollection)
    assert np.ptp([line[-1, 1] for line in good.get_segments()[4:]]) > 0.5


def steps(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}  # type: ignore[arg-type]


def test_curves_are_those_of_each_group(tmp_path: Path, drawn: list[Figure]) -> None:
    made = [("adamw", 3.0), ("reg", 5.0), ("adamw", 4.0), ("reg", math.nan), ("adamw", 1.0), ("reg", 2.0)]
    trials = [trial(n, v, seconds=1.0 + n, optimizer__name=name) for n, (name, v) in enumerate(made)]
    given = section(target=2.0)
    sweep_pictures.best_so_far(trials, given, tmp_path / "a.png")
    sweep_pictures.time_to_target(trials, given, tmp_path / "b.png")
    best, reached = ([steps(axis) for axis in figure.axes] for figure in drawn)
    assert best[0]["adamw"] == ([1, 2, 3], [3.0, 3.0, 1.0])
    assert best[1]["adamw"] == ([1.0, 4.0, 9.0], [3.0, 3.0, 1.0])
    assert best[1]["reg"] == ([2.0, 6.0, 12.0], [5.0, 5.0, 2.0])
    assert reached[0]["adamw"] == ([0, 1, 2, 3], [0.0, 0.0, 0.0, pytest.approx(1 / 3)])
    assert reached[1]["reg"] == ([0.0, 2.0, 6.0, 12.0], [0.0, 0.0, 0.0, pytest.approx(1 / 3)])


def test_importances_are_bars_and_say_what_is_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    sweep_pictures.importances(swept(), recipe(), tmp_path / "i.png")
    (axis,) = drawn[0].axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    lengths = [bar.get_width() for bar in axis.patches if isinstance(bar, Rectangle)]
    assert names[0] == "lr"
    assert lengths == sorted(lengths, reverse=True)
    assert sum(lengths) == pytest.approx(1.0)
    assert axis.get_xlabel() == "left out: momentum (not in every trial), decay (one value alone)"


def test_thresholds_have_a_panel_a_stratum_and_a_shaded_bracket(tmp_path: Path, drawn: list[Figure]) -> None:
    probes = {1e-4: [True] * 3, 1e-2: [True, False, True], 0.1: [False] * 3, 1.0: [False] * 3}
    given = bisection({"log_uniform": [1e-4, 1.0]})
    trials = bisected(probes) + bisected({1e-4: [True], 1.0: [True]}, "reg")
    path = tmp_path / "t.png"
    assert sweep_pictures.thresholds(trials, given, path, converged) == path
    first, second = drawn[0].axes
    assert first.get_title(loc="left") == "optimizer adamw: edge at 0.03162"
    assert second.get_title(loc="left") == "optimizer reg: no edge"
    (shade,) = first.patches
    assert isinstance(shade, Rectangle)
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((1e-2, 0.1))
    assert not second.patches
    (bars,) = (c for c in first.collections if isinstance(c, LineCollection))
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [pytest.approx(clopper_pearson(k, 3)) for k in (3, 2, 0, 0)]
    assert first.get_xscale() == "log"
