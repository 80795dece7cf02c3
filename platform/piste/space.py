"""`[sweep]`: what is searched, how, and for how long.

    [sweep.space]
    "optimizer.name"     = { grid = ["adamw", "sgd"] }          # every one, with equal shares of the trials
    "optimizer.lr"       = { log_uniform = [1e-4, 1e-1] }
    "optimizer.momentum" = { uniform = [0.5, 0.99], when = { "optimizer.name" = "sgd" } }
    "train.steps"        = 60                                   # a plain value is set in every trial
    seed                 = { repeats = 3 }                      # each point with three seeds: a cell

A *cell* is a point of the space, a *trial* a cell with a seed: trial `n` of a sweep with `R` repeats is
repeat `n % R` of cell `n // R`. Entries with `grid` cut the space into *strata*; each has a search of its
own, and cell `c` of a space with `G` strata is point `c // G` of stratum `c % G`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from piste.errors import nearest
from piste.section import Section

Scalar = bool | int | float | str
Kind = Literal["choice", "grid", "uniform", "log_uniform", "int", "normal", "repeats"]
Values = dict[str, Any]


def _plain(given: Any) -> Any:
    for part in given if isinstance(given, list | tuple) else (given,):
        if not isinstance(part, Scalar) or (isinstance(part, float) and not math.isfinite(part)):
            raise ValueError("a value is a finite number, text, true or false, or a list of these")
    return given


Value = Annotated[Scalar | tuple[Scalar, ...], BeforeValidator(_plain)]


class Entry(Section):
    """One entry of `[sweep.space]`: exactly one kind, and perhaps a condition."""

    choice: tuple[Value, ...] | None = Field(default=None, min_length=1, description="one of these")
    grid: tuple[Value, ...] | None = Field(default=None, min_length=1, description="every one of these")
    uniform: tuple[float, float] | None = Field(default=None, description="[low, high]")
    log_uniform: tuple[float, float] | None = Field(default=None, description="[low, high], both above 0")
    integer: tuple[int, int] | None = Field(default=None, alias="int", description="[low, high], included")
    normal: tuple[float, float] | None = Field(default=None, description="[mean, standard deviation]")
    repeats: int | None = Field(default=None, ge=1, description="of seed: this many seeds a cell")
    when: dict[str, Value] = Field(
        default={}, description="only where another entry has this value, or one of these"
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, table: Any) -> Any:
        for key in table if isinstance(table, Mapping) else ():
            if key not in {*_KINDS, "when"}:
                raise ValueError(f"unknown key {key!r}{nearest(key, [*_KINDS, 'when'])}")
        return table

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in _KINDS if getattr(self, _FIELD.get(name, name)) is not None]
        if len(given) != 1:
            what = "none is" if not given else f"{' and '.join(given)} are"
            raise ValueError(f"{what} given: use one of {', '.join(_KINDS)}")
        for name in ("uniform", "log_uniform", "integer"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"[{bounds[0]}, {bounds[1]}]: the lower end comes first")
        if self.log_uniform is not None and self.log_uniform[0] <= 0.0:
            raise ValueError(f"log_uniform begins at {self.log_uniform[0]}: both ends are above 0")
        if self.normal is not None and self.normal[1] <= 0.0:
            raise ValueError(f"the standard deviation {self.normal[1]} must be above 0")
        if self.repeats is not None and self.when:
            raise ValueError("repeats has no condition")
        listed = self.grid or self.choice or ()
        if twice := [value for place, value in enumerate(listed) if value in listed[:place]]:
            raise ValueError(f"{twice[0]!r} is given twice")
        return self

    @property
    def kind(self) -> Kind:
        """Which of the kinds it is."""
        return next(name for name in _KINDS if getattr(self, _FIELD.get(name, name)) is not None)

    @property
    def finite(self) -> Sequence[Value] | None:
        """All its values, or None where they are a continuum."""
        if self.integer is not None:
            return range(self.integer[0], self.integer[1] + 1)
        return self.grid if self.grid is not None else self.choice

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether its condition is met by the values chosen so far."""
        return all(key in values and values[key] in one_of(wanted) for key, wanted in self.when.items())


def one_of(wanted: Value) -> tuple[Value, ...]:
    """The values that a condition accepts: a list stands for any of its own, or for itself."""
    return (wanted, *wanted) if isinstance(wanted, tuple) else (wanted,)


_KINDS: tuple[Kind, ...] = ("choice", "grid", "uniform", "log_uniform", "int", "normal", "repeats")
_FIELD = {"int": "integer"}


_Item = Annotated[
    Annotated[Entry, Tag("")] | Annotated[Value, Tag("value")],
    Discriminator(lambda given: "" if isinstance(given, Mapping | Entry) else "value"),
]


class Budget(Section):
    """`[sweep.budget]`: where a sweep stops before it has had all its trials."""

    seconds: float | None = Field(default=None, gt=0.0, description="wall time, over all its sessions")
    cpu_seconds: float | None = Field(default=None, gt=0.0, description="CPUs x seconds of its runs")
    gpu_seconds: float | None = Field(default=None, gt=0.0, description="GPUs x seconds of its runs")
    plateau: int | None = Field(default=None, ge=1, description="cells in a row without a better one")


class Retries(Section):
    """`[sweep.retries]`: how often a trial is tried again, from its last checkpoint, by what it died of."""

    died: int = Field(default=2, ge=0, description="its process was killed, or ran out of memory")
    error: int = Field(default=0, ge=0, description="it raised an exception")
    nan: int = Field(default=0, ge=0, description="it ended, and the metric is not a finite number")


class Bisection(Section):
    """`[sweep.bisect]`: which edge is looked for."""

    parameter: str = Field(description="the entry of the space that is bisected")
    tolerance: float = Field(default=0.1, gt=0.0, description="largest relative width of the last bracket")
    limit: float | None = Field(
        default=None, description="a run converges when its metric ends better than this; none: than it began"
    )


class Halving(Section):
    """`[sweep.asha]`: when the schedulers `asha` (successive halving) and `median` stop a trial."""

    grace_steps: int = Field(default=1, ge=1, description="steps that every trial may take")
    reduction_factor: float = Field(default=3.0, gt=1.0, description="asha: one in so many goes on")


class Sweep(Section):
    """`[sweep]`: present, `piste sweep` can run the recipe."""

    metric: str = Field(min_length=1, description="the objective: this metric's last value")
    mode: Literal["min", "max"] = "min"
    trials: int | None = Field(default=None, ge=1, description="how many; grid: all; bisect: as needed")
    searcher: Literal["grid", "random", "tpe", "gp", "cmaes", "bisect"] = "random"
    scheduler: Literal["fifo", "asha", "median"] = "fifo"
    batch: int = Field(default=8, ge=1, description="cells suggested together, from the same history")
    asynchronous: bool = Field(default=False, description="suggest a cell whenever there is room")
    concurrency: int | None = Field(default=None, ge=1, description="trials at a time; none: what fits")
    pack: bool = Field(default=True, description="compatible trials as one tensor program")
    history: bool = Field(default=False, description="packed trials keep every value, not the last alone")
    baseline: dict[str, Value] = Field(default={}, description="what other cells are compared with")
    target: float | None = Field(default=None, description="a value of the metric, for times to it")
    space: dict[str, _Item] = Field(default={}, description="dotted keys and what they may be")
    budget: Budget = Budget()
    retries: Retries = Retries()
    asha: Halving = Halving()
    bisect: Bisection | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key, item in self.space.items():
            if isinstance(item, Entry) and item.repeats is not None and key != "seed":
                raise ValueError(f"space.{key}: repeats is for seed alone")
            if key.partition(".")[0] in ("workload", "sweep"):
                raise ValueError(f"space.{key}: all trials of a sweep have it in common")
        entries = self.entries
        for key, entry in entries.items():
            self._check_condition(key, entry)
        self.order  # noqa: B018 (raises where conditions go round in circles)
        if self.searcher == "grid" and (wide := [k for k, e in entries.items() if e.finite is None]):
            raise ValueError(
                f"searcher = 'grid' needs finite entries; {wide[0]!r} has infinitely many values"
            )
        if self.searcher == "cmaes" and all(e.when or e.choice or e.grid for e in entries.values()):
            raise ValueError("searcher = 'cmaes' needs a number that every trial has; 'tpe' takes any space")
        self._check_baseline()
        if self.searcher == "bisect":
            self._check_bisection()
        elif self.bisect is not None:
            raise ValueError("bisect is for searcher = 'bisect'")
        elif self.trials is None and self.searcher != "grid":
            raise ValueError("trials is missing: how many there are to be")
        share = self.repeats * len(self.strata)
        if self.searcher == "grid" and self.trials not in {None, share}:
            raise ValueError(f"trials = {self.trials}, but the grid has {share}: leave it out")
        if self.searcher == "bisect" and self.trials is not None:
            raise ValueError("trials: the searcher 'bisect' decides how many: leave it out")
        if self.trials is not None and self.trials % share:
            below = self.trials // share * share
            raise ValueError(
                f"trials = {self.trials} is no multiple of {self.repeats} seeds x {share // self.repeats} "
                f"grid points = {share}: use {f'{below} or ' if below else ''}{below + share}"
            )
        return self

    def _check_condition(self, key: str, entry: Entry) -> None:
        for other, wanted in entry.when.items():
            asked = self.entries.get(other)
            if asked is None:
                hint = nearest(other, self.entries)
                raise ValueError(f"space.{key}: when: {other!r} is not searched{hint}")
            if entry.grid is not None and asked.grid is None and self.searcher != "grid":
                raise ValueError(
                    f"space.{key}: a grid entry's condition must be on a grid entry, not {other!r}"
                )
            listed = wanted if isinstance(wanted, tuple) and wanted not in (asked.finite or ()) else (wanted,)
            for value in listed:
                _check_value(f"space.{key}: when", other, asked, value)

    def _check_baseline(self) -> None:
        known = {**self.entries, **self.constants}
        for key, value in self.baseline.items():
            if key not in known:
                raise ValueError(f"baseline: {key!r} is not in the space{nearest(key, known)}")
            if key in self.entries:
                _check_value("baseline", key, self.entries[key], value)
            elif value != self.constants[key]:
                raise ValueError(f"baseline: {key!r} is {self.constants[key]!r} in every trial")

    def _check_bisection(self) -> None:
        if self.bisect is None:
            raise ValueError("searcher = 'bisect' needs [sweep.bisect] with parameter = a key of the space")
        ordered = {k: e for k, e in self.entries.items() if e.kind in ("uniform", "log_uniform", "int")}
        entry = ordered.get(self.bisect.parameter)
        if entry is None:
            hint = nearest(self.bisect.parameter, ordered)
            raise ValueError(
                f"bisect.parameter = {self.bisect.parameter!r}: no uniform, log_uniform or int entry{hint}"
            )
        if entry.when:
            raise ValueError(f"space.{self.bisect.parameter}: the bisected entry has no condition")
        for key, other in self.entries.items():
            if key != self.bisect.parameter and other.grid is None:
                raise ValueError(
                    f"space.{key}: beside the bisected entry there are grid entries and repeats alone"
                )

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """What is searched, without the seeds."""
        return {k: e for k, e in self.space.items() if isinstance(e, Entry) and e.repeats is None}

    @cached_property
    def constants(self) -> Values:
        """What every trial is set to."""
        return {k: v for k, v in self.space.items() if not isinstance(v, Entry)}

    @cached_property
    def repeats(self) -> int:
        """Seeds of a cell."""
        seed = self.space.get("seed")
        return seed.repeats or 1 if isinstance(seed, Entry) else 1

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The searched keys, each behind those that its condition asks for.

        Raises:
            ValueError: Conditions go round in circles.
        """
        done: list[str] = []
        waiting = self.entries
        while waiting:
            ready = [k for k, e in waiting.items() if all(other in done for other in e.when)]
            if not ready:
                raise ValueError(f"space: the conditions of {' and '.join(waiting)} go round in circles")
            done.extend(ready)
            waiting = {k: e for k, e in waiting.items() if k not in ready}
        return tuple(done)

    @cached_property
    def strata(self) -> tuple[Values, ...]:
        """Every combination of the `grid` entries; of all entries for the searcher `grid`."""
        chosen = self.order if self.searcher == "grid" else [k for k in self.order if self.entries[k].grid]
        points: list[Values] = [{}]
        for key in chosen:
            entry = self.entries[key]
            points = [
                extended
                for point in points
                for extended in (
                    [{**point, key: v} for v in entry.finite or ()] if entry.holds(point) else [point]
                )
            ]
        return tuple(points)

    def has(self, values: Mapping[str, Any]) -> bool:
        """Whether a point has an entry where the entry's condition is met, and nowhere else."""
        return all((key in values) == entry.holds(values) for key, entry in self.entries.items())

    @property
    def cells(self) -> int | None:
        """How many cells there are to be; None where the searcher decides."""
        if self.trials is not None:
            return self.trials // self.repeats
        return len(self.strata) if self.searcher == "grid" else None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy that derives anew what follows from its fields."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]
        return copy


def _check_value(where: str, key: str, entry: Entry, value: Value) -> None:
    """Refuses a value that an entry never has."""
    if entry.finite is None:
        raise ValueError(f"{where}: {key!r} is a continuum: hardly a trial has the value {value!r}")
    if value not in entry.finite:
        known = [] if entry.integer else [str(each) for each in entry.finite]
        raise ValueError(f"{where}: {key!r} is never {value!r}{nearest(str(value), known)}")
