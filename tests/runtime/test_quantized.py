"""The bitsandbytes modes through PrecisionRuntime: which layers are swapped, and what stays."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.layers import QuantizedLayer, dequantized_state_dict, load_state_dict, quantized_layers
from precision_runtime.modes import GROUPS
from precision_runtime.runtime import PrecisionRuntime

bnb = pytest.importorskip("bitsandbytes")

MODES = GROUPS["quantized"]
STORED = [m for m in MODES if m != "int8-training"]


class Net(nn.Module):
    def __init__(self, vocabulary=32, width=64):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.lm_head = nn.Linear(width, vocabulary)
        self.register_buffer("scale", torch.tensor(3.0, dtype=torch.float64))

    def forward(self, ids):
        x = self.emb(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.lm_head(x * self.scale)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


IDS = torch.arange(12).view(2, 6)


def same_state(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype is b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("mode", MODES)
def test_linear_layers_are_real_bitsandbytes_layers_and_the_rest_is_in_the_compute_dtype(mode):
    model = PrecisionRuntime(mode, "cpu").setup(net())
    kind = bnb.nn.Linear8bitLt if mode.startswith("int8") else bnb.nn.Linear4bit
    assert list(quantized_layers(model)) == ["up", "down", "lm_head"]
    assert all(isinstance(layer, kind) for layer in quantized_layers(model).values())
    if mode != "int8-training":
        parameter = bnb.nn.Int8Params if mode == "int8" else bnb.nn.Params4bit
        assert all(isinstance(layer.weight, parameter) for layer in quantized_layers(model).values())
    rest = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in rest} == {torch.bfloat16}
    assert type(model.attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert model(IDS).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_the_compute_dtype_is_that_asked_for(mode, dtype):
    model = PrecisionRuntime(mode, "cpu", compute_dtype=dtype).setup(net())
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {wanted}
    assert model.norm.weight.dtype is wanted
    seen = []
    model.up.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    model(IDS)
    assert seen == [(wanted, wanted)]


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_near_to_itself_with_the_weights_it_computes_with(mode):
    model, plain = PrecisionRuntime(mode, "cpu").setup(net()).eval(), net().double().eval()
    for name, layer in quantized_layers(model).items():
        plain.get_submodule(name).weight.data = layer.dequantized().double()
    with torch.no_grad():
        expected = plain(IDS)
        error = ((model(IDS).double() - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("mode", MODES)
def test_the_swap_keeps_identity_hooks_training_state_and_what_is_frozen(mode):
    model = net()
    layers = dict(model.named_modules())
    calls = []
    model.up.register_forward_hook(lambda *a: calls.append("hook"))
    model.up.register_forward_pre_hook(lambda *a: calls.append("pre"))
    model.up.eval()
    model.up.note = "the user's"
    model.up.weight.requires_grad_(False)
    model.lm_head.bias.requires_grad_(False)
    biases = {name: module.bias for name, module in layers.items() if isinstance(module, nn.Linear)}
    PrecisionRuntime(mode, "cpu").setup(model)
    assert dict(model.named_modules()) == layers
    assert (model.up.training, model.down.training, model.up.note) == (False, True, "the user's")
    assert all(model.get_submodule(name).bias is bias for name, bias in biases.items())
    trains = mode == "int8-training"
    assert [model.up.weight.requires_grad, model.down.weight.requires_grad] == [False, trains]
    assert [model.up.bias.requires_grad, model.lm_head.bias.requires_grad] == [True, False]
    model(IDS).sum().backward()
    assert calls == ["pre", "hook"]
    assert model.emb.weight.grad is not None
    assert model.up.weight.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_a_linear_that_is_the_whole_model_is_swapped(mode):
    rt = PrecisionRuntime(mode, "cpu")
    layer = rt.setup(nn.Linear(64, 3))
    assert isinstance(layer, QuantizedLayer)
    assert rt.setup(layer) is layer
    assert layer(torch.ones(2, 64)).dtype is torch.float32
    with rt.init_module():
        made = nn.Linear(64, 3)
    assert isinstance(made, QuantizedLayer)


def rows(mode, model, **options):
    before = {k: (v.dtype, v.data_ptr()) for k, v in model.state_dict(keep_vars=True).items()}
    found = PrecisionRuntime(mode, "cpu", **options).strategy.swaps(model)
    assert before == {k: (v.dtype, v.data_ptr()) for k, v in model.state_dict(keep_vars=True).items()}
    return {row.name: row.reason for row in found}


def test_the_rows_name_every_linear_layer_and_why_it_stays():
    found = rows("nf4", net(), ignore_modules="lm_head")
    assert found == {
        "attention.out_proj": "NonDynamicallyQuantizableLinear is a subclass with a behaviour of its own",
        "up": "",
        "down": "",
        "lm_head": "ignore_modules has 'lm_head'",
    }
    assert rows("nf4", net(), ignore_modules=("d*", "up")) == {
        **found, "lm_head": "", "down": "ignore_modules has 'd*'", "up": "ignore_modules has 'up'",
    }  # fmt: skip
    assert PrecisionRuntime("bf16-true", "cpu").strategy.swaps(net()) == []
    assert rows("nf4", net(), islands="up")["up"] == "islands has 'up'"


def refusals():
    hooked = nn.Linear(4, 4)
    prune.random_unstructured(hooked, "weight", 0.5)
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    infinite = nn.Linear(4, 4)
    infinite.weight.data[0, 0] = float("inf")
    huge = nn.Linear(4, 4).double()
    huge.weight.data[0, 0] = 1e300
    return {
        "hook": (hooked, "no parameter but computed"),
        "parametrisation": (parametrizations.weight_norm(nn.Linear(4, 4)), "subclass"),
        "patched": (patched, "replaced on the object"),
        "infinite": (infinite, "float32 cannot hold"),
        "huge": (huge, "float32 cannot hold"),
        "complex": (nn.Linear(4, 4, dtype=torch.complex64), "torch.complex64"),
    }


@pytest.mark.parametrize("case", refusals())
def test_a_layer_whose_weight_cannot_be_swapped_stays_with_the_reason(case):
    layer, reason = refusals()[case]
    model = nn.Sequential(layer, nn.Linear(4, 4))
    kind = type(layer)
    assert reason in rows("nf4", model)["0"]
    PrecisionRuntime("nf4", "cpu").setup(model)
    assert type(layer) is kind
    assert isinstance(model[1], QuantizedLayer)


class Tied(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.emb, self.body, self.head = nn.Embedding(8, 64), nn.Linear(64, 64), nn.Linear(64, 8, bias=False)
        self.twin = nn.Linear(64, 64)
        if how == "embedding":
            self.head.weight = self.emb.weight
        elif how == "memory":
            self.head.weight.data = self.emb.weight.data
        elif how == "linear":
            self.twin.weight = self.body.weight

    def forward(self, ids):
        return self.head(self.twin(self.body(self.emb(ids))))


@pytest.mark.parametrize("how", ["embedding", "memory"])
@pytest.mark.parametrize("mode", STORED)
def test_a_weight_that_an_embedding_has_too_stays_plain_and_tied(mode, how):
    model = Tied(how)
    assert rows(mode, model)["head"] == "its weight is also 'emb.weight', which is not swapped"
    PrecisionRuntime(mode, "cpu").setup(model)
    assert type(model.head) is nn.Linear
    if how == "embedding":
        assert model.head.weight is model.emb.weight
    assert list(quantized_layers(model)) == ["body", "twin"]
    assert model(torch.arange(3)).isfinite().all()


@pytest.mark.parametrize("mode", STORED)
def test_a_weight_that_two_linear_layers_share_is_quantised_once_and_stays_shared(mode):
    model = PrecisionRuntime(mode, "cpu").setup(Tied("linear"))
    assert model.body.weight is model.twin.weight
    assert copy.deepcopy(model).body.weight is not model.body.weight
    copied = copy.deepcopy(model)
    assert copied.body.weight is copied.twin.weight
    assert rows(mode, Tied("linear"), ignore_modules="twin")["body"].startswith("its weight is also 'twin.weight'")
    both = PrecisionRuntime(mode, "cpu", quantize_embeddings=True).setup(Tied("embedding"))
    assert both.head.weight is both.emb.weight
    assert isinstance(both.head, QuantizedLayer)
    same_state(load_and_state(both, mode), both.state_dict())


def load_and_state(model, mode):
    fresh = PrecisionRuntime(mode, "cpu", quantize_embeddings=True).setup(Tied("embedding"))
    fresh.load_state_dict(model.state_dict())
    assert fresh.head.weight is fresh.emb.weight
    return fresh.state_dict()


def test_a_model_without_linear_layers_is_refused_and_says_why_each_candidate_stays():
    rt = PrecisionRuntime("nf4", "cpu", ignore_modules="0")
    with pytest.raises(ConfigurationError, match=r"Conv2d has no nn.Linear. Use bf16-true"):
        PrecisionRuntime("nf4", "cpu").setup(nn.Conv2d(1, 1, 1))
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match=r"none that can be swapped:\n  0: ignore_modules has '0'"):
        rt.setup(model)
    assert model[0].weight.dtype is torch.bfloat16 or model[0].weight.dtype is torch.float32
    with pytest.raises(UnknownNameError, match=r"'lm_haed' in ignore_modules is unknown. Did you mean 'lm_head'"):
        PrecisionRuntime("nf4", "cpu", ignore_modules="lm_haed").setup(net())


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_model_with_bitsandbytes_layers_is_taken_as_it_was_made(kind):
    torch.manual_seed(0)
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"quant_type": "nf4"}
    theirs = getattr(bnb.nn, kind)(64, 64, **options)
    weight = theirs.weight.data.clone()
    model = nn.Sequential(theirs, nn.Linear(64, 4))
    assert "has bitsandbytes layers already ('0')" in rows("nf4", model)["1"]
    PrecisionRuntime("nf4", "cpu").setup(model)
    assert type(model[0]) is getattr(bnb.nn, kind)
    assert (type(model[1]), model[1].weight.dtype) == (nn.Linear, torch.bfloat16)
    if kind == "Linear4bit":
        assert model[0].compute_dtype is torch.bfloat16
        codes, _ = bnb.functional.quantize_4bit(weight, quant_type="nf4")  # from float32, not from bfloat16
        assert torch.equal(model[0].weight.data, codes)
    else:
        assert model[0].weight.dtype is torch.int8
    model.train()
    assert model(torch.ones(2, 64)).isfinite().all()


def test_another_storage_than_the_mode_s_is_refused():
    model = PrecisionRuntime("nf4", "cpu").setup(net())
    fresh = nn.Sequential(*model.children())
    with pytest.raises(ConfigurationError, match=r"quantised already, as nf4, and cannot run in int8"):
        PrecisionRuntime("int8", "cpu").setup(fresh)


@pytest.mark.parametrize("mode", MODES)
def test_the_fast_path_of_transformer_layers_never_sees_codes(mode):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0), 2)
    model = PrecisionRuntime(mode, "cpu").setup(model).eval()
    x = torch.randn(2, 5, 64)
    expected = model(x)
    with torch.no_grad():  # where torch would take it
        torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)


def test_optimizers_let_go_of_the_weights_that_were_swapped():
    model = net()
    weights = [model.up.weight, model.down.weight]
    optimizer = torch.optim.SGD(
        [{"params": weights, "lr": 0.1}, {"params": [model.up.bias, model.emb.weight]}], lr=1e-2
    )
    PrecisionRuntime("nf4", "cpu").setup(model, optimizer)
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 2]
    model(IDS).sum().backward()
    before = model.up.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model.up.bias, before)


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Lion8bit", "SGD8bit"])
@pytest.mark.parametrize("mode", ["nf4-dq", "int8-training"])
def test_eight_bit_optimizers_train_with_32_bits_for_the_embedding(mode, name, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(80, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Conv1d(6, 16, 64), nn.Flatten())
    rt = PrecisionRuntime(mode, "cpu")
    manager = bnb.optim.GlobalOptimManager.get_instance()
    # The process's, otherwise; and it knows parameters by id(), which a later test's parameter may have.
    monkeypatch.setattr(manager, "module_weight_config_triple", [])
    monkeypatch.setattr(manager, "pid2config", {})
    rt.setup(model)
    manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    options = {"SGD8bit": {"lr": 0.01, "momentum": 0.9}, "Lion8bit": {"lr": 1e-3}}.get(name, {"lr": 0.01})
    optimizer = getattr(bnb.optim, name)([p for p in model.parameters() if p.requires_grad], **options)
    rt.setup(model, optimizer)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(IDS) - 0.5).square().mean()
        rt.backward(loss)
        rt.clip_gradients(optimizer, max_norm=1.0)
        assert not rt.step(optimizer).skipped
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state[model[0].weight]["state1"].dtype is torch.float32
    assert optimizer.state[model[3].weight]["state1"].dtype is torch.uint8


@pytest.mark.parametrize("mode", MODES)
def test_a_state_dict_goes_round_into_every_kind_of_model(mode, tmp_path):
    rt = PrecisionRuntime(mode, "cpu")
    model = rt.setup(net())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    same_state(state, model.state_dict())
    model.eval()
    expected = model(IDS)

    def check(other):
        same_state(other.state_dict(), state)
        assert torch.equal(other.eval()(IDS), expected)

    after = rt.setup(net(1))
    after.load_state_dict(state, strict=True)
    check(after)
    check_gradients(after, model)
    with rt.init_module():
        made = Net()
    made.load_state_dict(state, strict=True)
    check(rt.setup(made))
    before = net(2)
    load_state_dict(before, state, strict=True)
    check(rt.setup(before))
    assigned = rt.setup(net(3))
    assigned.load_state_dict(state, strict=True, assign=True)
    check(assigned)

    plain = net(4)
    plain.load_state_dict(dequantized_state_dict(state), strict=True)
    same_state(dequantized_state_dict(model), dequantized_state_dict(state))
    for name, layer in quantized_layers(model).items():
        if mode != "int8-training":
            assert torch.equal(plain.get_submodule(name).weight, layer.dequantized(stored=True))
    again = rt.setup(net(5))
    again.load_state_dict(dequantized_state_dict(state))
    if mode in ("nf4", "fp4"):  # the others' scales are rounded, and those of rounded values are others
        same_state(dequantized_state_dict(again), dequantized_state_dict(model))


def check_gradients(a, b):
    for model in (a, b):
        model.zero_grad()
        model(IDS).sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_a_plain_checkpoint_is_quantised_as_setup_would_have():
    state = net(3).state_dict()
    for mode in STORED:
        model = PrecisionRuntime(mode, "cpu").setup(net(0))
        model.load_state_dict(state)
        same_state(model.state_dict(), PrecisionRuntime(mode, "cpu").setup(net(3)).state_dict())


def test_checkpoints_that_do_not_fit_are_refused_and_leave_the_values():
    states = {mode: PrecisionRuntime(mode, "cpu").setup(net()).state_dict() for mode in MODES}
    for mode in STORED:
        model = PrecisionRuntime(mode, "cpu").setup(net(1))
        values = model.up.dequantized()
        for other in STORED:
            if other != mode:
                with pytest.raises(RuntimeError, match=r"up.weight: these .*dequantized_state_dict"):
                    model.load_state_dict(states[other])
        assert torch.equal(model.up.dequantized(), values)
        narrow = PrecisionRuntime(mode, "cpu").setup(Net(width=32)).state_dict()
        with pytest.raises(RuntimeError, match=r"size mismatch"):
            model.load_state_dict(narrow)
        missing = {k: v for k, v in states[mode].items() if not k.startswith("up.weight")}
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "up.weight"'):
            model.load_state_dict({k: v for k, v in missing.items() if k != "up.SCB"})
        bare = {k: v for k, v in states[mode].items() if k in net().state_dict()}
        with pytest.raises(RuntimeError, match=r"up.weight: these torch.u?int8 values"):
            model.load_state_dict(bare)
    with pytest.raises(RuntimeError, match="floating weights"):
        PrecisionRuntime("int8-training", "cpu").setup(net()).load_state_dict(states["int8"], strict=False)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_bitsandbytes_own_layers_load_ours(mode):
    layer = nn.Linear(128, 64)
    PrecisionRuntime(mode, "cpu").setup(nn.ModuleList([layer]))
    state = layer.state_dict()
    if mode == "int8":
        theirs = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False).to("cpu")
        theirs.load_state_dict(state)
        values = bnb.functional.int8_vectorwise_dequant(theirs.weight.data, theirs.weight.SCB)
    else:
        statistics = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
        theirs = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
        values = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    torch.testing.assert_close(values, layer.dequantized(stored=True), rtol=1e-6, atol=0)
