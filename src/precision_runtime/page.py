"""Pages of HTML for people: one file each, with everything in it, readable without a network.

jinja2 is an extra, imported when a page is made.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from precision_runtime.errors import UnsupportedError

TEMPLATES = Path(__file__).parent / "templates"


def check() -> None:
    """Raise ``UnsupportedError`` where jinja2 is missing: that is to be known before work of minutes begins."""
    if importlib.util.find_spec("jinja2") is None:
        raise UnsupportedError("pages of HTML need jinja2: pip install 'pytest-precision[html]'")


def render(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """The page that ``template`` (a file of ``folder``) makes of ``values``. Text is escaped."""
    check()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
