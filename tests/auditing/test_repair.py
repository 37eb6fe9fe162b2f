"""The repair: the smallest set of modules in FP32 with which the mode holds, proposed only after it was audited."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.auditing.repair import find_repair
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.modes import parse_mode
from precision_runtime.record import Finding, Report

MIXED, HALF = ("16-mixed", "bf16-mixed"), ("16-true", "bf16-true")


class BadNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True) - mean.square()
        return (x - mean) * (variance.clamp_min(0) + 1e-5).rsqrt()


class Block(nn.Module):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.norm = BadNorm() if bad else nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.linear(self.norm(x))
        return out


class Steep(nn.Module):
    """Coordinates times a large frequency: under autocast the product rounds the phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Linear(2, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(400.0 * self.phase(x))


def blocks(*bad: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(i in bad) for i in range(4)))


def inputs() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 8, 16) + 30.0


@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("bad", [(1,), (0, 2)])
def test_the_guilty_modules_and_no_others_become_islands(mode: str, bad: tuple[int, ...]) -> None:
    model, x = blocks(*bad), inputs()
    report = audit(model, x, mode=mode, gradients=False, repair=True)
    repair = report.repair
    assert not report.ok
    assert repair is not None
    assert repair.holds
    assert repair.islands == {f"{i}.norm": "32" for i in bad}
    assert repair.after <= report.budget < repair.before == report.lost_bits
    # The second witnesses: the audit with what the runtime takes, and none of it may be left out.
    assert audit(model, x, mode=mode, gradients=False, islands=repair.islands).ok
    for left in itertools.combinations(repair.islands, len(bad) - 1):
        assert not audit(model, x, mode=mode, gradients=False, islands=dict.fromkeys(left, "32")).ok
    PrecisionRuntime(mode, accelerator="cpu", islands=repair.islands).setup(model)(x)


@pytest.mark.parametrize("mode", MIXED)
def test_under_autocast_the_patch_that_is_printed_repairs_too(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), Steep(), nn.Linear(16, 4))
    x = torch.rand(64, 2)
    repair = audit(model, x, mode=mode, gradients=False, repair=True).repair
    assert repair is not None
    assert list(repair.islands) == ["1.phase"]  # the smaller part is enough
    first, *code = repair.patch.splitlines()
    assert first == "# in the forward of Steep (1), where it calls self.phase:"
    space = {"torch": torch}
    exec("\n    ".join(["def forward(self, x):", *code, "return torch.sin(400.0 * y)"]), space)
    model[1].__class__ = type("Patched", (Steep,), {"forward": space["forward"]})
    assert audit(model, x, mode=mode, gradients=False).ok
    model[1].__class__ = Steep
    assert not audit(model, x, mode=mode, gradients=False).ok


@pytest.mark.parametrize("mode", HALF)
def test_in_true_modes_the_patch_that_is_printed_repairs_too(mode: str) -> None:
    model, x = blocks(1), inputs()
    repair = audit(model, x, mode=mode, gradients=False, repair=True).repair
    assert repair is not None
    assert f"# after the cast to {'float16' if mode == '16-true' else 'bfloat16'}: model.1.norm.float()" in repair.patch
    assert "# in the forward of Block (1), where it calls self.norm:" in repair.patch
    line = repair.patch.splitlines()[-1]
    space: dict[str, object] = {}
    exec(f"def forward(self, x):\n    {line}\n    return x + self.linear(y)", space)
    model[1].__class__ = type("Patched", (Block,), {"forward": space["forward"]})
    assert audit(model, x, mode=mode, gradients=False).ok


@pytest.mark.parametrize("mode", ["32-true", "tf32"])
def test_where_the_mode_is_float32_the_islands_are_float64(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), BadNorm(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].bias += 100.0
    x = torch.randn(8, 16)
    found = audit(model, x, mode=mode, repair=True, gradients=False).repair
    assert found is not None
    assert (found.holds, found.islands) == (True, {"1": "64"}), found
    assert "model.1.double()" in found.patch
    assert audit(model, x, mode=mode, islands=found.islands, gradients=False).ok


def test_where_code_outside_of_modules_is_to_blame_there_is_none_and_the_line_is_said() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.linear(x) + 40.0
            out: torch.Tensor = h.square().mean(-1) - h.mean(-1).square()
            return out

    torch.manual_seed(0)
    repair = audit(Own(), torch.randn(8, 16), mode="bf16-true", gradients=False, repair=True).repair
    assert repair is not None
    assert not repair.holds
    assert repair.islands == {}
    assert re.search(
        r"in Own itself, or a value from outside: test_repair\.py:\d+: out: torch\.Tensor = h\.square", repair.note
    )


def test_a_function_names_its_models_parts_as_the_runtime_does() -> None:
    net, x = blocks(2), inputs()
    repair = audit(lambda t: net(t) * 2.0, x, mode="bf16-true", gradients=False, repair=True).repair
    assert repair is not None
    assert repair.islands == {"2.norm": "32"}


def test_two_models_are_refused() -> None:
    one, two = blocks(0), blocks(1)
    with pytest.raises(ConfigurationError, match="one model, and this function runs 2"):
        audit(lambda t: one(t) + two(t), inputs(), mode="bf16-true", gradients=False, repair=True)


def test_healthy_code_is_audited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precision_runtime.auditing.procedure.find_repair", None)
    assert audit(blocks(), inputs(), mode="bf16-true", gradients=False, repair=True).repair is None


def test_everything_is_as_before() -> None:
    model, x = blocks(1), inputs()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    audit(model, x, mode="16-true", gradients=False, repair=True)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert all("forward" not in vars(m) and "_apply" not in vars(m) for m in model.modules())


def test_islands_that_match_nothing_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="norms"):
        audit(blocks(1), inputs(), mode="bf16-true", islands=("1.norms",))


# -- the search alone, on verdicts that are made up --------------------------------------------------------------------


def tree(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(tree(width, depth - 1) for _ in range(width))) if depth else nn.Identity()


LEAVES = [n for n, m in tree(3, 2).named_modules() if isinstance(m, nn.Identity)]


def verdict(needed: Collection[str], kept: Collection[str]) -> Report:
    """Fails by every needed leaf that no kept module covers; names it, or its caller where ``0.0`` is concerned."""
    missing = [n for n in needed if not any(n == k or n.startswith(f"{k}.") for k in kept)]
    findings = tuple(
        Finding("instability", "forward", n if n != "0.0" else "", None, 5.0, 32.0, "made up") for n in missing
    )
    return Report("made up", "16-true", "cpu", "native", 2.0, 32.0 if missing else 1.0, 1.0, findings)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(LEAVES), min_size=1))
def test_the_search_finds_exactly_what_is_needed_also_where_findings_do_not_name_it(needed: set[str]) -> None:
    repair = find_repair(
        verdict(needed, ()), "", tree(3, 2), parse_mode("16-true"), "cpu", lambda kept: verdict(needed, kept)
    )
    assert repair.holds
    assert set(repair.islands) == needed
    assert repair.audits <= 2 + 6 * len(LEAVES)
