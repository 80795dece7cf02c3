"""What streams come to offline: the algorithms alone, each stream's events in one piece."""

from __future__ import annotations

from typing import Any

from piste.ledger import Ledger
from piste.ledger.streams import decoded
from piste_workloads.stream import Config, open_source
from piste_workloads.stream.simulated import calibration


def offline(config: Config, number: int) -> tuple[dict[str, Any], list[Any]]:
    """The detectors of a stream after all of its events, and their alarms as `(detector, alarm)`."""
    scores = open_source(config, [number]).read(0, config.events)[number]
    detectors: dict[str, Any] = {name: section.build() for name, section in config.detectors.items()}
    alarms = []
    for name, detector in detectors.items():
        detector.calibrate(calibration(config, number))
        alarms += [(name, alarm) for alarm in detector.update_many(scores)]
    return detectors, alarms


def assert_offline(ledger: Ledger, run_id: str, config: Config) -> None:
    """A run's streams have the states and alarms of the offline ones, bit for bit."""
    numbers = range(config.source.streams)
    kept = ledger.streams.states(run_id, numbers)
    assert sorted(kept) == list(numbers)
    for number, stream in kept.items():
        detectors, alarms = offline(config, number)
        for name, detector in detectors.items():
            state = detector.state_dict()
            assert {**stream.origin[name], **stream.state[name]} == state
            assert stream.wealth[name] == state["log_value"]
        assert (stream.sequence, stream.ended, stream.alarms) == (config.events, True, len(alarms))
        found = [alarm for alarm in ledger.streams.alarms(run_id) if alarm.number == number]
        assert [_facts(alarm) for alarm in found] == sorted(
            (name, a.sequence, a.onset, a.log_wealth, a.log_threshold, a.bet, a.segment) for name, a in alarms
        )
        for alarm in found:
            assert decoded(alarm.details)["parameters"] == detectors[alarm.detector].state_dict()["settings"]
    assert ledger.run(run_id).recomputed_different == 0


def _facts(alarm: Any) -> tuple[Any, ...]:
    details = alarm.details
    numbers = (alarm.sequence, alarm.onset, alarm.log_wealth, alarm.log_threshold)
    return (alarm.detector, *numbers, details["bet"], details["segment"])
