"""Recorded streams: what is read, what becomes of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from river.datasets import TrumpApproval, WaterFlow
from tests.platform.driving import write

from piste import running, streams
from piste.errors import BadInput
from piste.ledger import open_ledger
from piste_workloads.stream import Config, open_source, prepare_data, stream_names
from piste_workloads.stream.recorded import calibration, scores

pytest_plugins = ["tests.platform.fixtures"]


def _all(dataset: Any) -> list[Any]:
    return list(dataset())


def recorded(name: str, **source: Any) -> Config:
    table = {"source": {"name": name, "calibration": 400, **source}, "tracking": {"system_metrics": False}}
    config = running.resolve({"workload": "stream", **table}, name)
    assert isinstance(config, Config)
    return config


def test_water_flows_as_river_says() -> None:
    flow = np.array([y for _, y in _all(WaterFlow)])
    config = recorded("water_flow")
    np.testing.assert_array_equal(scores(config)["water_flow"], flow)
    np.testing.assert_array_equal(calibration(config, 0), flow[:400])
    source = open_source(config, [0])
    np.testing.assert_array_equal(source.read(0, 5000)[0], flow[400:])
    np.testing.assert_array_equal(source.read(700, 200)[0], flow[1100:])


def test_ratings_are_as_river_says_and_streams_each() -> None:
    config = recorded("trump_approval")
    rows = _all(TrumpApproval)
    names = stream_names(config)
    assert names == ["gallup", "ipsos", "morning_consult", "rasmussen", "you_gov", "five_thirty_eight"]
    for name, series in scores(config).items():
        theirs = [y if name == "five_thirty_eight" else x[name] for x, y in rows]
        np.testing.assert_array_equal(series, theirs)


def test_glucose_is_that_of_the_package() -> None:
    glucose = pytest.importorskip("bokeh_sampledata.glucose").data["glucose"]
    np.testing.assert_array_equal(scores(recorded("glucose"))["glucose"], glucose.to_numpy(dtype=float))


def test_blocks_are_averaged_and_differences_taken_between_them() -> None:
    flow = scores(recorded("water_flow"))["water_flow"]
    blocks = scores(recorded("water_flow", block=3))["water_flow"]
    assert len(blocks) == len(flow) // 3
    np.testing.assert_allclose(blocks[:2], [flow[:3].mean(), flow[3:6].mean()])
    np.testing.assert_allclose(
        scores(recorded("water_flow", block=3, score="difference"))["water_flow"], np.diff(blocks)
    )


def test_files_of_ones_own_are_read_and_gaps_are_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISTE_DATA", str(tmp_path))
    write(tmp_path / "nab" / "real" / "taxi.csv", "timestamp,value\n1,2.5\n2,\n3,x\n4,1e3\n")
    write(tmp_path / "nab" / "ads.csv", "timestamp,value\n1,7\n")
    write(tmp_path / "elec2.csv", "date,nswprice,nswdemand,vicprice,vicdemand\n1,0.1,0.2,0.3,0.4\n")
    write(tmp_path / "streams" / "nab_speed.csv", "timestamp,value\n1,5\n")
    found = scores(recorded("nab"))
    assert list(found) == ["ads", "real/taxi", "speed"]
    np.testing.assert_array_equal(found["real/taxi"], [2.5, np.nan, np.nan, 1000.0])
    assert {name: list(series) for name, series in scores(recorded("elec2")).items()} == {
        "nswprice": [0.1],
        "nswdemand": [0.2],
        "vicprice": [0.3],
        "vicdemand": [0.4],
    }
    with pytest.raises(BadInput, match=r"series ads has 1 events, no more than source.calibration = 400"):
        prepare_data(recorded("nab"))


def test_a_series_that_cannot_calibrate_its_detectors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISTE_DATA", str(tmp_path))
    gaps = "\n".join(f"{n},{'x' if n < 395 else n % 7}" for n in range(500))
    write(tmp_path / "nab" / "gaps.csv", f"timestamp,value\n{gaps}\n")
    with pytest.raises(BadInput, match=r"^nab: the series gaps: .* at least 326 finite .*, got 5$"):
        prepare_data(recorded("nab"))


@pytest.mark.parametrize(("name", "message"), [("elec2", "put elec2.csv into"), ("nab", "PISTE_DATA names")])
def test_what_is_not_there_is_one_line(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PISTE_DATA", raising=False)
    with pytest.raises(BadInput, match=message):
        prepare_data(recorded(name))
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    monkeypatch.setattr("piste_workloads.stream.recorded._scores", _uncached())
    with pytest.raises(BadInput, match=r"river is missing: pip install 'piste\[streams\]'"):
        prepare_data(recorded("water_flow"))


def _uncached() -> Any:
    from piste_workloads.stream import recorded as module

    return module._scores.__wrapped__


def test_a_recorded_stream_is_followed_to_its_end(no_view: None) -> None:
    config = recorded("water_flow", score="difference")
    ledger = open_ledger()
    run_id = streams.plan(ledger, "water", config)
    result = running.execute(ledger, run_id, local=True)
    assert result.status == "finished"
    assert result.metrics["stream/events"] == len(_all(WaterFlow)) - 1 - 400
    assert result.metrics["alarmed/shift"] in {0.0, 1.0}
    [line] = running.log_lines(ledger, run_id)
    assert line.endswith("stream water_flow ended after 867 events")
    assert ledger.run(run_id).provenance["data_hash"] == prepare_data(config)
