"""Streams whose states are known beforehand: they add up their events and raise alarms at known ones.

Event n of stream k is `event(k, n)`. A detector here is a sum of thirds, so that an event that is left out,
or taken twice, or in another order, changes the last bits of all that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from piste.config import Section
from piste.errors import PisteError
from piste.shards import StreamRecipe, Taken


class Adding(Section):
    """`[adding]`: how many streams, how long, and what goes wrong."""

    streams: int = Field(default=3, ge=1)
    events: int = Field(default=40, ge=1)
    short: int = Field(default=0, ge=0, description="events of the last stream; 0: as many as the others")
    refused: int = Field(default=-1, description="the event that stream 1 refuses")
    broken: int = Field(default=-1, description="the event from which on the source throws")


class Config(StreamRecipe, frozen=True):
    """Everything that these streams are told."""

    workload: str = "tests.platform.adding_streams"
    adding: Adding = Adding()

    @property
    def events(self) -> int:
        return self.adding.events


def event(number: int, sequence: int) -> float:
    return (number + 1) / 3 + sequence / 7


def length(config: Config, number: int) -> int:
    last = number == config.adding.streams - 1
    return config.adding.short if last and config.adding.short else config.adding.events


def expected(config: Config, number: int) -> tuple[float, list[int]]:
    """A whole stream's sum, and its alarms."""
    total, alarms = 0.0, []
    for sequence in range(length(config, number)):
        total += event(number, sequence)
        if is_alarm(number, sequence):
            alarms.append(sequence)
    return total, alarms


def is_alarm(number: int, sequence: int) -> bool:
    return sequence % 11 == number + 5


def stream_names(config: Config) -> list[str]:
    return [f"s{number}" for number in range(config.adding.streams)]


class Source:
    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        self._config, self._numbers = config, numbers

    def read(self, first: int, count: int) -> Mapping[int, list[float]]:
        if 0 <= self._config.adding.broken < first + count:
            raise OSError("the line is dead")
        return {
            n: [event(n, k) for k in range(first, min(first + count, length(self._config, n)))]
            for n in self._numbers
        }


class Sum:
    """The one detector of a stream."""

    def __init__(self, config: Config, number: int, saved: Any) -> None:
        self._number, self._refused = number, config.adding.refused if number == 1 else -1
        self.skipped = 0
        state: dict[str, Any] = {"total": 0.0, "sequence": 0} if saved is None else saved[1]
        self.total: float = state["total"]
        self.sequence: int = state["sequence"]

    @property
    def wealth(self) -> dict[str, float]:
        return {"sum": self.total}

    def take(self, events: Sequence[float]) -> Taken:
        alarms = list[dict[str, Any]]()
        for place, each in enumerate(events):
            if self.sequence == self._refused:
                return Taken(place, alarms, failure="it is odd")
            self.total += each
            if is_alarm(self._number, self.sequence):
                alarms.append(
                    {
                        "detector": "sum",
                        "sequence": self.sequence,
                        "onset": self.sequence - 2,
                        "log_wealth": self.total,
                        "log_threshold": 0.0,
                        "details": {"bet": float("-inf")},
                    }
                )
            self.sequence += 1
        return Taken(len(events), alarms)

    def origin(self) -> dict[str, Any]:
        return {"number": self._number}

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "sequence": self.sequence, "never": float("-inf")}


def open_source(config: Config, numbers: Sequence[int]) -> Source:
    return Source(config, numbers)


def open_processor(config: Config, number: int, saved: Any) -> Sum:
    return Sum(config, number, saved)


def summarize(
    config: Config, streams: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    return {"sum/all": sum(stream["wealth"]["sum"] for stream in streams)}


def train(config: Config, run: Any) -> None:
    raise PisteError("these streams are followed, not trained")
