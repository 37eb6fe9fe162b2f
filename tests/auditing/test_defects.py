"""Known defects of torch's own kernels: still there, computed rightly in an audit, and remarked on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.executing.defects import KNOWN_DEFECTS, KnownDefect, defect_of


def _seen_here(defect: KnownDefect) -> bool:
    return any(torch.__version__.startswith(v.strip() + ".") for v in defect.torch_versions.split(","))


@pytest.mark.parametrize("defect", KNOWN_DEFECTS, ids=lambda d: d.name)
def test_each_reproduction_still_shows_its_defect(defect: KnownDefect) -> None:
    if not _seen_here(defect):
        pytest.skip(f"seen in torch {defect.torch_versions}, this is {torch.__version__}")
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(defect.reproduction, space)
    # In units of u; a healthy kernel is at about 1 / sqrt(3) (one rounding of the result).
    assert space["excess"] > 4, f"{defect.name} is repaired in this torch: delete it from the list"


@pytest.mark.parametrize("defect", KNOWN_DEFECTS, ids=lambda d: d.name)
def test_the_same_reproduction_without_the_defect_is_healthy(defect: KnownDefect) -> None:
    """A reproduction that failed for another reason would prove nothing."""
    torch.manual_seed(0)
    cures = {"4096": "4", ".to(memory_format=torch.channels_last)": "", "30.0": "0.0"}
    cured = defect.reproduction
    for bad, good in cures.items():
        cured = cured.replace(bad, good)
    assert cured != defect.reproduction
    space: dict[str, Any] = {}
    exec(cured, space)
    assert space["excess"] < 1.5


def test_an_op_has_at_most_one_entry_and_others_have_none() -> None:
    assert len({d.op for d in KNOWN_DEFECTS}) == len(KNOWN_DEFECTS)
    assert defect_of("aten::mm") is None
    assert all(defect_of(d.op) is d for d in KNOWN_DEFECTS)


def test_a_layer_norm_over_many_rows_is_a_remark_and_no_failure() -> None:
    torch.manual_seed(0)
    report = audit(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(4096, 8), mode="bf16-true")
    assert report.ok, report
    (remark,) = [r for r in report.remarks if r.kind == "known-defect"]
    assert remark.op == "aten::native_layer_norm_backward"
    assert "LayerNorm's weight and bias gradients are accumulated in the low dtype on the CPU" in remark.message


def test_a_layer_norm_over_few_rows_is_not_remarked_on() -> None:
    torch.manual_seed(0)
    assert not audit(nn.LayerNorm(8), torch.randn(4, 8), mode="bf16-true").remarks


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
@pytest.mark.parametrize(
    ("norm", "op"),
    [
        (lambda: nn.LayerNorm(8), "aten::native_layer_norm_backward"),
        (lambda: nn.GroupNorm(2, 8), "aten::native_group_norm_backward"),
        (lambda: nn.BatchNorm1d(8), "aten::native_batch_norm_backward"),
        (lambda: nn.InstanceNorm1d(8, affine=True), "aten::native_batch_norm_backward"),
    ],
    ids=["layer", "group", "batch", "instance"],
)
def test_a_norm_far_from_zero_is_a_remark_and_no_failure(norm: Callable[[], nn.Module], op: str, mode: str) -> None:
    torch.manual_seed(0)
    far = nn.Linear(8, 8)
    nn.init.constant_(far.bias, 30.0)
    layers = (far, norm()) if op == "aten::native_layer_norm_backward" else (far, Turned(), norm())
    report = audit(nn.Sequential(*layers), torch.randn(16, 32, 8), mode=mode)
    assert report.ok, report
    assert {r.op for r in report.remarks if r.kind == "known-defect"} == {op}


class Turned(nn.Module):
    """Channels second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_channels_last_convolution_is_a_remark_and_no_failure(channels_last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    report = audit(nn.Conv2d(16, 16, 8, stride=8), x, mode="bf16-true", gradients=False)
    assert report.ok, report
    assert [r.op for r in report.remarks] == (["aten::convolution"] if channels_last else [])


@pytest.mark.parametrize("kernel", [512, 4])
def test_windows_that_overlap_are_a_remark_and_no_failure(kernel: int) -> None:
    torch.manual_seed(0)
    report = audit(nn.Conv1d(1, 8, kernel), torch.randn(1, 1, 1024), mode="16-true")
    assert report.ok, report
    assert [r.op for r in report.remarks] == (["aten::convolution_backward"] if kernel == 512 else [])


def test_overlapping_windows_are_summed_in_half_and_would_be_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("precision_runtime.auditing.executing.dispatch.defect_of", lambda _: None)
    report = audit(nn.Conv1d(1, 8, 512), torch.randn(1, 1, 1024), mode="16-true")
    assert [(f.kind, f.where) for f in report.findings] == [("kernel", "backward")], report


class AfterNorm(nn.Module):
    """A defect of the user's own right behind a listed one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(1 + x.abs() * 1e-2)


def test_a_listed_defect_hides_nothing_else() -> None:
    torch.manual_seed(0)
    report = audit(nn.Sequential(nn.LayerNorm(8), AfterNorm()), torch.randn(4096, 8), mode="bf16-true")
    assert report.findings[0].module == "1"
    assert any(r.kind == "known-defect" for r in report.remarks)
