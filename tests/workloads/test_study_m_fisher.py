"""The study of M-FISHER: its comparisons on constructed runs, and what short runs leave for them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.platform.driving import NoRelay

from piste.running import RunResult, load_recipe
from piste.studies import Lab, failed, study
from piste.verdicts import Estimate
from piste_workloads.stream import Config
from piste_workloads.studies import _m_fisher_peers as peers
from piste_workloads.studies import _m_fisher_streams as streams
from piste_workloads.studies import m_fisher

DETECTION = [claim for claim in m_fisher.claims if claim.source in m_fisher.SOURCES]


def run_of(**metrics: float) -> RunResult:
    return cast(RunResult, SimpleNamespace(metrics={k.replace("__", "/"): v for k, v in metrics.items()}))


class PaperLab:
    """Answers with constructed runs: `late` and `null` by recipe, whatever else is asked."""

    scale = m_fisher.Scale(100, 1000, 2, 10, 100, 50, 40, 1, 1)

    def __init__(self, late: Mapping[str, float], null: Mapping[str, float]) -> None:
        self._metrics = {"stream-late": dict(late), "stream-null": dict(null)}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def run(self, recipe: str, metric: str, **settings: Any) -> RunResult:
        self.asked.append((recipe, settings))
        return run_of(**self._metrics[recipe])


def found(**delays: float) -> dict[str, float]:
    """Delays of settings, and that all shifts were found."""
    names = {name: name.replace("_", "-") for name in delays}
    return {f"delay/{names[n]}": d for n, d in delays.items()} | {f"detected/{names[n]}": 1.0 for n in delays}


def test_a_peer_is_compared_at_the_setting_whose_delay_is_nearest_to_ours() -> None:
    family = peers.Family(({"kind": "adwin"}, {"kind": "cusum"}, {"kind": "kswin"}), cheap=False)
    late = found(shift=60.0, setting_0=40.0, setting_1=70.0, setting_2=61.0)
    late["detected/setting-2"] = 0.9  # it missed some
    lab = PaperLab(late, {"false_alarm_rate/shift": 0.01, "false_alarm_rate/setting-1": 0.2})
    compared = peers.compared(cast(Lab, lab), family)
    assert (compared.nearest.delay, compared.nearest.false_alarms.figure) == (70.0, 0.2)
    assert (compared.ours.delay, compared.ours.false_alarms.figure) == (60.0, 0.01)
    assert compared.others == []
    recipe, asked = lab.asked[1]
    assert (recipe, list(asked["detectors"])) == ("stream-null", ["shift", "setting-1"])
    assert asked["source__streams"] == lab.scale.peer_streams


def test_a_delay_that_missed_a_shift_is_infinite() -> None:
    assert streams.delay(run_of(delay__a=3.0, detected__a=1.0), "a") == 3.0
    assert streams.delay(run_of(delay__a=3.0, detected__a=0.5), "a") == math.inf
    assert streams.delay(run_of(), "a") == math.inf


def test_a_share_of_streams_has_clopper_and_pearsons_interval() -> None:
    none = streams.proportion(0.0, 100)
    assert none.low == 0.0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 100))  # (1 - p)^n = 0.025
    assert streams.proportion(1 / 3, 3).low == pytest.approx(1 - 0.975 ** (1 / 3))


def test_the_interval_of_a_ratio_holds_both() -> None:
    metrics = {"false_alarm_rate/shift": 0.01, "false_alarm_rate/plugin-plain": 0.25}
    ratio = m_fisher.false_alarms_against("plugin-plain")(cast(Lab, PaperLab({}, metrics)))
    ours, theirs = streams.proportion(0.01, 100), streams.proportion(0.25, 100)
    assert ratio == Estimate(0.04, ours.low / theirs.high, ours.high / theirs.low)


def test_a_straight_line_has_an_r2_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path))
    metrics: dict[str, float] = {}
    for rate, name in zip(streams.RATES, streams.AT_RATES, strict=True):
        metrics |= {f"delay/{name}": 5 + 7 * math.log(2 / rate), f"detected/{name}": 1.0}
        metrics |= {f"delay_ratio/{name}": 2.0}
    monkeypatch.setattr(m_fisher, "shifted_at_once", lambda lab, shift: [run_of(**metrics)] * 2)
    assert m_fisher.linearity(0.5)(cast(Lab, None)) == pytest.approx([1.0, 1.0])
    assert (tmp_path / "studies" / "m-fisher-delays.png").stat().st_size > 1000


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_setting_fits_the_recipes(name: str) -> None:
    family = peers.PEERS[name]
    detectors = {f"setting-{number}": each for number, each in enumerate(family.settings)}
    for recipe in ("stream-late", "stream-null"):
        config = load_recipe(recipe, {"detectors": {"shift": streams.OURS} | detectors})
        assert isinstance(config, Config)
        assert list(config.detectors) == ["shift", *detectors]
    assert all(hasattr(scale, family.streams) for scale in m_fisher.scales.values())


def test_runs_leave_what_the_claims_ask_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    monkeypatch.setenv("PISTE_HOME", str(tmp_path))
    few = {name: peers.PEERS[name] for name in ("cusum", "adwin")}
    monkeypatch.setattr(m_fisher, "PEERS", few)
    monkeypatch.setattr(m_fisher, "LAWS", ("gamma",))
    lab = Lab(m_fisher.Scale(4, 500, 1, 3, 3, 2, 2, 1, 1), local=True)
    assert all(0.0 < ratio < 10.0 for ratio in m_fisher.against_the_bound("bootstrap", 1.0)(lab))
    assert all(0.0 < ratio < 1.0 for ratio in m_fisher.late_against("plain", 1.0)(lab))
    assert m_fisher.at_our_delay("adwin")(lab).high < 1.0
    assert m_fisher.fewest_false_alarms(lab).low < 0.0
    assert (tmp_path / "studies" / "m-fisher-false-alarms.png").stat().st_size > 1000


def test_claims_are_told_apart_and_say_where_they_come_from() -> None:
    assert len({claim.id for claim in m_fisher.claims}) == len(m_fisher.claims)
    assert len(DETECTION) == 22
    assert all(claim.sentence.endswith(".") for claim in DETECTION)


@pytest.mark.slow
def test_the_whole_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    monkeypatch.setenv("PISTE_HOME", str(tmp_path))
    began = time.monotonic()
    verdicts = study("m_fisher", local=True)
    print(f"{time.monotonic() - began:.0f} s", {verdict.claim: verdict.figure for verdict in verdicts})
    assert not [verdict.how for verdict in verdicts if verdict.broken]
    assert [verdict.claim for verdict in failed(verdicts)] == []
