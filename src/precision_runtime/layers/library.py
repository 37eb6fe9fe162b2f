"""The package bitsandbytes, imported late and quietly: the only place that imports it.

Its import takes seconds, because it loads torch's compiler, and logs advice about optional packages.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from precision_runtime.errors import UnsupportedError

_log = logging.getLogger("bitsandbytes")
_level = _log.level
_log.setLevel(logging.ERROR)
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb: Any = importlib.import_module("bitsandbytes")
except ImportError as error:
    raise UnsupportedError(
        f"quantised layers need the package bitsandbytes, which cannot be imported ({error}); "
        "pip install 'pytest-precision[bitsandbytes]'"
    ) from error
finally:
    _log.setLevel(_level)

__all__ = ["bnb", "float32_tables"]


@contextmanager
def float32_tables() -> Iterator[None]:
    """Inside, the values that bitsandbytes' codes stand for are float32, as they are meant to be.

    It makes these tables in the default dtype, and keeps the first ones that a device needs for the whole process: made
    under a float16 default they are rounded, and so is every weight from then on.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
