"""Tables of a sweep: what they show, and that they fit."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType
from tests.platform.test_comparison import section, trial
from tests.platform.test_thresholds import bisected, bisection, converged

from piste.ledger.tables import TrialRecord
from piste.reporting import cell
from piste.sweep_tables import (
    cells_table,
    comparison_rows,
    group_rows,
    groups_table,
    headings,
    threshold_rows,
    thresholds_table,
    unequal,
)
from piste.thresholds import thresholds

SPACE = {
    "optimizer.name": {"choice": ["adamw", "muon", "reg"]},
    "optimizer.lr": {"log_uniform": [1e-5, 1.0]},
    "optimizer.momentum": {"uniform": [0.0, 1.0], "when": {"optimizer.name": ["muon", "reg"]}},
    "model.width": {"choice": [64]},
}


def swept() -> list[TrialRecord]:
    """30 cells of three seeds: the later the worse, muon never seeded whole, every third reg diverging."""
    generator, made = np.random.default_rng(0), []
    for number in range(30):
        name = ["adamw", "reg", "reg", "muon"][number % 4]
        searched: dict[str, Any] = {"optimizer__lr": 1.2345678e-05 * 1.37**number, "model__width": 64}
        if name != "adamw":
            searched["optimizer__momentum"] = 0.123456 + number / 50
        for seed in range(3):
            value = 2.0 + 0.1 * number + 0.001 * float(generator.normal())
            lost = (name == "muon" and seed == 0) or (name == "reg" and number % 3 == 0)
            made.append(
                trial(
                    3 * number + seed, math.nan if lost else value, cell=number, seed=seed, seconds=1234.5,
                    optimizer__name=name, **searched,
                )
            )  # fmt: skip
    return made


def shown(renderable: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_rows_are_json_and_say_what_was_computed() -> None:
    recipe = section(SPACE, baseline={"optimizer.name": "adamw"})
    rows = json.loads(json.dumps(comparison_rows(swept(), recipe), allow_nan=False))
    assert len(rows) == 30
    values = {t.number: t.value for t in swept() if t.value is not None}
    best, second = rows[0], next(row for row in rows if row["cell"] == 1)
    assert (best["cell"], best["verdict"], best["difference"]) == (0, "baseline", None)
    assert best["mean"] == pytest.approx(np.mean([values[n] for n in range(3)]))
    assert best["interval"] == pytest.approx(
        [min(values[n] for n in range(3)), max(values[n] for n in range(3))]
    )
    assert second["difference"] == pytest.approx(np.mean([values[3 + n] - values[n] for n in range(3)]))
    low, high = second["difference_interval"]
    assert low < second["difference"] < high
    assert second["p"] < second["p_adjusted"] <= 0.05
    assert (second["n"], second["failed"], second["verdict"]) == (3, 0, "worse")
    lost = next(row for row in rows if row["cell"] == 6)
    assert (lost["n"], lost["failed"], lost["mean"], lost["interval"]) == (0, 3, None, None)


def test_without_a_baseline_every_cell_has_its_distance_from_the_best() -> None:
    rows = comparison_rows(swept(), section(SPACE))
    assert [row["verdict"] for row in rows if row["verdict"] is not None] == ["best", "worse", "worse"]
    assert all(row["difference"] > 0.0 for row in rows[1:] if row["n"])
    assert comparison_rows([], section(SPACE)) == []


def test_the_baseline_is_shown_where_it_is_not_among_the_best() -> None:
    recipe = section(SPACE, baseline={"optimizer.name": "muon"})
    rows = comparison_rows(swept(), recipe, top=5)
    assert [row["cell"] for row in rows] == [0, 1, 2, 4, 5, 3]
    assert rows[-1]["verdict"] == "baseline"


@pytest.mark.parametrize("baseline", [{}, {"optimizer.name": "adamw"}])
def test_the_best_cells_fit_80_columns_with_three_searched_values(baseline: dict[str, Any]) -> None:
    recipe = section(SPACE, baseline=baseline)
    rows = comparison_rows(swept(), recipe, top=20) + comparison_rows(swept(), recipe)[-2:]  # some failed
    text = shown(cells_table(rows, recipe))
    assert "…" not in text
    words = text.split()
    for row in rows:
        for value in (*row["values"].values(), row["mean"], *(row["interval"] or ()), row["difference"]):
            assert value == 64 or cell(value) in words  # whole, on one line
    assert {"optimizer", "lr", "momentum", "n", "mean", "failed"} <= set(words)
    assert "width" not in words  # all have the same


def test_a_verdict_is_said_in_full() -> None:
    trials = [
        trial(3 * c + s, 1.0 + math.sin(7.0 * c + 3.0 * s), cell=c, seed=s, optimizer__name=name)
        for c, name in enumerate(["adamw", "[reg]"])
        for s in range(3)
    ]
    recipe = section({"optimizer.name": {"choice": ["adamw", "[reg]"]}})
    text = shown(cells_table(comparison_rows(trials, recipe), recipe))
    assert "no difference found at n=3" in " ".join(text.split())
    assert "[reg]" in text  # no markup of rich
    assert "failed" not in text


def test_the_groups_say_how_much_tuning_each_got() -> None:
    recipe = section(SPACE)
    rows = group_rows(swept(), recipe)
    assert [(r["group"], r["cells"], r["trials"], r["seconds"]) for r in rows] == [
        ("adamw", 8, 24, 24 * 1234.5), ("reg", 15, 45, 45 * 1234.5), ("muon", 7, 21, 21 * 1234.5)
    ]  # fmt: skip
    assert [r["best"]["cell"] for r in rows] == [0, 1, 3]
    text = shown(groups_table(rows, recipe))
    said = "adamw got 8 cells, reg 15, muon 7: --equal-budgets compares 7 each"
    assert text.splitlines()[-1] == said == unequal(rows)
    assert "29.6 k" in text
    assert "width" not in text
    equal = [row | {"cells": 7} for row in rows]
    assert unequal(equal) is None
    assert "--equal-budgets" not in shown(groups_table(equal, recipe))
    assert unequal([]) is None


def test_a_group_without_an_objective_has_no_best_cell() -> None:
    rows = group_rows([trial(0, None, outcome="failed", optimizer__name="reg")], section())
    assert (rows[0]["group"], rows[0]["best"]) == ("reg", None)
    assert shown(groups_table(rows, section())).splitlines()[1].split() == ["reg", "1", "1", "1", "-", "-"]


def test_thresholds_have_both_sides_of_the_edge() -> None:
    probes = {1.0: [True] * 5, 3.0: [True, True, True, False, True], 4.0: [False] * 5, 9.0: [False] * 5}
    recipe = bisection({"int": [1, 9]})
    trials = bisected(probes) + bisected({1.0: [True], 9.0: [True]}, "reg")
    found = thresholds(trials, recipe, converged)
    first, second = json.loads(json.dumps(threshold_rows(found), allow_nan=False))
    assert (first["threshold"], first["bracket"], second["bracket"]) == (3.5, [3.0, 4.0], None)
    assert first["probes"][1] == {
        "value": 3.0, "converged": 4, "n": 5, "interval": pytest.approx([0.28358, 0.99495], abs=1e-5),
    }  # fmt: skip
    text = shown(thresholds_table(found, recipe))
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["adamw", "3.5", "3", "4", "of", "5", "0.2836", "4", "0", "of", "5", "0"]
    assert lines[2] == ["0.9949", "0.5218"]
    assert lines[3] == ["reg", "no", "edge", "9", "1", "of", "1", "0.025", "-", "-", "-"]


def test_headings_are_short_where_that_is_enough() -> None:
    assert headings(["optimizer.name", "optimizer.lr", "seed"]) == {
        "optimizer.name": "optimizer", "optimizer.lr": "lr", "seed": "seed",
    }  # fmt: skip
    alike = ["optimizer.lr", "optimizer.base.lr", "model.width"]
    assert list(headings(alike).values()) == ["optimizer.lr", "optimizer.base.lr", "width"]
