"""The terminal's summary."""

from __future__ import annotations

import pytest

from pytest_precision.report.row import Row
from pytest_precision.report.terminal import findings, tables


def row(case: str, lane: str, verdict: str = "pass", bits: float | None = None, **data) -> Row:
    row = Row(f"{case}[{lane}]")
    mode, _, accelerator = lane.partition("@")
    checks = [] if bits is None else [{"lost_bits": bits, "excess": 2**bits, "findings": []}]
    row.data = {"case": case, "lane": lane, "mode": mode, "accelerator": accelerator or "cpu", "status": "native"}
    row.data |= {"checks": checks, **data}
    row.verdict = verdict  # type: ignore[assignment]
    return row


def test_lanes_are_in_the_order_of_modes_and_tests_in_that_of_their_ids():
    (text,) = tables(
        [row("b", "16-mixed@xla"), row("b", "16-mixed", bits=0.25), row("a", "32-true")], 100, False, False
    )
    head, _rule, first, second = text.splitlines()
    assert head.split() == ["test", "32-true", "16-mixed", "16-mixed@xla"]
    assert first.split() == ["a", "pass"]
    assert second.split() == ["b", "0.2", "pass"]


def test_lanes_that_do_not_fit_are_put_below():
    case = "tests/test_one.py::test_it"
    rows = [row(case, lane) for lane in ("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed@cuda")]
    texts = tables(rows, 80, False, False)
    assert [text.splitlines()[0].split()[1:] for text in texts] == [
        ["32-true", "64-true", "16-true", "bf16-true", "16-mixed"],
        ["bf16-mixed@cuda"],
    ]
    assert all("tests/test_one.py\n  test_it" in text for text in texts)
    assert all(len(line) <= 80 for text in texts for line in text.splitlines())


def test_a_lane_that_is_not_native_says_so():
    (text,) = tables([row("a", "32-true", status="emulated")], 80, False, False)
    assert "emulated" in text.splitlines()[1]


def test_many_tests_that_hold_are_only_counted_unless_verbose():
    rows = [row(f"test_{i}", "32-true") for i in range(99)] + [row("test_bad", "32-true", "FAIL")]
    table, rest = tables(rows, 80, False, False)
    assert "test_bad" in table
    assert rest == "99 tests not shown; -v shows all"
    assert len(tables(rows, 80, False, True)[0].splitlines()) == 102


def test_markup_in_names_is_no_markup():
    (text,) = tables([row("test[red]", "32-true")], 80, False, False)
    assert "test[red]" in text


def test_long_names_are_folded_not_cut():
    name = "tests/a_folder/" * 6 + "test_it"
    (text,) = tables([row(name, "32-true")], 80, False, False)
    assert name in "".join(line.split(" ")[0] for line in text.splitlines())


def test_findings_are_worst_first():
    def failed(case: str, bits: float) -> Row:
        finding = {
            "kind": "range", "where": "forward", "module": "m", "op": None, "lost_bits": bits, "excess": 2.0**bits,
            "message": "text",
        }  # fmt: skip
        report = {
            "subject": "f", "mode": "16-true", "accelerator": "cpu", "status": "native", "budget": 2.0,
            "excess": 2.0**bits, "whole": 1.0, "lost_bits": bits, "findings": [finding, finding],
        }  # fmt: skip
        return row(case, "16-true", "FAIL", checks=[report])

    lines = findings([failed("a", 3.0), failed("b", float("inf")), failed("c", 5.0), row("d", "16-true", "FAIL")])
    assert [line.strip()[:1] for line in lines[2:]] == ["b", "c", "a"]
    assert lines[2].endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("fixture", "verdict"),
    [("assert 0", "error"), ("yield\n    assert 0", "error"), ("pytest.skip('why')", "skip")],
)
def test_what_happens_around_the_test_counts(run, fixture, verdict):
    result = run(
        f"""
@pytest.fixture
def around(precision_ctx):
    {fixture}

@pytest.mark.precision("32-true")
def test_it(precision_ctx, around): pass
"""
    )
    result.stdout.fnmatch_lines([f"  test_it * {verdict}"])
