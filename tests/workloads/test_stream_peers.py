"""Detectors of other packages in streams: their own results, and a state that goes on to the last bit."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
from river import drift
from scipy import stats
from tests.workloads.local_runs import RunOf
from tests.workloads.offline_streams import assert_offline

from piste import running, streams
from piste.errors import BadInput
from piste.ledger import open_ledger
from piste.ledger.streams import coded, decoded
from piste_workloads import stream
from piste_workloads.stream import Config
from piste_workloads.stream.config import DetectorSection
from piste_workloads.stream.martingale_peers import Crepes, OnlineCp

pytest_plugins = ["tests.platform.fixtures"]

PEERS: dict[str, dict[str, Any]] = {
    "adwin": {"kind": "adwin", "delta": 0.05, "clock": 8},
    "page-hinkley": {"kind": "page_hinkley", "threshold": 15.0, "mode": "both"},
    "kswin": {"kind": "kswin", "alpha": 1e-3, "window_size": 40, "stat_size": 15},
    "jumper": {"kind": "online_cp", "threshold": 10.0},
    "jumpers": {"kind": "online_cp", "martingale": "composite_jumper", "threshold": 10.0},
    "mixture": {"kind": "online_cp", "martingale": "simple_mixture", "threshold": 10.0},
    "crepes-jumper": {"kind": "crepes", "threshold": 10.0},
    "sleeper": {"kind": "crepes", "martingale": "sleeper_stayer", "threshold": 10.0},
}


def built(name: str, calibration: int = 150) -> Any:
    made = DetectorSection.model_validate(PEERS[name]).build()
    made.calibrate(np.random.default_rng(1).gamma(2.0, 1.0, calibration))  # type: ignore[attr-defined]
    return made


def scores(events: int = 500) -> Any:
    """Scores with two shifts, and some that are no numbers."""
    drawn = np.random.default_rng(2).gamma(2.0, 1.0, 500)
    drawn[200:350] += 2.0
    drawn[350:] += 5.0
    drawn[[0, 7, 210, 211]] = [math.nan, math.inf, -math.inf, math.nan]
    return drawn[:events]


@pytest.mark.parametrize("name", PEERS)
def test_any_batches_with_a_way_through_strict_json_between_give_the_same_bits(name: str) -> None:
    events, whole = scores(), built(name)
    expected = whole.update_many(events)
    going, found = built(name), []
    for first, end in ((0, 1), (1, 3), (3, 190), (190, 215), (215, 216), (216, 360), (360, 500)):
        found += going.update_many(events[first:end])
        state = json.loads(json.dumps(coded(going.state_dict()), allow_nan=False))
        going = DetectorSection.model_validate(PEERS[name]).build()
        going.load_state_dict(decoded(state))
    assert found == expected
    assert len(expected) >= 1
    assert going.state_dict() == whole.state_dict()
    assert (whole.sequence, whole.skipped, whole.alarms) == (500, 4, len(expected))
    assert all(alarm.log_wealth >= alarm.log_threshold and alarm.bet == 0.0 for alarm in expected)
    assert all(0 <= alarm.onset <= alarm.sequence for alarm in expected)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("adwin", drift.ADWIN(delta=0.05, clock=8)),  # type: ignore[no-untyped-call]
        ("page-hinkley", drift.PageHinkley(threshold=15.0)),
        ("kswin", drift.KSWIN(1e-3, 40, 15, seed=0)),
    ],
)
def test_rivers_detectors_raise_their_alarms_where_river_does(name: str, theirs: Any) -> None:
    calibration = np.random.default_rng(1).gamma(2.0, 1.0, 150)
    if name == "kswin":
        theirs.window.extend(calibration[-40:].tolist())
    else:
        for score in calibration.tolist():
            theirs.update(score)
    events, expected = scores(), []
    for number in np.flatnonzero(np.isfinite(events)).tolist():
        theirs.update(float(events[number]))
        if theirs.drift_detected:
            expected.append(number)
    assert expected
    assert [alarm.sequence for alarm in built(name).update_many(events)] == expected


@pytest.mark.parametrize("name", ["adwin", "page-hinkley", "kswin"])
def test_rivers_onsets_are_near_the_shift(name: str) -> None:
    events = np.random.default_rng(5).gamma(2.0, 1.0, 450)
    events[400:] += 3.0
    first = next(alarm for alarm in built(name).update_many(events) if alarm.sequence >= 400)
    assert abs(first.onset - 400) <= 30, first


@pytest.mark.parametrize("name", ["jumper", "mixture", "crepes-jumper", "sleeper"])
def test_a_martingales_onset_follows_its_least_wealth(name: str) -> None:
    events = scores()
    first, one_by_one = built(name).update_many(events)[0], built(name)
    wealth = [0.0]
    for event in events[: first.sequence].tolist():
        assert one_by_one.update(event) is None
        wealth.append(one_by_one.log_wealth)
    # Scores that are not finite leave it as it is: the last of equal ones is before the next bet.
    assert wealth[first.onset] == min(wealth)
    assert first.log_wealth >= math.log(10.0)


def test_two_packages_agree_on_the_same_martingale() -> None:
    # crepes bets before it mixes and online-cp after: the same, as the accounts begin equal.
    calibration, events = np.random.default_rng(1).gamma(2.0, 1.0, 300), scores(190)
    ours = [kind(threshold=1e12) for kind in (OnlineCp, Crepes)]
    for detector in ours:
        detector.calibrate(calibration)
        assert detector.update_many(events) == []
    assert ours[0].log_wealth == pytest.approx(ours[1].log_wealth, abs=1e-10)
    assert ours[0].log_wealth != 0.0


def test_p_values_are_ranks_with_ties_decided_by_chance_and_uniform() -> None:
    detector = OnlineCp(seed=3)
    sample = np.random.default_rng(0).integers(0, 10, 500).astype(float)
    detector.calibrate(sample)
    new = np.random.default_rng(1).integers(0, 10, 400).astype(float)
    p = detector._evidence(new)
    for score, each in zip(new.tolist(), p.tolist(), strict=True):
        above, equal = int((sample > score).sum()), int((sample == score).sum())
        assert above / 501 < each <= (above + equal + 1) / 501
    # Over many samples they are exactly uniform, with ties and all.
    drawn = np.random.default_rng(2).integers(0, 3, (2000, 20)).astype(float)
    ranks = []
    for seed, row in enumerate(drawn):
        one = OnlineCp(seed=seed)
        one.calibrate(row[:19])
        ranks.append(float(one._evidence(row[19:])[0]))
    assert stats.kstest(ranks, "uniform").pvalue > 0.01


def test_a_package_that_is_missing_is_named_with_its_extra_and_asked_for_by_its_own_recipes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("river.drift", "online_cp.martingale", "crepes.martingales"):
        monkeypatch.setitem(sys.modules, module, None)
    Config()
    for kind, package in (("adwin", "river"), ("online_cp", "online-cp"), ("crepes", "crepes")):
        with pytest.raises(BadInput) as caught:
            running.resolve({"workload": "stream", "detectors": {"a": {"kind": kind}}}, "mine")
        assert f"{package} is missing: pip install 'piste[streams]'" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "adwin", "delta": 2.0}, "delta must be"),
        ({"kind": "page_hinkley", "mode": "sideways"}, "mode must be one of 'up', 'down', 'both'"),
        ({"kind": "kswin", "window_size": 40}, "window_size must be an integer >= 60"),
        ({"kind": "online_cp", "martingale": "jumper"}, "martingale must be one of 'simple_jumper'"),
        ({"kind": "crepes", "threshold": 1.0}, "threshold must be"),
        ({"kind": "kswin", "alpah": 0.1}, "takes no 'alpah'; did you mean 'alpha'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorSection.model_validate(options)


def test_a_state_of_other_settings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a detector with threshold=10.0, this one has 20.0"):
        OnlineCp(threshold=20.0).load_state_dict(built("jumper").state_dict())


def test_streams_of_peers_end_where_they_end_offline(no_view: None) -> None:
    small = {"source.streams": 2, "source.events": 300, "source.onset": 150, "source.calibration": 400}
    config = running.load_recipe("stream-peers", {**small, "stream.batch": 100})
    assert isinstance(config, Config)
    ledger = open_ledger()
    run_id = streams.plan(ledger, "peers", config)
    assert running.execute(ledger, run_id, local=True).status == "finished"
    assert_offline(ledger, run_id, config)


def test_a_run_with_peers_that_was_stopped_goes_on(run_of: RunOf) -> None:
    fields = {"source.streams": 1, "source.events": 200, "source.onset": 90, "stream.batch": 50}
    config = running.load_recipe("stream-peers", fields)
    whole = run_of(stream, config)
    resumed = run_of(stream, config, stop_after=2).resume()
    for key in ("train/loss", "stream/alarms", "detected/adwin", "detected/crepes", "detected/kswin"):
        assert resumed.history(key)[-1] == whole.history(key)[-1]
    assert resumed.recomputed() == 0
