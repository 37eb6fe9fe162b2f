"""``precision-runtime plan``: the runtime's own plan, for each mode, from the command line."""

import json
import sys

import pytest
import torch

from precision_runtime import PrecisionRuntime, cli
from precision_runtime.modes import expand_modes

SOURCE = """
import torch
from torch import nn

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("big", torch.tensor([1e6, 1.0, -2e5]))
    def forward(self, x):
        return self.lin(x) * self.big[1]

def good():
    return nn.Linear(8, 4), (torch.ones(1, 8),)

def number():
    return len

made = nn.Linear(8, 4)

def sized(size):
    return nn.Linear(size, size)

def raises():
    return {}["gone"]
"""


@pytest.fixture(autouse=True)
def made_here(tmp_path, monkeypatch):
    (tmp_path / "nets_to_plan.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("nets_to_plan", None)


def run(factory, *options):
    return cli.main(["plan", f"nets_to_plan.py:{factory}", "--accelerator", "cpu", *options])


def test_what_loses_nothing_has_status_0(capsys):
    assert run("good", "--modes", "mixed", "bf16-true") == 0
    out = capsys.readouterr().out
    assert [mode for mode in ("16-mixed", "bf16-mixed", "bf16-true") if f"in {mode} on" in out] == [
        "16-mixed",
        "bf16-mixed",
        "bf16-true",
    ]


def test_what_loses_has_status_1_and_is_named(capsys):
    assert run("Table", "--modes", "16-true") == 1
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (row for row in rows if row[:1] == ["big"])
    assert row[:5] == ["big", "buffer", "float32", "float16", "2"]


def test_json_has_what_the_runtime_plans(capsys):
    assert run("Table", "--modes", "16-true", "bf16-mixed", "--optimizer", "Adam", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    torch.manual_seed(0)
    model = sys.modules["nets_to_plan"].Table()
    for plan in document["plans"]:
        runtime = PrecisionRuntime(plan["mode"], "cpu")
        expected = runtime.plan(model, torch.optim.Adam(model.parameters(), lr=1e-3))
        assert plan == json.loads(expected.to_json())
    assert [plan["mode"] for plan in document["plans"]] == ["16-true", "bf16-mixed"]
    names = {row["name"] for row in document["plans"][0]["rows"] if row["lossy"]}
    assert "big" in names
    assert any("eps" in name for name in names)


def test_modes_may_have_commas_between_them(capsys):
    assert run("good", "--modes", "half,!bf16-true,", "32-true", "--json") == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["mode"] for plan in plans] == [m.name for m in expand_modes(["half", "!bf16-true", "32-true"])]
    assert len(plans) > 1


def test_an_island_takes_the_loss_away():
    assert run("Table", "--modes", "16-true", "--island", "big") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["good", "--optimizer", "Adan"], "Did you mean 'Adam'"),
        (["good", "--modes", "16-tru"], "Did you mean '16-true'"),
        (["number"], "is to make a torch.nn.Module"),
        (["good", "--modes", "16-true", "--island", "absent"], "absent"),
        (["made"], "made is a model that is made already (Linear); name what makes it"),
        (["sized"], "sized cannot be called without arguments (missing a required argument: 'size')"),
        (["raises"], "KeyError: 'gone'"),
        (["good", "--optimizer", "Adam", "--lr", "-1"], "--optimizer Adam --lr -1: Invalid learning rate: -1.0"),
        (["good", "--seed", str(2**64)], "is not allowed: a seed is a whole number"),
    ],
)
def test_a_wrong_question_has_status_2(arguments, said, capsys):
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
