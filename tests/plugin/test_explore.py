"""``precision_ctx.explore`` and ``precision_ctx.headroom``."""

from __future__ import annotations

import re

SOFTPLUS = """
import torch.nn.functional as F

def by_hand(x):
    return torch.log(1 + torch.exp(x))
"""


def test_it_finds_and_shrinks_a_failing_input_and_prints_a_test_that_fails(run):
    result = run(
        SOFTPLUS
        + """
@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    precision_ctx.explore(by_hand, (4, 8), low=-20, high=20, gradients=False)
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E  *by_hand fails in 16-true on cpu: *",
            "E  *found by example * of at most 50 (seed 0); shrunk from 32 elements*",
        ]
    )
    result.stdout.no_fnmatch_line("*exploring.py*")
    lines = [line.removeprefix("E").removeprefix("  ") for line in result.outlines if line.startswith("E")]
    text = "\n".join(line.removeprefix("     ") for line in lines)
    source = text[text.index("import torch") :]
    assert re.search(r"args = \(torch\.(tensor|full)", source)
    again = run(SOFTPLUS + source)
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["E  *by_hand fails in 16-true on cpu: *"])


def test_healthy_code_holds_and_counts_as_one_check(run):
    result = run(
        SOFTPLUS
        + """
@pytest.mark.precision("16-true", "bf16-mixed")
def test_it(precision_ctx):
    report = precision_ctx.explore(F.softplus, (4, 8), low=-20, high=20, gradients=False, max_examples=15)
    assert report.ok
"""
    )
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*1 test x 2 lanes: 2 hold*"])


def test_the_same_seed_finds_the_same(run):
    source = (
        SOFTPLUS
        + """
from hypothesis import strategies as st
from precision_runtime.strategies_for_tests import tensors

@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    seen = []
    def f(x, power, flag):
        seen.append((x.detach().clone(), power, flag))
        return F.softplus(x) * power
    for _ in range(2):
        inputs = (tensors(low=-4, high=4), st.integers(1, 3), True)
        precision_ctx.explore(f, *inputs, max_examples=8, gradients=False, seed=3)
    half = len(seen) // 2
    assert half >= 8
    for (x, n, flag), (y, m, other) in zip(seen[:half], seen[half:]):
        assert n == m and flag is other is True
        assert torch.equal(x, y) or bool(x.isnan().any())
"""
    )
    run(source).assert_outcomes(passed=1)


def test_without_hypothesis_it_says_what_to_install(run):
    result = run(
        """
import sys

@pytest.mark.precision("16-true")
def test_it(precision_ctx, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "hypothesis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    precision_ctx.explore(torch.relu, (2,))
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *UnsupportedError: searching for failing inputs needs Hypothesis: pip install *"])


def test_what_the_user_s_own_code_raises_comes_through(run):
    result = run(
        """
def refuse(x):
    raise KeyError("mine")

@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    precision_ctx.explore(refuse, (2,))
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *KeyError: 'mine'"])


def test_what_fails_no_second_time_is_told_all_the_same(run):
    result = run(
        SOFTPLUS
        + """
@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    import pytest_precision.exploring as exploring
    over = []
    def once(x):
        if over:
            raise OSError("not again")
        return by_hand(x)
    shrink = exploring.shrink
    def late(*args, **asked):
        over.append(True)
        return shrink(*args, **asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exploring, "shrink", late)
        precision_ctx.explore(once, (4, 8), low=-20, high=20, gradients=False)
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E  *to blame: *", "E  *found by example * of at most 50 (seed 0); not shrunk: OSError: not again"]
    )


def test_headroom_can_be_asked_for(run):
    result = run(
        """
@pytest.mark.precision("16-true")
@pytest.mark.parametrize("bits", [1, 6])
def test_it(precision_ctx, bits):
    found = precision_ctx.headroom(lambda x: x.square(), torch.full((4,), 16.0), at_least=bits, limit=6)
    assert found.bits == 3  # 16 doubled three times has a square of 16384, and the next is 65536
""",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["E  *6 bits of headroom are asked for, and there are 3:", "E  *inputs scaled, by audits*"]
    )
