"""Rows of genotypes that msprime simulates: real ones of this size are not free. Marked as simulated."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput
from piste_workloads.circuits.config import Snp
from piste_workloads.circuits.rows import PARTS, Encoding, Rows, rows_of
from piste_workloads.data._cache import cached


def open_snp(section: Snp) -> Rows:
    """Genotypes 0, 1 or 2 of neighbouring sites, a row an individual.

    Raises:
        BadInput: msprime is not installed; there are too few sites.
    """
    genotypes = cached(_key(section), lambda: {"genotypes": _simulate(section)})["genotypes"].astype(np.int64)
    valid, test = (
        round(section.individuals * fraction)
        for fraction in (section.validation_fraction, section.test_fraction)
    )
    train = section.individuals - valid - test
    arrays = dict(zip(PARTS, np.split(genotypes, [train, train + valid]), strict=True))
    origin = {
        "source": f"msprime {_msprime().__version__}",
        "real": False,
        "note": "simulated, not real data",
    }
    told = [f"data: the genotypes are {origin['note']}"]
    return rows_of(arrays, Encoding("numbers", 3, (section.snps,)), dict.fromkeys(PARTS, origin), told)


def _key(section: Snp) -> str:
    split = {"kind", "validation_fraction", "test_fraction"}
    values = "-".join(f"{value:g}" for value in section.model_dump(exclude=split).values())
    return f"snp-msprime-{_msprime().__version__}-{values}"


def _msprime() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("msprime")
    except ModuleNotFoundError:
        raise BadInput("data.kind = \"snp\" simulates with msprime: pip install 'piste[snp]'") from None


def _simulate(section: Snp) -> NDArray[np.int8]:
    """The first sites of a region at which the rarer allele is common enough, `(individuals, snps)`."""
    msprime = _msprime()
    trees = msprime.sim_ancestry(
        samples=section.individuals,
        sequence_length=section.sequence_length,
        recombination_rate=section.recombination_rate,
        population_size=section.population,
        random_seed=section.simulation_seed,
    )
    mutated = msprime.sim_mutations(
        trees,
        rate=section.mutation_rate,
        model=msprime.BinaryMutationModel(),
        random_seed=section.simulation_seed,
    )
    haplotypes = mutated.genotype_matrix()  # (sites, 2 individuals)
    frequency = haplotypes.mean(1)
    common = haplotypes[np.minimum(frequency, 1.0 - frequency) > section.frequency]
    if len(common) < section.snps:
        raise BadInput(
            f"data.snps = {section.snps}: the region has {len(common)} sites with a frequency above "
            f"{section.frequency:g}: raise data.sequence_length or lower data.snps"
        )
    alleles = common[: section.snps].reshape(section.snps, section.individuals, 2)
    return np.ascontiguousarray(alleles.sum(2).T.astype(np.int8))
