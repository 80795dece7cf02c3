"""Optimizers, one a file."""

from piste_algorithms.optimizers._groups import matrix_param_groups, named_param_groups
from piste_algorithms.optimizers.muon import Muon
from piste_algorithms.optimizers.reg import REG, racs

__all__ = ["REG", "Muon", "matrix_param_groups", "named_param_groups", "racs"]
