"""What crashes or misleads an audit of real models: one test for each symptom that was met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precision_runtime import audit
from precision_runtime.errors import AuditError, ConfigurationError

TRUE = ("16-true", "bf16-true")


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


# -- ops and dtypes ----------------------------------------------------------------------------------------------------


def test_an_op_without_a_float64_kernel_runs_in_float32_in_the_reference_and_a_remark_says_so() -> None:
    weight = torch.randn(2, 16, 8)
    ends = torch.tensor([3, 8], dtype=torch.int32)
    x = torch.randn(8, 16)
    with pytest.raises(RuntimeError):  # when torch gets the kernel, another op must stand here
        torch._grouped_mm(x.double(), weight.double(), offs=ends)
    report = audit(lambda v, w: torch._grouped_mm(v, w, offs=ends), x, weight, mode="bf16-true", gradients=False)
    assert report.ok, report
    (remark,) = report.remarks
    assert remark.kind == "reference"
    assert remark.message.startswith("no FP64 kernel for aten::_grouped_mm")


class Masked(nn.Module):
    """A mask of the most negative value of a dtype that the code asks for, as attention layers make it."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = {"default": torch.get_default_dtype(), "input": x.dtype, "float32": torch.float32}[self.of]
        mask = torch.full(x.shape, torch.finfo(dtype).min, dtype=dtype).triu(1)
        return (x + mask.to(x.dtype)).softmax(-1)


@pytest.mark.parametrize(
    ("mode", "of"),
    [
        *((mode, "input") for mode in ("16-true", "bf16-true", "bf16-mixed", "32-true")),
        *((mode, "default") for mode in ("bf16-true", "bf16-mixed", "32-true")),  # in float16 it would be -inf
    ],
)
def test_the_most_negative_value_of_a_dtype_is_a_mask_and_no_overflow(mode: str, of: str) -> None:
    report = audit(Masked(of), torch.randn(6, 6), mode=mode)
    assert report.ok, report


def test_the_default_dtype_is_float64_in_the_reference_so_its_finfo_fits() -> None:
    seen = []

    def code(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_default_dtype())
        return torch.where(x > 0, x, torch.tensor(torch.finfo(torch.get_default_dtype()).min)).clamp(min=-10)

    assert audit(code, torch.randn(5), mode="bf16-mixed").ok
    assert seen[0] == torch.float32
    assert torch.float64 in seen


def test_a_row_of_minus_infinity_that_becomes_nan_in_both_is_no_finding() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(4, 4)
        mask[2] = -torch.inf
        return (x + mask.to(x.dtype)).softmax(-1)

    report = audit(masked, torch.randn(4, 4), mode="16-true", gradients=False)
    assert report.ok, report


def test_a_mask_that_overflows_to_a_nan_row_in_float16_alone_is_found() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        return (x + torch.full((4, 4), -1e10).to(x.dtype)).softmax(-1)  # -inf in float16

    x = torch.randn(4, 4)
    assert torch.equal(masked(x), torch.full((4, 4), 0.25))  # float32 has steps of 1024 there, and swallows x, too
    assert audit(masked, x, mode="bf16-true", gradients=False).ok
    report = audit(masked, x, mode="16-true", gradients=False)
    assert report.findings[0].kind == "range"


def test_float_in_user_code_is_float64_in_the_reference() -> None:
    seen = []

    class Upcasts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.float()
            z = x.to(torch.float32) + torch.zeros(3, dtype=torch.float32)
            s = x.softmax(-1, dtype=torch.float32) + torch.tensor([0.1, 0.2, 0.3], dtype=torch.half)
            seen.append((y.dtype, z.dtype, s.dtype))
            return y + z + s

    report = audit(Upcasts(), torch.randn(4, 3), mode="32-true", gradients=False)
    assert report.ok, report
    assert seen[0] == (torch.float32,) * 3
    assert seen[1] == (torch.float64,) * 3


def test_an_upcast_before_a_float64_layer_is_no_dtype_mismatch_in_the_reference() -> None:
    linear = nn.Linear(4, 4)
    assert audit(lambda x: linear(x.float().to(linear.weight.dtype)), torch.randn(2, 4), mode="bf16-true").ok


# -- modules, state, inputs --------------------------------------------------------------------------------------------


class UsesGiven(nn.Module):
    def forward(self, x: torch.Tensor, layer: nn.Module, *, other: nn.Module | None = None) -> torch.Tensor:
        y = layer(x)
        return y if other is None else other(y)


class LogOfOnePlus(nn.Module):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.abs() * 1e-3
        return torch.log(1 + x) if self.bad else torch.log1p(x)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("by", ["position", "keyword"])
def test_a_module_passed_as_an_argument_is_judged_too(bad: bool, by: str) -> None:
    linear = nn.Linear(8, 8)
    given = LogOfOnePlus(bad)
    x = torch.randn(4, 8)
    if by == "position":
        report = audit(UsesGiven(), x, given, mode="16-true")
    else:
        report = audit(UsesGiven(), x, linear, mode="16-true", kwargs={"other": given})
    assert report.ok is not bad, report
    if bad:
        assert report.findings[0].module == ("args[1]" if by == "position" else "other")
    assert linear.weight.dtype == torch.float32


class Recurrence(nn.Module):
    """A state that is passed in a list and replaced there, as state-space models keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, state: list[torch.Tensor]) -> torch.Tensor:
        state[0] = state[0] * 0.9 + self.inner(x)
        return state[0].tanh()


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Recurrence()

    def forward(self, x: torch.Tensor, state: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.cell(part, state) for part in x.unbind(1)], 1)


@pytest.mark.parametrize("mode", TRUE)
def test_a_state_that_is_replaced_in_a_list_is_what_it_was_at_each_call(mode: str) -> None:
    state = [torch.randn(4, 8)]
    first, before = state[0], state[0].clone()
    report = audit(Steps(), torch.randn(4, 5, 8), mode=mode, kwargs={"state": state}, gradients=False)
    assert report.ok, report
    assert state[0] is first
    assert torch.equal(first, before)


class BufferCache(nn.Module):
    """A cache in a buffer, written in place, and a position that counts up."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.position = nn.Linear(8, 8), 0
        self.register_buffer("cache", torch.zeros(6, 8))
        self.cache: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.cache[self.position] = self.inner(x).mean(0)
        self.position += 1
        return self.inner(x) + self.cache[: self.position].sum(0)


@pytest.mark.parametrize("mode", TRUE)
def test_a_cache_in_a_buffer_and_a_counter_are_what_they_were_at_each_call(mode: str) -> None:
    net = BufferCache()
    report = audit(lambda x: net(x) * net(x) + net(x), torch.randn(3, 8), mode=mode)
    assert report.ok, report
    assert net.position == 0
    assert not net.cache.any()


@pytest.mark.parametrize("mode", [*TRUE, "bf16-mixed"])
def test_an_activation_in_place_changes_no_captured_input(mode: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.SiLU(inplace=True))
    assert audit(net, torch.randn(4, 8), mode=mode).ok


def test_an_input_given_twice_stays_one_tensor() -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        return x + y if x is y else torch.zeros_like(x)

    x = torch.randn(4)
    assert audit(both, x, x, mode="16-true", gradients=False).lost_bits < 2


# -- values and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0,)])
def test_empty_tensors_go_through(shape: tuple[int, ...]) -> None:
    net: nn.Module = nn.Linear(8, 4) if shape[-1] == 8 else nn.ReLU()
    report = audit(net, torch.randn(shape), mode="16-true")
    assert report.ok, report


def test_whole_numbers_are_results_and_nothing_is_none() -> None:
    assert audit(lambda: torch.arange(3), mode="16-true").ok
    for nothing in ((), None, {1, 2}):
        with pytest.raises(ConfigurationError, match="nothing to judge: <lambda> gave"):
            audit(lambda x, nothing=nothing: nothing, torch.randn(3), mode="16-true")


def test_a_nan_in_the_reference_is_none_of_the_modes_fault() -> None:
    report = audit(lambda x: (x - 2).log(), torch.randn(50) + 2, mode="bf16-true", gradients=False)
    assert report.ok, report


def test_an_output_that_is_exactly_zero_in_float64_is_right_when_it_is_zero() -> None:
    assert audit(lambda x: x - x, torch.randn(4, 4), mode="16-true").ok


class Boxes(nn.Module):
    """As many rows come out as values pass a threshold that rounding crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[x[:, 0] > 1.0]
        return self.scale(chosen)


def test_a_shape_that_depends_on_values_is_a_remark() -> None:
    x = torch.randn(40, 4)
    x[:5, 0] = 1.0 + 2.0**-12  # 1 in both half formats
    boxes = Boxes()
    assert boxes(x).shape != boxes.to(torch.bfloat16)(x.bfloat16()).shape
    report = audit(Boxes(), x, mode="bf16-true")
    assert report.ok, report
    assert any(r.message.startswith("shape depends on values: ") for r in report.remarks), report


def test_the_rest_of_a_model_with_such_a_shape_is_judged() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxes, self.log = Boxes(), LogOfOnePlus(True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.boxes(x), self.log(x)

    x = torch.randn(40, 4)
    x[:5, 0] = 1.0 + 2.0**-12
    report = audit(Both(), x, mode="bf16-true")
    assert report.findings[0].module == "log"
    assert any("shape depends on values" in r.message for r in report.remarks)


class Declares(nn.Module):
    """Names a part that needs float32, as Hugging Face models do."""

    def __init__(self, declared: bool) -> None:
        super().__init__()
        self.lift, self.router = nn.Linear(8, 8), nn.Linear(8, 8)
        if declared:
            self._keep_in_fp32_modules = ["router"]
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.router.weight.dtype)
        y = self.lift(x)
        return self.router(y.to(self.router.weight.dtype)).to(y.dtype)


@pytest.mark.parametrize("declared", [False, True])
def test_parts_that_a_model_keeps_in_float32_stay_there(declared: bool) -> None:
    net = Declares(declared)
    seen = net.seen
    seen.clear()
    dtypes = []
    net.router.register_forward_hook(lambda m, a, o: dtypes.append(m.weight.dtype))
    report = audit(net, torch.randn(4, 8), mode="16-true")
    assert report.ok, report
    assert dtypes[0] == (torch.float32 if declared else torch.float16)
    assert net.router.weight.dtype == net.lift.weight.dtype == torch.float32


# -- code that does not run --------------------------------------------------------------------------------------------


class Mismatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.linspace(0, 1, 4)
        return x @ torch.diag(table) @ self.weight


def test_code_that_runs_in_float32_but_not_in_the_mode_is_an_error_with_the_line() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Mismatch())
    report = audit(net, torch.randn(2, 4), mode="16-true")
    (finding,) = report.findings
    assert (finding.kind, finding.where, finding.module) == ("error", "forward", "1")
    assert finding.message.startswith(
        "does not run in this mode: RuntimeError: expected m1 and m2 to have the same dtype"
    )
    assert "test_hazards.py:" in finding.message
    assert "return x @ torch.diag(table) @ self.weight" in finding.message
    assert report.lost_bits == float("inf")
    assert audit(net, torch.randn(2, 4), mode="bf16-mixed").ok  # autocast casts both


def test_code_that_does_not_run_at_all_raises_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        audit(nn.Linear(4, 4), torch.randn(2, 5), mode="16-true")


def test_code_that_runs_in_every_precision_but_float64_has_no_reference() -> None:
    def refuses(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise TypeError("no doubles here")
        return x * 2

    with pytest.raises(AuditError, match="not in FP64, so there is no reference: TypeError: no doubles here") as caught:
        audit(refuses, torch.randn(3), mode="16-true")
    assert 'raise TypeError("no doubles here")' in str(caught.value)


# -- gradients that are exactly zero -----------------------------------------------------------------------------------


class KeyBias(nn.Module):
    """Attention with a bias on its keys: it shifts every logit of a row alike, so its true gradient is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 4, -1) @ self.v(x)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true", "16-mixed", "bf16-mixed"])
def test_a_gradient_that_is_exactly_zero_is_judged_by_the_terms_that_cancel(mode: str) -> None:
    net, x = KeyBias(), torch.randn(3, 12, 16)
    report = audit(net, x, mode=mode)
    assert report.ok, report
    # The second witness: it is zero to float64's last digit, while in float32 it is not.
    double = KeyBias().double()
    double(x.double()).square().sum().backward()
    assert double.k.bias.grad is not None
    assert float(double.k.bias.grad.abs().max()) < 1e-13


class Force(nn.Module):
    """The gradient of an energy: the code differentiates by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.energy = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if x.is_leaf else x
        energy = self.energy(torch.tanh(self.inner(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.parametrize("mode", ["32-true", "16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("gradients", [False, True])
def test_code_that_differentiates_by_itself_is_judged_as_a_whole(mode: str, gradients: bool) -> None:
    torch.manual_seed(0)
    report = audit(Force(), torch.randn(4, 8), mode=mode, gradients=gradients)
    assert report.ok, report
    said = any("differentiates by itself" in remark.message for remark in report.remarks)
    assert said is gradients


def test_a_wrong_second_gradient_is_found_in_the_whole() -> None:
    class Cubed(Force):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (3000.0 * x) ** 2 / 9e6

    torch.manual_seed(0)
    report = audit(Cubed(), torch.randn(4, 8), mode="16-true")
    assert {(f.kind, f.module) for f in report.findings} == {("range", "")}, report


def test_the_rounding_of_a_norm_is_shared_by_its_row_and_no_finding() -> None:
    class Sharp(nn.Module):
        """Similarities of normalised rows over a temperature: each row's norm is rounded once, for all its columns."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.head(x)
            z = z / z.norm(dim=-1, keepdim=True)
            return torch.logsumexp((z @ z.T).float() / 0.05, -1)

    torch.manual_seed(0)
    a = torch.randn(32, 24)
    report = audit(Sharp(), torch.cat([a, a + 0.5 * torch.randn(32, 24)]), mode="16-mixed", gradients=False)
    assert report.ok, report


class Padded(nn.Module):
    """The row of the padding token is zero; a norm with a small eps makes its gradient huge, and it is dropped."""

    def __init__(self, factor: float = 4000.0) -> None:  # beyond what a smaller incoming gradient would prevent
        super().__init__()
        self.factor = factor
        self.table = nn.Embedding(12, 16, padding_idx=0)
        self.norm = nn.RMSNorm(16, eps=1e-10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.table(ids)) * self.factor


PADDED = torch.tensor([[0, 3, 5, 7], [0, 0, 2, 1]])


def test_a_gradient_out_of_range_that_reaches_nothing_is_a_remark_and_no_figure() -> None:
    report = audit(Padded(), PADDED, mode="16-true")
    assert report.ok, report
    assert report.lost_bits < 2, report
    assert "harmless-range" in {remark.kind for remark in report.remarks}, report


def test_a_gradient_out_of_range_that_reaches_nothing_is_no_finding_beside_gradients_that_are_wrong() -> None:
    """Its rows are dropped; what is wrong elsewhere is finite, which no infinity becomes in a backward pass."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded, self.linear, self.unstable = Padded(), nn.Linear(16, 16), Unstable()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.padded(ids)
            return x + self.unstable(self.linear(x / 4000.0) + 30.0)

    torch.manual_seed(0)
    report = audit(Both(), PADDED, mode="16-true")
    assert {f.module for f in report.findings} <= {"", "unstable"}, report
    assert any(f.where == "backward" for f in report.findings), report
    assert "range" not in {f.kind for f in report.findings}, report
    assert "harmless-range" in {remark.kind for remark in report.remarks}, report


def test_a_gradient_out_of_range_that_reaches_nothing_costs_no_other_gradient_a_digit() -> None:
    """A smaller incoming gradient, for its sake, would leave what ``small`` hands on a few subnormal steps."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded, self.large, self.small = Padded(1000.0), nn.Linear(16, 16), nn.Linear(16, 16)
            with torch.no_grad():
                self.small.weight *= 2.0**-9

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.padded(ids)
            return x + self.small(self.large(x))

    torch.manual_seed(0)
    report = audit(Both(), PADDED, mode="16-true")
    assert report.ok, report
    assert "harmless-range" in {remark.kind for remark in report.remarks}, report


class Unstable(nn.Module):
    """Forms a small difference of large squares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2 + 0.0 * x


class WritesResult(nn.Module):
    """Overwrites in place what a call inside has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = Unstable()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.variance(x + 10)
        y.clamp_(max=-100.0)  # nothing of the call's result is left
        return y


class Memory(nn.Module):
    """Returns an attribute that the next call, and whoever puts attributes back, writes to."""

    def __init__(self, unstable: bool = False) -> None:
        super().__init__()
        self.state = torch.zeros(8)
        self.unstable = unstable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state += (x * x).mean(0) - x.mean(0) ** 2 if self.unstable else x.mean(0)
        return self.state


def test_a_result_that_its_caller_overwrites_is_judged_as_it_came_out() -> None:
    torch.manual_seed(0)
    report = audit(WritesResult(), torch.randn(64, 32), mode="bf16-true", gradients=False)
    assert [f.module for f in report.findings] == ["variance"]


@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "16-mixed"])
def test_a_result_that_is_an_attribute_keeps_its_value_in_the_reference(mode: str) -> None:
    torch.manual_seed(0)
    memory = Memory()
    report = audit(lambda x: memory(x) + memory(x), torch.randn(16, 8), mode=mode, gradients=False)
    assert report.ok, str(report)
    assert report.calls == 2


def test_a_defect_is_found_in_a_result_that_is_an_attribute() -> None:
    torch.manual_seed(0)
    memory = Memory(unstable=True)
    # Were the reference's result put back with the attribute, it would be 0 and every run would differ from it alike.
    report = audit(lambda x: memory(x) * 1.0, torch.randn(64, 8) + 20.0, mode="bf16-true", gradients=False)
    assert [finding.module for finding in report.findings][:1] == ["memory"], str(report)


class Attention(nn.Module):
    """Attends with a mask that leaves the last query nothing to look at."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.fill = fill

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        mask = torch.zeros(x.shape[1], x.shape[1])
        mask[-1] = self.fill
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


@pytest.mark.parametrize("mode", ["bf16-mixed", "bf16-true", "32-true"])
def test_what_comes_out_of_an_entirely_masked_row_is_nobodys_concern(mode: str) -> None:
    torch.manual_seed(0)
    # float32's smallest number is -inf in bfloat16: torch then gives 0 where float32 gives the average of all values.
    report = audit(Attention(torch.finfo(torch.float32).min), torch.randn(2, 6, 16), mode=mode)
    assert report.ok, str(report)


def test_small_activations_lose_what_the_steps_of_subnormal_numbers_cost() -> None:
    torch.manual_seed(0)
    # Activations of 1e-6 are 17 steps of float16: some signs in front of the ReLU depend on their rounding.
    net = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 2, 1))
    nn.init.normal_(net[0].weight, std=0.02)  # type: ignore[arg-type]
    report = audit(net.eval(), 1e-5 * torch.randn(2, 8, 16, 16), mode="16-true")
    assert report.ok, str(report)
