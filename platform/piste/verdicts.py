"""Verdicts: which side of a threshold a measured figure is on, with its uncertainty.

supported      the whole 95 % confidence interval is on the claimed side of the threshold
refuted        all of it is on the other side
inconclusive   the threshold lies within it
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

Outcome = Literal["supported", "refuted", "inconclusive"]
Direction = Literal["below", "above"]

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval."""

    figure: float
    low: float
    high: float


def estimate(samples: Sequence[float]) -> Estimate:
    """The mean of independent samples with Student's interval.

    One sample has no interval, and neither have samples of which some are not finite; samples that are all
    infinite in one direction are that infinity.

    Raises:
        ValueError: There is no sample.
    """
    if not samples:
        raise ValueError("samples must not be empty")
    if set(samples) in ({math.inf}, {-math.inf}):
        return Estimate(samples[0], samples[0], samples[0])
    count = len(samples)
    if not all(map(math.isfinite, samples)):
        return Estimate(math.nan, -math.inf, math.inf)
    mean = math.fsum(samples) / count
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    from scipy import stats

    # mean +- t sqrt(sum (x - mean)^2 / (n - 1) / n)
    variance = math.fsum((x - mean) ** 2 for x in samples) / (count - 1)
    half = float(stats.t.ppf((1.0 + CONFIDENCE) / 2.0, count - 1)) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)


def decide(interval: tuple[float, float], threshold: float, direction: Direction) -> Outcome:
    """Which side of a threshold an interval is on.

    Args:
        interval: Its two ends.
        threshold: What is claimed to bound the figure.
        direction: Whether the figure is claimed to be `below` or `above` it, or just there.
    """
    low, high = interval if direction == "below" else (-interval[1], -interval[0])
    bound = threshold if direction == "below" else -threshold
    if high <= bound:
        return "supported"
    return "refuted" if low > bound else "inconclusive"


class Budget(NamedTuple):
    """What a verdict rests on: runs, their steps together, their seconds and those of measurements."""

    runs: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """A claim, judged.

    Attributes:
        claim: The claim's id; `sentence` to `note` are the claim's too.
        outcome: What came out.
        figure: The measured figure; NaN where there is none.
        interval: Its 95 % confidence interval.
        samples: What it is the mean of; empty for a ready estimate.
        budget: What it cost when it was computed, reused runs included.
        runs: The ids of the runs that it rests on.
        how: How it was decided, or why it could not be.
        broken: Whether something failed on the way.
    """

    claim: str
    sentence: str
    source: str
    threshold: float
    direction: Direction
    expectation: Outcome
    paper_figure: float | None
    unit: str
    note: str
    outcome: Outcome
    figure: float
    interval: tuple[float, float]
    samples: tuple[float, ...]
    budget: Budget
    runs: tuple[str, ...]
    how: str
    broken: bool = False

    @property
    def seeds(self) -> int:
        """How many independent repetitions there are."""
        return len(self.samples)

    @property
    def expected(self) -> bool:
        """Whether the outcome is the one on record; nothing that broke is."""
        return self.outcome == self.expectation and not self.broken


def failed(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that are not as expected."""
    return [verdict for verdict in verdicts if not verdict.expected]


def rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The verdicts as JSON can hold them; what is not a finite number is None."""
    made = []
    for verdict in verdicts:
        row = asdict(verdict) | {"seeds": verdict.seeds, "expected": verdict.expected}
        row["budget"] = verdict.budget._asdict()
        row["figure"] = _finite(verdict.figure)
        row["interval"] = [_finite(end) for end in verdict.interval]
        row["samples"] = [_finite(sample) for sample in verdict.samples]
        made.append(row)
    return made


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_COLOURS = {"supported": "green", "refuted": "red", "inconclusive": "yellow"}


def table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts for the terminal; an outcome that is not the one on record is marked."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="bold")
    for heading in ("claim", "verdict", "figure", "95 %", "claimed", "paper", "n", "runs"):
        made.add_column(heading, justify="left" if heading in {"claim", "verdict", "claimed"} else "right")
    for verdict in verdicts:
        outcome = f"[{_COLOURS[verdict.outcome]}]{verdict.outcome}[/]"
        made.add_row(
            verdict.claim.replace("-", " "),  # a narrow terminal wraps it between its words
            outcome if verdict.expected else f"{outcome}\n[bold]expected: {verdict.expectation}[/]",
            f"{verdict.figure:.4g}",
            "\n".join(f"{end:.4g}" for end in verdict.interval),
            f"{'<=' if verdict.direction == 'below' else '>='} {verdict.threshold:g} {verdict.unit}".strip(),
            "not\nstated" if verdict.paper_figure is None else f"{verdict.paper_figure:g}",
            str(verdict.seeds),
            str(verdict.budget.runs),
        )
    return made


def report(name: str, scale: str, verdicts: Sequence[Verdict]) -> str:
    """The verdicts as plain text, a paragraph each."""
    paragraphs = [f"Study {name}, scale {scale}, {time.strftime('%Y-%m-%d %H:%M')}"]
    for v in verdicts:
        sign = "at most" if v.direction == "below" else "at least"
        paper = "not stated" if v.paper_figure is None else f"{v.paper_figure:g}"
        expected = "as on record" if v.expected else f"NOT AS ON RECORD: {v.expectation}"
        lines = [
            f"{v.claim}: {v.outcome.upper()} ({expected})",
            f"  {v.sentence} [{v.source}]",
            f"  measured {v.figure:.4g} {v.unit}".rstrip()
            + f", 95 % interval {v.interval[0]:.4g} to {v.interval[1]:.4g}, claimed {sign} {v.threshold:g}; "
            f"the paper's figure: {paper}",
            f"  {v.how}",
            f"  {v.budget.runs} runs, {v.budget.steps} steps, {v.budget.seconds:.1f} s",
        ]
        paragraphs.append("\n".join(lines + ([f"  {v.note}"] if v.note else [])))
    return "\n\n".join(paragraphs) + "\n"
