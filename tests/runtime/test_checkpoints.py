import gc
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from precision_runtime.checkpoints.carrying import ProbeError
from precision_runtime.checkpoints.changes import Changes
from precision_runtime.checkpoints.description import SwitchWarning
from precision_runtime.checkpoints.probe import roundoff, run
from precision_runtime.checkpoints.trees import Tensors, decode, encode, restored
from precision_runtime.errors import ConfigurationError, UnsupportedError
from precision_runtime.float8 import Float8Linear
from precision_runtime.layers import QuantizedLayer, dequantized_state_dict
from precision_runtime.modes import MODES
from precision_runtime.printing import printed
from precision_runtime.runtime import PrecisionRuntime

# Adam divides by a second moment that fp16 cannot hold; SGD with momentum has state, and works everywhere.
TRAINED = [mode for mode in MODES if MODES[mode].weights in ("", "int8-training")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.fc = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.batch = nn.BatchNorm1d(128)
        self.out = nn.Linear(128, 16)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("spectrum", torch.tensor([1 + 2j, 3 - 1j]))
        self.out.weight.requires_grad_(True)

    def forward(self, ids, scale=1.0):
        x = self.norm(torch.relu(self.fc(self.embed(ids))))
        return self.out(nn.functional.dropout(self.batch(x), 0.1, self.training)) * scale


def ids(seed=0):
    return torch.randint(16, (8,), generator=torch.Generator().manual_seed(seed))


def made(mode="bf16-mixed", seed=0, optimizer=True, **options):
    torch.manual_seed(seed)
    runtime = PrecisionRuntime(mode, "cpu", **options)
    model = Net()
    if not optimizer:
        return runtime, runtime.setup(model), None
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, sgd = runtime.setup(model, sgd)
    return runtime, model, sgd


def train(runtime, model, optimizer, steps=3, start=0):
    for number in range(start, start + steps):
        torch.manual_seed(number)
        loss = nn.functional.cross_entropy(model(ids(number)).float(), ids(number))
        runtime.backward(loss)
        runtime.step(optimizer)
        optimizer.zero_grad()


def saved(path, mode="bf16-mixed", steps=3, probe=True, **options):
    runtime, model, optimizer = made(mode, **options)
    if optimizer is not None:
        train(runtime, model, optimizer, steps)
    if probe:
        runtime.probe(model, ids(99), scale=2.0)
    runtime.save(path, model, optimizer)
    return runtime, model, optimizer


def same(a, b):
    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype is b[key].dtype
            assert torch.equal(value, b[key]), key


# The same mode


@pytest.mark.parametrize("mode", TRAINED)
def test_a_run_goes_on_bit_by_bit(mode, tmp_path):
    runtime, model, optimizer = saved(tmp_path / "c", mode)
    train(runtime, model, optimizer, 2, 3)
    again, other, sgd = made(mode, seed=1)
    changes = again.load(tmp_path / "c", other, sgd)
    assert not changes.rows
    assert changes.ok
    assert changes.probe[0].lost_bits == 0
    train(again, other, sgd, 2, 3)
    same(other.state_dict(), model.state_dict())
    assert again.scaler.state_dict() == runtime.scaler.state_dict()


@pytest.mark.parametrize("updates", ["stochastic", "kahan"])
def test_ways_of_updates_go_on_too(updates, tmp_path):
    runtime, model, optimizer = saved(tmp_path / "c", "bf16-true", updates=updates)
    train(runtime, model, optimizer, 2, 3)
    again, other, sgd = made("bf16-true", seed=1, updates=updates)
    again.load(tmp_path / "c", other, sgd)
    train(again, other, sgd, 2, 3)
    same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("mode", ["nf4", "fp4-dq", "int8"])
def test_codes_come_back_as_they_were(mode, tmp_path):
    runtime, model, _ = made(mode, optimizer=False)
    runtime.probe(model, ids())
    runtime.save(tmp_path / "c", model)
    again, other, _ = made(mode, seed=1, optimizer=False)
    assert again.load(tmp_path / "c", other).probe[0].difference == 0
    same(other.state_dict(), model.state_dict())


def test_weights_are_read_by_safetensors_alone(tmp_path):
    _, model, _ = saved(tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    assert torch.equal(weights["fc.weight"], model.fc.weight)
    assert set(weights) == set(model.state_dict())
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "model.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    saved(tmp_path / "c", "transformer-engine")
    runtime, model, optimizer = made("transformer-engine", seed=1)
    for module in ("pickle", "torch", "torch.serialization"):
        monkeypatch.setattr(sys.modules[module], "load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    runtime.load(tmp_path / "c", model, optimizer)
    for file in (tmp_path / "c").iterdir():
        assert b"\x80\x02" not in file.read_bytes()[:2]
    json.loads((tmp_path / "c" / "state.json").read_text())


def test_tied_weights_are_written_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    runtime = PrecisionRuntime("bf16-true", "cpu")
    model = runtime.setup(Tied())
    runtime.save(tmp_path / "c", model)
    assert list(load_file(tmp_path / "c" / "model.safetensors")) == ["a.weight"]
    other = runtime.setup(Tied())
    runtime.load(tmp_path / "c", other)
    assert torch.equal(other.b.weight, model.a.weight)
    assert other.b.weight is other.a.weight


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path, monkeypatch):
    runtime, model, optimizer = saved(tmp_path / "c")
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    train(runtime, model, optimizer)
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runtime.save(tmp_path / "c", model, optimizer)
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    monkeypatch.undo()
    runtime.save(tmp_path / "c", model, optimizer)
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} != before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_another_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    runtime, model, optimizer = made()
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        runtime.save(tmp_path / "mine", model, optimizer)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("wrong", ["missing", "damaged", "later"])
def test_what_is_no_checkpoint_is_refused(wrong, tmp_path):
    saved(tmp_path / "c")
    runtime, model, optimizer = made()
    path = tmp_path / "c" / "state.json"
    if wrong == "missing":
        path.unlink()
    elif wrong == "damaged":
        path.write_text(path.read_text()[:100])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    message = {"missing": "lacks state.json", "damaged": "damaged", "later": "version 99"}[wrong]
    with pytest.raises(ConfigurationError, match=message):
        runtime.load(tmp_path / "c", model, optimizer)


@pytest.mark.parametrize(
    ("options", "other", "told"),
    [
        ({}, {"mode": "bf16-true"}, "bf16-mixed"),
        ({"islands": ("norm",)}, {}, "islands: saved"),
        ({}, {"islands": "auto"}, "islands: saved"),
        (
            {"mode": "transformer-engine"},
            {"mode": "transformer-engine", "recipe": "MXFP8BlockScaling"},
            "recipe: saved",
        ),
        ({"mode": "int8-training"}, {"mode": "int8-training", "ignore_modules": "fc"}, "ignore_modules"),
        ({"mode": "bf16-true"}, {"mode": "bf16-true", "updates": "kahan"}, "saved with updates='nearest'"),
        ({"mode": "int8-training"}, {"mode": "int8-training", "compute_dtype": "float32"}, "compute: saved 'bfloat16'"),
    ],
)
def test_another_runtime_is_refused_and_nothing_changes(options, other, told, tmp_path):
    saved(tmp_path / "c", **options)
    runtime, model, optimizer = made(**other, seed=1)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=told):
        runtime.load(tmp_path / "c", model, optimizer)
    same(model.state_dict(), before)


def test_a_state_from_before_there_was_more_in_it_still_loads():
    runtime = PrecisionRuntime("16-mixed", "cpu")
    state = runtime.state_dict()
    assert {"mode", "scaler", "recipe", "switches", "islands"} == set(state)
    old = {key: state[key] for key in ("mode", "scaler")}
    runtime.load_state_dict(old)
    with pytest.raises(ConfigurationError, match="no state of a PrecisionRuntime"):
        runtime.load_state_dict({**state, "more": 1})


def test_a_state_holds_builtins_and_tensors_only(tmp_path):
    runtime, model, _ = made("transformer-engine", islands={"norm": "32"})
    runtime.probe(model, ids(), scale=2.0)
    torch.save(runtime.state_dict(), tmp_path / "s")
    state = torch.load(tmp_path / "s", weights_only=True)
    assert state["recipe"]["recipe"] == "DelayedScaling"
    assert state["islands"]["asked"] == [["norm", "float32"]]
    assert state["islands"]["kept"][0][:3] == ["norm", "module", "float32"]
    assert state["switches"]["compute"] == "bfloat16"
    assert torch.equal(
        state["probe"]["outputs"][""], dict(run(model, (ids(),), {"scale": 2.0}, torch.device("cpu")))[""]
    )


def test_torch_s_switches_are_told(tmp_path):
    runtime = PrecisionRuntime("bf16-mixed", "cpu")
    state = runtime.state_dict()
    state["switches"]["torch"]["deterministic"] = "True"
    with pytest.warns(SwitchWarning, match="deterministic was 'True', is 'False'") as told:
        runtime.load_state_dict(state)
    assert [w.filename for w in told] == [__file__]


def test_optimizers_are_counted(tmp_path):
    saved(tmp_path / "c")
    runtime, model, optimizer = made()
    with pytest.raises(ConfigurationError, match="1 optimizers, and 0 were given"):
        runtime.load(tmp_path / "c", model)
    with pytest.raises(ConfigurationError, match="2 optimizers were given"):
        runtime.load(tmp_path / "c", model, optimizer, optimizer)
    with pytest.raises(ConfigurationError, match="saved \\[9\\], here \\[1\\]"):
        runtime.load_across(tmp_path / "c", model, torch.optim.SGD([model.fc.weight], lr=1.0))


def test_a_model_that_is_not_set_up_is_refused(tmp_path):
    saved(tmp_path / "c")
    runtime = PrecisionRuntime("bf16-mixed", "cpu")
    for call in (runtime.save, runtime.load, runtime.load_across):
        with pytest.raises(ConfigurationError, match="call setup"):
            call(tmp_path / "c", Net())
    with pytest.raises(ConfigurationError, match=r"torch\.nn\.Module"):
        runtime.save(tmp_path / "c", 3)


def test_another_model_is_refused_before_anything_changes(tmp_path):
    saved(tmp_path / "c")
    runtime = PrecisionRuntime("32-true", "cpu")
    model = nn.Sequential(nn.Linear(3, 3))
    before = model[0].weight.clone()
    with pytest.raises(ConfigurationError, match=r"nothing has been changed.*lacks \['0.bias'"):
        runtime.load_across(tmp_path / "c", runtime.setup(model))
    assert torch.equal(model[0].weight, before)
    other = Net()
    other.fc = nn.Linear(64, 64)
    with pytest.raises(ConfigurationError, match=r"fc.weight is \(64, 64\), saved \(128, 64\)"):
        runtime.load_across(tmp_path / "c", runtime.setup(other))


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    runtime, model, _ = made()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'pytest-precision\[safetensors\]'"):
        runtime.save(tmp_path / "c", model)


def test_neither_it_nor_the_audit_is_loaded_before_it_is_needed():
    code = (
        "import sys, torch\nfrom precision_runtime import PrecisionRuntime\n"
        "PrecisionRuntime('bf16-mixed', 'cpu').state_dict()\n"
        "print([m for m in sys.modules if m.startswith(('safetensors', 'precision_runtime.auditing'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Across modes

PAIRS = [
    ("nf4", "32-true"), ("fp4-dq", "bf16-true"), ("int8", "32-true"), ("nf4", "nf4-dq"), ("nf4", "int8"),
    ("transformer-engine", "32-true"), ("32-true", "transformer-engine"), ("transformer-engine", "bf16-true"),
    ("16-mixed", "bf16-mixed"), ("bf16-mixed", "16-mixed"), ("apex-O2", "32-true"), ("32-true", "apex-O2"),
    ("apex-O2", "16-mixed"), ("32-true", "nf4"), ("32-true", "int8"), ("32-true", "16-true"), ("bf16-true", "64-true"),
    ("64-true", "32-true"), ("int8-training", "32-true"), ("tf32", "bf16-mixed"), ("16-true", "bf16-true"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_mode_s_checkpoint_loads_in_the_others_and_the_probe_comes_out(before, after, tmp_path):
    first, model, _ = made(before, optimizer=False)
    first.probe(model, ids(99))
    first.save(tmp_path / "c", model)
    second, other, _ = made(after, seed=1, optimizer=False)
    changes = second.load_across(tmp_path / "c", other)
    assert changes.ok
    assert changes.probe[0].lost_bits <= 2
    assert any(row.kind == "mode" and (row.before, row.after) == (before, after) for row in changes.rows)
    wide = dequantized_state_dict(model)
    for name, value in dequantized_state_dict(other).items():
        if not isinstance(value, torch.Tensor) or isinstance(
            other.get_submodule(name.rpartition(".")[0]), QuantizedLayer
        ):
            continue
        assert torch.equal(value, wide[name].to(value.dtype)), name


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_other_weights_do_not_pass_for_the_saved_ones(before, after, tmp_path):
    first, model, _ = made(before, optimizer=False)
    first.probe(model, ids(99))
    first.save(tmp_path / "c", model)
    path = tmp_path / "c" / "state.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(path)
    name = next(n for n in tensors if ".outputs." in n)
    tensors[name] = tensors[name] + 0.7 * tensors[name].float().std().to(tensors[name].dtype) * torch.randn_like(
        tensors[name]
    )
    save_file(tensors, path)
    second, other, _ = made(after, seed=1, optimizer=False)
    with pytest.raises(ProbeError, match="not the one that was saved") as caught:
        second.load_across(tmp_path / "c", other)
    assert not caught.value.changes.ok
    assert second.load_across(tmp_path / "c", other, check=False).probe == ()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("before", "after"), [("32-true", "bf16-true"), ("16-mixed", "bf16-mixed"), ("32-true", "16-true")]
)
def test_small_mistakes_are_seen_where_both_modes_are_fine(before, after, seed, tmp_path):
    first, model, _ = made(before, seed=seed, optimizer=False)
    first.probe(model, ids(99))
    first.save(tmp_path / "c", model)
    second, other, _ = made(after, seed=seed + 10, optimizer=False)
    assert second.load_across(tmp_path / "c", other).ok
    forgetful = Net.forward
    try:
        Net.forward = lambda self, ids, scale=1.0: forgetful(self, ids, scale) * 1.1
        with pytest.raises(ProbeError):
            second.load_across(tmp_path / "c", other)
    finally:
        Net.forward = forgetful


def test_the_probe_sees_an_overflow_on_the_way(tmp_path):
    first, model, _ = made("32-true", optimizer=False)
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e6
    first.probe(model, torch.arange(16))
    first.save(tmp_path / "c", model)
    second, other, _ = made("16-true", seed=1, optimizer=False)
    with pytest.raises(ProbeError, match=r"Lossy on the way:\n  weight fc.weight: float32 -> float16") as caught:
        second.load_across(tmp_path / "c", other)
    (row,) = caught.value.changes.lossy
    assert row.inf == 1
    assert math.isinf(caught.value.changes.probe[0].lost_bits)
    assert not torch.isfinite(other(torch.arange(16))).all()


def test_float32_masters_come_and_go_exactly(tmp_path):
    _, model, optimizer = saved(tmp_path / "c", "apex-O2")
    plain, other, sgd = made("32-true", seed=1)
    plain.load_across(tmp_path / "c", other, sgd)
    same(other.state_dict(), model.state_dict())
    for a, b in zip(sgd.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    plain.save(tmp_path / "d", other, sgd)
    back, third, third_sgd = made("apex-O2", seed=2)
    changes = back.load_across(tmp_path / "d", third, third_sgd)
    assert any(row.after == "float16 with a float32 master" for row in changes.rows)
    same(third.state_dict(), model.state_dict())
    assert third.fc.weight.dtype is torch.float16


@pytest.mark.parametrize("mode", MODES)
def test_the_same_mode_changes_nothing_whichever_way_it_is_loaded(mode, tmp_path):
    trained = mode in TRAINED
    first, old, sgd = made(mode, optimizer=trained)
    if trained:
        train(first, old, sgd)
    first.probe(old, ids(99))
    first.save(tmp_path / "c", old, *([sgd] if trained else []))
    for verb in ("load", "load_across"):
        runtime, model, optimizer = made(mode, seed=1, optimizer=trained)
        changes = getattr(runtime, verb)(tmp_path / "c", model, *([optimizer] if trained else []))
        assert changes.rows == ()
        line, probe = str(changes).splitlines()
        assert (line, probe[:5]) == ("loading changed nothing", "probe")
        assert printed(changes).startswith("loading changed nothing\nprobe")


def test_a_scaler_goes_stays_or_begins(tmp_path):
    first, *_ = saved(tmp_path / "c", "16-mixed")
    first.scaler.load_state_dict({**first.scaler.state_dict()})
    cases = {"bf16-mixed": "does not scale", "apex-O1": None}
    for mode, note in cases.items():
        second, model, optimizer = made(mode, seed=1)
        rows = [r for r in second.load_across(tmp_path / "c", model, optimizer).rows if r.kind == "scaler"]
        assert [note in row.note for row in rows] == ([True] if note else [])
        if note is None:
            assert second.scaler.state_dict() == first.scaler.state_dict()
    saved(tmp_path / "d", "bf16-mixed")
    second, model, optimizer = made("16-mixed", seed=1)
    (row,) = [r for r in second.load_across(tmp_path / "d", model, optimizer).rows if r.kind == "scaler"]
    assert "anew" in row.note


def test_fp8_scales_go_and_begin(tmp_path):
    _, model, _ = saved(tmp_path / "c", "transformer-engine")
    assert isinstance(model.fc, Float8Linear)
    second, plain, sgd = made("bf16-true", seed=1)
    changes = second.load_across(tmp_path / "c", plain, sgd)
    assert {r.name for r in changes.rows if r.before == "FP8 scales"} == {"fc._extra_state", "out._extra_state"}
    assert any(row.kind == "recipe" and row.after == "none" for row in changes.rows)
    third, other, sgd = made("transformer-engine-float16", seed=2)
    third.load_across(tmp_path / "c", other, sgd)
    assert torch.equal(other.fc.scaling["amax_history_fwd"], model.fc.scaling["amax_history_fwd"])


def test_residuals_of_compensated_updates_are_not_lost(tmp_path):
    runtime, model, _ = saved(tmp_path / "c", "bf16-true", updates="kahan", steps=5)
    wide = {name: p.detach().float() + runtime.updates.residual(p).float() for name, p in model.named_parameters()}
    assert any(not torch.equal(w, p.float()) for w, p in zip(wide.values(), model.parameters(), strict=True))
    second, other, sgd = made("32-true", seed=1)
    changes = second.load_across(tmp_path / "c", other, sgd)
    for name, p in other.named_parameters():
        assert torch.equal(p, wide[name])
    assert any(row.kind == "updates" and "residual" in row.before for row in changes.rows)
    same_way, third, sgd = made("bf16-true", seed=2, updates="kahan")
    same_way.load_across(tmp_path / "c", third, sgd)
    assert torch.equal(same_way.updates.residual(third.fc.weight), runtime.updates.residual(model.fc.weight))


def test_islands_are_compared(tmp_path):
    saved(tmp_path / "c", "bf16-true", islands=("norm",))
    second, model, optimizer = made("bf16-true", seed=1, islands=("batch",))
    rows = {
        r.name: (r.before, r.after)
        for r in second.load_across(tmp_path / "c", model, optimizer).rows
        if r.kind == "island"
    }
    assert rows == {"norm": ("float32", "none"), "batch": ("none", "float32")}
    assert model.norm.weight.dtype is torch.bfloat16


def test_state_that_half_cannot_hold_is_counted(tmp_path):
    runtime = PrecisionRuntime("32-true", "cpu")
    model = nn.Linear(4, 4)
    adam = torch.optim.Adam(model.parameters())
    runtime.setup(model, adam)
    runtime.backward((model(torch.ones(1, 4)) * 1e-5).sum())
    runtime.step(adam)
    runtime.save(tmp_path / "c", model, adam)
    second = PrecisionRuntime("16-true", "cpu")
    other = nn.Linear(4, 4)
    adam2 = torch.optim.Adam(other.parameters(), eps=1e-4)
    second.setup(other, adam2)
    changes = second.load_across(tmp_path / "c", other, adam2)
    row = next(r for r in changes.rows if r.name == "Adam.exp_avg_sq")
    zeros = sum(int((s["exp_avg_sq"] == 0).sum()) for s in adam2.state.values())
    assert row.zero == zeros == 20
    assert row.lossy


def test_optimizers_may_be_left_out(tmp_path):
    saved(tmp_path / "c", "32-true")
    second, model, _ = made("nf4", seed=1, optimizer=False)
    rows = second.load_across(tmp_path / "c", model).rows
    assert any(row.kind == "optimizer" and row.after == "none" for row in rows)


def test_changes_print_and_go_to_json(tmp_path):
    first, model, _ = made("nf4", optimizer=False)
    first.probe(model, ids(99))
    first.save(tmp_path / "c", model)
    second, other, _ = made("32-true", seed=1, optimizer=False)
    changes = second.load_across(tmp_path / "c", other)
    assert isinstance(changes, Changes)
    text = str(changes)
    for part in ("fc.weight", "nf4", "32-true", "probe: differs by", "as it must be"):
        assert part in " ".join(text.split())
    data = json.loads(changes.to_json())
    assert data["ok"] is True
    assert data == json.loads(json.dumps(changes.to_dict()))
    row = next(r for r in data["rows"] if r["name"] == "fc.weight")
    assert (row["before"], row["after"], row["lossy"]) == ("nf4", "float32", False)


# The probe itself


@pytest.mark.parametrize("mode", ["bf16-mixed", "transformer-engine", "apex-O2", "nf4"])
def test_recording_changes_nothing(mode):
    runtime, model, optimizer = made(mode, optimizer=mode != "nf4")
    if optimizer is not None:
        train(runtime, model, optimizer, 1)
    model.norm.eval()
    before = {k: v.clone() if isinstance(v, torch.Tensor) else repr(v) for k, v in model.state_dict().items()}
    flags, draws = [m.training for m in model.modules()], torch.get_rng_state()
    runtime.probe(model, ids())
    runtime.state_dict()
    after = {k: v if isinstance(v, torch.Tensor) else repr(v) for k, v in model.state_dict().items()}
    same(before, after)
    assert [repr(v) for k, v in before.items() if isinstance(v, str)] == [
        repr(v) for k, v in after.items() if isinstance(v, str)
    ]
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_check_changes_nothing_either(tmp_path):
    first, model, _ = made("32-true", optimizer=False)
    first.probe(model, ids(99))
    first.save(tmp_path / "c", model)
    second, other, _ = made("bf16-true", seed=1, optimizer=False)
    second.load_across(tmp_path / "c", other)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert other.training
    assert not other.fc._forward_hooks
    assert torch.get_default_dtype() is torch.float32
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(value.dtype))
    assert second.state_dict()["probe"]["model"] == "Net"  # it is carried on


def test_the_outputs_are_those_of_the_present_weights():
    runtime, model, optimizer = made()
    runtime.probe(model, ids())
    before = runtime.state_dict()["probe"]["outputs"][""]
    train(runtime, model, optimizer)
    after = runtime.state_dict()["probe"]["outputs"][""]
    assert not torch.equal(before, after)
    model.eval()
    with torch.no_grad():
        assert torch.equal(after, model(ids()))


def test_a_probe_without_tensors_is_refused():
    runtime = PrecisionRuntime("32-true", "cpu")

    class Silent(nn.Module):
        def forward(self, x):
            return "done"

    with pytest.raises(ConfigurationError, match="no tensor"):
        runtime.probe(runtime.setup(Silent()), torch.ones(1))
    assert "probe" not in runtime.state_dict()


def test_a_model_that_is_gone_is_told():
    runtime, model, optimizer = made()
    runtime.probe(model, ids())
    del model, optimizer
    gc.collect()
    with pytest.raises(ConfigurationError, match="is gone"):
        runtime.state_dict()


def test_the_coarser_operand_of_a_mode_counts():
    assert roundoff(MODES["32-true"], None) == 2.0**-24
    assert roundoff(MODES["16-mixed"], None) == 2.0**-11
    assert roundoff(MODES["tf32"], None) == 2.0**-11
    assert roundoff(MODES["transformer-engine"], None) == 2.0**-4
    assert roundoff(MODES["transformer-engine"], "NVFP4BlockScaling") == 2.0**-2
    assert roundoff(MODES["nf4"], None) == 2.0**-8
    assert roundoff(MODES["int8"], None) == 2.0**-6


# Trees


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, 2: "b", None: True, 1.5: [1, (2, 3), {}]},
        [math.inf, -math.inf, 0.1, -0.0],
        {(1, "x"): torch.bfloat16},
        "text", None, 2**70, (),
    ],
)  # fmt: skip
def test_trees_come_back_as_they_were(value):
    tensors = Tensors()
    text = json.dumps(encode(value, tensors), allow_nan=False)
    back = decode(json.loads(text), {})
    assert back == value
    assert repr(back) == repr(value)


def test_tensors_in_trees_come_back_as_they_were():
    base = torch.randn(4, 6)
    value = {
        "view": base[1:3, ::2], "whole": base, "again": base, "wide": torch.tensor([1 + 2j], dtype=torch.complex128),
        "empty": torch.empty(0, 3), "count": torch.tensor(3), "half": torch.ones(2).half(),
        "flag": torch.tensor([True]), "conj": torch.tensor([1 + 2j]).conj(),
    }  # fmt: skip
    tensors = Tensors()
    encoded = json.loads(json.dumps(encode(value, tensors)))
    back = decode(encoded, restored(tensors.by_name, tensors.names()))
    for name, tensor in value.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype is tensor.dtype
    assert back["whole"] is back["again"]


@pytest.mark.parametrize("bad", [object(), {1, 2}, {"a": [lambda: 0]}])
def test_what_would_need_a_pickle_is_refused(bad):
    with pytest.raises(ConfigurationError, match="pickle"):
        encode(bad, Tensors())
    with pytest.raises(ConfigurationError, match="meta"):
        encode(torch.empty(1, device="meta"), Tensors())


def test_no_warning_is_given(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(tmp_path / "c")
