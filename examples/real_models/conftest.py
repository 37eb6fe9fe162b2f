"""The option ``--seeds``: the same architectures with other weights and inputs."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--seeds``."""
    parser.addoption("--seeds", type=int, default=1, metavar="N", help="real models: try the seeds 0 … N-1 (default 1)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread tests that take a seed."""
    if "seed" in metafunc.fixturenames:
        seeds = range(metafunc.config.getoption("--seeds"))
        metafunc.parametrize("seed", seeds, ids=[f"seed{seed}" for seed in seeds])
