"""``shrink``: less input, the same failure, and a test that shows it wherever it is pasted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precision_runtime import audit, shrink
from precision_runtime.errors import AuditError, ConfigurationError
from precision_runtime.modes import parse_mode
from precision_runtime.options import Options, with_dtypes
from precision_runtime.pasting import Draw, source_of_test
from precision_runtime.record import Report
from precision_runtime.shrinking import Shrunk, smallest


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


class Length(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()


def variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    y = x * mask
    return y.square().mean(-1) - y.mean(-1).square()


def pasted(found: Shrunk, **names: Any) -> None:
    """Run the source where these names mean something."""
    space: dict[str, Any] = dict(names)
    exec(found.source, space)
    (test,) = [value for name, value in space.items() if name.startswith("test_")]
    test()


def first(report: Report) -> tuple[str, str, str]:
    finding = report.findings[0]
    return finding.module, finding.kind, finding.where


def check(found: Shrunk, before: Report, **names: Any) -> None:
    """The same failure, by an audit of the inputs and by the test's text."""
    assert first(found.report) == first(before)
    with pytest.raises(AssertionError) as failure:
        pasted(found, **names)
    assert str(found.report).splitlines()[:2] == str(failure.value).splitlines()[:2]


def test_one_row_of_a_batch_is_left_and_the_pasted_test_fails_in_the_same_way() -> None:
    net, x = nn.Sequential(nn.Linear(16, 32), Length(), nn.Linear(32, 4)), torch.randn(32, 16)
    x[21] *= 300.0
    before = audit(net, x, mode="16-true", gradients=False)
    found = shrink(net, (x,), None, "16-true", gradients=False, name="net")
    check(found, before, net=net)
    assert found.args[0].shape == (1, 16)  # the Linear fixes the features
    assert (found.before, found.after) == (512, 16)
    assert "def test_net_holds_in_16_true():" in found.source
    with pytest.raises(ConfigurationError, match="nothing fails"):
        shrink(net, (found.args[0] / 300.0,), None, "16-true", gradients=False)


def test_tensors_that_share_an_axis_are_cut_together_also_among_keywords() -> None:
    x, mask = 10 + torch.randn(4, 24), torch.ones(24)
    before = audit(variance, x, mode="bf16-true", kwargs={"mask": mask}, gradients=False)
    found = shrink(variance, (x,), {"mask": mask}, "bf16-true", gradients=False)
    check(found, before, variance=variance)
    (columns,), (rows, width) = found.kwargs["mask"].shape, found.args[0].shape
    assert rows == 1
    assert columns in (1, width)  # a mask of one broadcasts
    assert width < 24
    assert "kwargs = {'mask': " in found.source


def test_the_repaired_code_passes_the_pasted_test() -> None:
    def steady(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = x * mask
        return (y - y.mean(-1, keepdim=True)).square().mean(-1)

    found = shrink(variance, (10 + torch.randn(4, 24), torch.ones(24)), {}, "bf16-true", gradients=False)
    pasted(found, variance=steady)


def test_magnitudes_come_as_near_to_one_as_the_failure_allows() -> None:
    def square(x: torch.Tensor) -> torch.Tensor:
        return (x * x) / 2.0**14

    found = shrink(square, (torch.tensor([3.0e4, 1.0]),), {}, "16-true", gradients=False)
    (x,) = found.args
    largest = float(x.abs().max())
    assert 256.0 <= largest <= 1024.0  # squares overflow from 256 on; a power of two and two digits above that
    assert not audit(square, x, mode="16-true", gradients=False).ok


def test_a_failure_that_needs_a_seed_keeps_it_and_another_loses_it() -> None:
    found = shrink(torch.exp, (torch.full((3,), 20.0),), {}, "16-true", gradients=False, seed=7, budget=1.0)
    assert found.seed == 0
    assert "seed" not in found.source
    assert "budget=1.0" in found.source
    assert "gradients=False" in found.source


def test_many_values_become_those_that_a_seed_draws() -> None:
    class Fixed(nn.Module):
        """Takes 100 values, no fewer."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape != (100,) or float(x.std()) < 0.5:
                raise ValueError("another input is asked for")
            return x.square().mean() - x.mean().square()

    fixed, x = Fixed(), 40 + torch.randn(100)
    before = audit(fixed, x, mode="16-true", gradients=False)
    found = shrink(fixed, (x,), {}, "16-true", gradients=False)
    check(found, before, subject=fixed)
    assert "manual_seed(0)" in found.source
    assert len(found.source) < 700


def test_as_many_audits_are_made_as_are_allowed() -> None:
    x = 10 + torch.randn(16, 24)
    found = shrink(variance, (x, torch.ones(24)), {}, "bf16-true", gradients=False, audits=5)
    assert found.audits <= 5
    assert not found.report.ok
    with pytest.raises(ConfigurationError, match="audits=0"):
        shrink(variance, (x, torch.ones(24)), {}, "bf16-true", audits=0)


def test_the_pasted_test_has_the_options_and_dtypes_that_the_audit_was_given() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.kept = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.kept(self.first(x)) * 1e4).square()

    net, x = Steps(), torch.randn(2, 64)
    options = Options(ignore_modules=("kept",), islands=(("kept", "float32"),))
    mode = with_dtypes(parse_mode("nf4"), compute_dtype="float16")
    before = audit(net, x, mode=mode, gradients=False, options=options)
    found = shrink(net, (x,), None, mode, gradients=False, options=options, name="net", audits=4)
    check(found, before, net=net)
    seen: dict[str, Any] = {}

    def noted(*args: Any, mode: Any, options: Any, **rest: Any) -> Report:
        seen.update(mode=mode, options=options)
        return audit(*args, mode=mode, options=options, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("precision_runtime.audit", noted)
        with pytest.raises(AssertionError):
            pasted(found, net=net)
    assert seen == {"mode": mode, "options": options}


def test_where_the_first_search_leads_astray_the_second_has_audits_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fooled(function: Any, args: Any, kwargs: Any, mode: Any, **asked: Any) -> Report:
        calls.append("quick")
        return audit(variance, 10 + torch.randn(4, 24), torch.ones(24), mode=mode, gradients=False)

    def counted(*args: Any, **asked: Any) -> Report:
        calls.append("full")
        return audit(*args, **asked)

    monkeypatch.setattr("precision_runtime.shrinking.verdict", fooled)
    monkeypatch.setattr("precision_runtime.shrinking.audit", counted)
    x = torch.zeros(16, 4)
    x[5] = 20.0
    found = shrink(torch.exp, (x,), {}, "16-true", gradients=False, audits=40)
    assert found.args[0].numel() == 1
    assert found.audits <= 40
    assert calls.count("quick") <= 30
    # The audit of the inputs as given, and those of what each search led to, are beside the search.
    assert len(calls) - 3 <= 40


def test_warnings_of_smaller_inputs_are_not_the_user_s() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        if x.numel() < 16:
            warnings.warn("a small input", stacklevel=1)
        return torch.exp(x)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = shrink(noisy, (torch.full((16,), 20.0),), {}, "16-true", gradients=False)
        assert found.after == 1
        assert not told
        noisy(*found.args)  # it does warn
    assert len(told) == 1


def test_a_warning_that_is_an_error_is_one_for_smaller_inputs_too() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        if x.numel() < 4:
            warnings.warn("a small input", stacklevel=1)
        return torch.exp(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shrink(noisy, (torch.full((16,), 20.0),), {}, "16-true", gradients=False).after == 4


def test_a_report_that_is_known_spares_its_audit_and_code_that_ends_otherwise_each_time_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.full((4,), 20.0)
    report = audit(torch.exp, x, mode="16-true", gradients=False)
    audits: list[torch.Tensor] = []

    def counted(*args: Any, **asked: Any) -> Report:
        audits.append(args[1])
        return audit(*args, **asked)

    monkeypatch.setattr("precision_runtime.shrinking.audit", counted)
    found = shrink(torch.exp, (x,), {}, "16-true", gradients=False, report=report)
    assert [t.numel() for t in audits] == [1]  # of what was found, and none of what was given
    assert found.after == 1
    with pytest.raises(AuditError, match=r"end otherwise when audited again: first .*range.*; then nothing fails"):
        shrink(torch.relu, (x,), {}, "16-true", gradients=False, report=report)


def test_the_user_s_inputs_and_model_stay_as_they_are() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), Length()), torch.randn(8, 4) * 1000
    kept, before = x.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    shrink(net, (x,), {}, "16-true", gradients=False)
    assert torch.equal(x, kept)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in net.state_dict().items())


def test_inputs_that_no_text_can_make_are_said_to_be_so() -> None:
    class Box:
        """No container that anybody knows."""

    found = shrink(lambda x, box: torch.exp(x), (torch.full((4,), 20.0), Box()), {}, "16-true", gradients=False)
    assert found.source.startswith("# a test cannot be written for an input of type Box")
    assert found.after == 1


# -- the search alone --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_exactly_what_is_needed_is_left(given_: tuple[int, set[int]]) -> None:
    count, needed = given_
    assert smallest(range(count), lambda kept: needed <= set(kept)) == sorted(needed)


def test_where_any_part_will_do_one_item_is_left() -> None:
    assert len(smallest(range(37), lambda kept: len(kept) > 0)) == 1


# -- the text ----------------------------------------------------------------------------------------------------------

REPORT = Report("f", "16-true", "cpu", "native", 2.0, 8.0, 8.0)


def written(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the function of a pasted test gets."""
    seen: list[Any] = []
    source = source_of_test("f", "16-true", args, kwargs, {}, REPORT, {}, 0)
    body, call = source.split("    report = audit(")
    space: dict[str, Any] = {}
    exec(f"{body}    return args, locals().get('kwargs', {{}})", space)
    assert call.startswith("f, *args, mode=")
    seen.append(space["test_f_holds_in_16_true"]())
    return seen[0]


AWKWARD: dict[str, Callable[[], Any]] = {
    "scalar": lambda: torch.tensor(0.1),
    "empty": lambda: torch.empty(0, 3),
    "half": lambda: torch.randn(3, 4).half(),
    "bfloat16": lambda: torch.randn(300).bfloat16(),
    "double": lambda: torch.randn(5, dtype=torch.float64),
    "long": lambda: torch.randint(0, 9, (400,)),
    "bool": lambda: torch.rand(3, 3) > 0.5,
    "many bools": lambda: torch.rand(30, 30) > 0.5,
    "complex": lambda: torch.randn(4, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(300, dtype=torch.complex64).conj(),
    "special": lambda: torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-45, 3.4e38]),
    "equal": lambda: torch.full((5, 7), 0.3),
    "large": lambda: torch.randn(40, 40),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 5).mT,
    "nested": lambda: [torch.ones(2), {"a": (torch.zeros(3), None, 1.5)}, ()],
    "infinite number": lambda: [math.inf, -math.inf],
}


def plain(t: torch.Tensor) -> torch.Tensor:
    """Something that ``torch.equal`` can compare: no NaN, no complex numbers."""
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.nan_to_num(7.0, 8.0, 9.0) if t.is_floating_point() else t


@pytest.mark.parametrize("case", AWKWARD)
def test_every_input_comes_back_from_its_text(case: str) -> None:
    value = AWKWARD[case]()
    (positional,), named = written(value, also=value)
    for back in (positional, named["also"]):
        if not isinstance(value, torch.Tensor):
            assert repr(back) == repr(value)
            continue
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        assert back.clone().stride() == value.clone().stride()
        assert torch.equal(plain(back), plain(value))
        if value.is_floating_point():
            assert torch.equal(back.signbit() | back.isnan(), value.signbit() | value.isnan())


def test_a_draw_and_its_text_are_the_same() -> None:
    draw = Draw(3, 0.5, 2.0, (3, 4), torch.float32)
    state = torch.get_rng_state()
    assert torch.equal(eval(draw.source(), {"torch": torch}), draw.tensor())
    assert torch.equal(state, torch.get_rng_state())
