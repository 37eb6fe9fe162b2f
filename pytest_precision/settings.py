"""Options, ini keys and the one value that they become: ``Settings``. Precedence: marker, command line, ini."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pytest_precision.files import FILES, Files, add_files, parse_files

if TYPE_CHECKING:
    from pytest_precision.lanes import Selection
    from pytest_precision.problems import Problems

MARKERS = (
    "precision(*modes, accelerators=None, budget=None, gradients=None, xfail={mode: reason}, reference='64-true', "
    "runtime={...}): "
    "run the test once in each precision mode (names or groups such as '16-mixed', 'half', 'all'); with the fixture "
    "precision_ctx, or else inside the mode's autocast and default dtype. budget: bits that may be lost beyond what "
    "the mode must lose; xfail: modes that are known to fail, with the reason; runtime: what else PrecisionRuntime "
    "is given, such as {'islands': 'auto', 'nf4': {'compute_dtype': 'float16'}}.",
    "precision_case(mode=, accelerator=): put by pytest-precision on each lane of a test; select with "
    "-m \"precision_case(mode='16-mixed')\".",
)
DEFAULT_MODES = ["mixed"]  # of a test that names no modes, without --precision-matrix: what most training runs in
DEFAULT_BUDGET = 2.0  # bits: an excess of 4, calibrated on healthy modules


@dataclass(frozen=True)
class Settings:
    """What command line and ini say, parsed once.

    ``lanes`` and ``require`` are None where not given; empty ``accelerators`` leave them to the machine. ``files`` are
    the reports to write, and the baseline to compare with.
    """

    matrix: bool
    lanes: Selection | None
    require: Selection | None
    modes: tuple[str, ...]
    accelerators: tuple[str, ...]
    budget: float
    collect_only: bool
    bisect: bool = False
    shrink: bool = False
    files: Files = field(default_factory=Files)


SETTINGS = pytest.StashKey[Settings]()


def add_options(parser: pytest.Parser) -> None:
    """Declare options and ini keys; each default is None, so that "not given" can be told from any value."""
    group = parser.getgroup("precision", "numerical trust in low precision")
    group.addoption(
        "--precision-matrix",
        action="store_true",
        default=None,
        help="run every precision-aware test in all modes (its own, if it names some) on all accelerators",
    )
    group.addoption(
        "--precision-lanes",
        metavar="SPEC",
        default=None,
        help="only these lanes: modes, groups, !name, mode@accelerator, separated by commas; e.g. all,!64-true",
    )
    group.addoption(
        "--precision-require",
        metavar="LANES",
        default=None,
        help="fail the session unless at least one test really ran in each of these lanes",
    )
    group.addoption(
        "--precision-bisect",
        action="store_true",
        default=None,
        help="where a check fails, look for the smallest set of modules to keep in FP32 so that it holds",
    )
    group.addoption(
        "--precision-shrink",
        action="store_true",
        default=None,
        help="where a check fails, look for the smallest input that fails in the same way, and print it as a test",
    )
    add_files(group, parser)
    parser.addini("precision_modes", "modes of tests that name none (default: mixed)", "args", DEFAULT_MODES)
    parser.addini("precision_accelerators", "accelerators of --precision-matrix (default: all here)", "args", [])
    parser.addini("precision_budget", "bits that may be lost beyond what a mode must lose (default: 2)", "string", None)
    parser.addini("precision_require", "like --precision-require", "args", [])


def configure(config: pytest.Config) -> None:
    """Register markers and the board; check the values now where some were given, so that a typo stops the run."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    if _given(config) and settings_of(config).files.baseline is not None:
        from pytest_precision.baseline import baseline_of

        baseline_of(config)
    if not hasattr(config, "workerinput") and not config.getoption("collectonly"):
        from pytest_precision.report.board import Board

        config.pluginmanager.register(Board(config), "precision-board")


def settings_of(config: pytest.Config) -> Settings:
    """Return the run's settings; raises ``pytest.UsageError`` that lists every bad value."""
    if SETTINGS not in config.stash:
        config.stash[SETTINGS] = _parse(config)
    return config.stash[SETTINGS]


def _given(config: pytest.Config) -> bool:
    if any(config.getoption(name) is not None for name in ("precision_lanes", "precision_require", *FILES)):
        return True
    return any(
        config.getini(f"precision_{key}") != default
        for key, default in (("modes", DEFAULT_MODES), ("accelerators", []), ("budget", None), ("require", []),
                             ("baseline", None))
    )  # fmt: skip


def _parse(config: pytest.Config) -> Settings:
    from pytest_precision.lanes import parse_accelerators, parse_selection
    from pytest_precision.problems import Problems

    problems = Problems()
    lanes = config.getoption("precision_lanes")
    require, source = config.getoption("precision_require"), "--precision-require"
    if require is None:
        require, source = ",".join(config.getini("precision_require")) or None, "ini key precision_require"
    modes = parse_selection(",".join(config.getini("precision_modes")), "ini key precision_modes", problems)
    if any(rule.accelerator is not None for rule in modes.rules):
        problems.add("ini key precision_modes takes modes and groups; accelerators go to precision_accelerators")
    settings = Settings(
        matrix=bool(config.getoption("precision_matrix")),
        lanes=None if lanes is None else parse_selection(lanes, "--precision-lanes", problems),
        require=None if require is None else parse_selection(require, source, problems),
        modes=modes.modes(),
        accelerators=parse_accelerators(
            config.getini("precision_accelerators"), "ini key precision_accelerators", problems
        ),
        budget=_budget(config, problems),
        collect_only=bool(config.getoption("collectonly")),
        bisect=bool(config.getoption("precision_bisect")),
        shrink=bool(config.getoption("precision_shrink")),
        files=parse_files(config, problems),
    )
    if problems:
        raise pytest.UsageError(problems.text())
    return settings


def _budget(config: pytest.Config, problems: Problems) -> float:
    text = config.getini("precision_budget")
    if text is None:
        return DEFAULT_BUDGET
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        problems.add(f"ini key precision_budget is {text!r}; it is a number of bits, 0 or more")
    return value
