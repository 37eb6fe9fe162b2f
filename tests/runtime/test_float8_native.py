"""The thin path to NVIDIA's library, with a library that only records what it is asked."""

import contextlib
import dataclasses
import enum
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from precision_runtime.accelerators import Machine, pretend
from precision_runtime.errors import UnsupportedError
from precision_runtime.float8 import native
from precision_runtime.float8.recipes import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
)
from precision_runtime.modes import MODES
from precision_runtime.strategies import strategy_for

CPU = torch.device("cpu")


class Format(enum.Enum):
    E4M3 = (448, 448)
    HYBRID = (448, 57344)


@dataclasses.dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False


def theirs(name, **fields):
    return dataclasses.make_dataclass(name, [(k, object, dataclasses.field(default=v)) for k, v in fields.items()])


class Linear(nn.Module):
    """Refuses the rows that the real one refuses."""

    __module__ = "transformer_engine.pytorch.module.linear"

    def __init__(self, in_features, out_features, bias=True, params_dtype=None, device="cuda"):
        super().__init__()
        self.options = {"params_dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype))
        else:
            self.bias = torch.empty(0)

    def forward(self, inp):
        assert inp.shape[:-1].numel() % 8 == 0
        self.seen = inp.shape
        return functional.linear(inp, self.weight, self._parameters.get("bias"))


class LayerNorm(nn.Module):
    __module__ = "transformer_engine.pytorch.module.layernorm"

    def __init__(self, normalized_shape, eps=1e-5, dtype=None, device="cuda"):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(*normalized_shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*normalized_shape, dtype=dtype))

    def forward(self, inp):
        return functional.layer_norm(inp, self.weight.shape, self.weight, self.bias, self.eps)


@pytest.fixture
def library(monkeypatch):
    """The modules, and the log of regions that were opened."""
    log = []

    @contextlib.contextmanager
    def autocast(enabled, recipe):
        log.append(("enter", enabled, recipe))
        try:
            yield
        finally:
            log.append(("exit",))

    common = types.SimpleNamespace(
        Format=Format,
        DelayedScaling=theirs(
            "DelayedScaling", margin=0, fp8_format=Format.HYBRID, amax_history_len=1024, amax_compute_algo="max",
            reduce_amax=True,
        ),
        Float8BlockScaling=theirs(
            "Float8BlockScaling", use_f32_scales=False, fp8_format=Format.E4M3, x_block_scaling_dim=1,
            w_block_scaling_dim=2, grad_block_scaling_dim=1, fp8_quant_fwd_inp=QParams(True),
            fp8_quant_fwd_weight=QParams(True), fp8_quant_bwd_grad=QParams(True),
        ),
        Float8CurrentScaling=theirs(
            "Float8CurrentScaling", use_power_2_scales=False, fp8_format=Format.HYBRID, fp8_quant_fwd_inp=QParams(),
            fp8_quant_fwd_weight=QParams(), fp8_quant_bwd_grad=QParams(),
        ),
        MXFP8BlockScaling=theirs("MXFP8BlockScaling", fp8_format=Format.E4M3),
    )  # fmt: skip
    pytorch = types.SimpleNamespace(Linear=Linear, LayerNorm=LayerNorm, autocast=autocast, log=log)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("transformer_engine.common"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", common)
    caches = (native._classes, native.library_recipe)
    for cached in caches:
        cached.cache_clear()
    yield pytorch
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def strategy():
    """The native strategy; the device is the CPU, since there is no other."""

    class Everything(Machine):
        def emulation(self, accelerator, dtype):
            return None

    with pretend(Everything()):
        found = strategy_for(MODES["transformer-engine"], torch.device("cuda"))
    assert found.native
    object.__setattr__(found, "device", CPU)
    return found


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 16, bias=False))


@pytest.mark.usefixtures("library")
def test_nvidia_s_layers_take_the_places_with_the_same_parameters(strategy):
    model = net()
    parameters = dict(model.named_parameters())
    model[0].eval()
    model[0].register_forward_hook(lambda module, args, output: None)
    hooks = dict(model[0]._forward_hooks)
    strategy.convert(model)
    assert [isinstance(m, (Linear, LayerNorm)) for m in model] == [
        True,
        False,
        True,
        True,
    ]  # in=24 is refused here, too
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model[0].training, model[3].training) == (False, True)
    assert dict(model[0]._forward_hooks) == hooks
    assert model[0].options["params_dtype"] is torch.float32  # cast with the rest, after it was made


@pytest.mark.usefixtures("library")
def test_a_second_conversion_finds_fp8_layers_and_swaps_nothing(strategy):
    model = strategy.convert(net())
    again = list(model)
    assert list(strategy.convert(model)) == again


@pytest.mark.usefixtures("library")
def test_a_layer_used_in_two_places_stays_one_layer(strategy):
    shared = nn.Linear(16, 16)
    model = strategy.convert(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}))
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], Linear)


@pytest.mark.usefixtures("library")
def test_a_root_linear_has_no_place_to_be_replaced_in(strategy):
    with pytest.raises(UnsupportedError, match=r"nn\.Sequential\(layer\)"):
        strategy.convert(nn.Linear(16, 16))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (16, 16)], ids=str)
def test_rows_are_filled_up_for_the_kernels_and_cut_off_again(strategy, shape):
    model = strategy.convert(nn.Sequential(nn.Linear(16, 32)))
    x = torch.randn(*shape, dtype=torch.bfloat16)
    expected = functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model(x), expected)
    assert model[0].seen[:-1].numel() % 16 == 0


@pytest.mark.usefixtures("library")
def test_float64_weights_make_them_plain(strategy):
    model = strategy.convert(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    y = functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model(x), functional.layer_norm(y, (16,), model[1].weight, model[1].bias))
    assert not hasattr(model[0], "seen")


@pytest.mark.usefixtures("library")
def test_they_are_pickled(strategy):
    model = strategy.convert(nn.Sequential(nn.Linear(16, 16)))
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])


def test_forward_and_autocast_open_the_library_s_region_and_close_it_after_an_error(library, strategy):
    strategy.call(lambda x: library.log.append("forward") or x, (torch.ones(1),), {})
    (_, enabled, recipe), middle, end = library.log
    assert (enabled, type(recipe).__name__, recipe.fp8_format) == (True, "DelayedScaling", Format.HYBRID)
    assert (middle, end) == ("forward", ("exit",))
    library.log.clear()
    with pytest.raises(KeyError), strategy.autocast():
        raise KeyError
    assert [entry[0] for entry in library.log] == ["enter", "exit"]


def test_an_earlier_release_has_another_name_for_the_region(library):
    opened = []
    library.fp8_autocast = lambda enabled, fp8_recipe: contextlib.nullcontext(opened.append((enabled, fp8_recipe)))
    del library.autocast
    with native.context(DelayedScaling(margin=1)):
        pass
    assert [(enabled, recipe.margin) for enabled, recipe in opened] == [(True, 1)]


@pytest.mark.usefixtures("library")
def test_every_field_of_a_recipe_arrives():
    found = native.library_recipe(DelayedScaling(2, "E4M3", 7, "most_recent", False))
    assert dataclasses.astuple(found) == (2, Format.E4M3, 7, "most_recent", False)
    power = native.library_recipe(Float8CurrentScaling(use_power_2_scales=True))
    single = native.library_recipe(Float8BlockScaling(use_f32_scales=True))
    for side in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        assert getattr(power, side).power_2_scale
        assert not getattr(single, side).power_2_scale
        assert getattr(native.library_recipe(Float8BlockScaling()), side).power_2_scale


@pytest.mark.usefixtures("library")
def test_what_an_earlier_release_cannot_express_is_refused():
    assert native.library_recipe(MXFP8BlockScaling()).fp8_format is Format.E4M3
    with pytest.raises(UnsupportedError, match="does not know enable_2d_quantization=True"):
        native.library_recipe(MXFP8BlockScaling(enable_2d_quantization=True))
    with pytest.raises(UnsupportedError, match="has no recipe NVFP4BlockScaling"):
        native.library_recipe(NVFP4BlockScaling())


def test_nothing_is_imported_before_it_is_needed():
    assert "transformer_engine" not in sys.modules
    with pytest.raises(AttributeError, match="nothing"):
        native.nothing  # noqa: B018 - looking it up is the test
