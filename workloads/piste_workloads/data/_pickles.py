"""The pickled batches in which CIFAR is published, read without running what a pickle may ask for."""

from __future__ import annotations

import codecs
import io
import pickle
from typing import Any

import numpy as np

# A pickle names functions to call. These make arrays and bytes, and no others are found.
_reconstruct = np.empty(0).__reduce__()[0]
_HARMLESS = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): codecs.encode,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _HARMLESS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs") from None


def unpickle(content: bytes) -> dict[str, Any]:
    """A batch: a dictionary of lists, strings and arrays, its keys as text.

    Raises:
        ValueError: It is none, or asks for anything else.
    """
    try:
        found = _Restricted(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of a dictionary")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}
