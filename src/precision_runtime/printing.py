"""What rich would print, as text: for ``str()`` of what is a table at a terminal. Imports rich when it is used."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def printed(renderable: RenderableType, width: int = 120) -> str:
    """The lines that a terminal of ``width`` columns without colours would show."""
    from rich.console import Console

    paper = io.StringIO()
    Console(file=paper, width=width).print(renderable)
    return "\n".join(line.rstrip() for line in paper.getvalue().rstrip().split("\n"))
