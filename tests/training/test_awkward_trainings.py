"""Trainings that go wrong in ways of their own, each beside its twin that is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from precision_runtime import audit_training

_G = torch.Generator().manual_seed(0)
X = torch.randn(64, 8, generator=_G)
Y = torch.tanh(X @ torch.randn(8, 4, generator=_G))
BATCH = [(X, Y)]
BOTH = pytest.mark.parametrize("bad", [False, True])


def line() -> nn.Module:
    return nn.Linear(8, 4)


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def wide(t: torch.Tensor) -> torch.Tensor:
    """A copy of at least float32."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True)


# -- steps that are skipped, gradients that are kept ------------------------------------------------------------------


def steep(model: nn.Module, batch: Any) -> torch.Tensor:
    return mse(model, batch) * 10


def test_a_first_step_that_overflows_is_skipped_with_master_weights_as_without() -> None:
    """65536 times this loss is more than float16 holds; masters let go of a skipped step's gradients."""
    assert float(torch.tensor(65536.0).half()) == float("inf")
    report = audit_training(line, lambda m: torch.optim.SGD(m.parameters(), lr=0.01), steep, BATCH, "apex-O2", steps=8)
    assert report.ok, str(report)
    assert report.figures["skipped_steps"] >= 1
    assert report.figures["loss_scale"] < 65536.0


@pytest.mark.parametrize("every", [1, 2])
def test_sparse_gradients_are_judged_and_may_accumulate(every: int) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 1))

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - 1).square().mean()

    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        model.seen = getattr(model, "seen", 0) + 1  # type: ignore[assignment]
        if model.seen % every == 0:
            optimizer.step()

    rows = [torch.randint(0, 20, (8,), generator=_G) for _ in range(2)]
    report = audit_training(
        net, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), loss, rows, "16-mixed", steps=4,
        step_fn=None if every == 1 else step,
    )  # fmt: skip
    assert report.ok, str(report)


# -- averages of weights -----------------------------------------------------------------------------------------------


class Averaged(torch.optim.SGD):
    """SGD that keeps an average of the weights, in their dtype or in float32, as an attribute or as its state."""

    def __init__(self, model: nn.Module, careful: bool, place: str) -> None:
        super().__init__(model.parameters(), lr=0.5)
        self.careful, self.place = careful, place
        self.averages: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        weights = self.param_groups[0]["params"]
        if not self.averages:
            self.averages = [wide(p) if self.careful else p.detach().clone() for p in weights]
            if self.place == "state":
                for p, average in zip(weights, self.averages, strict=True):
                    self.state[p]["average"] = average
        super().step(closure)
        for p, average in zip(weights, self.averages, strict=True):
            average.lerp_(p.detach().to(average.dtype), 2e-3)


@BOTH
@pytest.mark.parametrize("place", ["state", "attribute"])
def test_an_average_of_weights_that_is_stuck_is_found(place: str, bad: bool) -> None:
    report = audit_training(line, lambda m: Averaged(m, not bad, place), mse, BATCH, "bf16-true", steps=14)
    assert report.ok is not bad, str(report)
    if bad:
        (finding,) = report.findings
        assert (finding.where, finding.kind) == ("update", "underflow")
        assert "this average of '" in finding.message
        assert finding.worst is not None
        assert finding.worst.value != pytest.approx(finding.worst.reference, rel=2.0**-8)


@pytest.mark.slow
@BOTH
def test_an_average_that_has_left_where_the_weights_began_is_still_one(bad: bool) -> None:
    """It nears weights that are ten times as large as in the beginning, until 1 % of what is left is rounded away."""

    def average(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        optimizer.averages = [
            p.detach().bfloat16() if p.dtype is not torch.float64 and bad else wide(p)  # type: ignore[attr-defined]
            for p in model.parameters()
        ]
        return optimizer

    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for p, kept in zip(model.parameters(), optimizer.averages, strict=True):
                kept.mul_(0.99).add_(p.to(kept.dtype), alpha=0.01)

    def far(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return sum((p - 3.0).square().sum() for p in model.parameters()) * batch  # type: ignore[no-any-return]

    report = audit_training(lambda: nn.Linear(8, 8), average, far, [torch.ones(())], "32-true", steps=300, step_fn=step)
    assert report.ok is not bad, str(report)
    if bad:
        assert report.findings[0].message.startswith("average \"['averages']")
        assert "rounded always the same way. Keep it in float32" in report.findings[0].message


def test_moments_of_gradients_are_no_averages_of_weights() -> None:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.9, 0.95))

    assert audit_training(line, adam, mse, BATCH, "bf16-mixed", steps=8).ok


# -- gradients ---------------------------------------------------------------------------------------------------------


class Scaled(torch.optim.SGD):
    """SGD with a GradScaler of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)


@BOTH
def test_clipping_values_before_unscaling_is_named_though_it_turns_the_gradient(bad: bool) -> None:
    def step(model: nn.Module, optimizer: Scaled, loss: torch.Tensor) -> None:
        optimizer.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not bad:
            optimizer.scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        optimizer.scaler.step(optimizer)
        optimizer.scaler.update()

    report = audit_training(line, Scaled, mse, BATCH, "16-mixed", steps=8, step_fn=step)
    assert report.ok is not bad, str(report)
    if bad:
        assert report.findings[0].where == "update"
        assert "times too small" in report.findings[0].message
        assert "Unscale first" in report.findings[0].message


@pytest.mark.slow
@BOTH
def test_a_gradient_that_is_summed_over_micro_batches_in_bfloat16_is_found(bad: bool) -> None:
    # From 256 equal terms on, the sum's last place is as large as a term, and half of it is rounded away.
    count = 320
    assert float(sum((torch.ones((), dtype=torch.bfloat16) for _ in range(count)), torch.zeros(()).bfloat16())) == 256.0

    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        model.seen = getattr(model, "seen", 0) + 1  # type: ignore[assignment]
        (loss / count).backward()  # type: ignore[no-untyped-call]
        if not bad:
            for p in model.parameters():
                p.total = wide(p.grad) if model.seen == 1 else p.total + p.grad  # type: ignore[attr-defined,arg-type]
                p.grad = None
        if model.seen == count:
            if not bad:
                for p in model.parameters():
                    p.grad = p.total.to(p.dtype)  # type: ignore[attr-defined]
            optimizer.step()

    batches = [(X[:1] * 0.2 + 1.0, Y[:1] + 3.0)]
    report = audit_training(
        line, lambda m: torch.optim.SGD(m.parameters(), lr=0.5), mse, batches, "bf16-true", steps=count, step_fn=step
    )
    assert report.ok is not bad, str(report)
    if bad:
        assert (report.findings[0].where, report.findings[0].kind) == ("backward", "instability")
        assert "already the gradient of the first step" in report.findings[0].message


# -- steps -------------------------------------------------------------------------------------------------------------


class ByHand:
    """Adam as many write it, with its moments in the weights' dtype or in float32."""

    def __init__(self, model: nn.Module, careful: bool) -> None:
        self.weights, self.count = list(model.parameters()), 0
        self.mean = [torch.zeros_like(wide(p) if careful else p.detach()) for p in self.weights]
        self.square = [torch.zeros_like(m) for m in self.mean]

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        for p, m, v in zip(self.weights, self.mean, self.square, strict=True):
            assert p.grad is not None
            g = p.grad.to(m.dtype)
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.99).addcmul_(g, g, value=0.01)
            root = (v / (1 - 0.99**self.count)).sqrt() + 1e-8
            p.sub_((0.01 * m / (1 - 0.9**self.count) / root).to(p.dtype))


@BOTH
def test_an_eps_of_adam_s_that_is_nothing_in_float16_is_found_in_the_update(bad: bool) -> None:
    assert float(torch.tensor(1e-8).half()) == 0.0

    def small(model: nn.Module, batch: Any) -> torch.Tensor:
        return mse(model, batch) * 0.02

    report = audit_training(line, lambda m: ByHand(m, not bad), small, BATCH, "16-true", steps=10)
    assert report.ok is not bad, str(report)
    if bad:
        assert (report.findings[0].where, report.findings[0].kind) == ("update", "range")
        assert "though every gradient is finite" in report.findings[0].message


class Table(nn.Module):
    """A layer, and a table of which one row is used: the others only decay."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(8, 4), nn.Embedding(50, 8)
        nn.init.normal_(self.table.weight, 1.0, 0.1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x + 1e-3 * self.table.weight[0])


class Decaying:
    """SGD with weight decay of a thousandth in each step, on the weights or on float32 masters of them."""

    def __init__(self, model: nn.Module, careful: bool) -> None:
        self.weights = list(model.parameters())
        self.masters = [wide(p) for p in self.weights] if careful else self.weights

    @torch.no_grad()
    def step(self) -> None:
        for p, master in zip(self.weights, self.masters, strict=True):
            assert p.grad is not None
            master.mul_(1 - 1e-3).sub_(0.1 * p.grad.to(master.dtype))
            p.copy_(master)


@BOTH
def test_weight_decay_that_does_nothing_is_found(bad: bool) -> None:
    assert float(torch.ones((), dtype=torch.bfloat16) * (1 - 1e-3)) == 1.0
    report = audit_training(Table, lambda m: Decaying(m, not bad), mse, BATCH, "bf16-true", steps=50)
    assert report.ok is not bad, str(report)
    if bad:
        (finding,) = report.findings
        assert (finding.where, finding.kind, finding.module) == ("update", "underflow", "table")
        assert "100% of the movement that the optimizer meant left no trace" in finding.message


@BOTH
def test_a_norm_that_overflows_when_gradients_are_clipped_is_no_fault_of_the_backward_pass(bad: bool) -> None:
    """600 squared is more than float16 holds: the factor by which gradients are clipped becomes 0."""

    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([(g if bad else wide(g)).square().sum() for g in grads]).sum().sqrt()
        for g in grads:
            g.mul_((1.0 / norm).to(g.dtype))
        optimizer.step()

    def large(model: nn.Module, batch: Any) -> torch.Tensor:
        return 3000.0 * functional.mse_loss(model(batch[0]), batch[1])

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    report = audit_training(
        net, lambda m: torch.optim.SGD(m.parameters(), lr=0.5), large, BATCH, "16-true", steps=4, step_fn=step
    )
    assert report.ok is not bad, str(report)
    if bad:
        first = report.findings[0]
        assert (first.kind, first.where) == ("instability", "update")
        assert "the backward pass leaves its gradient right" in first.message
        assert "taken with is zero" in first.message


@BOTH
def test_decay_that_is_added_to_scaled_gradients_is_told_from_a_wrong_gradient(bad: bool) -> None:
    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        scaler = scalers.setdefault(id(model), torch.amp.GradScaler("cpu"))
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not bad:
            scaler.unscale_(optimizer)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.add_(p.detach(), alpha=0.5)
        scaler.step(optimizer)
        scaler.update()

    scalers: dict[int, torch.amp.GradScaler] = {}
    report = audit_training(
        lambda: nn.Linear(8, 4), lambda m: torch.optim.SGD(m.parameters(), lr=0.1), mse, BATCH, "16-mixed", steps=4,
        step_fn=step,
    )  # fmt: skip
    assert report.ok is not bad, str(report)
    if bad:
        first = report.findings[0]
        assert (first.kind, first.where) == ("instability", "update")
        assert "what is done to it in between" in first.message


# -- causes ------------------------------------------------------------------------------------------------------------


def low(t: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rounded, where it is not the reference."""
    return t if t.dtype is torch.float64 else t.to(dtype).to(t.dtype)


def plainly(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


class Rounding(torch.optim.Optimizer):
    """SGD with momentum, whose steps are rounded to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
            kept.mul_(0.9).add_(p.grad)
            p.sub_(low(0.05 * kept))


def test_state_that_only_follows_wrong_steps_is_not_blamed_for_them() -> None:
    report = audit_training(lambda: nn.Linear(8, 16), Rounding, lambda m, b: m(b[0]).square().mean(), BATCH, "32-true",
                            steps=6)  # fmt: skip
    assert "the gradients of the first step are right" in report.findings[0].message
    assert "momentum" not in report.findings[0].message


def test_a_gradient_that_cancels_in_float32_is_not_said_to_underflow() -> None:
    """1000 and 1001 are one number in bfloat16."""

    def advantage(model: nn.Module, batch: Any) -> torch.Tensor:
        reward = low(1000.0 + (batch[1][:, 0] > 0).to(batch[0].dtype))
        return -((reward - reward.mean()) * model(batch[0])[:, 0]).mean()

    report = audit_training(
        line, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), advantage, BATCH, "32-true", steps=4
    )
    first = report.findings[0]
    assert (first.kind, first.where) == ("instability", "backward")
    assert "it is zero in 4 of 4 steps, though the format holds values far smaller" in first.message
    assert "loss scale" not in str(report)
    assert first.suggestion is None
    assert "loss_scale_needed" not in report.figures


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "16-mixed"])
def test_steps_that_step_fn_skips_are_not_laid_to_a_loss_scale_that_is_not_there(mode: str) -> None:
    """300 squared is more than float16 holds."""

    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if all(low(p.grad, torch.float16).square().half().sum().isfinite() if p.dtype is not torch.float64 else True
               for p in model.parameters() if p.grad is not None):  # fmt: skip
            optimizer.step()
        optimizer.zero_grad()

    report = audit_training(
        line, lambda m: torch.optim.SGD(m.parameters(), lr=1e-5), lambda m, b: mse(m, b) * 3000, BATCH, mode, steps=3,
        step_fn=step,
    )  # fmt: skip
    (finding,) = report.findings
    assert "every one of 3 steps was skipped by step_fn, which steps in FP64" in finding.message
    assert ("scaled" in finding.message) is (mode == "16-mixed")


class Twins(nn.Module):
    """A layer, and an average of it that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.average = nn.Linear(8, 4), nn.Linear(8, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def test_an_average_in_the_model_that_is_rounded_in_each_step_is_no_fault_of_the_optimizer_s() -> None:
    def step(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        plainly(model, optimizer, loss)
        with torch.no_grad():
            for p, kept in zip(model.layer.parameters(), model.average.parameters(), strict=True):
                kept.copy_(low(kept.lerp(p, 1e-3)))

    report = audit_training(
        Twins, lambda m: torch.optim.SGD(m.layer.parameters(), lr=0.1), mse, BATCH, "32-true", steps=8, step_fn=step
    )
    first = report.findings[0]
    assert first.module == "average"
    assert "values written into it in each step are rounded always the same way" in first.message


class Summing(torch.optim.Optimizer):
    """Divides its steps by a sum of norms, kept in float16 beside the parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            dtype = p.dtype if p.dtype is torch.float64 else torch.float16
            total = self.state[p].setdefault("total", torch.zeros((), dtype=dtype))
            total.add_(p.grad.norm().to(dtype))
            p.sub_(p.grad / (1.0 + total.to(p.dtype)))


def test_state_that_is_not_finite_is_named_by_its_parameter() -> None:
    report = audit_training(line, Summing, lambda m, b: mse(m, b) * 3e5, BATCH, "32-true", steps=3)
    assert "not finite any more: 'total' of weight, 'total' of bias" in report.findings[0].message
    assert "tensor(" not in str(report)


class Wrapper:
    """Keeps the optimizer that steps inside."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(self) -> None:
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def test_steps_of_an_inner_optimizer_s_are_not_said_never_to_have_been_taken() -> None:
    report = audit_training(
        line, Wrapper, mse, BATCH, "bf16-mixed", steps=3, step_fn=lambda m, o, loss: plainly(m, o.inner, loss)
    )
    (remark,) = report.remarks
    assert "step() of what make_optimizer returned was never called, and yet weights have moved" in remark.message


def differentiated(loss: torch.Tensor, weights: list[torch.Tensor], own: bool) -> tuple[Any, ...]:
    """Gradients that a step_fn asks for itself, or those that a backward pass has left."""
    if own:
        return torch.autograd.grad(loss, weights)
    loss.backward()  # type: ignore[no-untyped-call]
    return tuple(p.grad for p in weights)


@pytest.mark.parametrize("own", [False, True])
def test_gradients_that_step_fn_sums_in_bfloat16_are_not_laid_to_the_backward_pass(own: bool) -> None:
    def step(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        weights = list(model.parameters())
        found = differentiated(loss, weights, own)
        model.sums = [low(a + b) for a, b in zip(getattr(model, "sums", [0.0] * 2), found, strict=True)]
        model.count = getattr(model, "count", 0) + 1
        optimizer.zero_grad()
        if model.count % 8 == 0:
            for p, g in zip(weights, model.sums, strict=True):
                p.grad = g
            optimizer.step()
            model.sums = [0.0] * 2

    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 64, 8)]
    report = audit_training(
        line, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), mse, batches, "32-true", steps=16, step_fn=step
    )
    first = report.findings[0]
    assert (first.kind, first.where) == ("instability", "update")
    assert ("step_fn has put it there" if own else "the backward pass leaves its gradient right") in first.message
    assert "1 times too large" not in first.message


class Drifting(nn.Module):
    """A buffer that moves where it is not FP64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("there", torch.ones(4))

    def forward(self, x: torch.Tensor) -> Any:
        if self.there.dtype is not torch.float64:
            self.there.add_(0.5)
        return self.layer(x)


def test_a_buffer_that_moves_in_the_mode_only_is_told_of() -> None:
    report = audit_training(
        Drifting, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), mse, BATCH, "bf16-true", steps=4
    )
    assert "buffer 'there'" in report.findings[0].message
    assert "Keep it in float32" in report.findings[0].message


def test_a_sum_that_is_unscaled_after_every_micro_batch_is_no_fault_of_the_backward_pass() -> None:
    def step(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        scale = 1024.0 if model.weight.dtype is torch.float32 else 1.0
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        for p in model.parameters():
            p.grad /= scale
        model.seen = getattr(model, "seen", 0) + 1
        if model.seen % 4 == 0:
            optimizer.step()

    batches = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
    report = audit_training(
        line, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), mse, batches, "16-mixed", steps=16, step_fn=step
    )
    first = report.findings[0]
    assert (first.kind, first.where) == ("instability", "update"), str(report)
    assert "the backward pass leaves its gradient right" in first.message


@pytest.mark.parametrize("own", [False, True])
def test_a_gradient_that_step_fn_makes_infinite_is_laid_to_step_fn(own: bool) -> None:
    def step(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        weights = list(model.parameters())
        for p, g in zip(
            weights, differentiated(loss, weights, own), strict=True
        ):  # a norm of squares that float16 does not hold
            p.grad = (g * 1e-9).to(p.dtype) / (g * 1e-9).to(p.dtype).square().sum().sqrt()
        optimizer.step()

    report = audit_training(
        line, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), mse, BATCH, "16-true", steps=4, step_fn=step
    )
    first = report.findings[0]
    assert (first.kind, first.where) == ("range", "update"), str(report)
    assert ("step_fn has put it there" if own else "the backward pass left it so") in first.message
