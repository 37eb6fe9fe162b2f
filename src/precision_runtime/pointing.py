"""Which line of the user's a warning is about."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_OURS = tuple(f"{Path(path).parent}{os.sep}" for path in (torch.__file__, __file__))


def users_line() -> int:
    """The ``stacklevel`` with which the caller's warning names the innermost line that is neither torch's nor ours.

    A number will not do where calls come through torch: it wraps steps and forwards, once or several times.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    return level
