import math
import struct
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from precision_runtime import PrecisionRuntime, support
from precision_runtime.accelerators import Machine, pretend
from precision_runtime.errors import UnsupportedError
from precision_runtime.formats import FORMATS
from precision_runtime.tf32 import Emulated, is_emulating, round_to_tf32, switched, switches

TF32 = FORMATS["tf32"]


def rounded_slowly(value: float) -> float:
    """Round half to even on the grid of TF32, in exact fractions: the twin that anybody can check."""
    if math.isnan(value) or math.isinf(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, 1 - TF32.emax)
    step = Fraction(2) ** (exponent - (TF32.precision - 1))
    exact = round(Fraction(value) / step) * step
    return math.copysign(math.inf, value) if abs(exact) >= Fraction(2) ** 128 else math.copysign(float(exact), value)


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_rounding_is_that_of_the_slow_twin_for_every_kind_of_bits(patterns):
    values = torch.tensor([float_of(b) for b in patterns])
    expected = torch.tensor([rounded_slowly(v) for v in values.tolist()])
    assert torch.equal(round_to_tf32(values).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("exponent", [0, 1, 127, 128, 254])
def test_ties_go_to_even_at_both_ends_of_the_exponent(exponent):
    # Each of the 2^10 results, and the tie, and the neighbours of the tie, behind it.
    dropped = [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF]
    patterns = [(exponent << 23) | (kept << 13) | low for kept in range(1024) for low in dropped]
    values = torch.tensor([float_of(b) for b in patterns])
    assert torch.equal(round_to_tf32(values), torch.tensor([rounded_slowly(v) for v in values.tolist()]))


def test_not_a_number_keeps_its_payload_and_infinity_stays():
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    assert torch.equal(round_to_tf32(bits.view(torch.float32)).view(torch.int32), bits)


def test_the_largest_float32_is_beyond_tf32():
    assert round_to_tf32(torch.tensor([torch.finfo(torch.float32).max])).isinf().all()
    assert round_to_tf32(torch.tensor([TF32.max])).item() == TF32.max


def test_only_float32_and_complex64_are_rounded():
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32):
        tensor = torch.ones(2, dtype=dtype)
        assert round_to_tf32(tensor) is tensor
    z = torch.tensor([complex(1 + 2**-12, 1 + 2**-9)])
    assert round_to_tf32(z).item() == complex(1, 1 + 2**-9)
    assert round_to_tf32(z.conj()).item() == complex(1, -1 - 2**-9)


def draw(*shape):
    return torch.randn(shape, requires_grad=True)


# Everything that is linear in each of two operands, by the ways in which people write it.
PRODUCTS = {
    "mm": (torch.mm, (5, 7), (7, 3)),
    "matmul, batched": (torch.matmul, (2, 5, 7), (2, 7, 3)),
    "matmul, broadcast": (torch.matmul, (2, 5, 7), (7, 3)),
    "bmm": (torch.bmm, (2, 5, 7), (2, 7, 3)),
    "addmm": (lambda a, b: torch.addmm(torch.zeros(5, 3, dtype=a.dtype), a, b), (5, 7), (7, 3)),
    "baddbmm": (lambda a, b: torch.baddbmm(torch.zeros(2, 5, 3, dtype=a.dtype), a, b), (2, 5, 7), (2, 7, 3)),
    "addbmm": (lambda a, b: torch.addbmm(torch.zeros(5, 3, dtype=a.dtype), a, b), (2, 5, 7), (2, 7, 3)),
    "linear": (F.linear, (5, 7), (3, 7)),
    "linear, deep": (F.linear, (2, 5, 7), (3, 7)),
    "einsum": (lambda a, b: torch.einsum("bik,bkj->bij", a, b), (2, 5, 7), (2, 7, 3)),
    "einsum, strange": (lambda a, b: torch.einsum("abc,cda->bd", a, b), (2, 5, 7), (7, 3, 2)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (5, 7), (7, 3)),
    "inner": (torch.inner, (5, 7), (3, 7)),
    "conv1d": (F.conv1d, (2, 3, 9), (4, 3, 3)),
    "conv2d": (F.conv2d, (2, 3, 9, 9), (4, 3, 3, 3)),
    "conv3d": (F.conv3d, (1, 2, 5, 5, 5), (2, 2, 3, 3, 3)),
    "conv2d, groups": (lambda x, w: F.conv2d(x, w, groups=2, stride=2, padding=1), (2, 4, 9, 9), (4, 2, 3, 3)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 3, 5, 5), (3, 4, 3, 3)),
    "conv_tbc": (lambda x, w: torch.conv_tbc(x, w, torch.zeros(4, dtype=x.dtype)), (5, 2, 3), (3, 3, 4)),
}


@pytest.mark.parametrize(("function", "left", "right"), PRODUCTS.values(), ids=PRODUCTS)
def test_forward_and_both_gradients_are_products_of_rounded_operands(function, left, right):
    torch.manual_seed(0)
    a, b = draw(*left), draw(*right)
    with Emulated():
        product = function(a, b)
        g = torch.randn_like(product)
        product.backward(g)
    # The witness: the same, in float64, of operands rounded beforehand.
    low = [round_to_tf32(t.detach()).double() for t in (a, b)]
    true, pull = torch.func.vjp(function, *low)
    by_a, by_b = pull(round_to_tf32(g).double())
    for got, expected in ((product, true), (a.grad, by_a), (b.grad, by_b)):
        assert got.dtype is torch.float32
        error = (got.detach() - expected).norm() / expected.norm()
        assert error < 2**-21  # float32 sums of at most 54 terms
    full = function(a.detach(), b.detach())
    assert (full - true).norm() / true.norm() > 2**-14  # and without the emulation it is something else


def test_a_float64_product_is_left_alone():
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    with Emulated():
        assert torch.equal(a @ b, torch.mm(a, b))
        inside = a @ b
    assert torch.equal(inside, a @ b)


def test_what_is_added_to_a_product_is_not_rounded():
    value = 1 + 2**-12
    bias = torch.full((3,), value, requires_grad=True)
    x, w = torch.zeros(4, 2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    with Emulated():
        y = F.linear(x, w, bias)
        y.backward(torch.full_like(y, value))
    assert torch.equal(y, torch.full_like(y, value))
    assert torch.equal(bias.grad, torch.full((3,), 4 * value))
    image, kernel = torch.zeros(2, 2, 4, 4, requires_grad=True), torch.zeros(3, 2, 1, 1, requires_grad=True)
    bias.grad = None
    with Emulated():
        y = F.conv2d(image, kernel, bias)
        y.backward(torch.full_like(y, value))
    assert torch.equal(y, torch.full_like(y, value))
    assert torch.equal(bias.grad, torch.full((3,), 32 * value))


def test_a_matrix_times_a_vector_stays_in_float32():
    a, v = torch.randn(5, 7), torch.randn(7)
    with Emulated():
        product = a.mv(v)
    assert torch.equal(product, a.mv(v))


def test_distances_between_many_points_are_one_product():
    torch.manual_seed(0)
    a, b = torch.randn(30, 4), torch.randn(40, 4)
    with Emulated():
        low = torch.cdist(a, b)
    true = torch.cdist(a.double(), b.double())
    assert 2**-14 < (low - true).norm() / true.norm() < 2**-8


def loss(out):
    return (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum()


def gradients(model, *args):
    """The first output and all gradients of a model."""
    out = model(*args)
    out = out[0] if isinstance(out, tuple) else out
    model.zero_grad()
    loss(out).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


COMPOSITES = {
    "LSTM": (lambda: nn.LSTM(8, 8, 2), (5, 3, 8), 1),
    "GRU": (lambda: nn.GRU(8, 8), (5, 3, 8), 1),
    "RNN": (lambda: nn.RNN(8, 8), (5, 3, 8), 1),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), (5, 3, 8), 3),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (5, 3, 8), 1),
}


@pytest.mark.parametrize(("make", "shape", "arguments"), COMPOSITES.values(), ids=COMPOSITES)
def test_layers_that_fuse_their_products_are_reached_forward_and_backward(make, shape, arguments):
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    full = gradients(model, *[x] * arguments)
    rt = PrecisionRuntime("tf32", "cpu")
    model = rt.setup(model)
    out = model(*[x] * arguments)
    out = out[0] if isinstance(out, tuple) else out
    model.zero_grad()
    rt.backward(loss(out))
    changed = 0
    for low, single in zip([out.detach(), *(p.grad for p in model.parameters())], full, strict=True):
        error = (low - single).norm() / single.norm()
        changed += error > 2**-18
        assert error < 2**-7
    assert changed > len(full) / 2
    assert torch.backends.mkldnn.enabled


def test_an_encoder_in_eval_mode_does_not_escape_through_its_fast_path():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        full = model(x)
        low = PrecisionRuntime("tf32", "cpu").setup(model)(x)
    assert 2**-15 < (low - full).norm() / full.norm() < 2**-8
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_fused_kernel_out_of_reach_is_refused_with_what_to_do():
    class Own(nn.LSTM):
        def forward(self, x):
            h = torch.zeros(1, 3, 8)
            return torch._VF.lstm(x, (h, h), self._flat_weights, True, 1, 0.0, False, False, False)

    class Attention(nn.Module):
        def forward(self, x):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(x, x, x)

    with Emulated(), pytest.raises(UnsupportedError, match=r"mkldnn_rnn_layer.* fuses products"):
        Own(8, 8)(torch.randn(5, 3, 8))
    with Emulated(), pytest.raises(UnsupportedError, match="without a backend of your own choice"):
        Attention()(torch.randn(1, 2, 4, 8))


def test_backward_outside_the_runtime_is_not_touched():
    # As on real hardware, where the switches are back by then.
    torch.manual_seed(0)
    rt, layer, x = PrecisionRuntime("tf32", "cpu"), nn.Linear(16, 16, bias=False), torch.randn(8, 16)
    layer = rt.setup(layer)
    g = torch.randn(8, 16)
    layer(x).backward(g)
    assert torch.equal(layer.weight.grad, g.T @ x)
    layer.weight.grad = None
    rt.backward(layer(x), g)
    assert not torch.equal(layer.weight.grad, g.T @ x)
    assert torch.equal(layer.weight.grad, round_to_tf32(g).T @ round_to_tf32(x))


class Raises(nn.Module):
    def forward(self, x):
        x @ x.T
        assert is_emulating() or any(s.fp32_precision == "tf32" for s in switches("cpu"))
        raise KeyError("the user's own")


def everything():
    attention = torch.backends.cuda
    return (
        [s.fp32_precision for s in (*switches("cpu"), *switches("cuda"))],
        attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled(), attention.math_sdp_enabled(),
        attention.cudnn_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled, is_emulating(), torch.get_float32_matmul_precision(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    )  # fmt: skip


class WithUnits(Machine):
    """A processor with TF32 units."""

    def emulation(self, accelerator, dtype):
        return None


@pytest.mark.parametrize("here", [Machine, WithUnits])
def test_everything_is_put_back_also_when_user_code_raises(here):
    before = everything()
    with pretend(here()):
        rt = PrecisionRuntime("tf32", "cpu")
    assert rt.strategy.emulated is (here is Machine)
    with pytest.raises(KeyError, match="the user's own"):
        rt.setup(Raises())(torch.ones(2, 2))
    assert everything() == before
    x = torch.ones(2, 2, requires_grad=True)
    y = x * 1
    y.register_hook(lambda g: {}[g])
    with pytest.raises(KeyError):
        rt.backward(y.sum())
    assert everything() == before


def test_the_switches_are_on_inside_and_as_before_outside_even_nested():
    conv = torch.backends.mkldnn.conv
    conv.fp32_precision = "ieee"
    try:
        with switched("cpu"), switched("cpu"):
            assert [s.fp32_precision for s in switches("cpu")] == ["tf32"] * 3
        assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = "none"


def test_the_older_switches_stay_readable_and_keep_their_values():
    # Others raise here: torch refuses to answer through the old API once the new one has been used (defect 16).
    code = """
import torch
from precision_runtime import PrecisionRuntime
from precision_runtime.accelerators import Machine, pretend
class WithUnits(Machine):
    def emulation(self, accelerator, dtype): return None
for here in (Machine(), WithUnits()):
    for old in (None, "highest", "high", "medium", "highest"):
        if old: torch.set_float32_matmul_precision(old)
        before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
        with pretend(here):
            rt = PrecisionRuntime("tf32", "cpu")
        layer = rt.setup(torch.nn.Linear(4, 4))
        rt.backward(layer(torch.ones(1, 4)).sum())
        assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32) == before, old
torch.backends.mkldnn.matmul.fp32_precision = "tf32"  # the witness: the mixture that raises
try:
    torch.get_float32_matmul_precision()
except RuntimeError as error:
    print("mix" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stdout + done.stderr


def test_another_thread_computes_in_float32_meanwhile():
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    expected, found = a @ b, []
    with Emulated():
        thread = threading.Thread(target=lambda: found.append(a @ b))
        thread.start()
        thread.join()
        assert not torch.equal(a @ b, expected)
    assert torch.equal(found[0], expected)


def test_a_compiled_model_gives_the_same_as_in_eager():
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    full = model(x)
    model = PrecisionRuntime("tf32", "cpu").setup(model)
    low = model(x)
    assert not torch.equal(low, full)
    assert torch.equal(torch.compile(model, backend="eager")(x), low)


def test_the_mode_casts_nothing():
    model = nn.Linear(2, 2).double()
    x = torch.randn(1, 2, dtype=torch.float64)
    y = model(x)
    assert torch.equal(PrecisionRuntime("tf32", "cpu").setup(model)(x), y)


def test_support_says_that_it_is_emulated_and_why():
    answer = support("tf32", "cpu")
    assert answer.status == "emulated"
    assert "rounded to TF32's 10 bits" in answer.reason
    assert support("32-true", "cpu").status == "native"
    with pretend(WithUnits()):
        assert support("tf32", "cpu").status == "native"


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr("precision_runtime.tf32.has_units", lambda device: False)
    reason = Machine().emulation("cuda", "tf32")
    assert "Tesla T4 (compute capability 7.5) has no TF32 units, which came with 8.0" in reason


def test_the_probe_really_multiplies(monkeypatch):
    seen = []
    monkeypatch.setattr("precision_runtime.tf32.switched", lambda kind: seen.append(kind) or switched(kind))
    assert Machine().emulation("cpu", "tf32") is not None
    assert seen == ["cpu"]
