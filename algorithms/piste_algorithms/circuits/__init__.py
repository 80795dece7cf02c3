"""Probabilistic circuits: structures, exact inference and learning rules."""

from piste_algorithms.circuits.adam import AdamCircuit
from piste_algorithms.circuits.anemone import Anemone
from piste_algorithms.circuits.chow_liu import chow_liu_tree, mutual_information
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.expectation_maximization import FullBatchEM, MiniBatchEM, OnlineEM
from piste_algorithms.circuits.hclt import hclt
from piste_algorithms.circuits.hmm import hmm
from piste_algorithms.circuits.poon_domingos import pd, pdhclt
from piste_algorithms.circuits.rules import LearningRule, StepInfo
from piste_algorithms.circuits.schedules import cosine_decay, power_decay
from piste_algorithms.circuits.structure import Leaf, Product, Structure, Sum, Table

__all__ = [
    "AdamCircuit",
    "Anemone",
    "Circuit",
    "FullBatchEM",
    "Leaf",
    "LearningRule",
    "MiniBatchEM",
    "OnlineEM",
    "Product",
    "StepInfo",
    "Structure",
    "Sum",
    "Table",
    "chow_liu_tree",
    "cosine_decay",
    "hclt",
    "hmm",
    "mutual_information",
    "pd",
    "pdhclt",
    "power_decay",
]
