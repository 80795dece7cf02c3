"""What the MLflow runs of a sweep are called and say: names, tags, the description, the table, the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from piste.comparison import Cell
from piste.ledger import Sweep as SweepRow
from piste.ledger import TrialRecord
from piste.reporting import cell, comparison_url
from piste.space import Sweep
from piste.sweep_tables import headings
from piste.tracking import metric_name, view_page

SWEEP, CELL, TRIAL = "piste.sweep_id", "piste.sweep_cell", "piste.trial"
LONGEST = 8_000  # characters of a tag's value
COMPARED = 75  # runs of MLflow's comparison page: two such addresses fit into a description


def about(sweep: SweepRow) -> str:
    """What a sweep is, in a sentence."""
    searched = ", ".join(sweep.config["sweep"]["space"])
    return f"A sweep of **{sweep.workload}** over {searched}: `piste compare --sweep {sweep.id}`."


def sweep_tags(sweep: SweepRow) -> dict[str, str]:
    """What identifies and describes a sweep in MLflow."""
    origin = sweep.provenance
    named = {
        SWEEP: sweep.id,
        "piste.kind": "sweep",
        "piste.recipe": sweep.recipe,
        "piste.workload": sweep.workload,
        "piste.code_version": origin.get("code_version", ""),
        "piste.data_hash": origin.get("data_hash", ""),
        "piste.command": origin.get("command", ""),
        "mlflow.source.git.commit": origin.get("git", {}).get("commit", ""),
        "mlflow.note.content": about(sweep),
    }
    named |= {f"version.{name}": version for name, version in origin.get("libraries", {}).items()}
    return {key: value[:5000] for key, value in named.items() if value}


def note(
    sweep: SweepRow,
    section: Sweep,
    ranked: Sequence[Cell],
    trials: Mapping[int, Sequence[str]],
    cells: Mapping[int, str],
    experiment: str,
) -> str:
    """The description of a sweep's MLflow run: its best cell, and where its trials are compared.

    Args:
        sweep: The sweep.
        section: Its `[sweep]`.
        ranked: Its cells that have an objective, best first.
        trials: The MLflow runs of each cell's finished trials.
        cells: The MLflow run of each cell that has one.
        experiment: MLflow's id of the experiment.
    """
    said = []
    if ranked:
        best = ranked[0]
        of = f", the mean of {best.n} seeds," if section.repeats > 1 else ""
        point = ", ".join(f"{key} {cell(value)}" for key, value in best.values.items())
        said.append(f"Best {section.metric}: **{cell(best.mean)}**{of} at {point or 'the only point'}.")
        # MLflow compares by the metrics that all runs have: no failed ones.
        runs = [run for one in ranked for run in trials.get(one.number, ())][:COMPARED]
        means = [cells[one.number] for one in ranked if one.number in cells][:COMPARED]
        links = [f"[all trials](#{view_page(experiment, sweep.id)})"]
        for text, shown in ((f"the best {len(runs)} trials", runs), (f"the best {len(means)} cells", means)):
            if len(shown) > 1:
                links.append(f"[{text}]({comparison_url('', experiment, shown).removeprefix('/')})")
        said.append(f"Compare {', '.join(links)}.")
    return "\n\n".join([*said, about(sweep)])


def title(trial: TrialRecord, seed: bool | None = None) -> str:
    """What a reader of MLflow's list of runs tells it by; `seed` None: a cell."""
    names, said = headings(list(trial.values)), []
    for key, value in trial.values.items():
        short = f"{value:.3g}" if isinstance(value, float) else str(value)
        said.append(short if isinstance(value, str) else f"{names[key]} {short}")
    if seed is None:
        return " ".join([*said, f"(cell {trial.cell})"])
    return " ".join([*said, *([f"seed {trial.seed}"] if seed else []), f"(trial {trial.number})"])


def table(trials: Sequence[TrialRecord]) -> Any:  # pyarrow.Table
    """One row a trial: its values, its seed, what came of it."""
    import pyarrow  # type: ignore[import-untyped]

    keys = dict.fromkeys(key for trial in trials for key in trial.values)
    columns: dict[str, list[Any]] = {"trial": [t.number for t in trials], "cell": [t.cell for t in trials]}
    columns |= {key: [t.values.get(key) for t in trials] for key in keys}
    columns |= {"seed": [t.seed for t in trials], "outcome": [t.outcome for t in trials]}
    columns |= {"objective": [t.value for t in trials], "step": [t.step for t in trials]}
    columns |= {"seconds": [t.seconds for t in trials], "reused": [t.reused for t in trials]}
    columns["run"] = [t.run_id for t in trials]
    made = {}
    for name, values in columns.items():
        try:
            made[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # a choice between numbers and words
            made[name] = pyarrow.array([None if value is None else str(value) for value in values])
    return pyarrow.table(made)


def plain(value: Any) -> Any:
    """A value as JSON has it: no NaN, no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def view(sweep_id: str, section: Sweep) -> dict[str, Any]:
    """How MLflow lays out a sweep's trials: best first, what differs as columns, charts of the objective.

    This is MLflow's own format of a shared view: the query of its list of runs and the state of its page.
    """
    several = {k: e for k, e in section.entries.items() if e.finite is None or len(e.finite) > 1}
    numeric = [k for k, e in several.items() if e.finite is None or e.integer is not None]
    seed = ["seed"] if section.repeats > 1 else []
    metric = {"key": metric_name(section.metric), "type": "METRIC"}
    charts: list[dict[str, Any]] = [
        {"type": "PARALLEL", "selectedParams": list(several)[:8], "selectedMetrics": [metric["key"]]},
        {"type": "BAR", "metricKey": metric["key"], "isGenerated": True},
    ]
    axes = [{"key": key, "type": "PARAM"} for key in numeric]
    charts += [{"type": "SCATTER", "xaxis": axis, "yaxis": metric} for axis in axes[:4]]
    charts += [{"type": "CONTOUR", "xaxis": axes[0], "yaxis": axis, "zaxis": metric} for axis in axes[1:2]]
    usual = {
        "isGenerated": False,
        "deleted": False,
        "metricSectionId": "objective",
        "runsCountToCompare": 100,
    }
    titled = {"uuid": "objective", "name": f"{section.metric} of all trials", "display": True, "columns": 2}
    return {
        "searchFilter": f"tags.`{SWEEP}` = '{sweep_id}' and tags.`piste.kind` = 'trial'",
        "orderByKey": f"metrics.`{metric['key']}`",
        "orderByAsc": section.mode == "min",
        "selectedColumns": [
            "attributes.`Duration`",
            f"metrics.`{metric['key']}`",
            *(f"params.`{key}`" for key in [*list(several)[:20], *seed]),
        ],
        "runsHiddenMode": "SHOWALL",
        "isAccordionReordered": True,  # MLflow's own sections come behind
        "compareRunSections": [{**titled, "isReordered": False, "deleted": False, "isGenerated": False}],
        "compareRunCharts": [
            {**usual, "uuid": f"chart-{n}", "showAllRuns": True, **chart} for n, chart in enumerate(charts)
        ],
    }
