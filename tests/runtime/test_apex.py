import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from precision_runtime import PrecisionRuntime, support
from precision_runtime.errors import ConfigurationError, PrecisionError
from precision_runtime.scaling import DynamicScaler

HALF, SINGLE = torch.float16, torch.float32


class Calls(nn.Module):
    """Runs a function inside forward, where the mode holds."""

    def forward(self, function):
        return [function()]  # in a list, as an object: its dtype is looked at before outputs are cast

    def inside(self, mode, function):
        seen = []
        rt = PrecisionRuntime(mode, "cpu")
        rt.setup(self)(lambda: seen.append(function()) or torch.ones(1))
        return seen[0]


def in_o1(function):
    return Calls().inside("apex-O1", function)


h, f = torch.full((4, 4), 0.5, dtype=HALF), torch.full((4, 4), 0.5)
image, scalar = h[None, None], torch.tensor(1.5)

# Apex's documentation: what O1 runs in float32 even where its inputs are half ("blacklist").
IN_SINGLE = {
    "exp": lambda: h.exp(), "torch.exp": lambda: torch.exp(h), "log": lambda: h.log(), "log10": lambda: h.log10(),
    "acos": lambda: h.acos(), "rsqrt": lambda: torch.rsqrt(h), "reciprocal": lambda: h.reciprocal(),
    "pow": lambda: h.pow(2), "**": lambda: h**2, "2**": lambda: 2**h, "sum": lambda: h.sum(), "prod": lambda: h.prod(),
    "cumsum": lambda: h.cumsum(0), "norm": lambda: h.norm(), "std": lambda: h.std(), "var": lambda: torch.var(h),
    "dist": lambda: torch.dist(h, h), "renorm": lambda: h.renorm(2, 0, 1.0), "softmax": lambda: F.softmax(h, -1),
    "tensor.softmax": lambda: h.softmax(-1), "log_softmax": lambda: F.log_softmax(h, -1),
    "softplus": lambda: F.softplus(h), "layer_norm": lambda: F.layer_norm(h, (4,)),
    "group_norm": lambda: F.group_norm(h, 2), "interpolate": lambda: F.interpolate(image, scale_factor=2.0),
    "local_response_norm": lambda: F.local_response_norm(image, 2), "normalize": lambda: F.normalize(h),
    "cosine_similarity": lambda: F.cosine_similarity(h, h), "mse_loss": lambda: F.mse_loss(h, h),
    "cross_entropy": lambda: F.cross_entropy(h, torch.zeros(4, dtype=torch.long)),
    "kl_div": lambda: F.kl_div(h, h, reduction="batchmean"), "l1_loss": lambda: F.l1_loss(h, f),
    "with logits": lambda: F.binary_cross_entropy_with_logits(h, h), "cpu": lambda: h.cpu(),
}  # fmt: skip
# What it runs in half even where they are float32 ("whitelist").
IN_HALF = {
    "linear": lambda: F.linear(f, f), "matmul": lambda: torch.matmul(f, f), "@": lambda: f @ f, "mm": lambda: f.mm(f),
    "mv": lambda: f.mv(f[0]), "addmm": lambda: torch.addmm(f, f, f), "addmv": lambda: torch.addmv(f[0], f, f[0]),
    "addr": lambda: torch.addr(f, f[0], f[0]), "bmm": lambda: torch.bmm(f[None], f[None]),
    "baddbmm": lambda: torch.baddbmm(f[None], f[None], f[None]),
    "conv2d": lambda: F.conv2d(f[None, None], f[None, None]),
    "conv1d": lambda: F.conv1d(f[None], f[None]), "prelu": lambda: F.prelu(f, f[0, :1]),
    "conv_transpose2d": lambda: F.conv_transpose2d(f[None, None], f[None, None]),
    "conv_tbc": lambda: torch.conv_tbc(f[None], f[None], f[0]),
}  # fmt: skip
# What takes the widest of its operands.
IN_WIDEST = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "torch.mul": torch.mul, "cat": lambda a, b: torch.cat([a, b]), "stack": lambda a, b: torch.stack((a, b)),
    "atan2": torch.atan2, "addcmul": lambda a, b: torch.addcmul(a, a, b), "dot": lambda a, b: a[0].dot(b[0]),
    "bilinear": lambda a, b: F.bilinear(a, b, a[None]),
    "cross": lambda a, b: torch.cross(a[:, :3], b[:, :3], dim=1),
}  # fmt: skip


@pytest.mark.parametrize("function", IN_SINGLE.values(), ids=IN_SINGLE)
def test_o1_runs_it_in_float32_on_half_inputs(function):
    assert in_o1(function).dtype is SINGLE


@pytest.mark.parametrize("function", IN_HALF.values(), ids=IN_HALF)
def test_o1_runs_it_in_half_on_float32_inputs(function):
    assert in_o1(function).dtype is HALF


@pytest.mark.parametrize("function", IN_WIDEST.values(), ids=IN_WIDEST)
def test_o1_takes_the_widest_operand(function):
    for a, b in ((h, f), (f, h), (f, f)):
        assert in_o1(lambda a=a, b=b: function(a, b)).dtype is SINGLE
    assert in_o1(lambda: function(h, h)).dtype is HALF


def test_o1_counts_a_float32_scalar_tensor_which_promotion_alone_would_not():
    assert (h * scalar).dtype is HALF
    assert in_o1(lambda: h * scalar).dtype is SINGLE
    assert in_o1(lambda: h * 1.5).dtype is HALF


def test_o1_differs_from_16_mixed_where_torch_s_cpu_policy_does():
    assert Calls().inside("16-mixed", lambda: F.softmax(h, -1)).dtype is HALF
    assert in_o1(lambda: F.softmax(h, -1)).dtype is SINGLE


def test_o1_leaves_the_rest_to_its_inputs():
    for function in (torch.relu, torch.tanh, torch.mean, torch.max):
        assert in_o1(lambda function=function: function(h)).dtype is HALF
        assert in_o1(lambda function=function: function(f)).dtype is SINGLE
    assert in_o1(lambda: torch.arange(3).cumsum(0)).dtype is torch.long


def test_o1_in_place_follows_the_tensor_that_is_written_to():
    assert in_o1(lambda: h.clone().add_(f)).dtype is HALF
    assert in_o1(lambda: f.clone().mul_(h)).dtype is SINGLE
    with pytest.raises(PrecisionError, match=r"runs exp in float32, and exp_ would write .* Use exp,"):
        in_o1(lambda: h.clone().exp_())
    assert in_o1(lambda: f.clone().exp_()).dtype is SINGLE


def test_o1_refuses_binary_cross_entropy_in_half_as_apex_does():
    with pytest.raises(PrecisionError, match="binary_cross_entropy_with_logits"):
        in_o1(lambda: F.binary_cross_entropy(h, h))
    assert in_o1(lambda: F.binary_cross_entropy(f, f)).dtype is SINGLE


def test_o1_leaves_nothing_behind_when_forward_raises():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError("the user's own")

    with pytest.raises(KeyError):
        PrecisionRuntime("apex-O1", "cpu").setup(Raises())(f)
    assert h.exp().dtype is HALF
    assert not torch.is_autocast_enabled("cpu")
    assert not torch._C._is_torch_function_mode_enabled()


def test_o1_holds_inside_autocast_for_what_runs_outside_forward():
    with PrecisionRuntime("apex-O1", "cpu").autocast():
        assert h.exp().dtype is SINGLE
        assert (f @ f).dtype is HALF


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.reentrant, self.seen = reentrant, []

    def part(self, x):
        x = self.last(x)
        self.seen.append((x.dtype, x.exp().dtype, self.last[0](x).dtype))
        return x.exp()

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


def gradients(reentrant, asked=False):
    torch.manual_seed(0)
    model, rt = Checkpointed(reentrant), PrecisionRuntime("apex-O1", "cpu", scaler=DynamicScaler(init_scale=16.0))
    rt.setup(model)
    loss = model(torch.linspace(-1, 1, 16).reshape(2, 8)).float().sum()
    if asked:
        found = rt.gradients(loss, list(model.parameters()))
    else:
        rt.backward(loss)
        found = [p.grad / 16 for p in model.parameters()]
    assert set(model.seen) == {(SINGLE, SINGLE, HALF)}
    assert len(model.seen) == 1 + (reentrant is not None)  # it has really been run again
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_o1_holds_while_a_checkpoint_runs_forward_again(reentrant):
    assert all(map(torch.equal, gradients(reentrant), gradients(None)))


def test_o1_holds_in_a_checkpoint_for_gradients_that_are_asked_for():
    assert all(map(torch.equal, gradients(False, asked=True), gradients(None, asked=True)))


def test_o1_leaves_python_functions_in_backward_as_they_are():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.half()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.exp().dtype)
            return gradient.float()

    seen = []
    PrecisionRuntime("apex-O1", "cpu").backward(Half.apply(torch.ones(3, requires_grad=True)).float().sum())
    assert seen == [HALF]


def test_o1_leaves_islands_alone():
    seen = []

    class Island(nn.Module):
        def forward(self, x):
            seen.append(F.prelu(x, x[0, :1]).dtype)
            return x

    rt = PrecisionRuntime("apex-O1", "cpu", islands=["0"])
    rt.setup(nn.Sequential(Island(), nn.Linear(4, 4)))(f)
    assert seen == [SINGLE]


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_o1_runs_a_spectral_norm(norm):
    torch.manual_seed(0)
    model = norm(nn.Linear(4, 4))
    x = torch.ones(2, 4)
    wide = copy.deepcopy(model)(x)
    assert torch.allclose(PrecisionRuntime("apex-O1", "cpu").setup(model)(x), wide, atol=1e-2)


def test_o0_is_float32_also_for_half_inputs_and_models():
    model = PrecisionRuntime("apex-O0", "cpu").setup(nn.Linear(4, 4).half())
    assert model.weight.dtype is SINGLE
    assert model(h).dtype is model(f.double()).dtype is SINGLE


def test_o3_is_16_true_with_a_loss_scale_of_1():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), torch.randn(8, 4)
    results = []
    for mode in ("apex-O3", "16-true"):
        rt = PrecisionRuntime(mode, "cpu")
        model = rt.setup(copy.deepcopy(net))
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        rt.backward(model(x).square().mean())
        assert rt.step(opt).scale == 1.0
        results.append(model.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(*map(dict.values, results), strict=True))
    with pytest.raises(ConfigurationError, match="does not scale its loss"):
        PrecisionRuntime("apex-O3", "cpu", scaler=DynamicScaler())


NORMS = [nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.SyncBatchNorm(4), nn.SyncBatchNorm(4, affine=False)]


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_o2_keeps_batch_norms_in_float32_to_the_last_bit(norm):
    norm = copy.deepcopy(norm)
    with torch.no_grad():
        norm.running_mean.fill_(1 / 3)
        for p in norm.parameters():
            p.fill_(1e-9)
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    model = PrecisionRuntime("apex-O2", "cpu").setup(nn.Sequential(nn.Linear(4, 4), norm))
    assert model[0].weight.dtype is HALF
    for name, t in (*norm.named_parameters(), *norm.named_buffers()):
        assert torch.equal(t, before[name]), name
        assert t.dtype is before[name].dtype


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_o2_batch_norms_take_half_and_give_half(affine, train):
    seen = []
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2)).train(train)
    net[1].register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    model = PrecisionRuntime("apex-O2", "cpu").setup(net)
    out = model(torch.randn(8, 4))
    out.sum().backward()
    assert seen == [(HALF, HALF)]
    assert out.dtype is SINGLE
    assert net[1].running_mean.dtype is SINGLE


@pytest.mark.parametrize("mode", ["apex-O2", "apex-O3"])
def test_complex_parameters_and_buffers_stay_whole(mode):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Parameter(torch.tensor([1 + 2j]))
            self.register_buffer("table", torch.tensor([3 - 1j]))

        def forward(self, x):
            return (x * (self.z * self.table).imag).sum()

    rt = PrecisionRuntime(mode, "cpu")
    model = Net()
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    assert (model.z.item(), model.table.item()) == (1 + 2j, 3 - 1j)
    rt.backward(model(torch.ones(1)))
    assert not rt.step(opt).skipped
    assert model.z.item() == 1 + 2j - 0.5 * (-1 + 3j)  # the gradient of Im(z t) is i·conj(t)
    assert model.state_dict()["z"].dtype is torch.complex64


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_levels_are_copied_and_pickled_and_still_run(level):
    model = PrecisionRuntime(f"apex-{level}", "cpu").setup(nn.Linear(2, 2))
    out = model(torch.ones(1, 2))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(torch.ones(1, 2)), out)
        assert all(a.dtype is b.dtype for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_the_arguments_of_the_old_trainer_choose_the_level():
    for level in ("O0", "O1", "O2", "O3"):
        rt = PrecisionRuntime(accelerator="cpu", amp_backend="apex", amp_level=level)
        assert rt.mode.name == f"apex-{level}"
        assert rt.scaler.enabled is (level in {"O1", "O2"})
    with pytest.raises(ValueError, match="letter O, not the digit zero"):
        PrecisionRuntime(amp_backend="apex", amp_level="02")


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_names_need_no_capitals_and_support_says_what_runs(level):
    answer = support(f"APEX-{level.lower()}", "cpu")
    assert (answer.mode, answer.status) == (f"apex-{level}", "native")
    assert ("float32" if level == "O0" else "float16") in answer.reason
