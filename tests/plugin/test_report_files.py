"""``--precision-json``, ``--precision-html``, ``--precision-summary`` and the summary of a GitHub job."""

from __future__ import annotations

import html
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from precision_runtime.record import Report
from pytest_precision.report.document import as_json, document
from pytest_precision.report.html import as_html
from pytest_precision.report.markdown import as_markdown
from pytest_precision.report.row import Row

SUITE = """
class BadNorm(nn.Module):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * ((x.square().mean(-1, keepdim=True) - mean.square()).clamp_min(0) + 1e-5).rsqrt()

@pytest.mark.precision("64-true", "16-true", "nf4", accelerators=["cpu", "xla"])
@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad|<b>"])
def test_it(precision_ctx, bad):
    net = nn.Sequential(nn.Linear(64, 64), BadNorm() if bad else nn.LayerNorm(64))
    nn.init.constant_(net[0].bias, 30.0)
    precision_ctx.check(net, precision_ctx.randn(4, 64), gradients=False)

@pytest.mark.precision("16-true")
def test_other(precision_ctx):
    raise ValueError("something else")
"""
FILES = ("--precision-json=out/p.json", "--precision-html=out/p.html", "--precision-summary=out/p.md")


class Page(HTMLParser):
    """The page's tables as texts, its links and ids, and what it would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        elif given.get("src") or given.get("href"):
            self.loaded.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if any(tag in self.open for tag in ("td", "th")):
            self.tables[-1][-1][-1] = f"{self.tables[-1][-1][-1]} {data.strip()}".strip()


def facts_in(pytester) -> dict:
    return json.loads((pytester.path / "out/p.json").read_text("utf-8"))


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["one process", "workers"])
def test_the_three_files_say_the_same_as_the_run(run, pytester, workers):
    if workers:
        pytest.importorskip("xdist")
    result = run(SUITE, *FILES, "--precision-bisect", *workers)
    result.assert_outcomes(passed=4, failed=3, skipped=6)
    facts = facts_in(pytester)
    rows = {(row["case"], row["lane"]): row for row in facts["rows"]}
    assert facts["counts"] == {"FAIL": 3, "pass": 4, "skip": 6}
    assert len(rows) == 13
    bad = rows["test_suite.py::test_it[bad|<b>]", "16-true"]
    report = Report.from_dict(bad["checks"][0])
    assert bad["verdict"] == "FAIL"
    assert bad["lost_bits"] == report.lost_bits > 2
    assert report.repair is not None
    assert report.repair.islands == {"1": "32"}
    stored = rows["test_suite.py::test_it[good]", "nf4"]["checks"][0]
    # 64 x 64 codes of 4 bits, a float32 scale for each 64 of them, and the table of 16 float32 values.
    assert [layer["bits"] for layer in stored["layers"]] == [(64 * 64 * 4 + 64 * 32 + 16 * 32) / 64**2]
    assert rows["test_suite.py::test_other", "16-true"]["reason"] == "ValueError: something else"
    assert "xla" in rows["test_suite.py::test_it[good]", "16-true@xla"]["reason"]

    text = (pytester.path / "out/p.html").read_text("utf-8")
    page = Page(text)
    assert page.loaded == []
    assert {link.removeprefix("#") for link in page.links} == set(page.ids)
    matrix = page.tables[0]
    assert matrix[0] == ["test", *facts["lanes"]]
    assert {line[0] for line in matrix[1:]} == {case for case, _ in rows}
    for line in matrix[1:]:
        for lane, cell in zip(facts["lanes"], line[1:], strict=True):
            row = rows.get((line[0], lane))
            assert cell.split(" emulated")[0] == ("" if row is None else row["word"])
    (finding, *_) = report.findings
    shown = html.unescape(text)
    for said in (finding.message, finding.line, finding.proof, f"{finding.worst.value:.6g}"):
        assert said in shown
    for line in str(report.repair).splitlines():
        assert line in shown
    assert any(line[1:3] == ["nf4", "4.625"] for table in page.tables[1:] for line in table)

    summary = (pytester.path / "out/p.md").read_text("utf-8").splitlines()
    (head,) = [line for line in summary if line.startswith("| test |")]
    assert head == "| test | " + " | ".join(facts["lanes"]) + " |"
    table = [line for line in summary if line.startswith("| test\\_suite")]
    assert len(table) == 3
    assert all(line.replace("\\|", "").count("|") == head.count("|") for line in table)
    assert f"**{bad['word']}**" in "\n".join(table)
    assert any("xla" in line for line in summary if line.startswith("- skipped"))
    for kind, file in (("json", "p.json"), ("html", "p.html"), ("summary", "p.md")):
        result.stdout.fnmatch_lines([f"--precision-{kind}: *out?{file}"])


def test_a_killed_worker_is_in_the_files(run, pytester):
    pytest.importorskip("xdist")
    run(
        """
import os

@pytest.mark.precision("16-mixed", "32-true")
def test_it(precision_ctx):
    if precision_ctx.mode == "16-mixed":
        os._exit(1)
""",
        "-n2",
        *FILES,
        subprocess=True,
    )
    assert [(row["lane"], row["verdict"], row["reason"]) for row in facts_in(pytester)["rows"]] == [
        ("16-mixed", "crash", "the worker was killed"),
        ("32-true", "pass", ""),
    ]
    assert "the worker was killed" in (pytester.path / "out/p.html").read_text("utf-8")
    assert "**crash**" in (pytester.path / "out/p.md").read_text("utf-8")


SMALL = '@pytest.mark.precision("32-true")\ndef test_it(precision_ctx): pass\n'


def test_a_job_on_github_gets_its_summary_beside_what_is_there(run, pytester, monkeypatch):
    job = pytester.path / "job.md"
    job.write_text("before\n", "utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(job))
    run(SMALL)
    assert job.read_text("utf-8").startswith("before\n## Precision\n")
    run("def test_it(): pass")
    run(SMALL, "--precision-summary=")
    run(SMALL, "--precision-summary=own.md")
    run(SMALL, "--collect-only")
    run(SMALL, "-p", "no:precision", "-W", "default", "-o", "addopts=")
    assert job.read_text("utf-8").count("## Precision") == 1
    assert (pytester.path / "own.md").exists()


def test_a_file_that_cannot_be_written_fails_the_run_and_says_why(run, pytester):
    (pytester.path / "taken").write_text("a file", "utf-8")
    result = run(SMALL, "--precision-json=taken/p.json")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["precision: the json *p.json could not be written: *"])


def test_a_folder_is_no_file_and_html_needs_its_library_before_anything_runs(run, pytester, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "jinja2" else find(name, *rest))
    (pytester.path / "folder").mkdir()
    result = run(SMALL, "--precision-json=folder", "--precision-html=p.html")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--precision-json: *folder is a folder; it takes a file", "*pip install 'pytest-p*"])


def test_without_options_nothing_is_written(run, pytester, monkeypatch):
    monkeypatch.setattr("pytest_precision.report.ending._put", None)
    before = {path.name for path in pytester.path.iterdir()}
    run(SMALL).assert_outcomes(passed=1)
    assert {path.name for path in pytester.path.iterdir()} - before <= {"tox.ini", "test_suite.py"}


# -- the writers alone -------------------------------------------------------------------------------------------------


def row(case: str, lane: str, verdict: str = "pass", **check) -> Row:
    made = Row(f"{case}[{lane}]")
    made.verdict = verdict  # type: ignore[assignment]
    made.data = {"case": case, "lane": lane, "mode": lane, "accelerator": "cpu", "status": "native", "checks": []}
    if check:
        blank = {"subject": case, "mode": lane, "accelerator": "cpu", "status": "native", "budget": 2.0, "whole": 1.0}
        made.data["checks"] = [{**blank, "findings": [], **check}]
    return made


def test_values_that_json_has_no_word_for_are_strings():
    text = as_json(document([row("a", "16-true", lost_bits=float("inf"), excess=float("nan"))], [], []))
    (only,) = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert (only["lost_bits"], only["checks"][0]["excess"]) == ("inf", "nan")


def test_of_a_thousand_tests_the_summary_has_those_that_did_not_hold():
    rows = [row(f"case_{i}", "16-true", lost_bits=0.5, excess=1.4) for i in range(1000)]
    text = as_markdown(document([*rows, row("loud", "16-true", "error")], [], []))
    assert [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:] == [
        "| loud | **error** |"
    ]
    assert "1000 more tests are not shown" in text
    assert len(text) < 2**20


def test_names_are_text_in_html():
    text = as_html(document([row("<script>alert(1)</script>", "16-true")], ['owed & "<i>"'], ["</pre><b>"]))
    assert "<script" not in text
    assert "<i>" not in text
    assert "<b>" not in text
    ET.fromstring(text[text.index("<body>") :].replace("</html>", ""))


def test_the_order_of_arrival_changes_nothing():
    rows = [row(case, lane, lost_bits=1.0, excess=2.0) for case in "ab" for lane in ("16-true", "32-true")]
    for write in (as_json, as_html, as_markdown):
        assert write(document(rows, [], [])) == write(document(rows[::-1], [], []))
    assert sorted(document(rows, [], [])["lanes"]) == ["16-true", "32-true"]
