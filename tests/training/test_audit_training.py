"""``audit_training``: what it finds, what it leaves in peace, and that it leaves everything as it was."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from precision_runtime import audit_training
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.scaling import DynamicScaler

_G = torch.Generator().manual_seed(0)
X = torch.randn(32, 8, generator=_G)
Y = torch.tanh(X @ torch.randn(8, 4, generator=_G))
BATCH = [(X, Y)]


def line() -> nn.Module:
    return nn.Linear(8, 4)


def ones() -> nn.Module:
    made = nn.Linear(8, 4)
    nn.init.constant_(made.weight, 1.0)
    return made


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("mode", ["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "apex-O2"])
def test_a_healthy_training_holds(mode: str) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))

    report = audit_training(net, sgd, mse, BATCH, mode, steps=6)
    assert report.ok, str(report)
    assert report.subject == "training Sequential for 6 steps"


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(("mode", "lr"), [("32-true", 1e-4), ("32-true", 1e-6), ("16-mixed", 1e-6), ("tf32", 1e-5)])
def test_what_float32_weights_round_away_of_small_steps_is_their_price(mode: str, lr: float, make: Any) -> None:
    """Steps that are alike round the same way each time; nothing wider is to be had in these modes."""
    report = audit_training(line, lambda m: make(m.parameters(), lr=lr), mse, BATCH, mode, steps=30)
    assert report.ok, str(report)


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", "bf16-mixed"])
def test_steps_that_even_float32_weights_do_not_hold_are_lost(mode: str) -> None:
    report = audit_training(ones, lambda m: torch.optim.Adam(m.parameters(), lr=2e-8), mse, BATCH, mode, steps=40)
    first = report.findings[0]
    assert (first.where, first.kind) == ("update", "underflow")
    assert "100% of the movement that the optimizer meant left no trace" in first.message


def test_updates_below_half_a_unit_are_found_with_parameter_cause_and_a_cure_that_was_tried() -> None:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95))

    report = audit_training(ones, adam, mse, BATCH, "bf16-true", steps=20)
    first = report.findings[0]
    assert (first.where, first.kind, first.module) == ("update", "underflow", "")
    assert "'weight'" in first.message
    assert "left no trace" in first.message
    assert first.worst is not None
    assert first.worst.value == 1.0  # it has not moved
    assert first.worst.reference != pytest.approx(1.0, abs=0.005)
    assert "updates='kahan'" in str(first.suggestion)
    assert audit_training(ones, adam, mse, BATCH, "bf16-mixed", steps=20).ok


def test_adam_s_eps_that_half_cannot_hold_is_named() -> None:
    report = audit_training(line, lambda m: torch.optim.Adam(m.parameters()), mse, [(X * 1e-3, Y)], "16-true", steps=3)
    assert not report.ok
    assert report.findings[0].where == "update"
    assert "eps=1e-08 in float16: it is 0 there" in report.findings[0].message


def test_gradients_that_vanish_are_found_with_the_scale_that_keeps_them() -> None:
    def small(model: nn.Module, batch: Any) -> torch.Tensor:
        return mse(model, batch) * 1e-8

    report = audit_training(line, sgd, small, BATCH, "16-true", steps=3)
    assert (report.findings[0].where, report.findings[0].kind) == ("backward", "underflow")
    needed, settles = report.figures["loss_scale_needed"], report.figures["loss_scale_settles"]
    assert needed <= settles

    def share(scale: float) -> float:
        torch.manual_seed(0)
        runtime = PrecisionRuntime("16-true", "cpu")
        model = runtime.setup(line())
        (small(model, (X, Y)).float() * scale).backward()
        return float((model.weight.grad == 0).double().mean())

    assert share(1.0) > 0.9
    assert share(needed) < 0.1


def test_the_largest_finite_scale_is_where_a_dynamic_scaler_settles() -> None:
    def steep(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]).sum(1).float() * 1e-9).sum()

    def plain(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()

    report = audit_training(line, sgd, steep, BATCH, "16-mixed", steps=2, step_fn=plain)
    settles = report.figures["loss_scale_settles"]
    torch.manual_seed(0)
    runtime = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(2.0**60))
    model = line()
    model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(40):
        optimizer.zero_grad()
        runtime.backward(steep(model, (X, Y)))
        if not runtime.step(optimizer).skipped:
            break
    assert settles == runtime.scaler.scale < 2.0**60


class Scaled(torch.optim.SGD):
    """SGD with a GradScaler of its own."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("first", [False, True], ids=["clipped first", "unscaled first"])
def test_clipping_before_unscaling_is_told_from_clipping_after(first: bool) -> None:
    def step(model: nn.Module, optimizer: Scaled, loss: torch.Tensor) -> None:
        optimizer.scaler.scale(loss).backward()
        if first:
            optimizer.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.scaler.step(optimizer)
        optimizer.scaler.update()

    report = audit_training(line, lambda m: Scaled(m, 1024.0), mse, BATCH, "16-mixed", steps=8, step_fn=step)
    assert report.ok is first, str(report)
    if not first:
        assert report.findings[0].where == "update"
        assert "times too small" in report.findings[0].message
    assert torch.amp.GradScaler("cpu").is_enabled()


def test_skipped_steps_are_no_error_and_a_schedule_that_runs_ahead_is_remarked_on() -> None:
    def make(model: nn.Module) -> Scaled:
        optimizer = Scaled(model, 2.0**24)
        optimizer.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)  # type: ignore[attr-defined]
        return optimizer

    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        optimizer.scaler.scale(loss).backward()
        optimizer.scaler.step(optimizer)
        optimizer.scaler.update()
        optimizer.schedule.step()

    report = audit_training(line, make, mse, BATCH, "16-mixed", steps=14, step_fn=step)
    assert report.ok, str(report)
    assert 0 < report.figures["skipped_steps"] < 14
    assert [r.kind for r in report.remarks] == ["scheduler"]


class Router(nn.Module):
    """Adds a thousandth to a buffer in every step; ``careful`` keeps it in float32 beside."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("load", torch.linspace(0.6, 0.9, 8))
        self.careful, self.wide = careful, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if self.careful:
                self.wide = self.load.float().clone() if self.wide is None else self.wide
                self.wide += 1e-3
                self.load.copy_(self.wide)
            else:
                self.load += 1e-3
        return self.layer(x)


@pytest.mark.parametrize("careful", [False, True])
def test_a_buffer_that_stands_still_is_found(careful: bool) -> None:
    report = audit_training(lambda: Router(careful), sgd, mse, BATCH, "bf16-true", steps=20)
    assert report.ok is careful, str(report)
    if not careful:
        assert "buffer 'load'" in report.findings[0].message
        assert "left no trace" in report.findings[0].message


def test_micro_batches_accumulate_where_the_step_is_not_taken() -> None:
    counts: list[int] = []

    def step(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        model.seen = getattr(model, "seen", 0) + 1
        (loss / 4).backward()
        counts.append(sum(p.grad is not None for p in model.parameters()))
        if model.seen % 4 == 0:
            optimizer.step()

    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]
    report = audit_training(line, sgd, mse, batches, "bf16-mixed", steps=8, step_fn=step)
    assert report.ok, str(report)
    assert len(counts) >= 16  # in the mode, and in FP64


def test_a_chaotic_training_stays_silent() -> None:
    class Chaos(nn.Module):
        """The logistic map: errors double in every step."""

        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.linspace(0.1, 0.9, 64))

        def forward(self, factor: torch.Tensor) -> torch.Tensor:
            return self.x * factor

    class Map:
        def __init__(self, model: nn.Module) -> None:
            self.x = next(model.parameters())

        @torch.no_grad()
        def step(self) -> None:
            self.x.copy_(3.9 * self.x * (1.0 - self.x))

    report = audit_training(
        Chaos, Map, lambda model, batch: model(batch).sum(), [torch.ones(64)], "bf16-mixed", steps=40
    )
    assert report.ok, str(report)
    assert "chaotic" in [r.kind for r in report.remarks]


def test_a_second_optimizer_of_second_order_and_one_of_one_s_own_can_be_judged() -> None:
    def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)

    assert audit_training(line, lbfgs, mse, BATCH, "16-mixed", steps=3).ok

    class Own:
        def __init__(self, model: nn.Module) -> None:
            self.parameters = list(model.parameters())

        def step(self) -> None:
            with torch.no_grad():
                for p in self.parameters:
                    p -= 0.1 * p.grad

    report = audit_training(line, Own, mse, BATCH, "16-mixed", steps=3)
    assert report.ok, str(report)


def test_code_that_does_not_run_in_the_mode_is_a_finding_and_other_errors_are_the_user_s() -> None:
    def picky(model: nn.Module, batch: Any) -> torch.Tensor:
        if next(model.parameters()).dtype is torch.bfloat16:
            raise RuntimeError("no bfloat16 here")
        return mse(model, batch)

    report = audit_training(line, sgd, picky, BATCH, "bf16-true", steps=2)
    assert (report.findings[0].kind, report.findings[0].where) == ("error", "forward")
    assert "no bfloat16 here" in report.findings[0].message

    def broken(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom") as caught:
        audit_training(line, sgd, mse, BATCH, "bf16-mixed", steps=2, step_fn=broken)
    notes = getattr(caught.value, "__notes__", None)
    assert notes is None or "step 1 of 2 in bf16-mixed" in notes[0]


def test_random_state_default_dtype_and_autocast_are_as_before_also_after_an_error() -> None:
    def wild(model: nn.Module, batch: Any) -> torch.Tensor:
        torch.set_default_dtype(torch.float64)
        torch.rand(3)
        random.random()
        raise ValueError("boom")

    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        audit_training(line, sgd, mse, BATCH, "32-true", steps=1)
        with pytest.raises(ValueError, match="boom"):
            audit_training(line, sgd, wild, BATCH, "bf16-mixed", steps=1)
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_default_dtype()) == before[1:]


def test_the_same_seed_gives_the_same_report() -> None:
    reports = [audit_training(line, sgd, mse, BATCH, "bf16-true", steps=5, seed=3).to_dict() for _ in range(2)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"make_model": nn.Linear(8, 4)}, "returned the same parameters twice"),
        ({"make_optimizer": lambda m: None}, "it is to return an optimizer, with step"),
        ({"loss_fn": lambda m, b: m(b[0])}, r"a tensor of shape \(32, 4\)"),
        ({"batches": []}, "got no batches"),
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"budget": -1.0}, "budget=-1.0 is not allowed"),
        ({"step_fn": 3}, "got int as step_fn"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_is_no_training_is_refused_in_a_sentence(change: dict[str, Any], message: str) -> None:
    if "make_model" in change:
        one = change["make_model"]
        change = {"make_model": lambda: one}
    given: dict[str, Any] = {
        "make_model": line, "make_optimizer": sgd, "loss_fn": mse, "batches": BATCH, "mode": "bf16-mixed", **change,
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match=message):
        audit_training(**given)


@pytest.mark.parametrize(("updates", "short"), [(None, True), ("kahan", False)])
def test_half_weights_that_have_not_moved_yet_are_remarked_on_first(updates: str | None, short: bool) -> None:
    """Steps of 1e-5, all lost, come to less than half a unit in the last place of 1 so far."""

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-5)

    report = audit_training(ones, adam, mse, BATCH, "bf16-true", steps=6, updates=updates)
    assert report.ok, str(report)
    assert bool(report.remarks) is short
    if short:
        assert "2 of 2 tensors of half weights have gone less than half of their way in 6" in report.remarks[0].message


@pytest.mark.parametrize("updates", ["kahan", "stochastic"])
def test_updates_that_lose_nothing_can_be_judged_and_what_half_optimizers_do_is_not_told_of_them(updates: str) -> None:
    """Rounded at random, weights walk: further than once rounded, and without losing what was meant."""

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    report = audit_training(ones, adam, mse, BATCH, "bf16-true", steps=24, updates=updates)
    assert report.ok, str(report)
    assert all(r.kind != "hazard" for r in report.remarks)


def test_updates_that_only_the_runtime_makes_are_not_for_who_steps_himself() -> None:
    with pytest.raises(ConfigurationError, match=r"updates='kahan' is what PrecisionRuntime\.step does"):
        audit_training(line, sgd, mse, BATCH, "bf16-true", step_fn=lambda m, o, loss: None, updates="kahan")
    with pytest.raises(ConfigurationError, match="updates='kahan' is for modes whose weights are half"):
        audit_training(line, sgd, mse, BATCH, "bf16-mixed", updates="kahan")


def test_an_island_that_is_nowhere_is_a_mistake_in_the_call_and_no_verdict() -> None:
    with pytest.raises(UnknownNameError, match="'9' in islands is unknown"):
        audit_training(line, sgd, mse, BATCH, "16-mixed", steps=1, islands={"9": "32"})


def test_an_unknown_mode_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'bf16-mixed'"):
        audit_training(line, sgd, mse, BATCH, "bf16-mixd")


def test_the_user_s_own_model_is_not_trained_when_it_is_refused() -> None:
    one = nn.Linear(8, 4)
    before = one.weight.detach().clone()
    with pytest.raises(ConfigurationError, match="same parameters twice"):
        audit_training(lambda: one, sgd, mse, BATCH, "bf16-mixed", steps=3)
    assert torch.equal(one.weight, before)
    assert one.weight.dtype is torch.float32
