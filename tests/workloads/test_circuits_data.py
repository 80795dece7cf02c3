"""Rows for circuits, held to the files they come from and to independent readers of those."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from Bio import SeqIO
from Bio.Seq import Seq
from sklearn.datasets import load_digits

from piste.config import validate
from piste.errors import BadInput
from piste_workloads.circuits import Config, dna, fasta
from piste_workloads.circuits.data import open_rows
from piste_workloads.circuits.rows import Encoding, Rows, evenly, windows
from piste_workloads.circuits.spelling import spell
from piste_workloads.circuits.text import encode
from piste_workloads.llm.tokens import Tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def config_of(**data: Any) -> Config:
    return validate(Config, {"workload": "circuits", "data": data}, "test")


def rows_of(**data: Any) -> Rows:
    return open_rows(config_of(**data).data)


def text_rows(folder: Path, text: str, **data: Any) -> Rows:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return rows_of(kind="text", source="file", path=str(path), **data)


SENTENCE = "In the beginning -- God created\nthe heaven; and the earth. "
LETTERS = "in the beginning god created the heaven and the earth "


def test_windows_follow_each_other() -> None:
    assert windows(np.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_some_rows_are_evenly_spaced() -> None:
    assert evenly(np.arange(10)[:, None], 4)[:, 0].tolist() == [0, 2, 5, 7]
    assert len(evenly(np.arange(10)[:, None], 0)) == 10


def test_letters_are_the_text_in_lower_case(tmp_path: Path) -> None:
    rows = text_rows(tmp_path, SENTENCE * 40, length=9)
    assert rows.encoding.categories == 27
    assert "".join(spell(rows.parts["train"], rows.encoding)).startswith(LETTERS * 20)


def test_parts_of_a_text_follow_each_other(tmp_path: Path) -> None:
    rows = text_rows(tmp_path, SENTENCE * 100, length=6, validation_fraction=0.2, test_fraction=0.1)
    counts = {part: 6 * len(rows.parts[part]) for part in rows.parts}
    whole = len(LETTERS) * 100
    for part, share in (("train", 0.7), ("valid", 0.2), ("test", 0.1)):
        assert abs(counts[part] - share * whole) <= 12, part
    valid = "".join(spell(rows.parts["valid"], rows.encoding))
    assert valid in LETTERS * 100


def test_characters_that_training_has_not_seen_are_missing(tmp_path: Path) -> None:
    text = "abcab " * 60 + "xbc" * 10
    rows = text_rows(tmp_path, text, units="characters", length=3, validation_fraction=0.1, test_fraction=0.1)
    assert rows.encoding.alphabet == " abc"
    assert int((rows.parts["train"] < 0).sum()) == 0
    test = "".join(spell(rows.parts["test"], rows.encoding))
    assert "_" in test
    assert test.replace("_", "x") in text


def test_letters_read_back_as_they_are_written() -> None:
    assert encode("Zoë & Åsa", "abcdefghijklmnopqrstuvwxyz ", lower=True).tolist() == [25, 14, 26, 18, 0]
    assert encode("b?a", "ba").tolist() == [0, -1, 1]


def test_tokens_are_those_of_the_language_model(tmp_path: Path) -> None:
    text = SENTENCE * 200
    rows = text_rows(tmp_path, text, units="tokens", vocab_size=290, length=16)
    tokenizer = Tokenizer(rows.encoding.tokenizer)
    assert tokenizer.vocab_size == rows.encoding.categories == 290
    assert text.startswith(tokenizer.decode(rows.parts["train"].flatten().tolist()))


def test_the_king_james_bible_has_its_letters() -> None:
    rows = rows_of(kind="text", length=64, rows=100, held_out_rows=10)
    assert [len(rows.parts[part]) for part in ("train", "valid", "test")] == [100, 10, 10]
    assert spell(rows.parts["train"][:1], rows.encoding) == [
        "in the beginning god created the heaven and the earth and the ea"
    ]


def test_a_text_that_is_too_short_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the valid part is empty"):
        text_rows(tmp_path, SENTENCE, length=32)


def test_fasta_is_what_biopython_reads(tmp_path: Path) -> None:
    path = tmp_path / "some.fna.gz"
    path.write_bytes(gzip.compress(b">one first\nACGTac\r\ngtNN\n>two\n\nGGG\nTTTRYK\n"))
    with gzip.open(path, "rt") as file:
        records = SeqIO.parse(file, "fasta")  # type: ignore[no-untyped-call]
        wanted = {record.id: str(record.seq).upper() for record in records}
    found = fasta.read(path, "data")
    assert found.others == {"K": 1, "R": 1, "Y": 1}
    assert found.told() == "letters beyond ACGTN count as missing: 1 K, 1 R, 1 Y"
    for name, letters in wanted.items():
        assert found.records[name].tolist() == ["ACGT".find(letter) for letter in letters]


def test_fasta_is_written_as_it_is_read() -> None:
    bases = np.random.default_rng(0).integers(-1, 4, 200)
    assert fasta.parse(fasta.write([("a", bases)]).encode(), "x").records["a"].tolist() == bases.tolist()


def test_the_other_strand_is_biopythons() -> None:
    letters = "ACGTNNGATTACA"
    wanted = str(Seq(letters).reverse_complement())  # type: ignore[no-untyped-call]
    assert fasta.reverse_complement(fasta.encode(letters.encode())).tolist() == [
        "ACGT".find(letter) for letter in wanted
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ACGT\n", "no FASTA"),
        (b"", "no FASTA"),
        (b">a\n>b\nAC\n", "the sequence a is empty"),
        (b">a\nAC\n>a\nAC\n", "two sequences are named a"),
        (b"\x1f\x8bno gzip", "cannot be read"),
    ],
)
def test_broken_fasta_is_bad_input(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.fna"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        fasta.read(path, "data")


def test_flies_are_split_by_species() -> None:
    rows = rows_of(kind="dna", length=100, train=["simulans", "santomea"], rows=50)
    assert len(rows.parts["train"]) == 50
    assert [told["source"].split(": ")[1] for told in rows.table()] == [
        "simulans, santomea",
        "melanogaster",
        "teissieri",
    ]
    # 1,348,131 bases of melanogaster's chromosome 4, of which 17,000 N are together.
    assert 13_300 <= len(rows.parts["valid"]) <= 13_312
    assert bool((rows.parts["valid"] >= 0).any(1).all())


def test_dna_of_files_tells_its_other_letters(tmp_path: Path) -> None:
    for name, content in (("a", ">s\nACGTNNRRACGT\n"), ("b", ">s\nACGTACGT\n"), ("c", ">s\nACGTAC\n")):
        (tmp_path / f"{name}.fa").write_text(content)
    parts = {part: [str(tmp_path / f"{name}.fa")] for part, name in zip(PARTS, "abc", strict=True)}
    rows = rows_of(kind="dna", length=4, **parts)
    assert rows.parts["train"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]  # a window of nothing is left out
    assert rows.table()[0]["note"] == "letters beyond ACGTN count as missing: 2 R"


PARTS = ("train", "validation", "test")


def test_introns_are_as_many_as_the_annotations_have() -> None:
    sequences = {name: next(iter(dna._sequences(name, "x").records.values())) for name in dna.ANNOTATED}
    introns, donors, acceptors = 0, 0, 0
    for name, forward in sequences.items():
        strands = {"+": forward, "-": fasta.reverse_complement(forward)}
        found = dna.read_introns(dna._folder() / f"{dna.SPECIES[name]}.gtf.gz", len(forward))
        for strand, places in found.items():
            bases = strands[strand]
            introns += len(places)
            donors += sum(bases[start : start + 2].tolist() == [2, 3] for start, _ in places)
            acceptors += sum(bases[stop - 2 : stop].tolist() == [0, 2] for _, stop in places)
    assert introns == 3708
    assert round(donors / introns, 3) == 0.984
    assert round(acceptors / introns, 3) == 0.998


@pytest.mark.parametrize(("site", "middle"), [("donor", [2, 3]), ("acceptor", [0, 2])])
def test_sites_and_decoys_have_the_same_two_bases(site: str, middle: list[int]) -> None:
    rows = rows_of(
        kind="splice", site=site, length=20, decoys=1, train=["sechellia"], validation=["simulans"]
    )
    for part in rows.parts.values():
        assert bool((part[:, 10:12] == torch.tensor(middle)).all())
        assert float(part[:, -1].double().mean()) == 0.5


def test_genotypes_are_simulated_and_say_so() -> None:
    few = {"kind": "snp", "individuals": 100, "snps": 20, "sequence_length": 1e5}
    rows = rows_of(**few)
    everyone = torch.cat([rows.parts[part] for part in ("train", "valid", "test")])
    frequency = everyone.double().mean(0) / 2.0
    assert everyone.shape == (100, 20)
    assert set(everyone.flatten().tolist()) == {0, 1, 2}
    assert float(torch.minimum(frequency, 1.0 - frequency).min()) > 0.05
    assert all(told["real"] is False and "simulated" in told["note"] for told in rows.table())
    assert rows.told == ("data: the genotypes are simulated, not real data",)
    assert rows_of(**few).sha256 == rows.sha256 != rows_of(**few, simulation_seed=2).sha256


def test_too_few_sites_are_bad_input() -> None:
    with pytest.raises(BadInput, match=r"data.snps = 500: the region has \d+ sites"):
        rows_of(kind="snp", individuals=20, snps=500, sequence_length=1e4)


def test_digits_have_their_own_shades() -> None:
    rows = rows_of(kind="images", name="digits", levels=17)
    everything = torch.cat(list(rows.parts.values()))
    wanted = load_digits().data.astype(np.int64)
    assert rows.encoding.shape == (1, 8, 8)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_grey_levels_are_equal_ranges_of_shades() -> None:
    whole, half = (rows_of(kind="images", name="mnist5k", levels=levels) for levels in (256, 2))
    assert whole.parts["train"].shape == (3600, 784)
    assert torch.equal(half.parts["test"], (whole.parts["test"] >= 128).long())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"kind": "dna", "train": ["melanogaster"]},
            "'melanogaster' is in two of train, validation and test",
        ),
        ({"kind": "splice", "length": 9}, "use an even number"),
        ({"kind": "text", "validation_fraction": 0.6, "test_fraction": 0.6}, "must be below 1"),
        ({"kind": "photos"}, "does not match any of the expected tags"),
    ],
)
def test_data_that_cannot_be_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        config_of(**data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"kind": "dna", "train": ["simulan"]},
            "neither a FASTA file nor a species; did you mean 'simulans'",
        ),
        ({"kind": "splice", "test": ["teissieri"]}, "no annotated genome 'teissieri'"),
        (
            {"kind": "images", "name": "digits", "rows": 5000},
            "data.rows = 5000: digits has 1000 training images",
        ),
        ({"kind": "images", "name": "digit"}, "did you mean 'digits'"),
        (
            {"kind": "images", "name": "digits", "patch": 3},
            "data.patch = 3: it does not divide the 8 x 8 of digits",
        ),
    ],
)
def test_data_that_are_not_there_are_bad_input(data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        rows_of(**data)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'piste\[dna\]'"):
        rows_of(kind="dna")


def test_an_encoding_survives_a_checkpoint() -> None:
    encoding = Encoding("dna", 4, (8,), label=2)
    assert Encoding.of(encoding.state()) == encoding
    assert encoding.variables == 9
    assert encoding.array == (9,)
