"""What an audit found, as plain data and as text."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precision_runtime.record import Finding, Layer, Remark, Repair, Report, Smallest, Worst, bits, lost_bits

FINDING = Finding(
    kind="instability", where="forward", module="blocks.2.norm1", op="aten::sub", lost_bits=9.8, excess=891.4,
    message="the error is 891 times what rounding the operands must cost", module_type="BadNorm", call=1,
    worst=Worst("output", (3, 17), 1.5, 0.25, 0.125, 0.5), suggestion="with `norm1` in FP32 the loss falls to 0.1 bits",
    line="norm.py:12: var = (x * x).mean(-1) - mean * mean",
    proof="with `aten::sub` alone in FP64 the loss falls from 9.8 bits to 0.1 bits",
)  # fmt: skip
REPORT = Report(
    subject="Block", mode="16-true", accelerator="cpu", status="native", budget=2.0, excess=891.4, whole=12.0,
    findings=(FINDING, replace(FINDING, module="", module_type="", op=None, worst=None, suggestion=None, kind="range",
                               line=None, proof=None, where="backward", excess=math.inf, lost_bits=math.inf)),
    remarks=(Remark("known-defect", "a kernel is wrong", "norm", "aten::x"), Remark("reference", "no FP64 kernel")),
    calls=7, seed=3, figures={"loss_scale": 65536.0},
)  # fmt: skip


def test_a_report_crosses_processes_and_comes_back_equal() -> None:
    assert Report.from_dict(REPORT.to_dict()) == REPORT
    through_json = json.loads(json.dumps(REPORT.to_dict()))
    assert Report.from_dict(through_json) == REPORT
    assert through_json["ok"] is False
    assert through_json["lost_bits"] == pytest.approx(math.log2(891.4))


def test_every_field_survives() -> None:
    """A field that is forgotten on the way would be lost in silence: each one alone must make a difference."""
    changes = {
        "subject": "x", "mode": "x", "accelerator": "x", "status": "x", "budget": 0.5, "excess": 0.5, "whole": 0.5,
        "findings": (), "remarks": (), "calls": 99, "seed": 99, "figures": {},
        "layers": (Layer("linear", "nf4", 4.5, 0.09, {"input": 0.1}, {"weight": 0.2}),),
        "repair": Repair({"norm": "32"}, True, 9.8, 0.1, 3, "y = self.norm(x.float())", "a note"),
        "smallest": Smallest(512, 4, 31, "def test_it(): ...", "a note"),
    }  # fmt: skip
    assert set(changes) == set(REPORT.__dataclass_fields__)
    for name, value in changes.items():
        changed = replace(REPORT, **{name: value})  # type: ignore[arg-type]
        assert Report.from_dict(changed.to_dict()) == changed
        assert changed != REPORT


def test_the_text_of_a_failure_says_what_where_how_much_and_what_was_tried() -> None:
    assert str(REPORT).splitlines() == [
        "Block fails in 16-true on cpu: 9.8 bits lost beyond what the mode must lose (2 allowed)",
        "  to blame: blocks.2.norm1 (BadNorm), aten::sub: instability in forward, 9.8 bits lost",
        "    the error is 891 times what rounding the operands must cost",
        "    worst: output[3, 17] = 1.5, reference 0.25, off by 1.25 where 0.125 is allowed (50.0% of the elements are "
        "beyond)",
        "    at norm.py:12: var = (x * x).mean(-1) - mean * mean",
        "    proof: with `aten::sub` alone in FP64 the loss falls from 9.8 bits to 0.1 bits",
        "    tried: with `norm1` in FP32 the loss falls to 0.1 bits",
        "  also: the whole function: range in backward, every bit lost",
        "    the error is 891 times what rounding the operands must cost",
        "  remark: norm: a kernel is wrong",
        "  remark: no FP64 kernel",
    ]


def test_the_text_has_the_smallest_input_as_a_test_or_why_there_is_none() -> None:
    found = replace(
        REPORT, remarks=(), smallest=Smallest(512, 4, 31, "import torch\n\n\ndef test_it():\n    assert 0\n")
    )
    assert str(found).splitlines()[-6:] == [
        "  smallest input that fails in the same way: 4 of 512 elements (31 audits); as a test:",
        "    import torch",
        "",
        "",
        "    def test_it():",
        "        assert 0",
    ]
    none = str(replace(REPORT, remarks=(), smallest=Smallest(note="why")))
    assert none.endswith("\n  smallest input that fails in the same way: not found: why")


def test_the_text_of_a_pass_has_its_figure_and_how_the_lane_ran() -> None:
    held = replace(REPORT, findings=(), remarks=(), excess=2.0)
    assert str(held) == "Block holds in 16-true on cpu: 1.0 bit lost of 2 allowed"
    assert (
        str(replace(held, status="emulated", excess=0.5))
        == "Block holds in 16-true on cpu (emulated): 0.0 bits lost of 2 allowed"
    )


def test_a_scalar_has_no_index() -> None:
    scalar = replace(FINDING, worst=Worst("output", (), 1.0, 2.0, 0.5))
    assert "    worst: output = 1, reference 2, off by 1 where 0.5 is allowed" in str(
        replace(REPORT, findings=(scalar,))
    )


@given(st.floats(0, 1e300))
def test_lost_bits_are_the_logarithm_and_never_below_zero(excess: float) -> None:
    assert lost_bits(excess) == (math.log2(excess) if excess > 1 else 0.0)


def test_lost_bits_of_the_limits() -> None:
    assert (lost_bits(0.0), lost_bits(1.0), lost_bits(4.0), lost_bits(math.inf)) == (0.0, 0.0, 2.0, math.inf)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0 bits"),
        (1.0, "1.0 bit"),
        (0.96, "1.0 bit"),
        (3.24, "3.2 bits"),
        (math.inf, "every bit"),
        (math.nan, "every bit"),
    ],
)
def test_bits_as_a_person_reads_them(value: float, text: str) -> None:
    assert bits(value) == text


def test_records_need_no_torch() -> None:
    code = "import sys, precision_runtime.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_repair_reads_as_islands_and_as_code() -> None:
    repair = Repair({"norm": "32"}, True, 9.8, 0.1, 3, "y = self.norm(x.float())")
    assert str(replace(REPORT, repair=repair)).splitlines()[-4:-2] == [
        "  repair: with islands={'norm': '32'} the mode holds: the loss falls from 9.8 bits to 0.1 bits (3 audits); as "
        "code:",
        "    y = self.norm(x.float())",
    ]
    nothing = Repair({}, False, 9.8, 9.8, 1, note="code outside of modules is to blame")
    assert str(nothing) == "repair: none found (1 audit): code outside of modules is to blame"
