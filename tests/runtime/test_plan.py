import contextlib
import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError, PrecisionWarning, UnknownNameError
from precision_runtime.modes import MODES
from precision_runtime.planning.plan import LossyError, Plan, Row
from precision_runtime.runtime import PrecisionRuntime

HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(0, 32, 2) / 32))

    def forward(self, x):
        return x * self.inv_freq.repeat(2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.fc = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.batch = nn.BatchNorm1d(32)
        self.rope = Rotary()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.odd = nn.Linear(32, 7)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(300.0))
        self.register_buffer("spectrum", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("precise", torch.tensor([0.1, 0.5], dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids):
        x = self.rope(self.norm(self.fc(self.embed(ids))))
        x = self.batch(x + self.attention(x, x, x)[0])
        return self.head(x)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def plan(mode="16-true", model=None, *optimizers, **options):
    return PrecisionRuntime(mode, "cpu", **options).plan(net() if model is None else model, *optimizers)


def tensors(model):
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def dtypes(model):
    """What ``setup`` really made, in the plan's words."""
    parts = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, tensor in tensors(model).items():
        storage = getattr(parts[name.rpartition(".")[0]], "storage", None)
        codes = storage is not None and not tensor.is_floating_point()
        found[name] = storage if codes else str(tensor.dtype).removeprefix("torch.")
    return found


OPTIONS = {
    "plain": {},
    "islands": {"islands": {"norm": "32", "fc": "64", "spectrum": "64", "positions": "32"}},
    "auto": {"islands": "auto"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_it_foretells_the_dtype_of_every_tensor(mode, options):
    if mode == "tf32" and options == "islands":
        pytest.skip("TF32 has no float32 islands")
    runtime = PrecisionRuntime(mode, "cpu", **OPTIONS[options])
    model = net()
    foretold = runtime.plan(model)
    runtime.setup(model)
    assert {name: foretold[name].after for name in tensors(model)} == dtypes(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["32-true", "64-true", "bf16-true", "16-mixed", "apex-O0", "apex-O2", "nf4"])
def test_it_foretells_it_for_models_that_are_not_float32(mode, dtype):
    runtime = PrecisionRuntime(mode, "cpu")
    model = net()._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    foretold = runtime.plan(model)
    widens = mode == "16-mixed" and dtype is not torch.float64
    with pytest.warns(PrecisionWarning, match="float32") if widens else contextlib.nullcontext():
        runtime.setup(model)
    assert {name: foretold[name].after for name in tensors(model)} == dtypes(model)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_is_set_up_already_has_nothing_left_to_swap(mode):
    runtime = PrecisionRuntime(mode, "cpu")
    model = runtime.setup(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    plan = runtime.plan(model)
    assert not plan.of("layer", "refusal")
    assert all(row.before == row.after for row in plan.rows)


@pytest.mark.parametrize("mode", MODES)
def test_it_foretells_which_layers_are_swapped(mode):
    runtime = PrecisionRuntime(mode, "cpu", ignore_modules="fc")
    model = net()
    before = {name: type(part) for name, part in model.named_modules()}
    foretold = {row.name: row for row in runtime.plan(model).of("layer")}
    runtime.setup(model)
    for name, part in model.named_modules():
        swapped = type(part) is not before[name]
        assert swapped is (name in foretold and foretold[name].before != foretold[name].after)
    for row in foretold.values():
        assert row.notes or row.before != row.after
    if foretold:
        assert "ignore_modules" in foretold["fc"].notes[0]
        assert foretold["attention.out_proj"].notes


class Noted(nn.Module):
    """Holds everything that a careless look could change."""

    def __init__(self):
        super().__init__()
        self.inner = net()
        self.calls = 0
        self.inner.fc.weight.grad = torch.ones(32, 32)

    def __setattr__(self, name, value):
        if name == "calls" and "calls" in self.__dict__:
            raise AssertionError("the plan wrote to the model")
        super().__setattr__(name, value)


def snapshot(model):
    """Values, versions, identities, gradients, attributes and hooks."""
    rows = []
    for part in model.modules():
        rows.append((type(part), part.training, {k: id(v) for k, v in vars(part).items()}, len(part._forward_hooks)))
        for held in (part._parameters, part._buffers):
            for name, t in held.items():
                if t is not None:
                    grad = None if t.grad is None else (id(t.grad), t.grad.tolist())
                    values = torch.view_as_real(t).tolist() if t.is_complex() else t.tolist()
                    rows.append((name, id(t), t.dtype, t._version, t.requires_grad, t.data_ptr(), values, grad))
    return rows


@pytest.mark.parametrize("mode", [*MODES])
def test_nothing_changes(mode):
    model = Noted()
    hook = model.inner.register_forward_hook(lambda *a: None)
    optimizer = torch.optim.Adam(model.parameters())
    runtime = PrecisionRuntime(mode, "cpu")
    before, state = snapshot(model), torch.get_rng_state()
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    default = torch.get_default_dtype(), torch.is_grad_enabled()
    first = runtime.plan(model, optimizer)
    assert snapshot(model) == before
    assert list(model.inner._forward_hooks) == [hook.id]
    assert torch.equal(torch.get_rng_state(), state)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == held
    assert not optimizer.state
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == default
    assert runtime.plan(model, optimizer) == first
    assert runtime.state_dict() == PrecisionRuntime(mode, "cpu").state_dict()


def test_values_that_become_inf_or_zero_are_counted():
    model = net()
    with torch.no_grad():
        model.fc.weight[0, :3] = torch.tensor([1e5, -7e4, 65504.0])
        model.fc.weight[1] = 1e-9
    row = plan("16-true", model)["fc.weight"]
    assert (row.inf, row.zero, row.before, row.after) == (2, 32, "float32", "float16")
    assert row.lossy
    assert "2 of 1024 values become inf in float16" in row.risks[0]
    assert not plan("bf16-true", model)["fc.weight"].lossy
    assert not plan("32-true", model).lossy


def test_under_autocast_the_weights_of_products_are_counted():
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e5
        model.norm.weight[0] = 1e5
        model.embed.weight[0, 0] = 1e5  # also the head's
        model.attention.in_proj_weight[0, 0] = 1e5
    found = plan("16-mixed", model)
    assert [row.name for row in found.lossy] == ["embed.weight", "fc.weight", "attention.in_proj_weight"]
    assert (found["fc.weight"].after, found["fc.weight"].cast) == ("float32", "float16")
    assert found["norm.weight"].cast == ""
    assert model.fc.weight.half().isinf().sum() == found["fc.weight"].inf == 1
    island = plan("16-mixed", model, islands=("fc", "head", "attention"))
    assert not island.lossy


def test_codes_are_judged_by_what_the_dtype_that_they_are_computed_in_can_hold():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(4096.0).view(64, 64))
        model[0].weight[0, 1] = 1e-9
    row = plan("nf4", model)["0.weight"]
    assert (row.inf, row.zero, row.whole, row.lossy) == (0, 0, 0, False)
    with torch.no_grad():
        model[0].weight[0, 0] = 1e5
    row = plan("nf4", model, compute_dtype="float16")["0.weight"]
    assert (row.inf, row.lossy) == (1, True)
    assert not torch.isfinite(
        PrecisionRuntime("nf4", "cpu", compute_dtype="float16").setup(model)(torch.ones(1, 64))
    ).all()


def test_a_few_tiny_weights_do_not_make_a_row_lossy_but_in_a_buffer_they_do():
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e-9
    model.register_buffer("eps", torch.tensor([1e-9, 1.0]))
    found = plan("16-true", model)
    assert found["fc.weight"].zero == 1
    assert not found["fc.weight"].lossy
    assert found["eps"].zero == 1
    assert found["eps"].lossy


@pytest.mark.parametrize("mode", HALF)
def test_buffers_at_risk_are_named(mode):
    found = plan(mode)
    positions = torch.arange(300.0)
    wrong = int((positions.to(HALF[mode]).float() != positions).sum())
    assert found["positions"].whole == wrong
    assert any("ascending" in risk for risk in found["rope.inv_freq"].risks)
    assert "1 of its float64 values" in found["precise"].risks[0]
    assert not found["spectrum"].lossy
    assert "kept whole" in found["spectrum"].notes[0]
    assert found["spectrum"].after == "complex64"
    assert not found["batch.running_var"].lossy
    lossy = {row.name for row in found.lossy}
    assert lossy == {"rope.inv_freq", "precise"} | ({"positions"} if wrong else set())
    assert not plan(mode, islands="auto").lossy


def test_tied_weights_are_one_row():
    found = plan()
    assert found["embed.weight"] is found["head.weight"]
    assert found["embed.weight"].tied == ("head.weight",)
    assert sum(row.elements for row in found.of("parameter")) == sum(p.numel() for p in net().parameters())


def test_shared_memory_that_a_cast_would_part_is_a_risk():
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(4, 4))
    model.register_buffer("view", model.a.detach()[0])
    assert "shares memory with 'view'" in plan("bf16-true", model)["a"].risks[0]
    assert not plan("32-true", model).lossy
    PrecisionRuntime("bf16-true", "cpu").setup(model)
    with torch.no_grad():
        model.a.fill_(7.0)
    assert not (model.view == 7).any()  # that is the risk


def test_gradients_that_are_there_are_cast_too():
    model = nn.Linear(4, 4)
    model.weight.grad = torch.full((4, 4), 1e-9)
    model.bias.grad = torch.tensor([1e6, 1.0, 1.0, 1.0])
    found = plan("16-true", model)
    assert (found["weight.grad"].zero, found["bias.grad"].inf) == (16, 1)
    PrecisionRuntime("16-true", "cpu").setup(model)
    assert int((model.weight.grad == 0).sum()) == 16
    assert int(model.bias.grad.isinf().sum()) == 1


def test_islands_are_rows_with_their_reason():
    found = plan(islands={"norm": "32"})
    (row,) = found.of("island")
    assert (row.name, row.after) == ("norm", "float32")
    assert "islands has 'norm'" in row.notes[0]
    with pytest.raises(UnknownNameError, match="norn"):
        plan(islands={"norn": "32"})


@pytest.mark.parametrize("mode", ["16-true", "bf16-mixed", "apex-O2", "nf4", "transformer-engine"])
def test_on_the_meta_device_values_are_unknown_and_everything_else_is_told(mode):
    real = plan(mode)
    with torch.device("meta"):
        model = Net()
    found = plan(mode, model)
    assert [(r.name, r.before, r.after) for r in found.rows] == [(r.name, r.before, r.after) for r in real.rows]
    assert found.unknown
    assert found["fc.weight"].inf is None or mode == "nf4"
    assert "meta" in found.unknown[0].notes[-1]
    with pytest.raises(LossyError):
        found.refuse()
    assert all(p.is_meta for p in model.parameters())


def test_tensors_that_hold_values_in_ways_of_their_own_are_unknown():
    model = nn.Sequential(nn.LazyLinear(4))
    model.register_buffer("graph", torch.eye(3).to_sparse())
    found = plan("16-true", model)
    assert [row.name for row in found.unknown] == ["graph", "0.weight", "0.bias"]
    assert "first forward" in found["0.weight"].notes[0]
    assert "sparse" in found["graph"].notes[0]
    assert not plan("32-true", model).unknown


def test_a_model_that_is_set_up_has_nothing_left_to_do():
    runtime = PrecisionRuntime("bf16-true", "cpu")
    model = runtime.setup(net())
    found = runtime.plan(model)
    assert not found.lossy
    assert not any(row.changes for row in found.rows)
    with pytest.raises(ConfigurationError, match="set up in bf16-true"):
        PrecisionRuntime("16-true", "cpu").plan(model)


def test_a_mode_that_would_find_nothing_to_quantise_says_so():
    (row,) = plan("nf4", nn.Sequential(nn.Conv1d(3, 3, 3))).refusals
    assert "nothing would be quantised" in row.notes[0]
    with pytest.raises(ConfigurationError):
        PrecisionRuntime("nf4", "cpu").setup(nn.Sequential(nn.Conv1d(3, 3, 3)))


# Optimizers


def adam(model, **settings):
    return torch.optim.Adam(model.parameters(), **settings)


def test_settings_are_judged_in_the_dtype_that_they_will_meet():
    model = net()
    found = plan("16-true", model, adam(model))
    assert found["Adam.0.eps"].lossy
    assert found["Adam.0.eps"].after == "0"
    assert torch.tensor(1e-8).half() == 0
    model = net()
    found = plan("bf16-true", model, adam(model))
    assert found["Adam.0.betas[1]"].after == "1"
    assert not any(row.name == "Adam.0.eps" for row in found.rows)
    for mode in ("32-true", "16-mixed", "apex-O2"):  # float32 state and weights
        model = net()
        assert not [row for row in plan(mode, model, adam(model)).of("optimizer") if row.lossy]
    model = net()
    assert not [r for r in plan("bf16-true", model, adam(model), updates="kahan").of("optimizer") if r.lossy]


@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("gradients", [False, True])
def test_updates_below_an_ulp_are_counted_as_a_step_loses_them(mode, gradients):
    model = nn.Linear(64, 64)
    rate = 1e-3 if gradients else {"16-true": 2e-5, "bf16-true": 1e-4}[mode]
    if gradients:
        model.weight.grad, model.bias.grad = torch.randn(64, 64), None
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, eps=1e-3)
    row = plan(mode, model, optimizer)[f"{type(optimizer).__name__}.0.lr"]
    still = total = 0
    for p in model.parameters():
        if gradients and p.grad is None:
            continue
        w = p.detach().to(HALF[mode]).double()
        if gradients:
            after = (w - rate * p.grad.double()).to(HALF[mode]).double()
            kept = after == w
        else:
            kept = ((w + rate).to(HALF[mode]).double() == w) & ((w - rate).to(HALF[mode]).double() == w)
        still, total = still + int(kept.sum()), total + p.numel()
    assert 0 < still < total
    assert f" {still:,} of {total:,} weights" in row.risks[0]


@pytest.mark.parametrize("rate", [1e-3, 1e-8, 2.0**-10, 2.0**-9, 2.0**-20, 3.0, 1e5, 0.0])
@pytest.mark.parametrize("mode", HALF)
def test_steps_of_every_size_are_counted(mode, rate):
    torch.manual_seed(0)
    model = nn.Linear(300, 300, bias=False)
    with torch.no_grad():
        model.weight.mul_(torch.logspace(-6, 4, 300))
        model.weight[0, :5] = torch.tensor([1.0, 0.5, -0.25, 0.0, 2.0])
    w = model.weight.detach().to(HALF[mode]).double()
    still = int((((w + rate).to(HALF[mode]) == w) & ((w - rate).to(HALF[mode]) == w)).sum()) if rate else 0
    rows = [r for r in plan(mode, model, adam(model, lr=rate)).rows if r.name == "Adam.0.lr"]
    assert [f" {still:,} of {w.numel():,} weights" in r.risks[0] for r in rows] == ([True] if still else [])


def test_what_to_know_of_optimizers_under_a_scaler():
    model = net()
    fused = adam(model, fused=True)
    found = plan("16-mixed", model, fused)
    assert "clip with runtime.clip_gradients" in found["Adam.fused"].notes[0]
    assert not found.lossy
    foreign = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2).half())], lr=1.0)
    found = plan("16-mixed", net(), foreign)
    assert "not this model's" in found["SGD.params"].notes[0]
    (row,) = found.refusals
    assert "float16" in row.notes[0]


def test_a_refused_optimizer_is_really_refused():
    runtime = PrecisionRuntime("16-mixed", "cpu")
    parameter = torch.nn.Parameter(torch.zeros(2).half())
    foreign = torch.optim.SGD([parameter], lr=1.0)
    runtime.setup(nn.Linear(2, 2), foreign)
    runtime.backward(parameter.sum())
    with pytest.raises(ConfigurationError, match="float16"):
        runtime.step(foreign)


def test_closures_are_told():
    model = net()
    lbfgs = torch.optim.LBFGS(model.parameters())
    assert "closure" in plan("16-mixed", model, lbfgs)["LBFGS.closure"].notes[0]
    assert plan("apex-O2", model, lbfgs).refusals


def test_weights_that_become_codes_leave_the_optimizer():
    model = net()
    optimizer = adam(model)
    foretold = plan("nf4", model, optimizer)["Adam.params"].notes[0]
    before = sum(len(g["params"]) for g in optimizer.param_groups)
    PrecisionRuntime("nf4", "cpu").setup(model, optimizer)
    after = sum(len(g["params"]) for g in optimizer.param_groups)
    assert foretold.startswith(f"{before - after} of its weights")


def test_two_optimizers_of_a_kind_have_names_of_their_own():
    model = net()
    first, second = torch.optim.Adam(model.fc.parameters()), torch.optim.Adam(model.norm.parameters())
    names = {row.name for row in plan("16-true", model, first, second).of("optimizer")}
    assert {"Adam.0.eps", "Adam1.0.eps"} <= names
    assert PrecisionRuntime("16-true", "cpu").plan(model, optimizer=first)["Adam.0.eps"].lossy


# Strict


def test_strict_lists_every_lossy_row_and_changes_nothing():
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runtime = PrecisionRuntime("16-true", "cpu")
    before = snapshot(model)
    with pytest.raises(LossyError) as caught:
        runtime.setup(model, optimizer, strict=True)
    assert [row.name for row in caught.value.rows] == ["precise", "fc.weight", "rope.inv_freq"]
    for name in ("fc.weight", "rope.inv_freq", "precise", "16-true", "islands=", "allow="):
        assert name in str(caught.value)
    assert snapshot(model) == before
    assert runtime.islands == ()


def test_what_is_allowed_by_name_is_done():
    model = net()
    PrecisionRuntime("16-true", "cpu").setup(model, strict=True, allow=("*.inv_freq", "precise"))
    assert model.rope.inv_freq.dtype is torch.float16
    model = net()
    with pytest.raises(LossyError) as caught:
        PrecisionRuntime("bf16-true", "cpu").setup(model, adam(model), strict=True, allow=("*.inv_freq", "precise"))
    assert {row.name for row in caught.value.rows} == {"positions", "Adam.0.betas[1]", "Adam.0.lr"}


def test_a_name_with_brackets_allows_itself():
    model = nn.Linear(4, 4)
    optimizer = adam(model, lr=10.0)
    runtime = PrecisionRuntime("bf16-true", "cpu")
    runtime.setup(model, optimizer, strict=True, allow="Adam.0.betas[1]")
    assert model.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "16-mixed", "tf32", "apex-O1"])
def test_strict_lets_pass_what_loses_nothing(mode):
    model = net()
    assert PrecisionRuntime(mode, "cpu").setup(model, strict=True) is model


def test_a_healthy_model_passes_in_half():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 512))
    assert PrecisionRuntime("16-true", "cpu").setup(model, strict=True) is model


def test_mistakes_in_allow_are_refused():
    runtime = PrecisionRuntime("16-true", "cpu")
    with pytest.raises(UnknownNameError, match=r"'fc\.weigth' in allow is unknown\. Did you mean 'fc\.weight'"):
        runtime.setup(net(), strict=True, allow="fc.weigth")
    with pytest.raises(ConfigurationError, match="strict=True"):
        runtime.setup(net(), allow="fc.weight")
    with pytest.raises(ConfigurationError, match="names or globs"):
        runtime.setup(net(), strict=True, allow=(3,))


# The value


def test_it_is_a_value_that_goes_to_json():
    first, second = plan(), plan()
    assert isinstance(first, Plan)
    assert first == second
    data = json.loads(first.to_json())
    assert data == first.to_dict() | {"rows": data["rows"]}
    assert (data["mode"], data["model"], data["accelerator"]) == ("16-true", "Net", "cpu")
    row = next(r for r in data["rows"] if r["name"] == "rope.inv_freq")
    assert row["lossy"] is True
    assert (row["before"], row["after"], row["inf"]) == ("float32", "float16", 0)
    assert len(data["rows"]) == len(first.rows)
    meta = json.loads(plan("16-true", net().to("meta")).to_json())
    assert next(r for r in meta["rows"] if r["name"] == "fc.weight")["inf"] is None


def test_printed_it_begins_with_what_is_lost_and_counts_the_rest():
    model = net()
    text = str(plan("16-true", model, adam(model)))
    assert "plan of Net in 16-true on cpu" in text
    assert text.index("rope.inv_freq") < text.index("spectrum")
    flat = " ".join(text.split())
    tensors_ = sum(p.numel() for p in model.parameters())
    assert f"{len(list(model.parameters()))} parameters, {tensors_:,} values: float32 -> float16" in flat
    assert "fc.bias" not in text  # nothing to tell of it


def test_a_long_plan_is_cut_and_says_so():
    rows = tuple(Row(f"t{i}", "buffer", "float32", "float16", 1, risks=("lost",)) for i in range(100))
    text = str(Plan("Net", "16-true", "cpu", rows))
    assert "60 more rows" in text
    assert "t39" in text
    assert "t40" not in text


def test_an_unknown_name_is_answered():
    with pytest.raises(UnknownNameError, match="Did you mean"):
        plan()["fc.weigth"]


def test_arguments_are_checked():
    with pytest.raises(ConfigurationError, match=r"torch\.nn\.Module"):
        PrecisionRuntime("16-true", "cpu").plan(3)
    with pytest.raises(ConfigurationError, match="optimizers"):
        PrecisionRuntime("16-true", "cpu").plan(net(), net())


def test_the_value_needs_no_torch_and_no_rich():
    code = "import precision_runtime.planning.plan, sys; print('torch' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
