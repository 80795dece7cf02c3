"""What a sweep tries next, as a pure function of what came of the cells before.

A suggestion never depends on a search object that has lived since the sweep began: cell `c` comes from a
fresh sampler that is seeded with hash(sweep, c) and told the cells that it may know, in the order of their
numbers. So a sweep is resumed by asking the ledger. Optuna (Akiba et al. 2019, arXiv 1907.10902) gives the
samplers `tpe`, `gp` and `cmaes`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from piste.space import Entry, Sweep, Values

if TYPE_CHECKING:
    import optuna

# A normal entry is sampled by its quantile, within these.
QUANTILES = (1e-6, 1.0 - 1e-6)


@dataclass(frozen=True)
class Known:
    """A cell that a suggestion may depend on.

    Attributes:
        cell: Its number.
        values: What was chosen for it.
        memory: What the sampler left behind when it was suggested.
        state: `complete`, `pruned`, or `pending` (suggested before, in the same batch).
        value: The mean objective over its seeds, infinitely bad where one diverged or failed; for the
            searcher `bisect` the fraction of its seeds that converged. None while pending.
        step: The last step of a pruned cell.
    """

    cell: int
    values: Values
    memory: Mapping[str, Any] | None
    state: Literal["complete", "pruned", "pending"]
    value: float | None
    step: int | None = None


@dataclass(frozen=True)
class Suggestion:
    """A cell's values, and what the sampler wants to find again."""

    values: Values
    memory: dict[str, Any] | None = None


def sweep_key(section: Sweep, seed: int) -> str:
    """What all suggestions of a sweep are seeded with: the same space, searcher and seed repeat them."""
    # without defaults: what an entry learns to say later changes no key
    space = section.model_dump(mode="json", include={"space", "searcher", "mode"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps([space, seed], sort_keys=True).encode()).hexdigest()


def seed_of(key: str, cell: int) -> int:
    """hash(sweep, cell) as a 64-bit seed: with 32 bits, two of 100,000 cells would be alike."""
    return int.from_bytes(hashlib.sha256(f"{key}/{cell}".encode()).digest()[:8], "little")


def suggest(section: Sweep, key: str, cell: int, known: Sequence[Known]) -> Suggestion | None:
    """The values of a cell.

    Args:
        section: The recipe's `[sweep]`.
        key: From `sweep_key`.
        cell: The cell's number.
        known: The cells of its stratum that it may depend on, in the order of their numbers.

    Returns:
        None where the stratum is done: its bracket is narrow enough.
    """
    strata = section.strata
    fixed = strata[cell % len(strata)]
    if section.searcher == "grid":
        return Suggestion(dict(fixed))
    if section.searcher == "bisect":
        return _bisect(section, fixed, known)
    if section.searcher == "random":
        return Suggestion(_random(section, fixed, np.random.default_rng(seed_of(key, cell))))
    return _sample(section, fixed, seed_of(key, cell), known)


def bracketing(section: Sweep, known: Sequence[Known]) -> tuple[float, float] | None:
    """The bracket `[a, b]` that the probes of a stratum leave: the edge lies between its ends.

    Returns:
        None until both ends of the entry are probed, and where they have the same outcome: there is no
        edge between them.
    """
    if len(known) < 2 or _converges(known[0]) == _converges(known[1]):
        return None
    parameter = _bisected(section)[0]
    low, high = (probe.values[parameter] for probe in known[:2])
    for probe in known[2:]:
        middle = probe.values[parameter]
        low, high = (middle, high) if _converges(probe) == _converges(known[0]) else (low, middle)
    return low, high


def _converges(probe: Known) -> bool:
    """Whether at least half of the seeds did."""
    return probe.value is not None and probe.value >= 0.5


def _bisected(section: Sweep) -> tuple[str, Entry]:
    assert section.bisect is not None
    return section.bisect.parameter, section.entries[section.bisect.parameter]


def _bisect(section: Sweep, fixed: Values, known: Sequence[Known]) -> Suggestion | None:
    """Both ends of the entry, then the middle of the bracket, until it is narrow."""
    assert section.bisect is not None
    parameter, entry = _bisected(section)
    ends = entry.log_uniform or entry.uniform or entry.integer
    assert ends is not None
    if len(known) < 2:
        return Suggestion({**fixed, parameter: ends[len(known)]})
    bracket = bracketing(section, known)
    if bracket is None:
        return None
    low, high = bracket
    # relative width: (high - low) / max(|low|, |high|) <= tolerance
    if high - low <= section.bisect.tolerance * max(abs(low), abs(high)):
        return None
    middle = math.sqrt(low * high) if entry.log_uniform else (low + high) / 2.0
    if entry.integer is not None:
        middle = int(middle)
    return Suggestion({**fixed, parameter: middle}) if low < middle < high else None


def _random(section: Sweep, fixed: Values, generator: np.random.Generator) -> Values:
    """Every entry drawn on its own, behind those that its condition asks for."""
    values = dict(fixed)
    for name in section.order:
        entry = section.entries[name]
        if name in fixed or not entry.holds(values):
            continue
        if entry.choice is not None:
            values[name] = entry.choice[int(generator.integers(len(entry.choice)))]
        elif entry.integer is not None:
            values[name] = int(generator.integers(entry.integer[0], entry.integer[1] + 1))
        elif entry.log_uniform is not None:
            low, high = entry.log_uniform
            drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
            values[name] = min(max(drawn, low), high)  # rounding may carry it past an end
        elif entry.uniform is not None:
            values[name] = float(generator.uniform(*entry.uniform))
        elif entry.normal is not None:
            values[name] = float(generator.normal(*entry.normal))
    return values


def _sample(section: Sweep, fixed: Values, seed: int, known: Sequence[Known]) -> Suggestion:
    """One cell from a fresh sampler of Optuna's."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="minimize" if section.mode == "min" else "maximize", sampler=_sampler(section, seed)
    )
    study.add_trials([_trial(section, fixed, cell, known) for cell in known])
    trial = study.ask()
    values = dict(fixed)
    for name in section.order:
        entry = section.entries[name]
        if name not in fixed and entry.holds(values):
            values[name] = _decode(entry, _ask(trial, name, entry))
    left = study.get_trials(deepcopy=False)[-1].system_attrs
    return Suggestion(values, dict(left) or None)


def _ask(trial: optuna.Trial, name: str, entry: Entry) -> Any:
    if entry.choice is not None:
        return trial.suggest_categorical(name, range(len(entry.choice)))
    if entry.integer is not None:
        return trial.suggest_int(name, *entry.integer)
    if entry.log_uniform is not None:
        return trial.suggest_float(name, *entry.log_uniform, log=True)
    return trial.suggest_float(name, *(entry.uniform or QUANTILES))


def _sampler(section: Sweep, seed: int) -> optuna.samplers.BaseSampler:
    from optuna.samplers import CmaEsSampler, GPSampler, TPESampler

    seed %= 2**32  # all that Optuna takes
    if section.searcher == "tpe":
        return TPESampler(seed=seed, n_startup_trials=section.batch)
    if section.searcher == "gp":
        return GPSampler(seed=seed, n_startup_trials=section.batch, warn_independent_sampling=False)
    # A batch is a generation. CMA-ES needs two parents or more.
    return CmaEsSampler(seed=seed, popsize=max(section.batch, 4), warn_independent_sampling=False)


def _trial(section: Sweep, fixed: Values, cell: Known, known: Sequence[Known]) -> optuna.trial.FrozenTrial:
    """A cell as Optuna sees it."""
    from optuna.trial import TrialState, create_trial

    # A normal entry is sampled by its quantile; what a condition or a grid decides is no parameter.
    sampled = {n: section.entries[n] for n in section.order if n in cell.values and n not in fixed}
    state = TrialState.RUNNING
    if cell.state != "pending":
        # Optuna's GP and CMA-ES would never hear of a pruned cell.
        pruned = cell.state == "pruned" and section.searcher == "tpe"
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
    value = None if cell.value is None else _told(cell.value, section, known)
    return create_trial(
        state=state,
        value=value if state is TrialState.COMPLETE else None,
        intermediate_values={cell.step or 0: value}
        if state is TrialState.PRUNED and value is not None
        else {},
        params={n: _encode(entry, cell.values[n]) for n, entry in sampled.items()},
        distributions={n: _distribution(entry) for n, entry in sampled.items()},
        system_attrs=dict(cell.memory or {}),
    )


def _told(value: float, section: Sweep, known: Sequence[Known]) -> float:
    """A cell's objective as its sampler is told it: finite, whatever came of the cell.

    A diverged cell has the worst that was seen. A Gaussian process would see nothing beside the 1e30 of a
    cell that is about to diverge, so that it is told scores from 0, the best, to 1, four times as far from
    the best as the best quarter is.
    """
    sign = 1.0 if section.mode == "min" else -1.0
    seen = sorted(sign * k.value for k in known if k.value is not None and math.isfinite(k.value))
    if section.searcher != "gp":
        return value if math.isfinite(value) else sign * (seen[-1] if seen else 0.0)
    best, quarter = (seen[0], seen[len(seen) // 4]) if seen else (0.0, 0.0)
    # (value - best) / (4 (quarter - best)); in parts, as differences of large numbers are infinite
    ahead, unit = sign * value / 8.0 - best / 8.0, quarter / 2.0 - best / 2.0
    return sign * (min(ahead / unit, 1.0) if unit > 0.0 else float(ahead > 0.0))


def _distribution(entry: Entry) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if entry.choice is not None:
        return CategoricalDistribution(tuple(range(len(entry.choice))))
    if entry.integer is not None:
        return IntDistribution(*entry.integer)
    if entry.log_uniform is not None:
        return FloatDistribution(*entry.log_uniform, log=True)
    return FloatDistribution(*(entry.uniform or QUANTILES))


def _encode(entry: Entry, value: Any) -> Any:
    """A recipe's value as the sampler's: the place of a choice, the quantile of a normal entry."""
    if entry.choice is not None:
        return entry.choice.index(tuple(value) if isinstance(value, list) else value)
    if entry.normal is not None:
        low, high = QUANTILES
        return min(max(NormalDist(*entry.normal).cdf(value), low), high)
    return value


def _decode(entry: Entry, value: Any) -> Any:
    if entry.choice is not None:
        return entry.choice[value]
    if entry.normal is not None:
        return NormalDist(*entry.normal).inv_cdf(value)
    return value
