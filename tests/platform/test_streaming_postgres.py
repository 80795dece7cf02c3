"""Streams in PostgreSQL: states to the last bit, and two shards that speak at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.platform import adding_streams
from tests.platform.adding_streams import Adding, Config
from tests.platform.ledgers import COLUMNS
from tests.platform.test_streaming import advance, check_whole

from piste.config import Tracking
from piste.ledger import Ledger, LedgerError
from piste.ledger.streams import Commit
from piste.shards import Feed, Pace, Shard, read, shards_of

pytest_plugins = ["tests.platform.fixtures", "tests.platform.postgres"]


def test_two_shards_commit_at_once(postgres_url: str, tmp_path: Path) -> None:
    ledger = Ledger(postgres_url)
    ledger.create(**(COLUMNS | {"id": "run", "directory": str(tmp_path)}))
    attempt = ledger.begin_attempt("run")
    config = Config(
        adding=Adding(streams=5, events=60), stream=Pace(batch=4), tracking=Tracking(system_metrics=False)
    )

    def follow(numbers: list[int]) -> None:
        mine = Ledger(postgres_url)
        shard = Shard(adding_streams, config, numbers, mine.streams, "run", attempt)
        source = adding_streams.open_source(config, numbers)
        feed = Feed(shard.open(), 4, window=1)
        while not feed.ended:
            first, count = next(feed.due())
            batch = read(source, first, count)
            feed.answered(first, shard.take(first, count, batch))
            shard.take(first, count, batch)  # it comes twice

    threads = [threading.Thread(target=follow, args=(numbers,)) for numbers in shards_of(5, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_whole(ledger, config)
    assert ledger.streams.states("run", [0])[0].state["never"] == float("-inf")


def test_a_commit_of_an_attempt_that_is_over_is_refused(postgres_url: str, tmp_path: Path) -> None:
    ledger = Ledger(postgres_url)
    ledger.create(**(COLUMNS | {"id": "run", "directory": str(tmp_path)}))
    first = ledger.begin_attempt("run")
    ledger.streams.open("run", [{"number": 0, "name": "a", "wealth": {}, "origin": {}, "state": {}}])
    assert ledger.streams.commit(Commit("run", first, (advance(0, 4),))) == {0: 4}
    ledger.begin_attempt("run")
    with pytest.raises(LedgerError, match="attempt 1 is over"):
        ledger.streams.commit(Commit("run", first, (advance(4, 8),)))
