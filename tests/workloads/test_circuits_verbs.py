"""A trained circuit's verbs, on files in and out."""

from __future__ import annotations

import csv
import importlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from piste.checkpoints import CheckpointError, CheckpointStore
from piste.config import validate
from piste.errors import BadInput
from piste_algorithms.circuits import Circuit, hmm
from piste_workloads.circuits import Config, impute, sample, save, score
from piste_workloads.circuits.rows import Encoding
from piste_workloads.circuits.train import state_of

pyarrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))  # they have no types

DNA = Encoding("dna", 4, (6,))
LABELLED = Encoding("dna", 4, (5,), label=2)
TEXT = Encoding("text", 4, (6,), alphabet="abc ", lower=True)
NUMBERS = Encoding("numbers", 4, (1, 2, 3))
CONFIG = validate(Config, {"workload": "circuits"}, "test")


@pytest.fixture
def circuit() -> Circuit:
    return hmm(6, 3, 4, homogeneous=False, dtype=torch.float64)


Keep = Callable[[Encoding], Path]


@pytest.fixture
def keep(circuit: Circuit, tmp_path: Path) -> Keep:
    """Writes a checkpoint of the circuit with an encoding; returns its folder."""

    def write(encoding: Encoding) -> Path:
        store = CheckpointStore(tmp_path / "checkpoints")
        store.write(1, 0, state_of(circuit, encoding))
        store.commit(1)
        return store.path(1)

    return write


def enumerated(circuit: Circuit, row: list[int]) -> float:
    """The log-likelihood of a row with missing values by summing over all ways to complete it."""
    ways = itertools.product(*(range(4) if value < 0 else [value] for value in row))
    return float(circuit.log_likelihood(torch.tensor(list(ways))).logsumexp(0))


def test_windows_of_fasta_are_scored(circuit: Circuit, keep: Keep, tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">one\nACGTNRAC\n>two\nGGGTTT\n")
    answer = score(CONFIG, keep(DNA), str(path))
    rows = [[0, 1, 2, 3, -1, -1], [0, 1, -1, -1, -1, -1], [2, 2, 2, 3, 3, 3]]
    wanted = [enumerated(circuit, row) for row in rows]
    assert [found["log_likelihood"] for found in answer["scores"]] == pytest.approx(wanted, rel=1e-10)
    assert [(found["row"], found["start"]) for found in answer["scores"]] == [
        ("one", 0),
        ("one", 6),
        ("two", 0),
    ]
    assert [found["observed"] for found in answer["scores"]] == [4, 2, 6]
    assert answer["note"] == "letters beyond ACGTN count as missing: 1 R"
    assert answer["log_likelihood"] == pytest.approx(sum(wanted) / 3)
    assert answer["bits_per_dimension"] == pytest.approx(-sum(wanted) / 12 / math.log(2))


def test_a_row_without_values_has_likelihood_one(keep: Keep, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.full((1, 6), -1))
    (found,) = score(CONFIG, keep(NUMBERS), str(path))["scores"]
    assert found["log_likelihood"] == pytest.approx(0.0, abs=1e-12)
    assert found["bits_per_dimension"] is None


def test_labels_have_probabilities(circuit: Circuit, keep: Keep, tmp_path: Path) -> None:
    path = tmp_path / "a.fa"
    path.write_text(">one\nACGTA\n")
    (found,) = score(CONFIG, keep(LABELLED), str(path))["scores"]
    joint = circuit.log_likelihood(torch.tensor([[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 0, 1]])).exp()
    assert [found["label_0"], found["label_1"]] == pytest.approx((joint / joint.sum()).tolist())


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.npy"])
def test_tables_of_every_kind_are_the_same_rows(
    name: str, circuit: Circuit, keep: Keep, tmp_path: Path
) -> None:
    rows = [[0, 1, 2, 3, None, 0], [3, 3, None, None, 1, 1]]
    path = tmp_path / name
    _save(path, rows)
    answer = score(CONFIG, keep(NUMBERS), str(path))
    wanted = [enumerated(circuit, [-1 if value is None else value for value in row]) for row in rows]
    assert [found["log_likelihood"] for found in answer["scores"]] == pytest.approx(wanted, rel=1e-10)

    out = tmp_path / f"out-{name}"
    done = impute(CONFIG, keep(NUMBERS), str(path), str(out))
    assert done["imputed"] == 3
    completed = _load(out)
    for given, found in zip(rows, completed, strict=True):
        assert all(a is None or a == b for a, b in zip(given, found, strict=True))
        assert all(0 <= value <= 3 for value in found)


def _save(path: Path, rows: list[list[int | None]]) -> None:
    names = [f"pixel {number}" for number in range(6)]
    if path.suffix == ".csv":
        lines = [",".join("" if value is None else str(value) for value in row) for row in rows]
        path.write_text("\n".join([",".join(names), *lines]))
    elif path.suffix == ".parquet":
        columns = zip(*rows, strict=True)
        parquet.write_table(pyarrow.table({k: list(c) for k, c in zip(names, columns, strict=True)}), path)
    else:
        numbers = [[math.nan if value is None else value for value in row] for row in rows]
        np.save(path, np.array(numbers).reshape(2, 1, 2, 3))


def _load(path: Path) -> list[list[int]]:
    if path.suffix == ".csv":
        head, *lines = list(csv.reader(path.read_text().splitlines()))
        assert head[0] == "pixel 0"
        return [[int(cell) for cell in line] for line in lines]
    if path.suffix == ".parquet":
        return [list(row.values()) for row in parquet.read_table(path).to_pylist()]
    rows: list[list[int]] = np.load(path).tolist()
    return rows


def test_imputed_values_follow_the_conditional_distribution(
    circuit: Circuit, keep: Keep, tmp_path: Path
) -> None:
    given, completed = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(given, np.tile([0, 1, -1, 3, 2, 1], (4000, 1)))
    impute(CONFIG, keep(NUMBERS), str(given), str(completed), seed=3)
    found = np.bincount(np.load(completed)[:, 2], minlength=4) / 4000
    ways = torch.tensor([[0, 1, value, 3, 2, 1] for value in range(4)])
    wanted = circuit.log_likelihood(ways).softmax(0).numpy()
    assert np.abs(found - wanted).max() < 4 * 0.5 / math.sqrt(4000)  # four standard errors at most


def test_the_most_probable_completion_is_the_circuits(circuit: Circuit, keep: Keep, tmp_path: Path) -> None:
    path, out = tmp_path / "a.npy", tmp_path / "b.npy"
    x = torch.tensor([[0, -1, -1, 3, 2, 1]])
    np.save(path, x.numpy())
    impute(CONFIG, keep(NUMBERS), str(path), str(out), method="most-probable")
    assert np.load(out).tolist() == circuit.mpe(x).tolist()


@pytest.mark.parametrize("name", ["a.fa", "a.fna.gz"])
def test_fasta_is_completed_to_its_own_length(name: str, keep: Keep, tmp_path: Path) -> None:
    path, out = tmp_path / "in.fa", tmp_path / name
    path.write_text(">one\nACGTNNAC\n>two\nGNGTTT\n")
    assert impute(CONFIG, keep(DNA), str(path), str(out))["imputed"] == 3
    from piste_workloads.circuits.fasta import read

    found = read(out, "x").records
    assert {name: len(bases) for name, bases in found.items()} == {"one": 8, "two": 6}
    assert found["one"][[0, 1, 2, 3, 6, 7]].tolist() == [0, 1, 2, 3, 0, 1]
    assert all(bool((bases >= 0).all()) for bases in found.values())


def test_text_is_completed_where_it_has_gaps(keep: Keep, tmp_path: Path) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("ab_ca?b\n\nCAB\nb__c\n", encoding="utf-8")
    answer = impute(CONFIG, keep(TEXT), str(path), str(out))
    lines = out.read_text().split("\n")
    assert [len(line) for line in lines] == [7, 3, 4, 0]
    assert lines[1] == "cab"
    assert lines[0][:2] + lines[0][3:] == "abca b"  # what is no letter is a space
    assert "_" not in out.read_text()
    assert answer["imputed"] == 3
    assert "upper case counts as lower case" in answer["note"]
    assert answer["note"].endswith("such lines: 2")
    path.write_text("ab_ca b\n", encoding="utf-8")
    assert impute(CONFIG, keep(TEXT), str(path), str(out))["note"] == ""


def test_samples_come_from_the_seed(circuit: Circuit, keep: Keep, tmp_path: Path) -> None:
    place = keep(DNA)
    first, again = (sample(CONFIG, place, count=5, seed=1)["samples"] for _ in range(2))
    assert first == again != sample(CONFIG, place, count=5, seed=2)["samples"]
    assert {len(text) for text in first} == {6}
    out = tmp_path / "s.csv"
    sample(CONFIG, place, count=5, seed=1, output=str(out))
    lines = list(csv.reader(out.read_text().splitlines()))
    assert lines[0] == ["x0", "x1", "x2", "x3", "x4", "x5"]
    assert ["".join("ACGT"[int(cell)] for cell in line) for line in lines[1:]] == first


@pytest.mark.parametrize("name", ["s.csv", "s.parquet", "s.npy"])
def test_scores_are_written(name: str, keep: Keep, tmp_path: Path) -> None:
    path, out = tmp_path / "a.fa", tmp_path / name
    path.write_text(">one\nACGTAC\n>two\nGGGTTT\n")
    wanted = [row["log_likelihood"] for row in score(CONFIG, keep(DNA), str(path))["scores"]]
    answer = score(CONFIG, keep(DNA), str(path), output=str(out))
    assert "scores" not in answer
    if name.endswith(".csv"):
        found = [float(row["log_likelihood"]) for row in csv.DictReader(out.read_text().splitlines())]
    elif name.endswith(".parquet"):
        found = parquet.read_table(out).column("log_likelihood").to_pylist()
    else:
        found = np.load(out).tolist()
    assert found == wanted


def test_a_saved_circuit_is_the_same(circuit: Circuit, keep: Keep, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(CONFIG, keep(DNA), str(path))
    x = torch.tensor([[0, 1, 2, 3, -1, 0]])
    assert torch.equal(Circuit.load(path).log_likelihood(x), circuit.log_likelihood(x))


def _rows(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b,c,d,e,f\n0,1,2,3,0,1\n0,1,7,3,0,1\n", "row 2, column c: 7 is no category"),
        ("a.csv", "0,1,2,3,0,1\n0,1,2,3,0,-2\n", "row 2, column x5: -2 is no category"),
        ("a.csv", "0,1,2.5,3,0,1\n", "row 1, column x2: 2.5 is no category: use a whole number from 0 to 3"),
        ("a.csv", "a,b,c,d,e,f\n0,1,two,3,0,1\n", "row 1, column c: 'two' is no number"),
        ("a.csv", "0,1,2,3,0,1\n0,1\n", "row 2 has 2 columns, and the first has 6"),
        ("a.csv", "0,1\n", "it has 2 columns, and the circuit 6 variables"),
        ("a.csv", "a,b,c,d,e,f\n", "there are no rows in it"),
        ("a.csv", "", "there are no rows in it"),
        ("a.npy", "no array", "it is no NPY file of numbers"),
        ("a.npy", "", "it is no NPY file of numbers"),
        ("a.parquet", "no table", "a.parquet: "),
        ("a.fa", "ACGT\n", "no FASTA"),
        ("a.doc", "", r"name a file that ends in .fa, .fasta, .fna, .csv, .parquet, .npy"),
    ],
)
def test_broken_input_is_told_in_one_line(
    name: str, content: str, message: str, keep: Keep, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        score(CONFIG, keep(DNA), _rows(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_asked_is_refused(keep: Keep, tmp_path: Path) -> None:
    place = keep(DNA)
    whole = _rows(tmp_path / "a.fa", ">one\nACGTACGG\n")
    cases: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (score, {"input": str(tmp_path / "absent.csv")}, "no such file"),
        (score, {"input": ""}, "name a file that ends in"),
        (score, {"input": whole, "output": "a.fa"}, "scores are written to"),
        (impute, {"input": whole}, "nothing is missing in it"),
        (impute, {"input": whole, "method": "mean"}, "must be sample or most-probable"),
        (impute, {"input": whole, "output": "a.doc"}, "name a file that ends in"),
        (sample, {"count": 0}, "count = 0 must be at least 1"),
        (sample, {"output": str(tmp_path / "no" / "a.csv")}, "cannot be written"),
        (save, {"output": str(tmp_path / "no" / "c.safetensors")}, "there is no folder"),
    ]
    for verb, options, message in cases:
        with pytest.raises(BadInput, match=message):
            verb(CONFIG, place, **options)
    text = _rows(tmp_path / "a.txt", "abc\n")
    with pytest.raises(BadInput, match="not in the circuit's alphabet"):
        score(CONFIG, keep(TEXT), text, missing="a")


def test_rows_of_probability_zero_cannot_be_completed(keep: Keep, circuit: Circuit, tmp_path: Path) -> None:
    emission: Tensor = circuit.parameters()["emission"]
    emission[0] = torch.tensor([0.0, 0.5, 0.25, 0.25], dtype=torch.float64)
    circuit.set_parameters({"emission": emission})
    path = tmp_path / "a.npy"
    np.save(path, np.array([[0, -1, 1, 1, 1, 1]]))
    assert score(CONFIG, keep(NUMBERS), str(path))["log_likelihood"] == -math.inf
    with pytest.raises(BadInput, match="probability zero"):
        impute(CONFIG, keep(NUMBERS), str(path))


def test_checkpoints_of_another_version_are_refused(tmp_path: Path, circuit: Circuit) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step, change in ((1, {"circuits": 99}), (2, {"circuits": None})):
        store.write(step, 0, {**state_of(circuit, DNA), **change})
        store.commit(step)
    with pytest.raises(CheckpointError, match="of version 99"):
        sample(CONFIG, store.path(1))
    with pytest.raises(CheckpointError, match="not one of the workload circuits"):
        sample(CONFIG, store.path(2))


def test_circuit_files_of_another_version_are_refused(keep: Keep, tmp_path: Path) -> None:
    from piste_workloads.circuits.building import load_circuit

    path = tmp_path / "c.safetensors"
    save(CONFIG, keep(DNA), str(path))
    with safe_open(path, framework="pt") as file:
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tables, path, {**file.metadata(), "version": "99"})
    with pytest.raises(BadInput, match=r"model.path: .* is a circuit of format version '99'"):
        load_circuit(path, "model.path")
