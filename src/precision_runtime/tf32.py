"""TF32 products: torch's switches for hardware that has them, exact emulation for hardware that has not.

TF32 keeps float32's exponent and 10 of its 23 mantissa bits. Only the operands of matrix products and convolutions are
rounded to it, in the forward and the backward pass alike; products of two such operands are exact in float32, and sums
are made in float32. (NVIDIA, "A100 Tensor Core GPU Architecture", 2020.)

torch's newer switches alone are used (``torch.backends.*.fp32_precision``): once they are set, the older ones
(``allow_tf32``, ``get_float32_matmul_precision``) raise when read, so nothing here reads or writes those.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.nn.attention import SDPBackend, sdpa_kernel

from precision_runtime.dispatching import OwnMode, opened
from precision_runtime.errors import UnsupportedError
from precision_runtime.uncompiled import stance

aten = torch.ops.aten

_DROPPED = 13  # of float32's 23 mantissa bits


def round_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its significands rounded to TF32's 11 bits, to nearest and ties to even; the dtype stays.

    float32 and complex64 are rounded; every other dtype comes back as it is, float64 references above all. inf and NaN
    stay, with the NaN's payload; what rounds beyond the largest exponent becomes inf, as in any IEEE format.
    """
    if tensor.dtype is torch.complex64:
        return torch.view_as_complex(round_to_tf32(torch.view_as_real(tensor.resolve_conj())))
    if tensor.dtype is not torch.float32:
        return tensor
    bits = tensor.view(torch.int32)
    # Half a unit of the last bit that is kept, less one where that bit is even: the carry is round-half-even's.
    odd = (bits >> _DROPPED) & 1
    rounded = (bits + ((1 << (_DROPPED - 1)) - 1) + odd) & -(1 << _DROPPED)
    return torch.where(tensor.isfinite(), rounded, bits).view(torch.float32)


class Tf32Products(OwnMode):
    """Inside, the float32 operands of every matrix product and convolution are rounded to TF32 first.

    It sits below autograd and sees what composite functions (einsum, attention, GRU) and the backward pass are made of.
    Products of a matrix and a vector are left alone, as cuBLAS leaves them. Raises ``UnsupportedError`` for a fused
    kernel whose inner products nobody can reach.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            return opened(self, func, args, kwargs)
        packet = func.overloadpacket
        special = _SPECIAL.get(packet)
        if special is not None:
            return special(func, args, kwargs)
        places = _OPERANDS.get(packet)
        return func(*args, **kwargs) if places is None else func(*_rounded(args, places), **kwargs)


# Which arguments of an op are the operands of its product; what is added to the product is not among them.
_OPERANDS: Mapping[Any, tuple[int, ...]] = MappingProxyType(
    {
        aten.mm: (0, 1),
        aten.bmm: (0, 1),
        aten.addmm: (1, 2),
        aten.addmm_: (1, 2),
        aten._addmm_activation: (1, 2),
        aten.baddbmm: (1, 2),
        aten.baddbmm_: (1, 2),
        aten.addbmm: (1, 2),
        aten.addbmm_: (1, 2),
        aten.convolution: (0, 1),
        aten.convolution_overrideable: (0, 1),
        aten.conv_tbc: (0, 1),
    }
)


def rounded_operands(packet: Any) -> tuple[int, ...]:
    """Which arguments of an op TF32 rounds; none for most ops."""
    return (0, 1, 2) if packet is aten.convolution_backward else _OPERANDS.get(packet, ())


def _rounded(args: Sequence[Any], places: tuple[int, ...]) -> list[Any]:
    return [round_to_tf32(a) if i in places else a for i, a in enumerate(args)]


def _convolution_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Two products and, for the bias, a plain sum: the sum takes the gradient as it came."""
    *rest, mask = args
    by_input, by_weight, _ = func(*_rounded(rest, (0, 1, 2)), [mask[0], mask[1], False], **kwargs)
    gradient = rest[0]
    by_bias = gradient.sum([d for d in range(gradient.dim()) if d != 1]) if mask[2] else None
    return by_input, by_weight, by_bias


def _euclidean_dist(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """torch.cdist of many points: the square root of one product of widened rows, |a|² - 2ab + |b|²."""
    a, b = args
    ones_a, ones_b = torch.ones_like(a[..., :1]), torch.ones_like(b[..., :1])
    left = torch.cat([a * -2, a.square().sum(-1, keepdim=True), ones_a], -1)
    right = torch.cat([b, ones_b, b.square().sum(-1, keepdim=True)], -1)
    return (round_to_tf32(left) @ round_to_tf32(right).mT).clamp_min(0).sqrt()


def _unreachable(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if any(isinstance(a, torch.Tensor) and a.dtype is torch.float32 for a in args):
        raise UnsupportedError(
            f"tf32 is emulated on this machine, and {func} fuses products that the emulation cannot reach. Use the "
            "nn.LSTM, nn.GRU or nn.RNN module, and scaled_dot_product_attention without a backend of your own choice"
        )
    return func(*args, **kwargs)


_FUSED = (
    "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
_SPECIAL: Mapping[Any, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = MappingProxyType(
    {
        aten.convolution_backward: _convolution_backward,
        aten._euclidean_dist: _euclidean_dist,
        **{getattr(aten, name): _unreachable for name in _FUSED if hasattr(aten, name)},
    }
)

_here = threading.local()


class Emulated:
    """Context manager: products in TF32 by ``Tf32Products``, attention by its plain formula. Nests cheaply.

    What chooses the plain formula are switches of the process; they are put back as they were.
    """

    def __enter__(self) -> None:
        self._stack: contextlib.ExitStack | None = None
        if getattr(_here, "active", False):
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's one kernel for all it does
            stack.enter_context(stance("force_eager"))  # compiled code would hide its products
            stack.enter_context(Tf32Products())
            self._stack = stack.pop_all()
        _here.active = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stack is not None:
            _here.active = False
            self._stack.__exit__(kind, error, trace)


def is_emulating() -> bool:
    """Whether this thread is inside ``Emulated``."""
    return getattr(_here, "active", False)


def switches(device_type: str) -> tuple[Any, ...]:
    """The objects of torch that have an ``fp32_precision`` for this kind of device; none where there is no switch."""
    backends: Any = torch.backends
    names = {
        "cuda": ((backends.cuda, "matmul"), (backends.cudnn, "conv"), (backends.cudnn, "rnn")),
        "cpu": tuple((backends.mkldnn, name) for name in ("matmul", "conv", "rnn")),
        "xpu": tuple((backends.mkldnn, name) for name in ("matmul", "conv", "rnn")),
    }.get(device_type, ())
    found = [getattr(owner, name, None) for owner, name in names]
    return tuple(s for s in found if hasattr(s, "fp32_precision"))  # torch before 2.9 has other attributes there


@contextlib.contextmanager
def switched(device_type: str) -> Iterator[None]:
    """The TF32 of torch itself for this kind of device; every switch is put back, also when user code raises.

    The switches belong to the process: other threads compute in TF32 meanwhile, too.
    """
    before = [(s, s.fp32_precision) for s in switches(device_type)]
    try:
        for switch, _ in before:
            switch.fp32_precision = "tf32"
        yield
    finally:
        for switch, value in before:
            switch.fp32_precision = value


def products(device_type: str, emulated: bool) -> AbstractContextManager[None]:
    """Matrix products and convolutions in TF32, on the hardware's own units or emulated."""
    return Emulated() if emulated else switched(device_type)


def has_units(device: torch.device) -> bool:
    """Whether a float32 product really comes out in TF32 on ``device`` when the switches are on.

    Tried with 1 + 2^-12, which TF32 cannot hold, in a product of a size that vendors' libraries take.
    """
    value = 1.0 + 2.0**-12
    with torch.no_grad(), torch.autocast(device.type, enabled=False), switched(device.type):
        a = torch.full((256, 256), value, device=device)
        product = a @ torch.eye(256, device=device)
    return bool((product.cpu() != value).any())
