"""The package bitsandbytes, imported late and quietly: the only place that imports it.

Its import takes seconds, because it loads torch's compiler, and logs advice about optional packages.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

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

__all__ = ["bnb"]
