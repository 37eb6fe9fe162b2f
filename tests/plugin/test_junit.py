"""JUnit properties."""

from __future__ import annotations

import xml.etree.ElementTree as ET


def test_each_lane_has_its_properties(run, pytester):
    run(
        """
@pytest.mark.precision("bf16-true", accelerators=["cpu", "xla"])
def test_it(precision_ctx):
    precision_ctx.check(lambda x: x.sum() * 0 + (x.square().mean() - x.mean().square()), 100 + precision_ctx.randn(64))

@pytest.mark.precision("bf16-mixed")
def test_no_check(): pass

def test_plain(): pass
""",
        "--junitxml=out.xml",
    )
    cases = {case.get("name"): case for case in ET.parse(pytester.path / "out.xml").iter("testcase")}
    found = {name: {p.get("name"): p.get("value") for p in case.iter("property")} for name, case in cases.items()}
    failed = found["test_it[bf16-true]"]
    assert failed.pop("precision.blame")
    assert float(failed.pop("precision.lost_bits")) > 2
    assert float(failed.pop("precision.excess")) > 4
    assert failed == {"precision.mode": "bf16-true", "precision.accelerator": "cpu", "precision.status": "native"}
    assert found["test_no_check[bf16-mixed]"] == {**failed, "precision.mode": "bf16-mixed"}
    assert found["test_it[bf16-true@xla]"]["precision.status"] == "unsupported"
    assert found["test_plain"] == {}
