"""Studies: what a paper claims, measured and judged.

A study is a module with

    claims = (Claim(...), ...)              # each asks the `Lab` for the runs and sweeps that it needs
    scales = {"small": ..., "full": ...}    # optional: what `lab.scale` is; the first is the usual one
    pictures = {"text": lines, ...}         # optional: learning curves; `lines(lab)`: by label a line's runs

A claim asks for as much as it likes: what has been computed already, by another claim, another study or a
person, is found in the ledger by its identity. A claim whose runs fail is inconclusive, and says why.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from piste import catalog, learning_curves, provenance, running, sweeping
from piste.errors import BadInput, PisteError, Terminated, nearest
from piste.home import home, keep
from piste.ledger import TrialRecord, open_ledger
from piste.verdicts import Budget, Direction, Estimate, Outcome, Verdict, decide, estimate, report, rows
from piste.verdicts import failed as failed
from piste.verdicts import table as table

Point = tuple[Any, ...]
Lines = Mapping[str, Sequence[running.RunResult]]  # by label, the runs of a line: one a seed
_NOTHING = Estimate(math.nan, -math.inf, math.inf)


@dataclass(frozen=True)
class Claim:
    """What is claimed, and how it is measured.

    Attributes:
        id: Its name within the study.
        sentence: What is claimed.
        source: Where in the paper, or whose reading of it.
        threshold: What bounds the figure.
        direction: Whether the figure is claimed to be below or above it.
        expectation: The outcome that is on record; `piste study` fails where another one comes out.
        measure: Gives samples, one an independent repetition (a seed), or a ready estimate.
        paper_figure: The paper's own figure; None: not stated, or not known here.
        unit: Of the figure; empty: a ratio.
        note: Why the expectation is what it is.
    """

    id: str
    sentence: str
    source: str
    threshold: float
    direction: Direction
    expectation: Outcome
    measure: Callable[[Lab], Sequence[float] | Estimate]
    paper_figure: float | None = None
    unit: str = ""
    note: str = ""


class Lab:
    """What a claim can ask for; the same thing is computed once.

    Attributes:
        scale: The study's entry of `scales`.
    """

    def __init__(
        self,
        scale: Any = None,
        *,
        local: bool = False,
        fresh: bool = False,
        observer: running.Observer | None = None,
        sweep_observer: sweeping.SweepObserver | None = None,
    ) -> None:
        self.scale = scale
        self._how: dict[str, Any] = {"local": local, "fresh": fresh}
        self._observer = observer
        self._sweep_observer = sweep_observer
        self._known: dict[str, Any] = {}
        self._ray = ExitStack()
        self._runs: dict[str, str] = {}  # the runs that the claim at hand rests on: id -> metric
        self._seconds = 0.0  # of its measurements

    def run(self, recipe: str | Path, metric: str, **overrides: Any) -> running.RunResult:
        """A finished run of a recipe.

        Args:
            recipe: As for `piste.run`.
            metric: What it is wanted for.
            **overrides: As for `piste.run`.
        """

        def compute() -> running.RunResult:
            self._start_ray(recipe, overrides)
            return reuse_or_run(recipe, metric, **self._how, observer=self._observer, **overrides)

        found: running.RunResult = self._once(["run", str(recipe), metric, overrides], compute)
        self._runs[found.id] = metric
        return found

    def runs(self, recipe: str | Path, metric: str, seeds: int, **overrides: Any) -> list[running.RunResult]:
        """As `run`, for several seeds, from the recipe's own upwards; computed as one sweep."""
        trials = self._trials(recipe, metric, {}, seeds, overrides)
        return [running.result(open_ledger(), trial.run_id) for trial in trials]

    def grid(
        self,
        recipe: str | Path,
        metric: str,
        space: Mapping[str, Sequence[Any]],
        seeds: int = 1,
        **overrides: Any,
    ) -> dict[Point, list[float]]:
        """The last value of a metric at every point of a grid, one a seed.

        Args:
            recipe: As for `piste.run`.
            metric: The metric.
            space: Dotted keys and their values.
            seeds: How many, from the recipe's own upwards.
            **overrides: As for `piste.run`.

        Returns:
            For each point, its values in the order of `space`, the metric in the order of the seeds; NaN
            is infinite (a loss that diverged).

        Raises:
            PisteError: A trial has failed.
        """
        found: dict[Point, list[float]] = {}
        for trial in self._trials(recipe, metric, space, seeds, overrides):
            value = math.nan if trial.value is None else trial.value
            point = tuple(trial.values[name] for name in space)
            found.setdefault(point, []).append(math.inf if math.isnan(value) else value)
        return found

    def _trials(
        self,
        recipe: str | Path,
        metric: str,
        space: Mapping[str, Sequence[Any]],
        seeds: int,
        overrides: Mapping[str, Any],
    ) -> list[TrialRecord]:
        def compute() -> list[TrialRecord]:
            self._start_ray(recipe, overrides)
            entries: dict[str, Any] = {key: {"grid": list(values)} for key, values in space.items()}
            entries["seed"] = {"repeats": seeds}
            section = {"metric": metric, "searcher": "grid", "space": entries}
            shown = self._sweep_observer
            swept = sweeping.sweep(recipe, observer=shown, sweep=section, **self._how, **overrides)
            if swept.status == "interrupted":
                raise Terminated
            for trial in swept.trials:
                if trial.status != "finished":  # a run that ends with a loss that is no number has
                    raise PisteError(f"trial {trial.number} of {swept.id} {trial.status}: {trial.error}")
            return swept.trials

        key = ["grid", str(recipe), metric, dict(space), seeds, overrides]
        trials: list[TrialRecord] = self._once(key, compute)
        self._runs |= {trial.run_id: metric for trial in trials}
        return trials

    def measured(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """What a function of a study returns, kept under the version of the code and its arguments.

        Args:
            function: Returns what JSON can hold.
            **arguments: What it is called with.
        """
        package = function.__module__.partition(".")[0]
        code = provenance.code_version({package, "piste_algorithms"})
        name = f"{function.__module__}.{function.__qualname__}"
        key = json.dumps([name, arguments, code], sort_keys=True, default=str)
        path = home() / "studies" / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

        def compute() -> dict[str, Any]:
            if path.exists() and not self._how["fresh"]:
                kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
                return kept
            began = time.perf_counter()
            value = function(**arguments)
            made = {"function": name, "value": value, "seconds": time.perf_counter() - began}
            keep(path, json.dumps(made))
            return made

        found = self._once(["measured", key], compute)
        self._seconds += found["seconds"]
        return found["value"]

    def close(self) -> None:
        """Ends what was started."""
        self._ray.close()

    def spent(self) -> tuple[Budget, tuple[str, ...]]:
        """What was asked for since the last call."""
        runs, seconds = self._runs, self._seconds
        self._runs, self._seconds = {}, 0.0
        if not runs:
            return Budget(0, 0, seconds), ()
        ledger = open_ledger()
        last = [ledger.sweeps.objective([i for i in runs if runs[i] == m], m) for m in set(runs.values())]
        steps = sum(step for found in last for step, _ in found.values())
        seconds += sum(ledger.run(run_id).seconds for run_id in runs)
        return Budget(len(runs), steps, seconds), tuple(sorted(runs))

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        text = json.dumps(key, sort_keys=True, default=str)
        if text not in self._known:
            try:
                self._known[text] = compute()
            except Exception as error:  # what one claim has broken, another need not break again
                self._known[text] = error
        found = self._known[text]
        if isinstance(found, Exception):
            raise found
        return found

    def _start_ray(self, recipe: str | Path, overrides: Mapping[str, Any]) -> None:
        """One Ray for all that is asked for."""
        if not self._how["local"]:
            from piste.training import cluster

            config = running.load_recipe(recipe, {k.replace("__", "."): v for k, v in overrides.items()})
            self._ray.enter_context(cluster(config.resources))


def reuse_or_run(
    recipe: str | Path,
    metric: str,
    *,
    local: bool = False,
    fresh: bool = False,
    observer: running.Observer | None = None,
    **overrides: Any,
) -> running.RunResult:
    """The newest finished run that is the same, or a new one.

    Args:
        recipe: As for `piste.run`.
        metric: What the run must have.
        local: As for `piste.run`.
        fresh: Run it whatever there is.
        observer: As for `piste.run`.
        **overrides: As for `piste.run`.

    Raises:
        BadInput: As `piste.run`.
        PisteError: The run failed, or has no such metric.
    """
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config = running.load_recipe(recipe, dotted | (running.ONE_WORKER if local else {}))
    ledger = open_ledger()
    if not fresh:
        identity, _ = provenance.identify(config.model_dump(mode="json"), *running.origin(config))
        if same := ledger.sweeps.reusable([identity], metric):
            return running.result(ledger, same[identity][0])
    run_id = running.plan(ledger, Path(recipe).stem, config)
    made = running.execute(ledger, run_id, local=local, observer=observer)
    if made.status == "interrupted":
        raise Terminated
    if metric not in made.metrics:
        raise PisteError(f"{made.id} has no metric {metric!r}{nearest(metric, made.metrics)}")
    return made


def load_study(name: str) -> ModuleType:
    """Imports a study by name or dotted path.

    Raises:
        BadInput: It is unknown, or declares no claims.
    """
    path = name if "." in name else catalog.find("studies", name).module
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise BadInput(f"study {name!r} cannot be imported: no module named {error.name!r}") from None
    if not getattr(module, "claims", ()):
        raise BadInput(f"study {name!r}: {module.__name__} declares no claims")
    return module


def study(
    name: str,
    *,
    local: bool = False,
    fresh: bool = False,
    observer: running.Observer | None = None,
    sweep_observer: sweeping.SweepObserver | None = None,
    scale: str | None = None,
) -> list[Verdict]:
    """Measures and judges all claims of a study.

    The verdicts are kept in `studies/NAME.json` and `studies/NAME.txt` of the home folder, a picture in
    `studies/NAME-PICTURE.png`.

    Args:
        name: The study's name, or the dotted path of its module.
        local: In this process, without Ray.
        fresh: Compute everything again, also what the ledger has.
        observer: Shows the progress of single runs.
        sweep_observer: Shows the progress of sweeps.
        scale: One of the study's `scales`; None: its first.

    Raises:
        BadInput: There is no such study or scale.
    """
    module = load_study(name)
    scales: Mapping[str, Any] = getattr(module, "scales", {"small": None})
    chosen = next(iter(scales)) if scale is None else scale
    if chosen not in scales:
        raise BadInput(f"study {name!r} has no scale {chosen!r}{nearest(chosen, scales)}")
    lab = Lab(scales[chosen], local=local, fresh=fresh, observer=observer, sweep_observer=sweep_observer)
    try:
        verdicts = [_judge(claim, lab) for claim in module.claims]
        kept = {"study": name, "scale": chosen, "created": time.time(), "verdicts": rows(verdicts)}
        said = report(name, chosen, verdicts)
        folder = home() / "studies"
        keep(folder / f"{name}.json", json.dumps(kept, indent=1))
        keep(folder / f"{name}.txt", said)
        drawn = _draw(name, getattr(module, "pictures", {}), lab)
        keep(folder / f"{name}.txt", said + "".join(f"\n{line}" for line in drawn))
    finally:
        lab.close()
    return verdicts


def _draw(name: str, pictures: Mapping[str, Callable[[Lab], Lines]], lab: Lab) -> list[str]:
    """Draws the learning curves of a study; a line for its report of each."""
    said = []
    for picture, lines in pictures.items():
        path = home() / "studies" / f"{name}-{picture}.png"
        path.unlink(missing_ok=True)  # that of an earlier measurement
        try:
            found = {label: [run.id for run in runs] for label, runs in lines(lab).items()}
            drawn = learning_curves.draw(open_ledger(), found, path)
            said.append(f"Learning curves: {path.name}" if drawn else f"{path.name}: nothing to draw")
        except (PisteError, OSError) as error:  # runs that failed; the claims that rest on them say so, too
            said.append(f"{path.name}: not drawn: {error}")
    return [f"{line}\n" for line in said]


def _judge(claim: Claim, lab: Lab) -> Verdict:
    found, how = _NOTHING, ""
    samples: tuple[float, ...] = ()
    try:
        measured = claim.measure(lab)
        samples = () if isinstance(measured, Estimate) else tuple(map(float, measured))
        found = measured if isinstance(measured, Estimate) else estimate(samples)
    except Exception as error:  # whatever a claim's own code or its runs raise: the other claims go on
        keep(home() / "studies" / f"error-{claim.id}.txt", traceback.format_exc())
        kind = "" if isinstance(error, PisteError) else f"{type(error).__name__}: "
        how = f"not measured: {kind}{str(error).strip().partition(chr(10))[0]}"
    outcome = decide((found.low, found.high), claim.threshold, claim.direction)
    budget, runs = lab.spent()
    said = {f.name: getattr(claim, f.name) for f in fields(claim) if f.name not in {"id", "measure"}}
    return Verdict(
        claim=claim.id,
        **said,
        outcome=outcome,
        figure=found.figure,
        interval=(found.low, found.high),
        samples=samples,
        budget=budget,
        runs=runs,
        how=how or _explain(claim, samples, outcome),
        broken=bool(how),
    )


def _explain(claim: Claim, samples: Sequence[float], outcome: Outcome) -> str:
    diverged = sum(not math.isfinite(sample) for sample in samples)
    if 0 < diverged < len(samples):
        return f"{diverged} of {len(samples)} samples are not finite: they have no interval"
    if len(samples) == 1:
        return "one sample has no interval"
    other = "above" if claim.direction == "below" else "below"
    sides = {"supported": claim.direction, "refuted": other, "inconclusive": "on both sides of"}
    mean = f"the mean of {len(samples)} samples" if samples else "the estimate"
    return f"the 95 % interval of {mean} is {sides[outcome]} {claim.threshold:g}"
