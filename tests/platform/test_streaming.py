"""Streams: at least once delivered, exactly once accounted for, whatever is killed, lost, doubled or late."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.platform import adding_streams
from tests.platform.adding_streams import Adding, Config, expected
from tests.platform.ledgers import COLUMNS

import piste
from piste import cli, running, streams, tracking
from piste.config import Resources, Tracking
from piste.errors import BadInput, PisteError
from piste.ledger import Ledger, LedgerError, open_ledger
from piste.ledger.streams import Advance, Commit, coded, decoded
from piste.shards import Feed, Pace, Progress, Shard, read, shards_of
from piste.stream_view import WIDTH, StreamView, sparkline

pytest_plugins = ["tests.platform.fixtures"]


def recipe(batch: int = 4, window: int = 3, **adding: int) -> Config:
    return Config(
        adding=Adding(**adding),
        stream=Pace(batch=batch, window=window),
        tracking=Tracking(system_metrics=False),
    )


def check_whole(ledger: Ledger, config: Config, run_id: str = "run") -> None:
    """Every stream is where an undisturbed one ends, with its alarms, and so is every metric."""
    standing = ledger.streams.standing(run_id)
    assert [stream["number"] for stream in standing] == list(range(config.adding.streams))
    found: dict[int, list[int]] = {stream["number"]: [] for stream in standing}
    for alarm in ledger.streams.alarms(run_id):
        found[alarm.number].append(alarm.sequence)
    for stream in standing:
        total, alarms = expected(config, stream["number"])
        assert stream["wealth"]["sum"] == total
        assert stream["sequence"] == adding_streams.length(config, stream["number"])
        assert stream["ended"]
        assert found[stream["number"]] == alarms
        assert stream["alarms"] == len(alarms)
        history = dict(ledger.history(run_id, f"log_wealth/{stream['name']}/sum"))
        assert history[stream["sequence"]] == total
        assert [s for s, _ in ledger.history(run_id, f"alarm/{stream['name']}/sum")] == alarms
    assert ledger.run(run_id).recomputed_different == 0


class Network:
    """In place of Ray: shards that are killed, and calls to them and to the ledger that go astray.

    Each step of `follow` asks `choose(n)` what goes wrong next; 0 is nothing.
    """

    def __init__(self, ledger: Ledger, config: Config, choose: Callable[[int], int]) -> None:
        self._ledger, self._config, self._choose = ledger, config, choose
        self._late: list[Commit] = []
        self.kills = 0

    # -- the ledger's part, with a network between ---------------------------------------------------

    def states(self, run_id: str, numbers: Any) -> Any:
        return self._ledger.streams.states(run_id, numbers)

    def open(self, run_id: str, opened: Any) -> None:
        self._ledger.streams.open(run_id, opened)
        if self._choose(8) == 1:
            raise _Killed

    def commit(self, commit: Commit) -> dict[int, int]:
        what = self._choose(8)
        if what == 1:  # killed before it has sent
            raise _Killed
        if what == 2:  # sent, and killed before it is told; the ledger gets it now
            self._ledger.streams.commit(commit)
            raise _Killed
        if what == 3:  # sent, and killed; the ledger gets it much later
            self._late.append(commit)
            raise _Killed
        if what == 4:  # it comes twice, once late
            self._late.append(commit)
        return self._ledger.streams.commit(commit)

    def deliver_late(self) -> None:
        for commit in self._late:
            self._ledger.streams.commit(commit)
        self._late.clear()

    # -- Ray's part: actors with a queue of calls, restarted when they are killed ---------------------

    def follow(self, numbers: list[int], attempt: int) -> None:
        config = self._config

        def new_shard() -> Shard:
            return Shard(adding_streams, config, numbers, self, "run", attempt)

        shard, source = new_shard(), adding_streams.open_source(config, numbers)
        feed = Feed(self._patiently(lambda: shard.open()), config.stream.batch, config.stream.window)
        queue: list[tuple[int, int]] = []
        for _ in range(10_000):
            queue += list(feed.due())
            if not queue:
                break
            what = self._choose(10)
            if what == 1:
                self.deliver_late()
            if what == 2 and len(queue) > 1:  # retried calls may come out of turn
                queue.insert(0, queue.pop())
            first, count = queue[0]
            batch = read(source, first, count)
            try:
                if what == 3:  # a source that replays old events
                    shard.take(0, count, read(source, 0, count))
                progress = shard.take(first, count, batch)
                if what == 4:  # the answer is lost: the call is made again
                    progress = shard.take(first, count, batch)
            except _Killed:
                self.kills += 1
                shard = new_shard()
                continue
            queue.pop(0)
            feed.answered(first, progress)
        assert feed.ended

    def _patiently(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except _Killed:
                self.kills += 1


class _Killed(BaseException):
    """The process of a shard is gone."""


def planned(ledger: Ledger, directory: Path) -> None:
    ledger.create(**(COLUMNS | {"id": "run", "directory": str(directory)}))


@settings(max_examples=80)
@given(
    choices=st.lists(st.integers(0, 9), max_size=120),
    batch=st.integers(1, 9),
    window=st.integers(1, 4),
    shards=st.integers(1, 3),
    short=st.sampled_from([0, 1, 13]),
)
def test_every_event_counts_once_whatever_goes_wrong(
    tmp_path_factory: pytest.TempPathFactory,
    choices: list[int],
    batch: int,
    window: int,
    shards: int,
    short: int,
) -> None:
    ledger = Ledger("sqlite://")  # in memory
    planned(ledger, Path("nowhere"))
    config = recipe(batch=batch, window=window, events=23, short=short)
    left = iter(choices)

    def choose(kinds: int) -> int:
        chosen = next(left, 0)
        return chosen if chosen < kinds else 0

    network = Network(ledger, config, choose)
    attempt = ledger.begin_attempt("run")
    for numbers in shards_of(config.adding.streams, shards):
        network.follow(numbers, attempt)
    network.deliver_late()
    check_whole(ledger, config)


def advance(before: int, sequence: int) -> Advance:
    return Advance(0, before, sequence, False, 0, 0, {}, {"at": sequence})


def test_a_commit_is_of_its_attempt_and_begins_where_the_stream_stands(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    planned(ledger, tmp_path)
    first = ledger.begin_attempt("run")
    ledger.streams.open("run", [{"number": 0, "name": "a", "wealth": {}, "origin": {}, "state": {"at": 0}}])
    assert ledger.streams.commit(Commit("run", first, (advance(0, 4),))) == {0: 4}
    second = ledger.begin_attempt("run")
    with pytest.raises(LedgerError, match="attempt 1 is over"):
        ledger.streams.commit(Commit("run", first, (advance(4, 8),)))
    with pytest.raises(LedgerError, match="stream 0 stands at 4, events from 6 on cannot be next"):
        ledger.streams.commit(Commit("run", second, (advance(6, 8),)))
    assert ledger.streams.commit(Commit("run", second, (advance(0, 4),))) == {0: 4}
    assert ledger.streams.states("run", [0, 1])[0].state == {"at": 4}
    again = [{"number": 0, "name": "b", "wealth": {}, "origin": {}, "state": {"at": 9}}]
    ledger.streams.open("run", again)  # what is there stays as it is
    assert ledger.streams.states("run", [0])[0].sequence == 4


def test_a_state_is_kept_to_the_last_bit_in_strict_json() -> None:
    state = {"log": [float("-inf"), 0.1 + 0.2, -0.0], "deep": {"inf": float("inf"), "name": "nan"}, "n": None}
    text = json.dumps(coded(state), allow_nan=False)
    assert repr(decoded(json.loads(text))) == repr(state)


def test_batches_begin_at_multiples_of_their_size_and_few_are_on_their_way() -> None:
    feed = Feed(Progress(7, False), size=5, window=2)
    assert list(feed.due()) == [(7, 3), (10, 5)]
    assert list(feed.due()) == []
    feed.answered(7, Progress(10, False))
    assert list(feed.due()) == [(15, 5)]
    feed.answered(10, Progress(10, False))  # it was not taken
    assert list(feed.due()) == []  # before the rest has come back
    feed.answered(15, Progress(10, False, dropped=2))
    assert list(feed.due()) == [(10, 5), (15, 5)]
    assert (feed.position, feed.dropped, feed.waiting) == (10, 2, 2)


def test_shards_hold_each_stream_once_and_none_is_empty() -> None:
    assert shards_of(5, 2) == [[0, 2, 4], [1, 3]]
    assert shards_of(2, 8) == [[0], [1]]


def follow(config: Config, stream_id: str | None = None) -> running.RunResult:
    ledger = open_ledger()
    return running.execute(ledger, streams.plan(ledger, "adding", config, stream_id), local=True)


@pytest.fixture
def config(no_view: None) -> Config:
    return recipe(batch=4, events=40)


def test_streams_are_followed_to_their_end_and_summed_up(config: Config) -> None:
    result = follow(config)
    assert result.status == "finished"
    check_whole(open_ledger(), config, result.id)
    whole = [expected(config, number) for number in range(3)]
    assert result.metrics["sum/all"] == sum(total for total, _ in whole)
    assert result.metrics["stream/events"] == 120
    assert result.metrics["stream/alarms"] == sum(len(alarms) for _, alarms in whole)
    table = json.loads(result.artifacts["alarms.json"].read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (row["stream"], row["detector"], row["onset"]) == ("s0", "sum", row["sequence"] - 2)
    assert row["details"] == {"bet": {"$number": "-inf"}}


def test_a_stream_that_ends_early_says_so_and_the_others_go_on(no_view: None) -> None:
    config = recipe(events=40, short=13)
    result = follow(config)
    check_whole(open_ledger(), config, result.id)
    [line] = running.log_lines(open_ledger(), result.id)
    assert line.endswith("stream s2 ended after 13 events")


def test_a_source_that_throws_ends_the_run_in_one_line_and_what_was_before_is_kept(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = config.model_copy(update={"adding": Adding(events=40, broken=22)})
    with pytest.raises(PisteError, match=r"^the source failed at event 20: OSError: the line is dead$"):
        follow(broken, "line")
    ledger = open_ledger()
    assert {stream["sequence"] for stream in ledger.streams.standing("line")} == {20}
    assert ledger.run("line").status == "failed"
    monkeypatch.setattr(adding_streams.Source, "__init__", _mended)
    assert piste.resume("line", local=True).status == "finished"
    check_whole(ledger, config, "line")


def _mended(self: adding_streams.Source, config: Config, numbers: list[int]) -> None:
    self._config = config.model_copy(update={"adding": Adding(events=40)})
    self._numbers = numbers


def test_an_event_that_is_refused_ends_the_run_and_no_alarm_is_lost(config: Config) -> None:
    refusing = config.model_copy(update={"adding": Adding(events=40, refused=18)})
    with pytest.raises(PisteError, match=r"^stream s1: event 18: it is odd$"):
        follow(refusing, "odd")
    ledger = open_ledger()
    assert [stream["sequence"] for stream in ledger.streams.standing("odd")] == [20, 18, 20]
    assert [a.sequence for a in ledger.streams.alarms("odd") if a.number == 1] == [6, 17]


def test_the_same_recipe_under_an_id_goes_on_and_another_is_refused(config: Config) -> None:
    ledger = open_ledger()
    assert streams.plan(ledger, "adding", config, "mine") == "mine"
    other = config.model_copy(
        update={"adding": Adding(events=50), "seed": 4, "resources": Resources(workers=2)}
    )
    with pytest.raises(BadInput, match=r"mine is there, but .* adding.events 40 -> 50, seed 0 -> 4: give"):
        streams.plan(ledger, "adding", other, "mine")
    moved = config.model_copy(
        update={"tracking": Tracking(experiment="x"), "resources": Resources(workers=2)}
    )
    assert streams.plan(ledger, "adding", moved, "mine") == "mine"
    older = ledger.run("mine")  # planned before there was such a field
    del older.config["stream"]["shown"]
    assert streams.changed(older, config) == []
    follow(config, "mine")
    with pytest.raises(BadInput, match="has finished"):
        streams.plan(ledger, "adding", config, "mine")
    with pytest.raises(BadInput, match=r"--name '\.\./x': use letters"):
        streams.plan(ledger, "adding", config, "../x")
    with pytest.raises(BadInput, match=r"mine is there, but mine is not in the ledger in use: .* PISTE_L"):
        streams.plan(Ledger("sqlite://"), "adding", config, "mine")


def test_streams_of_no_workload_and_runs_that_are_none_are_refused(config: Config) -> None:
    with pytest.raises(BadInput, match="'quadratic' has no streams: `piste run bowl` runs it"):
        streams.plan(open_ledger(), "bowl", running.resolve({"workload": "quadratic"}, "bowl"))
    run_id = running.plan(open_ledger(), "adding", config)
    with pytest.raises(BadInput, match="it is no stream"):
        streams.plan(open_ledger(), "adding", config, run_id)


def test_streams_that_are_stopped_go_on_from_where_they_stand(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take = Shard.take
    seen: list[int] = []

    def stopping(self: Shard, first: int, count: int, batch: Any) -> Progress:
        seen.append(first)
        if first == 12:
            raise KeyboardInterrupt
        return take(self, first, count, batch)

    monkeypatch.setattr(Shard, "take", stopping)
    with pytest.raises(KeyboardInterrupt):
        follow(config, "stopped")
    monkeypatch.setattr(Shard, "take", take)
    assert open_ledger().run("stopped").status == "interrupted"
    assert seen == [0, 4, 8, 12]
    assert cli.main(["resume", "stopped", "--local"]) == 0
    assert "3 streams, 120 events, 11 alarms" in capsys.readouterr().out
    check_whole(open_ledger(), config, "stopped")
    assert open_ledger().run("stopped").attempt == 2


def test_streams_are_shown_in_mlflow_with_their_alarms_and_parameters(
    no_view: None, shown_home: Path
) -> None:
    config = recipe(batch=4, events=40)
    run_id = follow(config).id
    uri = tracking.tracking_uri()
    relay = tracking.Relay(open_ledger(), run_id, uri)
    assert relay.step()
    assert relay.pending() == 0
    client = tracking.client(uri)
    shown = client.get_run(str(relay.mlflow_run_id))
    assert shown.data.tags["piste.alarm"] == f"s1/sum at {expected(config, 1)[1][-1]}"  # the last
    assert shown.data.tags["mlflow.note.content"].startswith("Streams of **tests.platform.adding_streams**")
    assert shown.data.params["adding.events"] == "40"
    for number in range(3):
        total, alarms = expected(config, number)
        wealth = client.get_metric_history(shown.info.run_id, f"log_wealth/s{number}/sum")
        assert max((metric.step, metric.value) for metric in wealth) == (40, total)
        raised = client.get_metric_history(shown.info.run_id, f"alarm/s{number}/sum")
        assert sorted(metric.step for metric in raised) == alarms
        onsets = client.get_metric_history(shown.info.run_id, f"onset/s{number}/sum")
        assert sorted(metric.value for metric in onsets) == [alarm - 2 for alarm in alarms]


def test_wealth_is_drawn_from_nothing_to_the_highest() -> None:
    assert sparkline([0.0, 1.0, 2.0, 4.0, math.inf, -1.0, math.nan], top=4.0) == "▁▃▅█▁▁▁"
    assert len(sparkline([1.0] * 100, top=2.0)) == WIDTH


@pytest.mark.parametrize(("width", "height"), [(100, 40), (40, 15)])
def test_a_terminal_shows_wealth_alarms_and_how_fast_events_pass(
    width: int, height: int, config: Config
) -> None:
    screen = io.StringIO()
    ledger = open_ledger()
    run_id = streams.plan(ledger, "adding", config)
    view = StreamView(Console(file=screen, force_terminal=True, width=width, height=height))
    running.execute(ledger, run_id, local=True, observer=view)
    drawn = screen.getvalue()
    for part in (
        run_id,
        "s0/sum \x1b[36m▁",
        "█",
        "log-wealth",
        "alarm s2/sum at 29: onset about 27",
        "120 events",
        "a second",
    ):
        assert part in drawn


def test_sigterm_ends_streams_after_the_batch_that_is_under_way(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Shard.take

    def terminated(self: Shard, first: int, count: int, batch: Any) -> Progress:
        if first == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, first, count, batch)

    monkeypatch.setattr(Shard, "take", terminated)
    assert follow(config, "ended").status == "interrupted"
    assert {stream["sequence"] for stream in open_ledger().streams.standing("ended")} == {16}
    assert "sum/all" not in open_ledger().last_values("ended")  # what came of it is not known yet
    monkeypatch.setattr(Shard, "take", take)
    assert follow(config, "ended").status == "finished"
    check_whole(open_ledger(), config, "ended")


def test_the_command_follows_streams_and_prints_them_for_a_machine(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "adding.toml"
    path.write_text('workload = "tests.platform.adding_streams"\n[tracking]\nsystem_metrics = false\n')
    assert cli.main(["stream", str(path), "--local", "--json", "--name", "all", "--stream.batch", "4"]) == 0
    *lines, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["events"] == 120
    assert lines[-1]["log_wealth"]["s0/sum"] == expected(config, 0)[0]
    assert (last["stream"], last["status"], last["ended"]) == ("all", "finished", 3)
    assert len(last["raised"]) == last["alarms"]
    assert cli.main(["rerun", "all", "--local", "--json"]) == 0
    *lines, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["events"] == 120
    assert set(last["differences"].values()) == {0.0}
    assert cli.main(["resume", "all", "--local"]) == 2
    assert "all has finished: `piste rerun all` repeats it" in capsys.readouterr().err
    assert cli.main(["stream", str(path), "--local", "--name", "all", "--adding.events", "9"]) == 2
    assert "adding.events 40 -> 9" in capsys.readouterr().err


def test_the_command_shows_alarms_to_a_person(
    no_view: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "adding.toml"
    path.write_text('workload = "tests.platform.adding_streams"\n[tracking]\nsystem_metrics = false\n')
    assert cli.main(["stream", str(path), "--local"]) == 0
    shown = capsys.readouterr().out
    assert "3 streams, 120 events, 11 alarms" in shown
    assert "first alarms" in shown
