"""Optimizers, one a file."""

from piste_algorithms.optimizers._groups import matrix_param_groups, named_param_groups
from piste_algorithms.optimizers.aesam import AESAM
from piste_algorithms.optimizers.arsam import ARSAM
from piste_algorithms.optimizers.egd import EGD, whiten
from piste_algorithms.optimizers.grokfast import GrokfastEMA
from piste_algorithms.optimizers.looksam import LookSAM
from piste_algorithms.optimizers.muon import Muon
from piste_algorithms.optimizers.reg import REG, racs
from piste_algorithms.optimizers.sam import SAM

__all__ = [
    "AESAM",
    "ARSAM",
    "EGD",
    "REG",
    "SAM",
    "GrokfastEMA",
    "LookSAM",
    "Muon",
    "matrix_param_groups",
    "named_param_groups",
    "racs",
    "whiten",
]
