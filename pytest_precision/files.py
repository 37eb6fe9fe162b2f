"""The files that a run writes or compares with: options, and the paths that they become."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_precision.problems import Problems

FILES = ("precision_json", "precision_html", "precision_summary", "precision_baseline", "precision_update_baseline")
GITHUB = "GITHUB_STEP_SUMMARY"  # where GitHub's runners say which file a job's summary is gathered in


@dataclass(frozen=True)
class Files:
    """Absolute paths; None where not asked for. ``appended`` is a summary that others write to as well."""

    json: Path | None = None
    html: Path | None = None
    summary: Path | None = None
    appended: Path | None = None
    baseline: Path | None = None
    update: bool = False


def add_files(group: pytest.OptionGroup, parser: pytest.Parser) -> None:
    """Declare the options and the ini key."""
    for name, what in (("json", "as JSON"), ("html", "as one page of HTML (needs jinja2)")):
        group.addoption(
            f"--precision-{name}", metavar="FILE", default=None, help=f"write every lane, check and finding {what}"
        )
    group.addoption(
        "--precision-summary",
        metavar="FILE",
        default=None,
        help=f"write the matrix and the findings in Markdown; without it they are added to the file that {GITHUB} "
        "names, if it does; an empty FILE writes none",
    )
    group.addoption(
        "--precision-baseline",
        metavar="FILE",
        default=None,
        help="fail lanes that lose half a bit more than this file says, or have a bit of headroom less; "
        "--precision-update-baseline writes it",
    )
    group.addoption(
        "--precision-update-baseline",
        action="store_true",
        default=None,
        help="take this run's lost bits and headroom into the baseline instead of comparing",
    )
    parser.addini("precision_baseline", "like --precision-baseline; relative to the root directory", "string", None)


def parse_files(config: pytest.Config, problems: Problems) -> Files:
    """Read the options; paths are relative to where pytest was started, the ini's to the root directory."""
    here = Path(config.invocation_params.dir)
    paths = {name: _path(config, here, name) for name in ("json", "html", "summary", "baseline")}
    told = config.getini("precision_baseline")
    if paths["baseline"] is None and told:
        paths["baseline"] = config.rootpath / told
    for name, path in paths.items():
        if path is not None and path.is_dir():
            problems.add(f"--precision-{name}: {path} is a folder; it takes a file")
    if paths["html"] is not None:
        _check_html(problems)
    update = bool(config.getoption("precision_update_baseline"))
    baseline = paths["baseline"]
    if update and baseline is None:
        problems.add("--precision-update-baseline needs to know which: --precision-baseline=FILE or precision_baseline")
    elif baseline is not None and not baseline.exists() and not update:
        problems.add(f"the baseline {baseline} does not exist; --precision-update-baseline makes it")
    shared = os.environ.get(GITHUB) if config.getoption("precision_summary") is None else None
    return Files(**paths, appended=Path(shared) if shared else None, update=update)


def _path(config: pytest.Config, here: Path, name: str) -> Path | None:
    given = config.getoption(f"precision_{name}")
    return here / given if given else None


def _check_html(problems: Problems) -> None:
    from precision_runtime import page
    from precision_runtime.errors import UnsupportedError

    try:
        page.check()
    except UnsupportedError as error:
        problems.add(f"--precision-html: {error}")
