"""Recorded streams: a glucose sensor, water in a pipe, ratings in polls, electricity, and NAB's.

A series' first events calibrate its detectors, those after are the stream. Neighbours depend on each other,
so that a detector's level does not hold for them as they are: means over blocks (`source.block`) and
differences (`source.score`) depend less.

- `glucose`: a continuous glucose monitor's signal (package bokeh-sampledata), in mg/dl every five minutes;
- `water_flow`: litres a second in a pipeline branch, hourly (river);
- `trump_approval`: six pollsters' ratings in percent, daily (river);
- `elec2`: prices and demands of New South Wales and Victoria (Harries 1999), a CSV file in PISTE_DATA or in
  its folder `streams`;
- `nab`: the Numenta Anomaly Benchmark (Lavin and Ahmad, arXiv:1510.03336), its folder of CSV files, as `nab`,
  or files `nab_NAME.csv` there.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput
from piste_workloads.stream.config import Config

Array = NDArray[np.float64]

FOLDER = "PISTE_DATA"  # the environment variable
_ELEC2 = ("elec2.csv", "elec.csv", "electricity-normalized.csv", "electricity.csv")
_ELEC2_COLUMNS = ("nswprice", "nswdemand", "vicprice", "vicdemand")


class RecordedSource:
    """The events of some recorded streams.

    Args:
        config: The recipe.
        numbers: The streams.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        whole = list(scores(config).values())
        begin, end = config.source.calibration, config.source.calibration + config.source.events
        self._streams = {number: whole[number][begin:end] for number in numbers}

    def read(self, first: int, count: int) -> Mapping[int, Array]:
        """Scores of each stream from sequence number `first` on; fewer where its recording ends."""
        return {number: stream[first : first + count].copy() for number, stream in self._streams.items()}


def calibration(config: Config, number: int) -> Array:
    """The scores that a stream's detectors are calibrated with: the first of its recording."""
    return list(scores(config).values())[number][: config.source.calibration]


def data_hash(config: Config) -> str:
    """The hash of all series.

    Raises:
        BadInput: They cannot be had, or do not suffice for the calibration.
    """
    digest = hashlib.sha256()
    for name, series in scores(config).items():
        if len(series) <= config.source.calibration:
            raise BadInput(
                f"{config.source.name}: the series {name} has {len(series)} events, no more than "
                f"source.calibration = {config.source.calibration}: lower that or source.block"
            )
        for detector in config.detectors.values():
            try:
                detector.build().calibrate(series[: config.source.calibration])  # type: ignore[attr-defined]
            except ValueError as error:
                raise BadInput(f"{config.source.name}: the series {name}: {error}") from None
        digest.update(name.encode() + series.tobytes())
    return digest.hexdigest()


def scores(config: Config) -> Mapping[str, Array]:
    """The scores of all series of a recording, by name.

    Raises:
        BadInput: The recording cannot be had.
    """
    return _scores(config.source.name, config.source.block, config.source.score, os.environ.get(FOLDER))


@functools.lru_cache(maxsize=4)
def _scores(name: str, block: int, score: str, folder: str | None) -> Mapping[str, Array]:
    found = {}
    for series, values in RECORDED[name](folder).items():
        whole = values[: len(values) // block * block].reshape(-1, block).mean(1)
        found[series] = np.diff(whole) if score == "difference" else whole
    return found


def _glucose(_folder: str | None) -> dict[str, Array]:
    return _columns(_packaged("bokeh_sampledata", "_data/CGM.csv.gz"), {"glucose": "glucose"})


def _water_flow(_folder: str | None) -> dict[str, Array]:
    return _columns(_packaged("river", "datasets/water-flow.csv"), {"Water flow [l/s]": "water_flow"})


def _trump_approval(_folder: str | None) -> dict[str, Array]:
    pollsters = ("gallup", "ipsos", "morning_consult", "rasmussen", "you_gov")
    path = _packaged("river", "datasets/trump_approval.csv.gz")
    return _columns(path, {name: name for name in (*pollsters, "five_thirty_eight")})


def _elec2(folder: str | None) -> dict[str, Array]:
    found = [place / name for place in _places(folder) for name in _ELEC2 if (place / name).exists()]
    if not found:
        raise BadInput(f"elec2 is not there: put {_ELEC2[0]} into the folder that {FOLDER} names")
    return _columns(found[0], {name: name for name in _ELEC2_COLUMNS})


def _nab(folder: str | None) -> dict[str, Array]:
    named: dict[str, Path] = {}
    for place in _places(folder):
        root = place / "nab"
        named |= {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.csv")}
        named |= {path.stem.removeprefix("nab_"): path for path in place.glob("nab_*.csv")}
    if not named:
        raise BadInput(
            f"NAB is not there: put its folder `data`, as nab, into the folder that {FOLDER} names"
        )
    return {name: _columns(path, {"value": name})[name] for name, path in sorted(named.items())}


def _places(folder: str | None) -> list[Path]:
    """Where files may lie that no package has."""
    return [Path(folder), Path(folder) / "streams"] if folder else []


RECORDED: dict[str, Callable[[str | None], dict[str, Array]]] = {
    "glucose": _glucose,
    "water_flow": _water_flow,
    "trump_approval": _trump_approval,
    "elec2": _elec2,
    "nab": _nab,
}


def _packaged(package: str, name: str) -> Path:
    """A file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"{package} is missing: pip install 'piste[streams]'")
    return Path(spec.submodule_search_locations[0]) / name


def _columns(path: Path, names: Mapping[str, str]) -> dict[str, Array]:
    """Columns of a CSV file by their new names; a field that holds no number is NaN."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    reader = csv.DictReader(io.StringIO(content.decode("utf-8")))
    lacking = [name for name in names if name not in (reader.fieldnames or ())]
    if lacking:
        raise BadInput(f"{path}: no column {lacking[0]!r}")
    rows = list(reader)
    return {new: np.array([_number(row[name]) for row in rows]) for name, new in names.items()}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
