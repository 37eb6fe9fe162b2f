"""``compare``: values computed by hand, judged by one rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from precision_runtime.auditing import compare
from precision_runtime.errors import ConfigurationError

VALUES = np.random.default_rng(0).normal(size=(50, 4))


@pytest.mark.parametrize(
    ("mode", "dtype"), [("16-true", np.float16), ("bf16-true", ml_dtypes.bfloat16), ("32-true", np.float32)]
)
def test_one_rounding_holds_and_eight_do_not(mode: str, dtype: type) -> None:
    rounded = VALUES.astype(dtype).astype(np.float64)
    reference = torch.from_numpy(VALUES)
    assert compare(torch.from_numpy(rounded), reference, mode=mode).ok
    off = torch.from_numpy(VALUES + 8 * (rounded - VALUES))
    report = compare(off, reference, mode=mode)
    assert report.findings[0].kind == "instability"
    assert report.excess == pytest.approx(8 * compare(torch.from_numpy(rounded), reference, mode=mode).excess, rel=1e-6)


def test_the_budget_decides() -> None:
    reference = torch.from_numpy(VALUES)
    off = reference * (1 + 8 * 2.0**-11)
    assert not compare(off, reference, mode="16-true").ok
    assert compare(off, reference, mode="16-true", budget=4.0).ok


def test_infinity_is_a_range_finding_with_its_place() -> None:
    report = compare({"a": torch.tensor([1.0, torch.inf]).half()}, {"a": torch.tensor([1.0, 2.0])}, mode="16-true")
    (finding,) = report.findings
    assert finding.kind == "range"
    assert finding.worst is not None
    assert (finding.worst.tensor, finding.worst.index) == ("actual['a']", (1,))


def test_structures_and_shapes_must_agree() -> None:
    with pytest.raises(ConfigurationError, match="both need the same structure"):
        compare([torch.ones(1)], torch.ones(1), mode="16-true")
    with pytest.raises(ConfigurationError, match=r"compare\(\) cannot judge: actual has shape \(1,\)"):
        compare(torch.ones(1), torch.ones(2), mode="16-true")


def test_an_infinity_where_the_reference_has_others_is_a_range_error_still() -> None:
    reference = torch.zeros(4, 4, dtype=torch.float64)
    reference[0] = -torch.inf
    actual = reference.half()
    assert compare(actual, reference, mode="16-true").ok
    actual[1, 1] = -torch.inf
    (finding,) = compare(actual, reference, mode="16-true").findings
    assert finding.kind == "range"
    assert "1 of 16 elements are not finite" in finding.message
