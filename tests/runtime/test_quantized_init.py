"""init_module in the bitsandbytes modes: the model of setup, bit by bit, with one float32 weight in memory."""

import copy

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.layers import quantized_layers
from precision_runtime.layers.streaming import Watch
from precision_runtime.modes import GROUPS
from precision_runtime.runtime import PrecisionRuntime

pytest.importorskip("bitsandbytes")

MODES = GROUPS["quantized"]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype is b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


class Base(nn.Module):
    """Three layers and an embedding; subclasses initialise them as people do."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(8, 64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(3)])
        self.head = nn.Linear(64, 8)
        self.late()

    def linears(self):
        return [m for m in self.modules() if isinstance(m, nn.Linear)]

    def late(self):
        pass

    def forward(self, ids):
        x = self.emb(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Apply(Base):
    def late(self):
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear) else None)


class Data(Base):
    def late(self):
        for m in self.linears():
            m.weight.data.normal_(0.0, 0.02)
            m.bias.data.zero_()


class Truncated(Base):
    def late(self):
        for m in self.linears():
            nn.init.trunc_normal_(m.weight, std=0.02, a=-0.03, b=0.03)


class Orthogonal(Base):
    def late(self):
        for m in self.linears():
            nn.init.orthogonal_(m.weight, gain=2.0)


class Parameters(Base):
    def late(self):
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)


class Scaled(Base):
    """Reads and changes what has been quantised long ago."""

    def late(self):
        with torch.no_grad():
            for i, m in enumerate(self.linears()):
                m.weight.mul_(0.5**i)
                m.weight[i].zero_()
                m.weight.data[:, :2] += torch.randn(1)
            self.blocks[0][0].weight.div_(self.blocks[1][0].weight.norm())


class Twice(Base):
    def late(self):
        for _ in range(2):
            for m in self.linears():
                m.reset_parameters()
        self.linears()[0].weight.data.clamp_(-0.05, 0.05)


class Generator(Base):
    def late(self):
        generator = torch.Generator().manual_seed(7)
        for m in self.linears():
            nn.init.uniform_(m.weight, -0.1, 0.1, generator=generator)
        self.linears()[0].weight.data.mul_(2)


class Checkpoint(Base):
    def late(self):
        torch.manual_seed(3)
        self.load_state_dict({k: torch.randn_like(v) for k, v in self.state_dict().items()})


class Reads(Base):
    """Values that leave through Python, without an operation."""

    def late(self):
        self.total = float(self.linears()[0].weight.detach().numpy().sum())
        self.rows = self.linears()[1].weight[0].tolist()
        self.copied = copy.deepcopy(self.linears()[2])
        self.linears()[0].weight.detach().numpy()[0, 0] = 9.0


class Runs(Base):
    def late(self):
        self.size = self(torch.arange(4)).shape
        self.spectrum = torch.linalg.svdvals(self.linears()[0].weight.detach())


class TiedHead(Base):
    def late(self):
        self.head.weight = self.emb.weight


class TiedEmbedding(Base):
    def late(self):
        self.emb.weight = self.head.weight


class Shared(Base):
    def late(self):
        self.blocks[2][0].weight = self.blocks[0][0].weight


class Clones(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), 3)
        self.head = nn.Linear(64, 2)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_normal_(p)


class Frozen(Base):
    def late(self):
        self.requires_grad_(False)
        self.linears()[0].weight.requires_grad_(True)


class Double(Base):
    def late(self):
        self.blocks[0].double()
        self.blocks[1].to(torch.bfloat16)


class WeightNorm(Base):
    def late(self):
        nn.utils.parametrizations.weight_norm(self.blocks[0][0])
        nn.utils.parametrizations.spectral_norm(self.head)


CASES = (Base, Apply, Data, Truncated, Orthogonal, Parameters, Scaled, Twice, Generator, Checkpoint, Reads, Runs,
         TiedHead, TiedEmbedding, Shared, Clones, Frozen, Double, WeightNorm)  # fmt: skip


@pytest.mark.parametrize("mode", ["nf4-dq", "int8", "int8-training"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_setup_bit_by_bit(case, mode):
    rt = PrecisionRuntime(mode, "cpu")
    torch.manual_seed(0)
    with rt.init_module():
        made = case()
    after = torch.rand(1)
    torch.manual_seed(0)
    plain = case()
    assert torch.equal(after, torch.rand(1))  # the generator has come as far
    set_up = rt.setup(plain)
    same_state(made, set_up)
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in set_up.parameters()]
    kinds = [{n: type(m).__name__ for n, m in model.named_modules()} for model in (made, set_up)]
    assert kinds[0] == kinds[1]
    for name in ("total", "rows", "size"):
        assert getattr(made, name, None) == getattr(plain, name, None)
    assert rt.setup(made) is made


@pytest.mark.parametrize("patterns", [("head",), ("blocks.1",), ("*.0",), ("blocks.*", "head")], ids=str)
@pytest.mark.parametrize("case", [Base, Data, Scaled, Checkpoint])
def test_names_are_matched_when_the_model_is_whole(case, patterns):
    rt = PrecisionRuntime("nf4", "cpu", ignore_modules=patterns)
    torch.manual_seed(0)
    with rt.init_module():
        made = case()
    torch.manual_seed(0)
    plain = case()
    if len(patterns) == 2:
        with pytest.raises(ConfigurationError, match="none that can be swapped"):
            rt.setup(plain)
        return
    same_state(made, rt.setup(plain))
    assert list(quantized_layers(made)) == list(quantized_layers(plain))


def test_an_unknown_name_and_loose_parts():
    with (
        pytest.raises(UnknownNameError, match="heads"),
        PrecisionRuntime("nf4", "cpu", ignore_modules="heads").init_module(),
    ):
        model, norm = Base(), nn.LayerNorm(4)
    with PrecisionRuntime("nf4", "cpu", ignore_modules="head").init_module():
        norm, model, loose = nn.LayerNorm(4), Base(), nn.Linear(64, 2)
    assert norm.weight.dtype is torch.bfloat16
    assert type(model.head) is nn.Linear
    assert list(quantized_layers(loose)) == [""]


@pytest.mark.parametrize("case", [Base, Apply, Parameters])
def test_never_are_two_weights_in_memory(case, monkeypatch):
    live = []
    inner = Watch.__torch_dispatch__

    def watched(self, func, types, args=(), kwargs=None):
        result = inner(self, func, types, args, kwargs)
        live.append([w.storage.nbytes() for w in self.weights.values() if w.storage.nbytes()])
        return result

    monkeypatch.setattr(Watch, "__torch_dispatch__", watched)
    with PrecisionRuntime("nf4", "cpu").init_module():
        case()
    assert max(map(len, live)) == 1
    assert [4 * 64 * 64] in live


def test_values_from_elsewhere_that_are_gone_are_refused_by_name():
    def build():
        with PrecisionRuntime("nf4", "cpu").init_module():
            a, b = nn.Linear(64, 64), nn.Linear(64, 64)
            with torch.no_grad():
                a.weight.copy_(torch.randn(64, 64))
                b.weight.copy_(torch.randn(64, 64))
                a.weight.mul_(2)

    with pytest.raises(ConfigurationError, match=r"weight of Linear\(64, 64\) .* mul_ needs its former values"):
        build()


def test_a_view_that_somebody_keeps_has_its_values_afterwards():
    with PrecisionRuntime("nf4", "cpu").init_module():
        model = Base()
        held = model.head.weight
        rows = [block[0].weight[1] for block in model.blocks]
    torch.manual_seed(0)
    assert held.dtype is torch.float32
    assert held.abs().sum() > 0
    assert all(row.abs().sum() > 0 for row in rows)
    assert model.head.weight is not held


def test_an_exception_puts_every_value_back():
    made = []

    def build():
        torch.manual_seed(0)
        with PrecisionRuntime("int8", "cpu").init_module():
            made.append(Base())
            raise KeyError

    with pytest.raises(KeyError):
        build()
    torch.manual_seed(0)
    same_state(made[0], Base())
    assert torch.ones(2).add_(1).sum() == 4


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_weights_of_the_meta_device_and_empty_ones_are_left_alone():
    with PrecisionRuntime("nf4", "cpu").init_module():
        with torch.device("meta"):
            empty = nn.Linear(64, 64)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 0, bias=False))
    assert empty.weight.is_meta
    assert list(quantized_layers(model)) == ["0"]
