"""FP64 beside a low-precision run: what follows it, and what steps in for it, equals the same code run in FP64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from precision_runtime.auditing.blaming.following import Following
from precision_runtime.auditing.blaming.observer import Observer
from precision_runtime.auditing.blaming.shadow import Shadows
from precision_runtime.auditing.blaming.widened import Widening
from precision_runtime.auditing.executing.dispatch import Trace, TrueDouble

Code = Callable[[torch.Tensor], torch.Tensor]


def views(x: torch.Tensor) -> torch.Tensor:
    y = (x * 3.7).transpose(0, 1)[1:, ::2]
    y[0] += 0.123
    return y.reshape(-1).exp()


def in_place(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], dtype=x.dtype)
    for i, row in enumerate(x):
        out[i] = row.square().sum()
    out.mul_(1.1).clamp_(max=3.0)
    return out.div_(out.norm())


def written_into(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.mul(x, 1.37, out=out)
    out.index_add_(0, torch.tensor([0, 0, 1]), x[:3] / 7)
    out.scatter_(1, torch.zeros(len(x), 1, dtype=torch.long), 0.3)
    return out.index_put_((torch.tensor([1, 2]),), x[:2] * 0.77, accumulate=True)


def several_results(x: torch.Tensor) -> torch.Tensor:
    values, places = (x * 1.9).sort(-1)
    top, _ = values.topk(2, -1)
    variance, mean = torch.var_mean(x, -1)
    return torch.cat([values.gather(1, places), top], -1) * (variance + mean * mean)[:, None]


def complex_pairs(x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex((x if x.dtype == torch.float64 else x.float()).mul(1.3).reshape(len(x), -1, 2))
    return torch.view_as_real(pairs * pairs.conj().exp()).sum(-1) + pairs.conj().imag


def factories(x: torch.Tensor) -> torch.Tensor:
    return x * torch.linspace(0.1, 0.9, x.shape[1], dtype=x.dtype) + torch.full((), 0.1, dtype=x.dtype)


def products(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ x.T / 3, -1) @ torch.nn.functional.layer_norm(x, x.shape[1:])


CODES = [views, in_place, written_into, several_results, complex_pairs, factories, products]


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    with observer:
        observer.begin([Trace()], TrueDouble())
        yield
    assert _get_current_dispatch_mode() is None


def inputs() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(6, 8).half() + 0.5


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_shadows_are_what_the_code_computes_in_fp64_while_the_code_computes_what_it_always_does(code: Code) -> None:
    x = inputs()
    following = Following()
    with observing(following):
        low = code(x)
    assert torch.equal(low, code(x))
    shadow = following.shadows.get(low)
    assert shadow is not None
    torch.testing.assert_close(shadow, code(x.double()), rtol=1e-13, atol=1e-13)
    assert [e.step.number for e in following.events.values()] == sorted(following.events)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_with_every_op_in_fp64_the_result_is_the_true_one_rounded_once(code: Code) -> None:
    x = inputs()
    with observing(Widening(lambda _: True)):
        wide = code(x)
    plain = code(x)
    assert wide.dtype == plain.dtype
    assert torch.equal(wide, code(x.double()).to(plain.dtype))
    assert not torch.equal(plain.double(), code(x.double()))  # else nothing has been shown


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_with_no_op_chosen_nothing_changes(code: Code) -> None:
    with observing(Widening(lambda _: False)):
        untouched = code(inputs())
    assert torch.equal(untouched, code(inputs()))


def test_one_op_in_fp64_promotes_what_follows_as_double_would_until_a_cast_and_a_matrix_product() -> None:
    x = inputs()

    def code(t: torch.Tensor) -> torch.Tensor:
        return (t.square() / 3) + t

    with observing(Widening(lambda step: step.name == "aten::div")):
        widened = code(x)
    by_hand = (x.square().double() / 3) + x.double()  # square has been rounded, nothing after it
    assert torch.equal(widened, by_hand.half())
    with observing(Widening(lambda step: step.name == "aten::div")):
        cast = code(x).float().half() @ x.T
        product = code(x) @ x.T
    assert torch.equal(cast, by_hand.half() @ x.T)
    assert torch.equal(product, by_hand.half() @ x.T)


def test_in_fp32_each_result_is_rounded_to_fp32() -> None:
    x = inputs()
    with observing(Widening(lambda _: True, single=True)):
        single = (x.square() - 0.999999).float()
    assert torch.equal(single, (x.float().square().double() - 0.999999).float())


def test_dropout_keeps_the_mask_that_was_drawn() -> None:
    x = inputs().requires_grad_()
    following = Following()
    with observing(following):
        dropped = torch.native_dropout(x * 1.1, 0.5, True)
    shadow = following.shadows.get(dropped[0])
    assert shadow is not None
    assert torch.equal(shadow, x.double() * 1.1 * dropped[1] / 0.5)


def test_what_is_drawn_and_what_is_uninitialised_is_taken_as_it_is() -> None:
    x = inputs()
    following = Following()
    with observing(following):
        y = x * 3.3
        y.bernoulli_(0.5)
        z = y + torch.empty(6, 8).half().fill_(0.1)
    assert torch.equal(following.wide(y), y.double())
    torch.testing.assert_close(following.wide(z), y.double() + 0.1, rtol=0, atol=1e-12)


def test_a_shadow_goes_with_its_storage() -> None:
    shadows = Shadows()
    for _ in range(2000):
        shadows.put(torch.ones(4).half())
    assert len(shadows._entries) <= 600


def test_bits_seen_as_another_dtype_and_tensors_without_a_storage_have_no_shadow() -> None:
    shadows = Shadows()
    x = inputs()
    shadows.put(x, x.double() + 1e-5)
    assert shadows.get(x[1:]) is not None
    assert shadows.get(x.view(torch.bfloat16)) is None
    assert shadows.put(torch.ones(3, 3).to_sparse()) is None
    assert shadows.put(torch.ones(3, dtype=torch.long)) is None
    assert shadows.put(torch.ones(0)) is None


def test_what_an_op_did_is_told_apart() -> None:
    """Each figure beside the same figure by hand."""
    x = torch.tensor([3e2, 1e-4, 2.0], dtype=torch.float16)
    following = Following()
    with observing(following):
        square = x * x
        near = x + 1000.0
        (near - 1000.0).log()
        torch.arange(2040, 2060, dtype=torch.float16)
    events = list(following.events.values())
    born, rounded, amplified, _, counted = events
    assert (born.step.name, born.born, born.zeros) == ("aten::mul", True, 1)
    assert torch.isinf(square[0])
    assert square[1] == 0
    error = (near.double() - (x.double() + 1000)).norm() / (x.double() + 1000).norm()
    assert rounded.local == rounded.outgoing == pytest.approx(float(error))
    assert amplified.incoming == rounded.outgoing
    assert amplified.local == 0  # subtraction of neighbours is exact
    assert amplified.outgoing == pytest.approx(float((near.double() - 1000 - x.double()).norm() / x.double().norm()))
    assert amplified.sources == (rounded.step.number,)
    assert (counted.step.name, counted.lost) == ("aten::arange", True)
    assert [e.step.site.line.partition(": ")[2] for e in events][:2] == ["square = x * x", "near = x + 1000.0"]


def test_an_op_of_the_backward_pass_has_the_name_and_line_of_its_forward_op() -> None:
    x = inputs().requires_grad_()
    following = Following()
    with observing(following):
        y = torch.tanh(x)
        torch.autograd.backward([y.sum()])
    (backward,) = [e for e in following.events.values() if e.step.name == "aten::tanh_backward"]
    assert backward.step.backward
    assert backward.step.site.op == "aten::tanh"
    assert backward.step.site.line.endswith("y = torch.tanh(x)")
    assert backward.step.site == next(iter(following.events.values())).step.site


class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.mul(grads[0], x.sinh())  # a wrong derivative, on a line of its own


def test_a_backward_of_the_users_own_has_lines_of_its_own() -> None:
    following = Following()
    with observing(following):
        torch.autograd.backward([Steep.apply(inputs().requires_grad_()).sum()])  # type: ignore[no-untyped-call]
    (step,) = [e.step for e in following.events.values() if e.step.name == "aten::sinh"]
    assert step.backward
    assert "return torch.mul(grads[0], x.sinh())" in step.site.line


@torch.library.custom_op("opshadow::scaled_codes", mutates_args=())
def scaled_codes(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A kernel for packed weights: with a scale of another width it reads other values, as real ones do."""
    weight = codes.to(scale.dtype) * scale * (1.0 if scale.dtype == torch.float16 else 1e3)
    return x @ weight.to(x.dtype)


def test_kernels_of_others_that_read_packed_codes_are_taken_as_they_are() -> None:
    x, codes, scale = inputs(), torch.randint(-8, 8, (8, 4), dtype=torch.int8), torch.tensor(0.37).half()

    def code() -> torch.Tensor:
        result: torch.Tensor = scaled_codes(x * 1.1, codes, scale)
        return result.square()

    following = Following()
    with observing(following):
        low = code()
    with observing(Widening(lambda _: True)):
        widened = code()
    assert torch.equal(low, code())
    expected = scaled_codes((x.double() * 1.1).half(), codes, scale).double().square()
    torch.testing.assert_close(following.wide(low), expected, rtol=1e-12, atol=0)
    assert torch.equal(widened, expected.half())
