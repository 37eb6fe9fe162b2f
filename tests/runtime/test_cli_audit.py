"""``precision-runtime audit``: verdicts of many modes, for people and machines."""

import html.parser
import json
import sys

import pytest
import torch

from precision_runtime import audit, cli, environment

SOURCE = """
import torch
from torch import nn

class Bad(nn.Module):
    # squares of values above 256 overflow in float16
    def forward(self, x):
        return x * (x * 300).square().mean(-1, keepdim=True).rsqrt()

def good():
    return nn.Linear(16, 4), (torch.randn(8, 16),)

def bad():
    return nn.Sequential(nn.Linear(16, 16), Bad(), nn.Linear(16, 4)), (torch.randn(8, 16),)

class Plain(nn.Module):
    def forward(self, x):
        return x + 1

class Broken(nn.Module):
    def forward(self, x):
        return x / (1 // 0)
"""


@pytest.fixture(autouse=True)
def made_here(tmp_path, monkeypatch):
    (tmp_path / "nets_to_judge.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("nets_to_judge", None)


def run(factory, *options):
    return cli.main(["audit", f"nets_to_judge.py:{factory}", *options])


def test_a_sound_model_holds_in_all_that_is_asked(capsys):
    assert run("good", "--modes", "mixed", "bf16-true") == 0
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines()[2:]] == [
        [mode, "native", "pass"] for mode in ("16-mixed", "bf16-mixed", "bf16-true")
    ]


def test_a_finding_gives_status_1_and_the_report_that_audit_makes(capsys):
    assert run("bad", "--modes", "16-true", "bf16-mixed", "--json") == 1
    rows = {row["mode"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["16-true"]["verdict"], rows["bf16-mixed"]["verdict"]) == ("fail", "pass")
    torch.manual_seed(0)
    model, args = sys.modules["nets_to_judge"].bad()
    report = audit(model, *args, mode="16-true")
    assert rows["16-true"]["why"] == report.findings[0].title()
    assert rows["16-true"]["report"] == json.loads(json.dumps(report.to_dict()))


def test_the_printed_report_names_the_module(capsys):
    assert run("bad", "--modes", "16-true") == 1
    assert "to blame: 1 (Bad)" in capsys.readouterr().out


def test_a_mode_that_has_nothing_to_swap_is_skipped_with_the_reason(capsys):
    assert run("Plain", "--input", "2x3", "--modes", "nf4", "bf16-true") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nf4 native skip nf4 puts quantised layers in place of" in out
    assert run("Plain", "--input", "2x3", "--modes", "nf4") == 2, "nothing was judged"


def test_islands_and_repair_reach_the_audit(capsys):
    assert run("bad", "--modes", "16-true", "--island", "1") == 0
    capsys.readouterr()
    assert run("bad", "--modes", "16-true", "--repair") == 1
    assert "with islands={'1': '32'} the mode holds" in capsys.readouterr().out


class Reader(html.parser.HTMLParser):
    """Collects the texts of cells and blocks, and sees that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.blocks = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        if tag in ("td", "pre"):
            (self.cells if tag == "td" else self.blocks).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag, texts in (("td", self.cells), ("pre", self.blocks)):
            if tag in self.open:
                texts[-1] += data


def test_the_page_shows_every_mode_and_the_whole_report(tmp_path):
    assert run("bad", "--modes", "16-true", "bf16-mixed", "--html", "page.html") == 1
    reader = Reader()
    reader.feed((tmp_path / "page.html").read_text())
    assert reader.open == []
    verdicts = dict(zip(reader.cells[::5], reader.cells[2::5], strict=True))
    assert verdicts == {"16-true": "fail", "bf16-mixed": "pass"}
    torch.manual_seed(0)
    model, args = sys.modules["nets_to_judge"].bad()
    assert reader.blocks[0] == str(audit(model, *args, mode="16-true"))


def test_a_page_without_jinja2_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr("precision_runtime.page.importlib.util.find_spec", lambda name: None)
    assert run("absent", "--html", "page.html") == 2
    assert "pytest-precision[html]" in capsys.readouterr().err


def test_a_page_in_no_folder_is_refused_before_anything_runs(capsys):
    assert run("absent", "--html", "no/page.html") == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Plain", "--modes", "16-true"], "give --input"),
        (["good", "--modes", "16-tru"], "Did you mean '16-true'"),
        (["good", "--accelerator", "cpuu"], "Did you mean 'cpu'"),
        (["Plain", "--input", "2x3:float99"], "dtype 'float99'"),
        (["good", "--modes", "16-true", "--budget", "-1"], "budget=-1.0 is not allowed"),
        (["good", "--modes", "16-true", "--island", "absent"], "absent"),
    ],
)
def test_a_wrong_question_has_status_2(arguments, said, capsys):
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


def test_code_that_does_not_run_at_all_is_no_finding(capsys):
    assert run("Broken", "--input", "2x3", "--modes", "16-true", "bf16-true") == 2
    err = capsys.readouterr().err
    assert "nets_to_judge.py:Broken does not run in float32: ZeroDivisionError" in err
    assert err.count("Traceback (most recent call last)") == 1


def test_the_environment_s_mode_does_not_lead_the_audit(monkeypatch):
    monkeypatch.setenv(environment.MODE, "64-true")
    assert run("good", "--modes", "bf16-true") == 0
