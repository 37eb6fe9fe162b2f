"""The fixture ``precision_ctx``."""

from __future__ import annotations

import pytest

from precision_runtime.modes import MODES

NETS = """
class BadNorm(nn.Module):
    def forward(self, x):
        variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.norm, self.out = nn.Linear(16, 16), BadNorm(), nn.Linear(16, 4)
        nn.init.constant_(self.lift.bias, 10.0)

    def forward(self, x):
        return self.out(self.norm(self.lift(x)))
"""


def test_an_unmarked_test_runs_in_the_modes_of_the_ini(ids):
    source = "def test_it(precision_ctx): pass"
    assert ids(source) == ["test_it[16-mixed]", "test_it[bf16-mixed]"]
    assert ids(source, ini="precision_modes = 32-true, true") == [
        "test_it[32-true]",
        "test_it[16-true]",
        "test_it[bf16-true]",
    ]


def test_a_healthy_model_holds_and_a_bad_norm_is_named(run):
    result = run(
        NETS
        + """
@pytest.mark.precision("16-true", "bf16-true")
@pytest.mark.parametrize("net", [Block, lambda: nn.Linear(16, 4)], ids=["bad", "good"])
def test_it(precision_ctx, net):
    precision_ctx.check(precision_ctx.setup(net()), precision_ctx.randn(8, 16))
""",
        "-rf",
    )
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "E  *Block fails in 16-true on cpu: * lost beyond what the mode must lose (2 allowed)",
            "E  * to blame: norm (BadNorm)*",
            "E  * worst: *reference*is allowed*",
            "*precision*",
            "*2 tests x 2 lanes: 2 hold, 2 fail*",
            "  test_it?bad? * FAIL *",
            "findings, worst first:",
            "  test_suite.py::test_it?bad-*-true?: * norm (BadNorm)*",
        ]
    )
    result.stdout.no_fnmatch_line("*context.py*")  # the user's line, not ours, ends the traceback


def test_every_lane_starts_from_the_same_weights_and_inputs_and_generators_are_put_back(run):
    run(
        """
import random
import numpy
SEEN = []
BEFORE = []

@pytest.fixture(scope="module", autouse=True)
def outside():
    BEFORE.append((random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1]))
    yield

@pytest.fixture
def model(): return nn.Linear(3, 3)

@pytest.mark.precision("all")
def test_lane(model, precision_ctx):
    x = precision_ctx.randn(5)
    SEEN.append((model.weight.sum().item(), x.sum().item(), random.random(), numpy.random.rand()))
    assert SEEN[0] == SEEN[-1]
    assert x.dtype == torch.float32 and not torch.equal(x[:3], torch.randn(3))

def test_after():
    assert len(SEEN) == MODES
    python, cpu, array = BEFORE[0]
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), cpu)
    assert (numpy.random.get_state()[1] == array).all()
""".replace("MODES", str(len(MODES)))
    ).assert_outcomes(passed=len(MODES) + 1)


def test_what_user_code_leaves_switched_is_switched_back(run):
    run(
        """
@pytest.mark.precision("32-true")
def test_leaks(precision_ctx):
    torch.set_default_dtype(torch.bfloat16)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    raise RuntimeError

TF32 = torch.backends.cudnn.allow_tf32

def test_after():
    assert torch.get_default_dtype() == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cudnn.allow_tf32 == TF32
"""
    ).assert_outcomes(passed=1, failed=1)


def test_a_modules_own_default_dtype_outlives_its_first_lane(run):
    run(
        """
@pytest.fixture(scope="module", autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def test_it(precision_ctx):
    assert torch.get_default_dtype() == torch.float64
"""
    ).assert_outcomes(passed=2)


def test_attributes_and_the_runtimes_verbs(run):
    run(
        """
@pytest.mark.precision("16-mixed", "bf16-true", "64-true")
def test_it(precision_ctx):
    ctx = precision_ctx
    dtypes = {"16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert ctx.dtype == dtypes[ctx.mode] and ctx.accelerator == "cpu" and ctx.device.type == "cpu"
    assert ctx.runtime.mode.name == ctx.mode
    with ctx.init_module():
        model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert ctx.setup(model, optimizer) == (model, optimizer) and model.weight.dtype == ctx.dtype
    with ctx.autocast():
        loss = model(ctx.randn(2, 4)).float().square().mean()
    ctx.backward(loss)
    ctx.clip_gradients(optimizer, max_norm=1.0)
    ctx.step(optimizer)
    ctx.load_state_dict(ctx.state_dict())
    ctx.check(model, ctx.randn(2, 4))
"""
    ).assert_outcomes(passed=3)


def test_setup_keeps_the_values_from_before_the_cast_as_the_truth(run):
    result = run(
        """
class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("freq", 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16))

    def forward(self, positions):
        return torch.sin(positions[:, None] * self.freq)

@pytest.mark.precision("bf16-true", "bf16-mixed", xfail={"bf16-true": "the table is cast"})
def test_it(precision_ctx):
    precision_ctx.check(precision_ctx.setup(Rotary()), precision_ctx.tensor([float(i) for i in range(256)]))
""",
        ini="xfail_strict = true",
    )
    result.assert_outcomes(passed=1, xfailed=1)
    result.stdout.fnmatch_lines(["*1 test x 2 lanes: 1 hold, 1 known to fail*", "  test_it * xfail *"])


def test_compare_judges_a_tensor_by_the_modes_own_rounding(run):
    result = run(
        """
@pytest.mark.precision("bf16-true")
@pytest.mark.parametrize("error", [0.0, 1.0], ids=["close", "far"])
def test_it(precision_ctx, error):
    reference = precision_ctx.randn(64).double()
    precision_ctx.compare(reference.bfloat16() + error, reference)
"""
    )
    result.assert_outcomes(passed=1, failed=1)


def test_a_reference_is_computed_once_for_all_lanes_of_a_case(run):
    run(
        """
RUNS = []

def f(x):
    if x.dtype == torch.float64:
        RUNS.append(tuple(x.shape))
    return x.sin()

@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.precision("32-true", "half")
def test_it(precision_ctx, n):
    precision_ctx.check(f, precision_ctx.randn(n), gradients=False)
    runs = sum(shape == (n,) for shape in RUNS)
    if precision_ctx.mode == "32-true":
        test_it.first = runs
    # Only what is sampled anew for another unit roundoff may be added: the reference run itself is not repeated.
    assert runs <= 3 * max(1, test_it.first), RUNS
"""
    ).assert_outcomes(passed=10)


def test_the_caches_of_a_case_are_dropped_when_another_begins():
    from pytest_precision.references import CaseReferences

    references = CaseReferences()
    first = references.at("a", 1)
    assert references.at("a", 1) is first
    assert references.at("a", 2) is not first
    references.at("b", 1)
    assert references.at("a", 1) is not first


def test_asking_for_the_fixture_while_the_test_runs_says_what_to_do(run):
    result = run("def test_it(request):\n    request.getfixturevalue('precision_ctx')\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*precision_ctx has no lane here*Name it among the test's arguments*"])


def test_a_check_of_the_users_other_exceptions_passes_them_on(run):
    result = run(
        """
def broken(x): raise KeyError("user")

@pytest.mark.precision("32-true")
def test_it(precision_ctx): precision_ctx.check(broken, precision_ctx.randn(2))
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*1 test x 1 lane: 1 fail*", "*KeyError*user*"], consecutive=False)


def test_the_verbs_that_look_and_watch_are_the_runtimes(run):
    run(
        """
@pytest.mark.precision("16-mixed", "bf16-true")
def test_it(precision_ctx):
    ctx = precision_ctx
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    assert str(ctx.plan(model, optimizer)) == str(ctx.runtime.plan(model, optimizer))
    assert model.weight.dtype == torch.float32
    ctx.setup(model, optimizer)
    scheduler = ctx.gate(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    x = ctx.randn(4, 8, requires_grad=True)
    with ctx.ledger() as ledger, ctx.lost_updates() as lost:
        loss = model(x).square().mean()
        (penalty,) = ctx.gradients(loss, [x])
        twin = torch.autograd.grad(model(x).square().mean(), x)[0]
        torch.testing.assert_close(penalty, twin, rtol=0.02, atol=0.02)
        ctx.backward(loss + penalty.square().sum())
        assert ctx.step(optimizer, None).skipped is False
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-7
    assert ctx.verify(0.5) == ledger.verify(0.5) > 0.5
    assert "weight" in str(lost)
"""
    ).assert_outcomes(passed=2)


def test_a_strict_set_up_refuses_what_nobody_allowed(run):
    run(
        """
from precision_runtime.errors import PrecisionError

@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.full((3,), 1e6))
    with pytest.raises(PrecisionError, match="table"):
        precision_ctx.setup(model, strict=True)
    assert precision_ctx.setup(model, strict=True, allow="table") is model
"""
    ).assert_outcomes(passed=1)


TRAIN = """
@pytest.mark.precision("bf16-true", "bf16-mixed"{more})
def test_it(precision_ctx):
    torch.manual_seed(0)
    batches = [torch.randn(16, 8) for _ in range(4)]
    report = precision_ctx.train(
        lambda: nn.Linear(8, 1), lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4),
        lambda m, batch: (m(batch) - 1).square().mean(), batches, steps=20,
    )
    assert report.mode == precision_ctx.mode
"""


def test_a_training_is_judged_in_the_lane(run):
    result = run(TRAIN.format(more=""))
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["E  *training Linear for 20 steps fails in bf16-true*", "*1 hold, 1 fail*"])


def test_a_training_is_judged_with_the_updates_of_its_marker(run):
    kahan = TRAIN.replace(', "bf16-mixed"{more}', ', runtime={"updates": "kahan"}').replace("{more}", "")
    run(kahan).assert_outcomes(passed=1)


def test_a_training_refuses_what_it_would_ignore(run):
    result = run(TRAIN.format(more=', runtime={"ignore_modules": "x"}'))
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*precision_ctx.train takes islands, scaler, updates of the marker*, not ignore_m*"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("at_least=4, limit=3", "at_least=4 is not allowed: limit=3 powers of two are tried, so 0 to 3 can be asked *"),
        ("at_least=17", "at_least=17 is not allowed: limit=16 powers of two are tried*"),
        ("at_least='4'", "at_least='4' is not allowed*"),
        ("at_least=4, limit='9'", "limit='9' is not allowed: headroom() tries 1 to 64 powers of two each way"),
    ],
)
def test_more_headroom_than_is_tried_cannot_be_asked_for(run, asked, said):
    result = run(
        f"""
@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    precision_ctx.headroom(torch.sin, precision_ctx.randn(4), {asked})
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E *ConfigurationError: {said}"])
