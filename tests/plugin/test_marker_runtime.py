"""The marker's argument ``runtime``: what PrecisionRuntime is given beside the mode, for the set-up and the audit."""

from __future__ import annotations

import inspect

import pytest

from precision_runtime import PrecisionRuntime
from pytest_precision.choices import KEYS, Choices, parse_choices
from pytest_precision.problems import Problems

NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 8)
    def forward(self, x):
        return self.lm_head(torch.relu(self.body(x)))
"""


def test_it_takes_what_the_runtime_takes_without_what_the_lane_decides():
    taken = set(inspect.signature(PrecisionRuntime).parameters) - {"mode", "accelerator", "amp_backend", "amp_level"}
    assert set(KEYS) == taken


@pytest.mark.parametrize("set_up", [True, False], ids=["set up", "audited as it is"])
def test_the_set_up_and_the_audit_go_by_it(run, set_up):
    run(
        NET
        + f"""
@pytest.mark.precision("nf4", runtime={{"ignore_modules": "lm_head", "compute_dtype": "float16"}})
def test_it(precision_ctx):
    net = Net()
    if {set_up}:
        precision_ctx.setup(net)
        assert type(net.lm_head) is nn.Linear and type(net.body) is not nn.Linear
        assert net.lm_head.weight.dtype == torch.float16
    seen = []
    net.body.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    report = precision_ctx.check(net, precision_ctx.randn(8, 64), gradients=False)
    assert [layer.module for layer in report.layers] == ["body"]
    assert torch.float16 in seen and torch.bfloat16 not in seen
"""
    ).assert_outcomes(passed=1)


def test_islands_are_kept_by_the_audit_of_a_model_that_is_not_set_up(run):
    source = """
class Big(nn.Module):
    def forward(self, x): return (x * 1e5) * 1e-5

@pytest.mark.precision("16-true" {runtime})
def test_it(precision_ctx):
    precision_ctx.check(nn.Sequential(nn.Linear(8, 8), Big()), precision_ctx.randn(4, 8), gradients=False)
"""
    run(source.format(runtime=', runtime={"islands": "1"}')).assert_outcomes(passed=1)
    run(source.format(runtime="")).assert_outcomes(failed=1)


def test_modes_and_groups_may_have_their_own():
    problems = Problems()
    given = {
        "islands": "auto",
        "nf4": {"compute_dtype": "float32"},
        "quantized": {"compute_dtype": "float16", "ignore_modules": "head"},
    }
    choices = parse_choices(given, ["nf4", "int8", "16-true"], "here", problems)
    assert not problems
    assert choices.of("16-true") == {"islands": "auto"}
    assert choices.of("int8") == {"islands": "auto", "compute_dtype": "float16", "ignore_modules": "head"}
    assert choices.of("nf4") == {"islands": "auto", "compute_dtype": "float32", "ignore_modules": "head"}


def test_nothing_given_is_nothing_asked():
    assert parse_choices(None, ["nf4"], "here", Problems()) == Choices()


def test_every_mistake_is_said_at_collection(run):
    result = run(
        """
@pytest.mark.precision("nf4", "16-mixed", runtime={
    "ignore_module": "lm_head", "compute_dtype": "float16", "islands": {"norm": "16"},
    "nf5": {"compute_dtype": "float16"}, "nf4": {"recipy": 1},
})
def test_it(precision_ctx): pass

@pytest.mark.precision("nf4", runtime="ignore")
def test_other(precision_ctx): pass
""",
        "--collect-only",
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "*the marker precision, runtime has no 'ignore_module'. Did you mean 'ignore_modules'? It takes *",
            "*the marker precision, runtime has no 'nf5'. Did you mean 'nf4'?*",
            "*the marker precision, runtime, 'nf4' has no 'recipy'. Did you mean 'recipe'?*",
            "*the marker precision, runtime: an island is kept in '32' or '64'*{'norm': '16'}*",
            "*the marker precision, runtime: 16-mixed takes no compute_dtype; these modes do: nf4, *",
        ],
        consecutive=False,
    )
    run(
        '@pytest.mark.precision("nf4", runtime="ignore")\ndef test_it(precision_ctx): pass', "--collect-only"
    ).stdout.fnmatch_lines(["*the marker precision, runtime is 'ignore'; it is a dict of what PrecisionRuntime takes*"])


def test_what_only_the_runtime_can_refuse_fails_the_lane_with_its_words(run):
    result = run(
        """
@pytest.mark.precision("16-true", runtime={"updates": "stocastic"})
def test_it(precision_ctx): pass
"""
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the marker precision, runtime: *'stocastic'*Did you mean 'stochastic'?*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_modes_that_the_matrix_adds_are_told_apart(run):
    """A test that names no modes may still say what its quantised lanes are to do."""
    run(
        NET
        + """
@pytest.mark.precision(runtime={"quantized": {"ignore_modules": "lm_head"}})
def test_it(precision_ctx):
    net = precision_ctx.setup(Net())
    assert (type(net.body) is nn.Linear) == (precision_ctx.mode == "bf16-true")
    assert type(net.lm_head) is nn.Linear
""",
        "--precision-lanes=bf16-true,nf4",
    ).assert_outcomes(passed=2)
