"""What crosses processes is of exact builtin types."""

from __future__ import annotations

import enum
from dataclasses import asdict

import numpy as np
import pytest
import torch

from precision_runtime.record import Finding, Report, Worst
from pytest_precision.transport import plain


class Text(str, enum.Enum):
    A = "a"


class Number(int):
    pass


class Name(str):
    __slots__ = ()

    def __str__(self):
        return "overridden"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (np.bool_(True), True),
        (np.float64(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.int64(3), 3),
        (Number(3), 3),
        (Name("x"), "x"),
        (Text.A, "a"),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5], dtype=torch.bfloat16), 0.5),
        (torch.tensor([1, 2]), [1, 2]),
        (np.array([[1.0]]), 1.0),
        (torch.float16, "torch.float16"),
        (torch.device("cpu"), "cpu"),
        ((1, [np.int8(2)]), [1, [2]]),
        ({Text.A: {3, 1}, 2: float("inf")}, {"a": [1, 3], "2": float("inf")}),
    ],
)
def test_plain_gives_exact_builtins(value, expected):
    result = plain(value)
    assert result == expected
    _assert_exact(result)


def test_a_report_survives_the_way(tmp_path):
    worst = Worst("output[0]", (1, 2), 1.0, 2.0, 0.1, 0.5)
    finding = Finding("instability", "forward", "norm", "sub", 3.0, 8.0, "text", worst=worst)
    report = Report("f", "16-true", "cpu", "native", 2.0, np.float64(8.0), 8.0, (finding,))
    sent = plain(report.to_dict())
    _assert_exact(sent)
    assert asdict(Report.from_dict(sent)) == asdict(report)


def _assert_exact(value):
    assert type(value) in (type(None), bool, int, float, str, list, dict)
    for inner in value.values() if type(value) is dict else value if type(value) is list else ():
        _assert_exact(inner)
