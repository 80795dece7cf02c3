"""The workload `stream`: detectors on streams, what is refused, and what comes of them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from tests.workloads.local_runs import RunOf
from tests.workloads.offline_streams import assert_offline, offline

from piste import catalog, running, streams
from piste.config import Tracking
from piste.errors import BadInput, PisteError
from piste.ledger import open_ledger
from piste.ledger.streams import coded, decoded
from piste.shards import Pace
from piste_workloads import stream
from piste_workloads.stream import Config, open_processor, open_source, summarize
from piste_workloads.stream.config import DetectorSection, Source

pytest_plugins = ["tests.platform.fixtures"]


def detectors(**sections: dict[str, Any]) -> dict[str, DetectorSection]:
    return {name: DetectorSection.model_validate(section) for name, section in sections.items()}


ALL = detectors(
    shift={"two_sided": True},
    plain={"kind": "shift", "onset": "plain"},
    conformal={"kind": "conformal"},
    cusum={"kind": "cusum", "average_run_length": 500},
    roberts={"kind": "shiryaev_roberts", "average_run_length": 500},
)


def small(**changes: Any) -> Config:
    source = Source(streams=3, events=700, calibration=500, shift=1.0, onset=300)
    made = Config(source=source, stream=Pace(batch=100), tracking=Tracking(system_metrics=False))
    return made.model_copy(update=changes)


def test_streams_of_every_detector_end_where_they_end_offline(no_view: None) -> None:
    config = small(detectors=ALL)
    ledger = open_ledger()
    run_id = streams.plan(ledger, "all", config)
    assert running.execute(ledger, run_id, local=True).status == "finished"
    assert_offline(ledger, run_id, config)
    assert {alarm.detector for alarm in ledger.streams.alarms(run_id)} == set(ALL)


def test_a_saved_processor_goes_on_bit_for_bit_after_a_way_through_strict_json() -> None:
    config = small(detectors=ALL)
    events = open_source(config, [0]).read(0, 700)[0]
    processor: Any = open_processor(config, 0, None)
    saved = (processor.origin(), processor.state())  # CUSUM's statistic is minus infinity here
    alarms = list[Any]()
    for first in range(0, 700, 50):
        text = json.dumps([coded(part) for part in saved], allow_nan=False)
        processor = open_processor(config, 0, tuple(decoded(json.loads(text))))
        alarms += processor.take(events[first : first + 50]).alarms
        saved = (processor.origin(), processor.state())
    whole, raised = offline(config, 0)
    assert {name: d.state_dict() for name, d in processor.detectors.items()} == {
        name: d.state_dict() for name, d in whole.items()
    }
    assert len(alarms) == len(raised)


def test_scores_that_are_not_finite_are_counted_and_never_bet_on() -> None:
    config = small()
    scores = open_source(config, [0]).read(0, 700)[0]
    broken = np.insert(scores, [0, 5, 5, 400], [math.nan, math.inf, -math.inf, math.nan])
    clean, skipping = (open_processor(config, 0, None) for _ in range(2))
    clean.take(scores)
    skipping.take(broken)
    assert skipping.wealth == clean.wealth
    assert (clean.skipped, skipping.skipped) == (0, 4)


def test_a_score_that_is_to_be_refused_ends_the_stream_after_what_came_before(
    no_view: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(detectors=detectors(shift={"non_finite": "raise"}))
    expected = [a.sequence for _, a in offline(config, 1)[1] if a.sequence < 442]
    assert expected
    read = stream.train.__globals__["SimulatedSource"].read

    def broken(self: Any, first: int, count: int) -> Any:
        events = dict(read(self, first, count))
        if first <= 442 < first + count:
            events[1][442 - first] = math.nan
        return events

    monkeypatch.setattr(stream.train.__globals__["SimulatedSource"], "read", broken)
    ledger = open_ledger()
    run_id = streams.plan(ledger, "nan", config)
    with pytest.raises(PisteError, match=r"^stream gamma-1: event 442: its score is nan$"):
        running.execute(ledger, run_id, local=True)
    assert [s["sequence"] for s in ledger.streams.standing(run_id)] == [500, 442, 500]
    assert [a.sequence for a in ledger.streams.alarms(run_id) if a.number == 1] == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"source": {"calibration": 100}}, "'shift' needs at least 326 calibration events at this level"),
        ({"source": {"name": "gama"}}, "source.name: Input should be 'gamma'"),
        ({"detectors": {"a": {"kind": "shfit"}}}, "unknown kind of detector 'shfit'; did you mean 'shift'"),
        (
            {"detectors": {"a": {"false_alarm": 0.1}}},
            "takes no 'false_alarm'; did you mean 'false_alarm_rate'",
        ),
        ({"detectors": {"a": {"false_alarm_rate": 1.5}}}, "false_alarm_rate must be"),
        ({"detectors": {}}, "at least 1 item"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(table: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        running.resolve({"workload": "stream", **table}, "mine")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_of_streams_is_the_same_as_following_them(run_of: RunOf, no_view: None) -> None:
    config = small(detectors=ALL)
    run = run_of(stream, config, stop_after=3).resume()
    ledger = open_ledger()
    followed = running.execute(ledger, streams.plan(ledger, "same", config), local=True)
    for key in ("stream/alarms", "stream/alarmed", "delay/shift", "false_alarm_rate/cusum", "detected/plain"):
        assert run.history(key)[-1][1] == followed.metrics[key]
    wealth = [s["wealth"]["shift"] for s in ledger.streams.standing(followed.id)]
    assert run.history("train/loss")[-1] == (7, -sum(wealth) / 3)


def alarm(number: int, sequence: int, onset: int = 0) -> dict[str, Any]:
    return {"number": number, "detector": "shift", "sequence": sequence, "onset": onset}


def test_delays_are_those_of_first_alarms_after_the_shift_on_streams_without_a_false_one() -> None:
    ends = [{"number": number, "sequence": 700} for number in range(4)]
    alarms = [alarm(0, 299), alarm(0, 310), alarm(1, 300, 302), alarm(1, 320), alarm(2, 308, 296)]
    found = summarize(small(), ends, alarms)
    assert found["false_alarm_rate/shift"] == 1 / 4
    assert found["detected/shift"] == 2 / 3
    assert found["delay/shift"] == (1 + 9) / 2  # the first shifted event is number 300
    assert found["onset_error/shift"] == 3.0
    null = small(source=Source(streams=4, events=700, calibration=500))
    assert summarize(null, ends, alarms) == {"false_alarm_rate/shift": 3 / 4}


def test_the_recipes_of_streams_are_valid_and_show_what_they_are_for(no_view: None) -> None:
    names = [name for name in catalog.members("recipes") if name.startswith("stream-")]
    assert {"stream-null", "stream-delay", "stream-late"} <= set(names)
    for name in names:
        config = running.load_recipe(name)
        assert isinstance(config, Config)
        assert config.optimizer.name == "adamw"  # none is asked for


def test_a_late_shift_is_found_sooner_by_the_mixture_over_onsets(run_of: RunOf) -> None:
    config = running.load_recipe("stream-late", {"source.streams": 24, "source.events": 1600})
    assert isinstance(config, Config)
    run = run_of(stream, config)
    late = {name: run.history(f"delay/{name}")[-1][1] for name in ("shift", "plain")}
    assert run.history("detected/shift")[-1][1] == 1.0
    assert late["shift"] <= 0.4 * late["plain"]
