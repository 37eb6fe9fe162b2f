import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from precision_runtime.auditing import audit
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.modes import MODES
from precision_runtime.options import Options, islands_of
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.setup import forwarding
from precision_runtime.setup.islands import islands_in, plan_islands
from precision_runtime.setup.swapping import swaps
from precision_runtime.strategies import strategy_for

HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
LOW = {**HALF, **MIXED}


class Watched(nn.Module):
    """A norm that keeps what it was given and how it ran."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x, more=None):
        self.seen = x.dtype, torch.is_autocast_enabled("cpu"), None if more is None else more["z"].dtype
        return (x * self.weight + self.shift) @ torch.eye(8, dtype=x.dtype)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = Watched()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.register_buffer("scale", torch.tensor([1.1, 1.2]))

    def forward(self, x):
        x = self.first(x)
        self.before = x.detach()
        x = self.norm(x, {"z": x})
        for block in self.blocks:
            x = block(x)
        return x


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def set_up(mode="bf16-true", islands=("norm",), model=None):
    return PrecisionRuntime(mode, "cpu", islands=islands).setup(net() if model is None else model)


@pytest.mark.parametrize("mode", LOW)
def test_an_island_is_given_float32_without_autocast_and_its_result_goes_back(mode):
    model = set_up(mode)
    out = model(torch.randn(3, 8))
    assert model.before.dtype is LOW[mode]
    assert model.norm.seen == (torch.float32, False, torch.float32)
    assert model.norm.weight.dtype is model.norm.shift.dtype is torch.float32
    assert out.dtype is torch.float32
    assert model.first.weight.dtype is HALF.get(mode, torch.float32)
    got = []
    model.norm.register_forward_hook(lambda m, a, out: got.append(out.dtype))
    model(torch.randn(3, 8))
    assert got == [HALF.get(mode, torch.float32)]


@pytest.mark.parametrize("mode", LOW)
def test_the_arithmetic_of_an_island_is_that_of_float32_bit_by_bit(mode):
    model, plain = set_up(mode), net().norm
    model(torch.randn(3, 8))
    x = model.before
    got = model.norm(x)
    want = plain(x.float())
    assert torch.equal(got, want.to(HALF.get(mode, torch.float32)))
    with PrecisionRuntime(mode, "cpu").autocast():
        narrow = set_up(mode, ()).norm(x)
    assert not torch.equal(narrow.float(), got.float())


@pytest.mark.parametrize("mode", LOW)
def test_gradients_of_an_island_are_float32_and_flow_on(mode):
    model = set_up(mode)
    model(torch.randn(3, 8)).sum().backward()
    assert model.norm.weight.grad.dtype is torch.float32
    assert model.first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("islands", "dtype"), [({"norm": "64"}, torch.float64), ({"norm": 64}, torch.float64)])
@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "bf16-mixed"])
def test_an_island_may_be_float64(mode, islands, dtype):
    model = set_up(mode, islands)
    assert model(torch.randn(2, 8)).dtype is torch.float32
    assert model.norm.seen == (dtype, False, dtype)
    assert model.norm.weight.dtype is dtype
    assert model.blocks[0].weight.dtype is MODE_DTYPE[mode]


MODE_DTYPE = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}


def test_a_mode_that_is_wider_stays_as_it_is():
    model, plain = set_up("64-true"), set_up("64-true", ())
    x = torch.randn(2, 8)
    assert torch.equal(model(x), plain(x))
    assert model.norm.seen[0] is model.norm.weight.dtype is torch.float64


def test_a_result_without_dimensions_stays_wide():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = nn.MSELoss()

        def forward(self, x):
            return self.loss(x, torch.zeros_like(x))

    x = torch.full((4,), 300.0)  # the mean of squares, 90000, is beyond float16
    assert set_up("16-true", (), Net())(x).isinf()
    assert set_up("16-true", "loss", Net())(x).item() == 90000.0


def test_names_globs_parameters_buffers_and_lists_of_modules():
    found = {i.path: (i.kind, i.dtype) for i in plan(net(), {"n*m": "32", "scale": "64", "blocks.1.bias": "32"})}
    wanted = {
        "norm": ("module", "float32"),
        "scale": ("buffer", "float64"),
        "blocks.1.bias": ("parameter", "float32"),
    }
    assert found == wanted
    assert [i.path for i in plan(net(), "blocks")] == ["blocks.0", "blocks.1"]
    assert [i.path for i in plan(net(), "*")] == ["first", "norm", "scale", "blocks.0", "blocks.1"]


def test_an_exact_name_counts_before_a_glob_and_the_wider_of_two_globs():
    assert [i.dtype for i in plan(net(), {"norm": "32", "no*": "64"})] == ["float32"]
    assert [i.dtype for i in plan(net(), {"n*": "32", "no*": "64"})] == ["float64"]


def test_an_island_in_a_wider_one_is_covered_and_a_wider_one_inside_counts():
    model = nn.Sequential(nn.Sequential(Watched(), Watched()), nn.Linear(8, 8))
    assert [i.path for i in plan(model, ("0", "0.1"))] == ["0"]
    set_up("bf16-true", {"0": "32", "0.1": "64"}, model)
    model(torch.randn(2, 8))
    assert [m.seen[0] for m in model[0]] == [torch.float32, torch.float64]
    assert model[0][1](torch.randn(2, 8)).dtype is torch.float32  # back to the island around it
    assert [m.weight.dtype for m in model[0]] == [torch.float32, torch.float64]


def plan(model, islands, mode="bf16-true"):
    options = Options((), None, *islands_of(islands))
    before = {k: v.dtype for k, v in model.state_dict().items()}
    found = plan_islands(model, strategy_for(MODES[mode], torch.device("cpu"), options))
    assert {k: v.dtype for k, v in model.state_dict().items()} == before
    assert not islands_in(model)
    return found


@pytest.mark.parametrize("islands", ["nrom", ("norm", "nrom"), {"nrom": "32"}])
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest_and_changes_nothing(islands):
    model = net()
    with pytest.raises(UnknownNameError, match=r"'nrom' in islands is unknown\. Did you mean 'norm'"):
        set_up(islands=islands, model=model)
    assert model.first.weight.dtype is torch.float32
    assert not forwarding.is_set_up(model)


@pytest.mark.parametrize("islands", [{"norm": "16"}, {"norm": None}, 3, [3], {3: "32"}, {"": "32"}])
def test_what_is_no_island_is_an_error(islands):
    with pytest.raises(ConfigurationError, match="island"):
        PrecisionRuntime("bf16-true", "cpu", islands=islands)


@pytest.mark.parametrize("width", ["32", 32, "32-true", torch.float32, "float32"])
def test_widths_may_be_written_as_modes_and_dtypes_are(width):
    assert islands_of({"a": width}) == ((("a", "float32"),), False)


def test_a_tied_tensor_is_wide_in_all_of_its_places_or_in_none():
    def tied():
        model = net()
        model.blocks[0].weight = model.first.weight
        return model

    model = tied()
    with pytest.raises(ConfigurationError, match=r"'first\.weight' in bfloat16, 'blocks.0.weight' in float32"):
        set_up("bf16-true", "blocks.0", model)
    assert model.first.weight.dtype is torch.float32
    model = set_up("bf16-true", ("blocks.0", "first"), model)
    assert model.first.weight is model.blocks[0].weight
    assert model(torch.randn(2, 8)).isfinite().all()
    set_up("bf16-mixed", "blocks.0", tied())(torch.randn(2, 8))  # one dtype in both places


CASTS = {
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "channels_last": lambda m: m.to(torch.float16, memory_format=torch.channels_last),
    "setup of the whole": lambda m: nn.Sequential(m).half()[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("mode", LOW)
def test_an_island_survives_casts_and_keeps_its_values(mode, cast):
    model, plain = set_up(mode, ("norm", "scale")), net()
    cast(model)
    assert torch.equal(model.norm.weight, plain.norm.weight)
    assert torch.equal(model.norm.shift, plain.norm.shift)
    assert torch.equal(model.scale, plain.scale)
    assert model.first.weight.dtype is not torch.float32
    assert model.norm.weight.dtype is torch.float32


def test_an_island_follows_what_makes_it_wider_or_moves_it():
    model = set_up()
    model.double()
    assert model.norm.weight.dtype is torch.float64
    model.half()
    assert model.norm.weight.dtype is torch.float32
    assert model.to("meta").norm.weight.is_meta
    model = set_up()
    model.norm.half()  # called on the island itself
    assert model.norm.weight.dtype is torch.float32
    grown = model.norm.weight.grad = torch.ones(8)
    model.half()
    assert model.norm.weight.grad is grown


def test_a_half_checkpoint_gets_wide_islands():
    model = set_up(model=net().bfloat16())
    assert model.norm.weight.dtype is torch.float32
    assert model.first.weight.dtype is torch.bfloat16


def test_complex_tensors_of_an_island_stay_complex():
    model = nn.Sequential(Watched())
    model[0].register_buffer("turn", torch.polar(torch.ones(4), torch.randn(4)))
    before = model[0].turn
    set_up("bf16-true", "0", model).to(torch.float16)
    assert torch.equal(model[0].turn, before)
    assert model.to("meta")[0].turn.is_meta
    plain = nn.Sequential(Watched())
    plain[0].register_buffer("turn", before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.to(torch.float16)
    assert not plain[0].turn.is_complex()  # what torch does


CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "checkpoint": lambda m: torch.load(_saved(m), weights_only=False),
}


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
@pytest.mark.parametrize("mode", LOW)
def test_a_copy_has_islands_of_its_own(mode, clone):
    model = set_up(mode, ("norm", "scale"))
    twin = clone(model)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), twin(x))
    assert twin.norm.seen[0] is torch.float32
    assert islands_in(twin) == islands_in(model)
    twin.half()
    assert twin.norm.weight.dtype is twin.scale.dtype is torch.float32
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert model.norm.weight.abs().sum() > 0


def test_a_state_dict_has_float32_values_and_loads_into_a_fresh_model():
    model = set_up()
    with torch.no_grad():
        model.norm.weight.mul_(1.001)
    state = torch.load(_saved(model.state_dict()), weights_only=True)
    assert list(state) == list(net().state_dict())
    assert state["norm.weight"].dtype is torch.float32
    fresh = set_up(model=net(1))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.norm.weight, net().norm.weight * 1.001)


@pytest.mark.parametrize("mode", LOW)
def test_init_module_and_setup_make_the_same_islands(mode):
    runtime = PrecisionRuntime(mode, "cpu", islands=("norm", "scale"))
    with runtime.init_module():
        made = net()
    assert made.norm.weight.dtype is torch.float32
    made, wanted = runtime.setup(made), set_up(mode, ("norm", "scale"))
    for name, value in wanted.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
        assert made.state_dict()[name].dtype is value.dtype
    assert islands_in(made) == islands_in(wanted)


def test_init_module_asks_for_a_match_in_one_of_the_modules_made():
    runtime = PrecisionRuntime("bf16-true", "cpu", islands=("norm",))
    with runtime.init_module():
        model, loss = net(), nn.MSELoss()
    assert model.norm.weight.dtype is torch.float32
    assert loss is not None
    with pytest.raises(UnknownNameError, match="'norm' in islands"), runtime.init_module():
        model = nn.Linear(2, 2)
    with runtime.init_module():
        pass


@pytest.mark.parametrize("mode", LOW)
def test_setting_up_again_changes_nothing(mode):
    model = set_up(mode)
    patches = model.norm.__dict__["forward"], model.norm.__dict__["_apply"]
    set_up(mode, model=model)
    assert (model.norm.__dict__["forward"], model.norm.__dict__["_apply"]) == patches


def test_other_islands_are_another_setup():
    with pytest.raises(ConfigurationError, match="already"):
        set_up(islands="first", model=set_up())


def test_restore_takes_islands_away():
    model = forwarding.restore(set_up())
    assert not any({"forward", "_apply"} & m.__dict__.keys() for m in model.modules())
    assert model.half().norm.weight.dtype is torch.float16


def test_an_exception_inside_leaves_autocast_as_it_was():
    model = set_up("bf16-mixed")
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(TypeError):
            model.norm(torch.randn(2, 8), wrong=1)
        assert torch.is_autocast_enabled("cpu")


def test_an_island_compiles_and_gives_the_same_values():
    class Plain(nn.Module):
        def forward(self, x):
            return (x + 1.0).exp() @ torch.eye(8, dtype=x.dtype)

    for mode in ("bf16-true", "bf16-mixed"):
        torch._dynamo.reset()
        model = set_up(mode, "1", nn.Sequential(nn.Linear(8, 8), Plain(), nn.Linear(8, 8)))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        x = torch.randn(2, 8)
        assert torch.equal(compiled(x), model(x))
    torch._dynamo.reset()


def test_no_layer_of_an_island_is_swapped_and_the_row_says_why():
    rows = swaps(net(), (nn.Linear,), islands=(("blocks*", "float32"),))
    assert [(r.name, r.reason) for r in rows] == [
        ("first", ""),
        ("blocks.0", "an FP32 island: islands has 'blocks*'"),
        ("blocks.1", "an FP32 island: islands has 'blocks*'"),
    ]


def test_the_runtime_lists_its_islands():
    runtime = PrecisionRuntime("bf16-true", "cpu", islands={"norm": "32"})
    assert runtime.islands == ()
    model = runtime.setup(net())
    assert [str(i) for i in runtime.islands] == ["norm (module) stays in float32: islands has 'norm'"]
    assert model.norm.weight.dtype is torch.float32


def test_tf32_leaves_float64_islands_alone_and_refuses_others():
    with pytest.raises(ConfigurationError, match=r"Ask for '64'.*\{'norm': '64'\}"):
        set_up("tf32")
    model = set_up("tf32", {"norm": "64"})
    x = torch.randn(3, 8)
    model(x)
    exact = net().norm.double()(model.before.double())
    assert torch.equal(model.norm(model.before), exact.float())


# -- an audit judges a model with islands as it runs -------------------------------------------------------------------


class Rotary(nn.Module):
    """Angles from a table of frequencies, as rotary embeddings compute them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, 64, 2) / 64), persistent=False)

    def forward(self, x, positions):
        angle = positions.float()[:, None] * self.inv_freq.float()
        return torch.cat([angle.cos(), angle.sin()], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rope, self.q = Rotary(), nn.Linear(64, 64)

    def forward(self, x, positions):
        return self.q(x) * self.rope(x, positions)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
@pytest.mark.parametrize("islands", [(), "rope", "*.inv_freq", "auto"])
def test_an_audit_of_a_rotary_embedding_holds_with_the_island_and_fails_without(mode, islands):
    model, originals = Attention(), Originals()
    originals.remember(model)
    runtime = PrecisionRuntime(mode, "cpu", islands=islands)
    runtime.setup(model)
    originals.settle(model)
    report = audit(model, torch.randn(500, 64), torch.arange(500), mode=mode, originals=originals)
    assert report.ok is bool(islands), report
    assert [f.module for f in report.findings][:1] == ([] if islands else ["rope"])
    assert len(islands_in(model)) == bool(islands)
    assert model.rope.inv_freq.dtype is (torch.float32 if islands else HALF[mode])
