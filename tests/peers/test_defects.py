"""Twenty defects of other precision runtimes: each is a check that this package passes, and that the peer fails.

A check is written once and run twice, on ours and on the peer's, where the peer is installed and can show it on a
processor. ``DEFECTS`` maps the numbers to the checks; the tests named in ``ALSO`` go deeper into our side. A peer that
begins to pass its check is good news: the test then fails, and the row goes.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from precision_runtime import PrecisionRuntime
from precision_runtime.counting.ledger import Ledger
from precision_runtime.errors import ConfigurationError
from precision_runtime.integrations.fabric import FabricPrecision
from precision_runtime.scaling import DynamicScaler

# The peers' own warnings are part of what is shown here, not of our behaviour.
pytestmark = pytest.mark.filterwarnings("ignore")
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def put_back():
    """Peers leave switches behind."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


# -- ours, in the shape that Lightning gives to plugins ---------------------------------------------------------------


def ours(mode, **options):
    pytest.importorskip("lightning", reason="the plugin's shape is Lightning's")
    return FabricPrecision(mode, "cpu", **options)


def our_fabric(mode):
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1, plugins=ours(mode))


# -- theirs -----------------------------------------------------------------------------------------------------------


def fabric_plugins():
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning.fabric.plugins import precision

    return precision


def their_half(mode="bf16-true"):
    return fabric_plugins().HalfPrecision(mode)


def their_mixed(scaler=None):
    scaler = scaler or torch.amp.GradScaler("cpu")
    return fabric_plugins().MixedPrecision("16-mixed", "cpu", scaler=scaler)


def their_fabric(mode):
    fabric_plugins()
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1, precision=mode)


def their_bitsandbytes(mode="nf4"):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return fabric_plugins().BitsandbytesPrecision(mode, dtype=torch.bfloat16)


def their_accelerate(model):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16")
    assert accelerator.mixed_precision == "fp16", "it says so"
    return accelerator.prepare(model)


# -- the checks -------------------------------------------------------------------------------------------------------


def complex_parameters_stay_complex(plugin):
    module = nn.Module()
    module.phase = nn.Parameter(torch.tensor([1.0 + 2.0j, -0.5j]))
    converted = plugin.convert_module(module)
    assert converted.phase.is_complex()
    assert converted.phase.imag.tolist() == [2.0, -0.5]


def a_scaler_of_one_s_own_is_taken(make):
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    made = make(ShardedGradScaler(device="cpu", init_scale=128.0))
    assert made.scaler is not None


def a_context_puts_back_what_held_when_it_was_entered(plugin):
    context = plugin.forward_context()
    torch.set_default_dtype(torch.float64)
    with context:
        pass
    assert torch.get_default_dtype() is torch.float64


def weights_survive_many_overflows(plugin):
    layer = nn.Linear(2, 2)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(300):
        opt.zero_grad()
        plugin.backward(layer(torch.ones(1, 2)).sum(), None)
        if step < 299:
            layer.weight.grad.fill_(float("inf"))
        plugin.optimizer_step(opt)
    assert all(p.isfinite().all() for p in layer.parameters())


def a_fatal_eps_is_said_or_harmless(plugin):
    layer = plugin.convert_module(nn.Linear(2, 2))
    opt = torch.optim.Adam(layer.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugin.backward((layer(torch.zeros(1, 2, dtype=torch.float16)) * 0).sum(), None)
        plugin.optimizer_step(opt)
    told = any("eps" in str(w.message) for w in caught)
    assert told or all(p.isfinite().all() for p in layer.parameters())


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.arange(0, 300, 1.0)[256:260] * 1


def whole_numbers_inside_forward_are_whole(fabric):
    assert fabric.setup(Counts())(torch.ones(1)).tolist() == [256.0, 257.0, 258.0, 259.0]


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("single", torch.ones(3).float() / 3)
        self.register_buffer("wide", torch.ones(3, dtype=torch.float64) / 3)
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex64) * 1j)


def init_module_gives_what_setup_gives(fabric):
    torch.manual_seed(0)
    with fabric.init_module():
        made = Tables()
    torch.manual_seed(0)
    set_up = fabric.setup(Tables())
    for name, value in set_up.state_dict().items():
        assert made.state_dict()[name].dtype is value.dtype, name
        assert torch.equal(made.state_dict()[name], value), name


def a_swap_keeps_hooks_eval_mode_and_attention(plugin):
    model = nn.ModuleDict({"lin": nn.Linear(64, 64), "attention": nn.MultiheadAttention(64, 2)}).eval()
    model["lin"].register_forward_hook(lambda *_: None)
    inner = type(model["attention"].out_proj)
    converted = plugin.convert_module(model)
    assert not any(part.training for part in converted.modules())
    assert len(converted["lin"]._forward_hooks) == 1
    assert type(converted["attention"].out_proj) is inner


def a_model_that_is_one_linear_is_swapped(plugin):
    converted = plugin.convert_module(nn.Linear(64, 64))
    assert type(converted) is not nn.Linear


def large_weights_are_no_infinities(plugin):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e5)
    converted = plugin.convert_module(model).to("cpu").eval()
    with torch.no_grad():
        output = converted(torch.full((2, 64), 1e-4, dtype=plugin.dtype)).float()
    assert torch.allclose(output, torch.tensor(640.0), rtol=0.02)


def our_int8():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plugin = ours("int8")
    plugin.dtype = torch.bfloat16
    return plugin


def their_int8():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return fabric_plugins().BitsandbytesPrecision("int8", dtype=torch.float16)


def it_runs_in_float16_as_it_says(setup):
    model = setup(nn.Sequential(nn.Linear(8, 8)))
    with Ledger(model) as ledger:
        model(torch.ones(2, 8))
    assert set(ledger.by_dtype()) == {"float16"}


def a_step_says_whether_it_was_skipped(plugin):
    layer = nn.Linear(2, 2)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    plugin.backward(layer(torch.ones(1, 2)).sum(), None)
    layer.weight.grad.fill_(float("inf"))
    assert getattr(plugin.optimizer_step(opt), "skipped", None) is True


def two_optimizers_move_alike(plugin):
    torch.manual_seed(0)
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second)]
    plugin.backward(first(torch.ones(1, 2)).sum() + second(torch.ones(1, 2)).sum(), None)
    for opt in opts:
        plugin.optimizer_step(opt)
    assert torch.equal(first.weight, second.weight)


def a_closure_by_position_is_unscaled(make):
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    backward, step = make(opt)

    def closure():
        opt.zero_grad()
        loss = layer(torch.ones(1, 2)).sum()
        backward(loss)
        return loss

    closure()
    step(opt, closure)
    assert torch.allclose(layer.weight, before - 0.1)


def our_step(opt):
    runtime = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(1024.0))
    return runtime.backward, runtime.step


def torch_step(opt):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return lambda loss: scaler.scale(loss).backward(), scaler.step


def a_4_bit_layer_loads_its_own_state(make):
    layer = make()
    state = {key: value.clone() if torch.is_tensor(value) else value for key, value in layer.state_dict().items()}
    fresh = make()
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert not torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x))


def our_4_bit_layer():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return PrecisionRuntime("nf4", "cpu").setup(nn.Linear(64, 64))


def their_4_bit_layer():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")


# number and what is checked -> (the check, ours, the peer's)
DEFECTS = {
    "1 complex": (complex_parameters_stay_complex, lambda: ours("bf16-true"), their_half),
    "2 own scaler": (
        a_scaler_of_one_s_own_is_taken,
        lambda: lambda scaler: PrecisionRuntime("16-mixed", "cpu", scaler=scaler),
        lambda: lambda scaler: fabric_plugins().FSDPPrecision("16-mixed", scaler=scaler),
    ),
    "3 default dtype": (
        a_context_puts_back_what_held_when_it_was_entered, lambda: ours("bf16-true"), their_half
    ),
    "4 floor": (weights_survive_many_overflows, lambda: ours("16-mixed"), their_mixed),
    "5 eps": (a_fatal_eps_is_said_or_harmless, lambda: ours("16-true"), lambda: their_half("16-true")),
    "6 arange": (
        whole_numbers_inside_forward_are_whole, lambda: our_fabric("bf16-true"), lambda: their_fabric("bf16-true")
    ),
    "7 init_module": (
        init_module_gives_what_setup_gives, lambda: our_fabric("bf16-true"), lambda: their_fabric("bf16-true")
    ),
    "8 swap": (a_swap_keeps_hooks_eval_mode_and_attention, lambda: ours("nf4"), their_bitsandbytes),
    "8 root": (a_model_that_is_one_linear_is_swapped, lambda: ours("nf4"), their_bitsandbytes),
    "9 large weights": (large_weights_are_no_infinities, our_int8, their_int8),
    "12 accelerate fp16": (
        it_runs_in_float16_as_it_says, lambda: PrecisionRuntime("16-mixed", "cpu").setup, lambda: their_accelerate
    ),
    "14 fabric 16-mixed": (
        it_runs_in_float16_as_it_says, lambda: our_fabric("16-mixed").setup, lambda: their_fabric("16-mixed").setup
    ),
    "17 state_dict": (
        a_4_bit_layer_loads_its_own_state, lambda: our_4_bit_layer, lambda: their_4_bit_layer
    ),
    "18 skipped": (a_step_says_whether_it_was_skipped, lambda: ours("16-mixed"), their_mixed),
    "19 two optimizers": (
        two_optimizers_move_alike,
        lambda: ours("16-mixed", scaler=DynamicScaler(1024.0, growth_interval=1)),
        lambda: their_mixed(torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)),
    ),
    "20 closure": (a_closure_by_position_is_unscaled, lambda: our_step, lambda: torch_step),
}  # fmt: skip

# Where the peer refuses by itself what ought to work, this is what it says.
REFUSALS = {
    "2 own scaler": (ValueError, "does not use a scaler, found"),
    "17 state_dict": (RuntimeError, "Unexpected key"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_ours_passes(defect):
    check, mine, _ = DEFECTS[defect]
    check(mine())


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_peer_fails(defect):
    check, _, peer = DEFECTS[defect]
    subject = peer()  # what is made must be made: only the check may fail
    kind, said = REFUSALS.get(defect, (AssertionError, None))
    with pytest.raises(kind, match=said):
        check(subject)


# -- those that no peer can show here ---------------------------------------------------------------------------------

NEEDS_GPU = "transformer_engine.pytorch, which the peer's code path begins with, does not import without CUDA"


def odd_and_even():
    return nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 7), nn.Linear(7, 32), nn.Linear(32, 32))


def test_10_fp8_of_24_inputs_runs():
    model = PrecisionRuntime("transformer-engine", "cpu").setup(nn.Sequential(nn.Linear(24, 32)))
    model(torch.randn(16, 24)).sum().backward()
    assert model[0].weight.grad is not None


def test_11_an_odd_layer_does_not_keep_its_siblings_from_fp8():
    runtime = PrecisionRuntime("transformer-engine", "cpu")
    rows = {row.name: row for row in runtime.plan(odd_and_even()).of("layer")}
    assert set(rows) == {"0", "1", "2", "3"}
    model = runtime.setup(odd_and_even())
    for name, part in model.named_children():
        swapped = type(part) is not nn.Linear
        assert swapped is rows[name].changes, name
        assert swapped or rows[name].notes, "one that stays is told of, with the reason"
    assert type(model[3]) is not nn.Linear


def test_13_a_mode_is_never_replaced():
    runtime = PrecisionRuntime("transformer-engine", "cpu")
    assert (runtime.mode.name, runtime.support.status) == ("transformer-engine", "emulated")


def test_15_a_forward_without_gradients_takes_none_away():
    runtime = PrecisionRuntime("bf16-mixed", "cpu")
    layer = nn.Linear(4, 4)
    with runtime.autocast():
        with torch.no_grad():
            layer(torch.ones(1, 4))
        layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight.grad is not None


TF32 = """
import torch
from torch import nn
{use}
print(torch.get_float32_matmul_precision())
"""


def runs(use):
    done = subprocess.run([sys.executable, "-c", TF32.format(use=use)], capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def test_16_the_older_switch_stays_readable_after_tf32():
    fine, said = runs(
        "from precision_runtime import PrecisionRuntime\n"
        "PrecisionRuntime('tf32', 'cpu').setup(nn.Linear(4, 4))(torch.ones(1, 4))"
    )
    assert fine, said
    fine, said = runs("torch.backends.fp32_precision = 'tf32'\ntorch.backends.cuda.matmul.fp32_precision = 'ieee'")
    assert not fine, "torch, by hand, is what fails"


@pytest.mark.parametrize("number", [10, 11, 13])
def test_no_peer_can_show_it_here(number):
    pytest.importorskip("transformer_engine.pytorch", reason=NEEDS_GPU)
    pytest.skip(f"defect {number}: the peer's side has not been written for a GPU")


# Tests of our own side that go deeper, by defect.
ALSO = {
    1: ("test_casting.py", "test_complex_parameters_and_buffers_keep_their_imaginary_part"),
    2: ("test_scaling.py", "test_a_sharded_scaler_of_torch_is_adopted_and_serves_the_cpu"),
    3: ("test_strategies.py", "test_forward_never_changes_the_default_dtype"),
    4: ("test_scaling.py", "test_torchs_own_scaler_does_reach_zero_and_writes_nan"),
    5: ("test_optimizers.py", "test_an_eps_is_called_fatal_exactly_where_torch_writes_nan"),
    6: ("test_strategies.py", "test_forward_never_changes_the_default_dtype"),
    7: ("test_building.py", "test_init_module_and_setup_give_the_same_model_bit_by_bit"),
    8: ("test_quantized.py", "test_the_swap_keeps_identity_hooks_training_state_and_what_is_frozen"),
    16: ("test_tf32.py", "test_the_older_switches_stay_readable_and_keep_their_values"),
    17: ("test_quantized.py", "test_a_state_dict_goes_round_into_every_kind_of_model"),
    18: ("test_step.py", "test_a_gated_scheduler_steps_only_when_the_optimizer_did"),
    19: ("test_scaling.py", "test_two_optimizers_in_one_round_change_the_scale_once"),
    20: ("test_step.py", "test_torchs_own_guard_lets_a_closure_by_position_through"),
}


@pytest.mark.parametrize("number", ALSO)
def test_the_tests_named_here_exist(number):
    file, name = ALSO[number]
    assert f"def {name}(" in (TESTS / "runtime" / file).read_text()


def test_every_defect_has_a_check():
    numbered = {int(name.split()[0]) for name in DEFECTS}
    by_name = {int(name.split("_")[1]) for name in globals() if name.startswith("test_1") and name[5:7].isdigit()}
    assert numbered | by_name == set(range(1, 21))


def test_a_contradiction_is_refused_where_the_peer_replaces_the_mode():
    with pytest.raises(ConfigurationError):
        PrecisionRuntime("bf16-mixed", "cpu", scaler=DynamicScaler())
