"""The rows of a recipe, whatever their kind."""

from __future__ import annotations

from piste_workloads.circuits.config import Data, Dna, Snp, Splice, Table, Text
from piste_workloads.circuits.dna import open_dna, open_splice
from piste_workloads.circuits.images import open_images
from piste_workloads.circuits.own_table import open_table
from piste_workloads.circuits.rows import Rows
from piste_workloads.circuits.snp import open_snp
from piste_workloads.circuits.text import open_text


def open_rows(section: Data) -> Rows:
    """The rows of a recipe's `[data]`.

    Raises:
        BadInput: They cannot be had, or a part of them is empty; the message says what to do.
    """
    if isinstance(section, Text):
        return open_text(section)
    if isinstance(section, Dna):
        return open_dna(section)
    if isinstance(section, Splice):
        return open_splice(section)
    if isinstance(section, Snp):
        return open_snp(section)
    if isinstance(section, Table):
        return open_table(section)
    return open_images(section)
