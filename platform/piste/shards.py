"""A shard of streams: events come at least once, and each is accounted for exactly once.

A workload of streams is a module with

    class Config(StreamRecipe, frozen=True)         # `Config.events`: how many events a stream is to have
    def stream_names(config) -> Sequence[str]       # its streams, by number
    def open_source(config, numbers) -> Source      # where their events come from, replayable
    def open_processor(config, number, saved) -> Processor   # what one of them goes through
    def summarize(config, streams, alarms) -> dict  # what came of it, as metrics; optional
    def figures(config, streams, alarms) -> dict    # and as pictures; optional

A source reads from any sequence number, the same events every time. A shard drops what it has accounted for
already, refuses what is not next, and hands a batch's effect to the ledger before it acknowledges it: states,
alarms and metrics in one transaction. Whatever is killed between, the shard goes on from the ledger's states
and its feed sends again from there.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from piste.config import Recipe, Section
from piste.errors import PisteError, cause
from piste.ledger import Row
from piste.ledger.streams import Advance, Commit
from piste.ledger.tables import Stream


class Pace(Section):
    """`[stream]`: how streams are fed, and which are shown. Not what comes of them."""

    batch: int = Field(default=1000, ge=1, description="events of each stream in a batch; one is one commit")
    window: int = Field(default=3, ge=1, description="batches of a shard that may be on their way")
    shown: int = Field(default=8, ge=0, description="streams whose wealth and alarms are metrics")


class StreamRecipe(Recipe, frozen=True):
    """What every configuration of a workload of streams has."""

    stream: Pace = Pace()

    @property
    def events(self) -> int:
        """How many events a stream is to have."""
        raise NotImplementedError

    @property
    def watched(self) -> tuple[str, str] | None:
        """The run and the metric that the one stream is, where it is one of the ledger's."""
        return None

    @property
    def until_alarm(self) -> bool:
        """Whether such a metric is followed to its first alarm, not to the end of its run."""
        return False


Events = Any  # a sequence of events that can be sliced: an array, or a workload's own


class Source(Protocol):
    """Where the events of some streams come from."""

    def read(self, first: int, count: int) -> Mapping[int, Events]:
        """Events of each stream from sequence number `first` on, `count` of them, fewer where it ends."""


@dataclass(frozen=True)
class Taken:
    """What a processor made of events.

    Attributes:
        count: How many of them it has taken: all, but for a failure.
        alarms: For each alarm its `detector`, `sequence`, `onset`, `log_wealth`, `log_threshold` and
            `details`.
        metrics: What it says of itself, `{name: value}`, after the last event.
        failure: Why it takes no more.
    """

    count: int
    alarms: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] | None = None
    failure: str | None = None


class Processor(Protocol):
    """What the events of one stream go through: a score, detectors, an adapter."""

    @property
    def skipped(self) -> int:
        """Events that were not finite."""

    @property
    def wealth(self) -> Mapping[str, float]:
        """Each detector's log-wealth."""

    def take(self, events: Events) -> Taken:
        """Takes the stream's next events."""

    def origin(self) -> dict[str, Any]:
        """What never changes of the state: settings, calibration."""

    def state(self) -> dict[str, Any]:
        """What every event changes, such that `open_processor` goes on from both to the last bit."""


class Store(Protocol):
    """The ledger's part for streams, or the way to it."""

    def states(self, run_id: str, numbers: Sequence[int]) -> dict[int, Stream]:
        """See `Streams.states`."""

    def open(self, run_id: str, streams: Sequence[dict[str, Any]]) -> None:
        """See `Streams.open`."""

    def commit(self, commit: Commit) -> dict[int, int]:
        """See `Streams.commit`."""


@dataclass(frozen=True)
class Progress:
    """Where a shard stands.

    Attributes:
        position: The number of the event that some of its streams need next; the last one's successor where
            all have ended.
        ended: Whether all of its streams have ended.
        dropped: Events of the batch that were accounted for before.
    """

    position: int
    ended: bool
    dropped: int = 0


@dataclass
class _Open:
    """One stream as the shard has it."""

    processor: Processor
    sequence: int
    ended: bool
    alarms: int


class Shard:
    """Some streams of a run, as one process accounts for them.

    Args:
        module: The workload.
        config: The recipe.
        numbers: Its streams.
        store: The ledger's part for streams.
        run_id: The run.
        attempt: The number of this attempt.
    """

    def __init__(
        self,
        module: Any,
        config: StreamRecipe,
        numbers: Sequence[int],
        store: Store,
        run_id: str,
        attempt: int,
    ) -> None:
        self._module, self._config = module, config
        self._numbers = list(numbers)
        self._store = store
        self._run_id, self._attempt = run_id, attempt
        self._names = module.stream_names(config)
        self._streams: dict[int, _Open] | None = None

    def open(self) -> Progress:
        """Takes the streams up where the ledger has them, or begins them."""
        self._load()
        return self._progress()

    def take(self, first: int, count: int, batch: Mapping[int, Events]) -> Progress:
        """Accounts for a batch.

        Args:
            first: The sequence number of its first events.
            count: How many events of each stream were asked for; a stream that has fewer ends.
            batch: Events of each stream.

        Returns:
            Where the shard stands, once the ledger has it.

        Raises:
            PisteError: A stream failed, after all that came before was recorded; or the ledger refuses.
        """
        streams = self._load()
        try:
            progress, failure = self._take(streams, first, count, batch)
        except BaseException:
            self._streams = None  # what this process has computed may not be what the ledger has
            raise
        if failure is not None:
            self._streams = None
            raise PisteError(failure)
        return progress

    def _take(
        self, streams: dict[int, _Open], first: int, count: int, batch: Mapping[int, Events]
    ) -> tuple[Progress, str | None]:
        advances, alarms, rows = list[Advance](), list[dict[str, Any]](), list[Row]()
        dropped, failure = 0, None
        now = time.time_ns() // 1_000_000
        for number, events in batch.items():
            stream = streams[number]
            known = stream.sequence - first
            if known < 0 or stream.ended:  # what comes between must come first; or nothing comes any more
                continue
            dropped += min(known, len(events))
            fresh, before = events[known:], stream.sequence
            taken = stream.processor.take(fresh) if len(fresh) else Taken(0)
            name = self._names[number]
            if taken.failure is not None:
                failure = failure or f"stream {name}: event {before + taken.count}: {taken.failure}"
            else:
                stream.ended = len(events) < count or first + count >= self._config.events
            if taken.count == 0 and not stream.ended:
                continue
            stream.sequence += taken.count
            stream.alarms += len(taken.alarms)
            alarms += [{"number": number, **alarm} for alarm in taken.alarms]
            if number < self._config.stream.shown:
                rows += _metrics(name, stream, taken, now)
            advances.append(
                Advance(
                    number=number,
                    before=before,
                    sequence=stream.sequence,
                    ended=stream.ended,
                    skipped=stream.processor.skipped,
                    alarms=stream.alarms,
                    wealth=dict(stream.processor.wealth),
                    state=stream.processor.state(),
                )
            )
        if advances:
            commit = Commit(self._run_id, self._attempt, tuple(advances), tuple(alarms), tuple(rows))
            stands = self._store.commit(commit)
            if any(stands[a.number] != a.sequence for a in advances):
                # Another process has taken them further meanwhile: this one goes on from there.
                streams = self._load(again=True)
        return self._progress(dropped), failure

    def _load(self, again: bool = False) -> dict[int, _Open]:
        """The streams as the ledger has them; those that it lacks are begun there."""
        if self._streams is None or again:
            known = self._store.states(self._run_id, self._numbers)
            lacking = [number for number in self._numbers if number not in known]
            begun = {n: self._module.open_processor(self._config, n, None) for n in lacking}
            self._store.open(self._run_id, [self._columns(n, each) for n, each in begun.items()])
            self._streams = {n: _Open(each, 0, False, 0) for n, each in begun.items()}
            for n, row in known.items():
                processor = self._module.open_processor(self._config, n, (row.origin, row.state))
                self._streams[n] = _Open(processor, row.sequence, row.ended, row.alarms)
        return self._streams

    def _columns(self, number: int, processor: Processor) -> dict[str, Any]:
        return {
            "number": number,
            "name": self._names[number],
            "wealth": dict(processor.wealth),
            "origin": processor.origin(),
            "state": processor.state(),
        }

    def _progress(self, dropped: int = 0) -> Progress:
        assert self._streams is not None
        going = [stream.sequence for stream in self._streams.values() if not stream.ended]
        reached = max((stream.sequence for stream in self._streams.values()), default=0)
        return Progress(min(going, default=reached), not going, dropped)


def _metrics(name: str, stream: _Open, taken: Taken, now: int) -> Iterator[Row]:
    """What is shown of a stream after a batch; the step is the event's number."""
    for alarm in taken.alarms:
        place = f"{name}/{alarm['detector']}"
        yield Row(f"alarm/{place}", alarm["sequence"], alarm["log_wealth"], now)
        yield Row(f"onset/{place}", alarm["sequence"], float(alarm["onset"]), now)
    for detector, log_wealth in stream.processor.wealth.items():
        if math.isfinite(log_wealth):  # else nothing was bet since an alarm
            yield Row(f"log_wealth/{name}/{detector}", stream.sequence, log_wealth, now)
    for key, value in (taken.metrics or {}).items():
        yield Row(f"{key}/{name}", stream.sequence, value, now)


class Feed:
    """Which batches a shard is to be sent: a few at a time, in their order, again from where some got lost.

    Batches begin at multiples of their size, so that metrics of runs that were disturbed have the steps of
    those that were not.

    Args:
        progress: Where the shard stands.
        size: Events a stream in a batch.
        window: Batches that may be on their way.
    """

    def __init__(self, progress: Progress, size: int, window: int) -> None:
        self._size, self._window = size, window
        self._next = self.position = progress.position
        self.ended = progress.ended
        self.dropped = 0
        self._sent: deque[tuple[int, int]] = deque()
        self._lost = False

    @property
    def waiting(self) -> int:
        """Batches that are on their way."""
        return len(self._sent)

    def due(self) -> Iterator[tuple[int, int]]:
        """The batches to be sent now, as `(first, count)`."""
        while not self.ended and not self._lost and len(self._sent) < self._window:
            first = self._next
            count = self._size - first % self._size
            self._next = first + count
            self._sent.append((first, count))
            yield first, count

    def answered(self, first: int, progress: Progress) -> None:
        """The shard has answered the batch that begins at `first`."""
        count = next(count for sent, count in self._sent if sent == first)
        self._sent.remove((first, count))
        self.position = max(self.position, progress.position)
        self.ended = self.ended or progress.ended
        self.dropped += progress.dropped
        self._lost = self._lost or progress.position < first + count
        if self._lost and not self._sent:  # nothing is on its way that would come out of turn
            self._next, self._lost = self.position, False


def read(source: Source, first: int, count: int) -> Mapping[int, Events]:
    """A batch of a source.

    Raises:
        PisteError: The source throws.
    """
    try:
        return source.read(first, count)
    except Exception as error:
        raise PisteError(f"the source failed at event {first}: {cause(error)}") from error


def shards_of(streams: int, shards: int) -> list[list[int]]:
    """The streams of each shard: in turn, so that neighbours are apart; none is empty."""
    return [list(range(shard, streams, shards)) for shard in range(min(streams, shards))]
