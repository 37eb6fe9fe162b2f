"""Emulated FP8 layers: their three products, what they keep of the layer they were, and where they stay plain."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from precision_runtime.errors import UnsupportedError
from precision_runtime.float8 import Float8LayerNorm, Float8Linear
from precision_runtime.float8.hadamard import matrix
from precision_runtime.float8.layers import become_float8
from precision_runtime.float8.product import multiplied
from precision_runtime.float8.quantizing import by_blocks, by_microscaling, by_nvfp4, by_tensor, scale_for
from precision_runtime.float8.recipes import RECIPES, DelayedScaling
from precision_runtime.formats import FORMATS

E4M3, E5M2 = FORMATS["float8_e4m3fn"], FORMATS["float8_e5m2"]
U = 2.0**-24  # float32's unit roundoff


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(recipe, features=(128, 256), bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return become_float8(nn.Linear(*features, bias=bias).to(dtype), recipe)


def run(layer, x, gradient):
    """Output, input gradient and the parameters' gradients of one step."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gradient)
    return y.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


def current(matrix, form):
    return by_tensor(matrix, form, scale_for(matrix.abs().max(), form, False)).tensor


def rotation(matrix_):
    padded = functional.pad(matrix_, (0, -matrix_.shape[1] % 16))
    return (padded.view(len(padded), -1, 16) @ matrix(torch.device("cpu"))).flatten(1).bfloat16().float()


def square(matrix, form):
    return by_blocks(matrix, form, (128, 128), True).tensor


# Recipe -> how x, w and g are rounded for products that sum over their last dimension, and for the weight's gradient
# (g^T, x^T, which have the rows last). Written for matrices, without the layers' machinery.
TWINS = {
    "Float8CurrentScaling": dict.fromkeys(("x", "w", "xt"), lambda m: current(m, E4M3))
    | dict.fromkeys(("g", "gt"), lambda m: current(m, E5M2)),
    "Float8BlockScaling": dict.fromkeys(("x", "xt", "g", "gt"), lambda m: by_blocks(m, E4M3, (1, 128), True).tensor)
    | {"w": lambda m: square(m, E4M3)},
    "MXFP8BlockScaling": dict.fromkeys(("x", "xt", "g", "gt", "w"), lambda m: by_microscaling(m, E4M3, (1, 32)).tensor),
    "NVFP4BlockScaling": {
        "x": lambda m: by_nvfp4(m, (1, 16), False).tensor,
        "w": lambda m: by_nvfp4(m, (16, 16), False).tensor,
        "g": lambda m: by_nvfp4(m, (1, 16), True).tensor,
    },
}


def assert_product(result, left, right, bias=None):
    """``result`` is left @ right^T (+ bias), up to float32's roundings of such a sum."""
    exact = left.double() @ right.double().T
    slack = (left.double().abs() @ right.double().abs().T) * (left.shape[1] + 4) * U
    if bias is not None:
        exact = exact + bias.double()
        slack = slack + 4 * U * bias.double().abs()
    assert ((result.double() - exact).abs() <= slack).all()


@pytest.mark.parametrize("name", TWINS)
def test_the_three_products_are_those_of_rounded_operands(name):
    layer, x, g = linear(name), draw(64, 128, seed=1), draw(64, 256, seed=2) * 1e-4
    w, twin = layer.weight.detach(), TWINS[name]
    torch.manual_seed(9)
    y, dx, dw, db = run(layer, x, g)
    assert_product(y, twin["x"](x), twin["w"](w), layer.bias.detach())
    if name == "NVFP4BlockScaling":  # by chance along g's rows as they lie: the transposed ones are tested below
        torch.manual_seed(9)
        assert_product(dx, twin["g"](g), twin["w"](w.T))
    else:
        assert_product(dx, twin["g"](g), twin["w"](w.T))
        assert_product(dw, twin["gt"](g.T), twin["xt"](x.T))
    assert torch.allclose(db, g.sum(0), rtol=0, atol=64 * U * g.abs().sum(0).max().item())


@pytest.mark.parametrize("disabled", [False, True])
def test_the_weights_gradient_in_four_bits_has_rotated_operands(disabled):
    recipe = {"recipe": "NVFP4BlockScaling", "disable_stochastic_rounding": True, "disable_rht": disabled}
    layer, x, g = linear(recipe), draw(40, 128, seed=1), draw(40, 256, seed=2)
    turned = (lambda m: functional.pad(m, (0, 8))) if disabled else rotation
    gt, xt = (by_nvfp4(turned(m.T), (1, 16), False).tensor for m in (g, x))
    assert_product(run(layer, x, g)[2], gt, xt)


@pytest.mark.parametrize("name", ["Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"])
def test_switches_of_block_recipes_change_what_they_name(name):
    x, g = draw(32, 128, seed=1), draw(32, 256, seed=2)
    switch = {
        "Float8BlockScaling": {"w_block_scaling_dim": 1},
        "MXFP8BlockScaling": {"enable_2d_quantization": True},
        "NVFP4BlockScaling": {"disable_2d_quantization": True},
    }[name]
    torch.manual_seed(0)
    layer, w = linear({"recipe": name, **switch}), linear(name).weight.detach()
    rounded = {
        "Float8BlockScaling": lambda m: by_blocks(m, E4M3, (1, 128), True).tensor,
        "MXFP8BlockScaling": lambda m: by_microscaling(m, E4M3, (32, 32)).tensor,
        "NVFP4BlockScaling": lambda m: by_nvfp4(m, (1, 16), False).tensor,
    }[name]
    assert_product(run(layer, x, g)[0], TWINS[name]["x"](x), rounded(w), layer.bias.detach())


@pytest.mark.parametrize("pair", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("shape", [(16, 64, 32), (7, 48, 16), (256, 512, 128)], ids=str)
def test_a_product_has_the_bits_of_torch_s_own_fp8_product(pair, shape):
    rows, inner, columns = shape
    operands = [
        by_tensor(draw(n, inner, seed=n), form, torch.tensor(37.5))
        for n, form in zip((rows, columns), pair, strict=True)
    ]
    codes = [o.values.to(getattr(torch, form.name)) for o, form in zip(operands, pair, strict=True)]
    one = torch.tensor(1.0)
    theirs = torch._scaled_mm(codes[0], codes[1].t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    factor = operands[0].factor * operands[1].factor  # behind the sum, as a GPU's kernel has it
    assert torch.equal(multiplied(operands[0], operands[1].values.t(), operands[1].factor), theirs * factor)


def test_torchao_s_emulation_agrees():
    float8 = pytest.importorskip("torchao.float8")
    layer = linear("Float8CurrentScaling", (64, 32), bias=False, dtype=torch.bfloat16)
    other = nn.Sequential(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    other[0].weight.data = layer.weight.data.clone()
    float8.convert_to_float8_training(other, config=float8.Float8LinearConfig(emulate=True))
    x, g = draw(16, 64, dtype=torch.bfloat16), draw(16, 32, seed=1, dtype=torch.bfloat16)
    theirs_x = x.clone().requires_grad_()
    theirs = other(theirs_x)
    theirs.backward(g)
    ours = run(layer, x, g)
    # Sums of another order, each rounded to bfloat16: now and then the last bit differs.
    for a, b in zip(ours, (theirs, theirs_x.grad, other[0].weight.grad), strict=False):
        assert torch.allclose(a.float(), b.float(), rtol=2.0**-7, atol=1e-5)
        assert (a == b).float().mean() > 0.99


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(128,), (5, 128), (2, 3, 128), (1, 1, 1, 128)], ids=str)
def test_any_number_of_rows_and_dimensions(name, shape):
    layer, x = linear(name), draw(*shape)
    filled = torch.zeros(128, 128)
    filled[: x.numel() // 128] = x.view(-1, 128)
    y, dx, dw, db = run(layer, x, torch.ones(*shape[:-1], 256))
    assert y.shape == (*shape[:-1], 256)
    assert dx.shape == x.shape
    # Rows of zeros change no scale and no result: what NVIDIA's kernels need in addition is invisible.
    again = linear(name)
    gradient = torch.zeros(128, 256)
    gradient[: x.numel() // 128] = 1
    more = run(again, filled, gradient)
    # One row is summed in another order than many: float32's roundings of 128 and 256 terms.
    assert torch.allclose(y.view(-1, 256), more[0][: x.numel() // 128], rtol=0, atol=128 * U * 8)
    assert torch.allclose(dw, more[2], rtol=0, atol=8 * U * more[2].abs().max().item())
    assert torch.equal(db, more[3])


def test_an_empty_batch_is_no_error_and_leaves_no_trace():
    layer = linear(None)
    before = copy.deepcopy(layer.scaling)
    x = torch.zeros(0, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 128)
    assert all(torch.equal(layer.scaling[k], v) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_have_the_dtype_of_the_weight_and_gradients_that_of_what_they_belong_to(dtype):
    layer = linear(None, dtype=dtype)
    y, dx, dw, db = run(layer, draw(4, 128), torch.ones(4, 256, dtype=dtype))
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, torch.float32, dtype, dtype)


@pytest.mark.parametrize("name", RECIPES)
def test_a_caller_s_autocast_changes_nothing_and_stays_on(name):
    layer, x, g = linear(name), draw(16, 128), draw(16, 256, seed=1)
    expected = run(layer, x, g)
    layer = linear(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(layer, x, g)
        assert torch.is_autocast_enabled("cpu")
        assert (x @ x.T).dtype is torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["DelayedScaling", "NVFP4BlockScaling"])
def test_only_what_is_needed_gets_a_gradient(name, needed):
    layer, x = linear(name), draw(16, 128)
    x.requires_grad_(needed[0])
    layer.weight.requires_grad_(needed[1])
    layer(x).sum().backward()
    assert ((x.grad is not None), (layer.weight.grad is not None)) == needed
    assert layer.bias.grad is not None


def test_a_second_derivative_is_refused_before_it_can_lack_a_share():
    layer, x = linear(None), draw(16, 128).requires_grad_()
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_a_float64_weight_makes_it_a_plain_layer_whose_memory_is_left_alone():
    layer = linear(None)
    before = copy.deepcopy(layer.scaling)
    layer.double()
    x, g = draw(3, 128, dtype=torch.float64), draw(3, 256, seed=1, dtype=torch.float64)
    plain = nn.Linear(128, 256, dtype=torch.float64)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert all(torch.equal(a, b) for a, b in zip(run(layer, x, g), run(plain, x, g), strict=True))
    assert all(torch.equal(layer.scaling[k], v) for k, v in before.items())
    norm, same = become_float8(nn.LayerNorm(128).double()), nn.LayerNorm(128).double()
    assert torch.equal(norm(x), same(x))


def test_a_layer_norm_computes_in_float32_with_its_gradients():
    # bfloat16 gradients of a weight, summed in bfloat16 over 4096 rows, are several units wrong in torch 2.13.
    norm = become_float8(nn.LayerNorm(32).to(torch.bfloat16))
    plain = nn.LayerNorm(32).double()
    x, g = draw(4096, 32, dtype=torch.bfloat16), draw(4096, 32, seed=1, dtype=torch.bfloat16)
    y = norm(x)
    y.backward(g)
    exact = plain(x.double())
    exact.backward(g.double())
    assert y.dtype is torch.bfloat16
    assert torch.allclose(y.double(), exact, rtol=2.0**-8, atol=1e-6)
    assert torch.allclose(norm.weight.grad.double(), plain.weight.grad, rtol=2.0**-8, atol=1e-3)
    assert torch.allclose(norm.bias.grad.double(), plain.bias.grad, rtol=2.0**-8, atol=1e-3)


def test_it_is_the_same_object_with_its_hooks_flags_and_parameters():
    layer = nn.Linear(32, 16)
    layer.weight.requires_grad_(False)
    layer.note = "mine"
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    layer.eval()
    weight, optimizer = layer.weight, torch.optim.SGD(layer.parameters(), 0.1)
    assert become_float8(layer) is layer
    layer(torch.ones(1, 32))
    assert isinstance(layer, (nn.Linear, Float8Linear))
    assert seen == [layer]
    assert layer.weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight
    assert (layer.training, layer.weight.requires_grad, layer.note) == (False, False, "mine")
    assert "recipe=DelayedScaling" in repr(layer)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_copied_and_pickled_with_its_memory_and_the_copy_has_its_own(name):
    layer, x = linear(name), draw(16, 128)
    run(layer, x, torch.ones(16, 256))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is Float8Linear
        assert other.recipe == layer.recipe
        torch.manual_seed(0)
        expected = layer(x).detach()
        assert torch.equal(other(x), expected)
        other.scaling.clear()
        assert bool(layer.scaling) == (name == "DelayedScaling")
    assert isinstance(pickle.loads(pickle.dumps(become_float8(nn.LayerNorm(4)))), Float8LayerNorm)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own looking around
def test_the_compiler_leaves_it_to_python():
    layer, x = linear(DelayedScaling(amax_history_len=4)), draw(16, 128)
    other = copy.deepcopy(layer)
    model = torch.compile(nn.Sequential(other, nn.ReLU()), backend="eager")
    for _ in range(3):
        expected, found = functional.relu(layer(x)), model(x)
        assert torch.equal(expected, found)
        expected.sum().backward()
        found.sum().backward()
    assert torch.equal(layer.weight.grad, other.weight.grad)
    assert all(torch.equal(v, other.scaling[k]) for k, v in layer.scaling.items())
