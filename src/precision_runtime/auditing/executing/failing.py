"""Code that raises: which line, in which module, in words that a user can act on."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping

from torch import nn

from precision_runtime.errors import AuditError
from precision_runtime.record import Finding


def error_finding(error: BaseException, names: Mapping[str, nn.Module]) -> Finding:
    """The finding for code that runs in float32 and raises in the mode."""
    line = user_line(error)
    backward = any(f.name == "differentiate" for f in traceback.extract_tb(error.__traceback__))
    return Finding(
        kind="error",
        where="backward" if backward else "forward",
        module=_module_of(error, names),
        op=None,
        lost_bits=math.inf,
        excess=math.inf,
        message=f"does not run in this mode: {type(error).__name__}: {first_line(error)}"
        + (f" ({line})" if line else ""),
    )


def no_reference(subject: str, mode: object, error: Exception) -> AuditError:
    """The error for code that runs in the mode and in float32, but not in FP64."""
    line = user_line(error)
    return AuditError(
        f"{subject} runs in {mode} and in float32 but not in FP64, so there is no reference: "
        f"{type(error).__name__}: {first_line(error)}" + (f" ({line})" if line else "")
    )


def user_line(error: BaseException) -> str:
    """The last frame outside torch and this package: the line that a user can change."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = frame.filename.replace("\\", "/")
        if "/torch/" not in path and "/precision_runtime/" not in path and not path.startswith("<"):
            return f"{path.rpartition('/')[2]}:{frame.lineno}: {frame.line}"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of the error's text that says what happened, and of TorchScript the line that failed, too."""
    lines = str(error).strip().splitlines() or [""]
    places = [i for i, line in enumerate(lines) if line.endswith("<--- HERE")]
    if "in the TorchScript interpreter" not in lines[0] or not places:
        return lines[0]
    # Where comes first and what last; what is empty where a dispatch mode was in between, as in an audit.
    what = next((line.partition(": ")[2] for line in lines[places[-1] + 1 :] if "Error: " in line), "")
    return f"TorchScript failed in `{lines[places[-1] - 1].strip()}`" + (f": {what}" if what else "")


def _module_of(error: BaseException, names: Mapping[str, nn.Module]) -> str:
    """The innermost module whose code was running when the error was raised."""
    by_id = {id(m): n for n, m in names.items()}
    trace, found = error.__traceback__, ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in by_id:
            found = by_id[id(owner)]
        trace = trace.tb_next
    return found
