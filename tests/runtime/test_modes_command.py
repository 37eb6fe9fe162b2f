import json
import re
from pathlib import Path

import pytest
import torch

from precision_runtime import MODES
from precision_runtime.accelerators import Machine, pretend
from precision_runtime.cli import main
from precision_runtime.commands.modes import BEGIN, COLUMNS, END, described
from precision_runtime.formats import FORMATS
from precision_runtime.measuring import measure

README = Path(__file__).parents[2] / "README.md"


def cells(text):
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]


def test_the_table_in_the_readme_is_not_stale():
    text = README.read_text(encoding="utf-8")
    header, _, *rows = cells(text.split(BEGIN)[1].split(END)[0])
    assert header == list(COLUMNS)
    for row, mode in zip(rows, MODES.values(), strict=True):
        name, weights, compute, status = described(mode, "cpu")
        assert row[:3] == [name, weights, compute]
        assert re.fullmatch(r"\d+(\.\d+)?", row[3])
        assert re.fullmatch(r"\d\.\de[-+]\d\d", row[4])
        # Another processor may have units where this table's had none, and lack a package.
        assert row[5] in ("native", "emulated")
        assert status in ("native", "emulated", "unsupported")


@pytest.mark.parametrize(
    "mode", ["16-true", "bf16-true", "16-mixed", "bf16-mixed", "apex-O1", "apex-O2", "apex-O3", "tf32"]
)
def test_the_error_is_that_of_rounded_operands(mode):
    # Operands, and in the half modes the result, each carry a relative error of at most u and about u / 3 on average.
    u = FORMATS[MODES[mode].products or MODES[mode].compute].unit_roundoff
    assert u / 4 < measure(MODES[mode], "cpu").error < u


def test_full_modes_have_the_error_of_their_sums():
    assert 2**-26 < measure(MODES["32-true"], "cpu").error < 2**-20
    assert measure(MODES["64-true"], "cpu").error == 0


@pytest.mark.parametrize(
    ("mode", "bits"), [("32-true", 32), ("64-true", 64), ("bf16-true", 16), ("16-mixed", 32), ("apex-O2", 48)]
)
def test_bits_are_those_of_what_is_kept(mode, bits):
    assert measure(MODES[mode], "cpu").bits == bits


def test_measuring_is_repeatable_and_draws_nothing_from_the_caller():
    before = torch.get_rng_state()
    assert measure(MODES["bf16-true"], "cpu") == measure(MODES["bf16-true"], "cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_it_prints_a_table_json_and_markdown(capsys):
    assert main(["modes", "true", "--accelerator", "cpu"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["16-true", "float16", "float16", "16", "3.5e-04", "native"] in lines
    main(["modes", "true", "--accelerator", "cpu", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["mode"] for row in rows] == ["16-true", "bf16-true"]
    main(["modes", "true", "--accelerator", "cpu", "--markdown"])
    assert cells(capsys.readouterr().out)[2:] == [list(row.values()) for row in rows]


def test_it_writes_between_the_marks_and_nowhere_else(tmp_path, capsys):
    document = tmp_path / "notes.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert main(["modes", "32-true", "--accelerator", "cpu", "--write", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n| mode | weights |")
    assert text.endswith(f"| native |\n{END}\nafter\n")
    assert "old" not in text
    document.write_text("no marks", encoding="utf-8")
    assert main(["modes", "--write", str(document)]) == 2
    assert "has no line '<!-- precision-runtime modes: begin -->'" in capsys.readouterr().err
    assert document.read_text(encoding="utf-8") == "no marks"


def test_what_does_not_run_has_no_figures(capsys):
    class NoDouble(Machine):
        def product_error(self, accelerator, dtype):
            return "no kernel" if dtype == "float64" else None

    with pretend(NoDouble()):
        main(["modes", "64-true", "--accelerator", "cpu", "--markdown"])
    assert cells(capsys.readouterr().out)[2] == ["64-true", "float64", "float64", "-", "-", "unsupported"]
