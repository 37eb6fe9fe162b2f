"""``precision-runtime run``: the script finds what ``python`` would give it, and the mode."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from precision_runtime import PrecisionRuntime, cli, environment
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.measuring import measure
from precision_runtime.modes import MODES

TELL = """
import json, os, sys
kept = dict(argv=sys.argv, path=sys.path[0], name=__name__, mode=os.environ["PRECISION_RUNTIME_MODE"], file=__file__)
print(json.dumps(kept | {"main": sys.modules["__main__"].kept is kept}))
"""
MAKE = "import sys\nfrom precision_runtime import PrecisionRuntime\nprint(PrecisionRuntime(*sys.argv[1:]))\n"


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="folder/script.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return name

    return write


def run(*arguments, precision="bf16-mixed"):
    return cli.main(["run", "--precision", precision, *arguments])


def test_the_script_finds_what_python_gives_it_and_the_mode(script, tmp_path, capsys):
    name = script(TELL)
    argv, path = sys.argv, list(sys.path)
    assert run(name, "--precision", "64", "-m", "x", precision="bf16") == 0
    told = json.loads(capsys.readouterr().out)
    expected = subprocess.run(
        [sys.executable, name, "--precision", "64", "-m", "x"],
        env=os.environ | {"PRECISION_RUNTIME_MODE": "bf16-mixed"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told == json.loads(expected.stdout)
    assert told["path"] == str(tmp_path / "folder")
    assert (sys.argv, sys.path) == (argv, path)
    assert environment.MODE not in os.environ


@pytest.mark.parametrize("name", ["folder/script.py", "folder/../folder/script.py", "folder", "folder.zip"])
def test_a_script_that_changes_the_folder_finds_its_own(script, name, tmp_path, capfd):
    """Beside itself, that is, as it does where Python runs it."""
    text = (
        "import os, sys\nos.chdir('/')\nimport beside\n"
        "print(__file__, sys.path[0], os.path.exists(__file__.replace('.zip/__main__.py', '.zip')))\n"
    )
    script(text)
    script(text, "folder/__main__.py")
    script("", "folder/beside.py")
    shutil.make_archive("folder", "zip", "folder")
    subprocess.run([sys.executable, name], check=True)
    expected = capfd.readouterr().out
    assert run(name) == 0
    assert capfd.readouterr().out == expected
    assert expected.endswith(" True\n")


def test_a_module_is_found_where_python_finds_it(script, tmp_path, capsys):
    script(TELL, "told/__main__.py")
    assert run("-m", "told", "--steps", "3") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["argv"][1:] == ["--steps", "3"]
    assert told["argv"][0].endswith("__main__.py")
    assert told["path"] == str(tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true", "apex-O2"])
def test_a_runtime_without_a_mode_takes_it(script, capsys, precision):
    assert run("--accelerator", "cpu", script(MAKE), precision=precision) == 0
    out, err = capsys.readouterr()
    assert out == f"PrecisionRuntime('{precision}', accelerator='cpu')\n"
    assert err == ""


def test_a_runtime_in_another_mode_ends_the_script_with_its_own_traceback(script, tmp_path, capsys):
    name = script(MAKE)
    assert run(name, "16-mixed") == 1
    err = capsys.readouterr().err
    assert err.startswith(f'Traceback (most recent call last):\n  File "{tmp_path / name}", line 3')
    assert "made in 16-mixed, and the environment asks for bf16-mixed" in err


def test_the_same_mode_under_another_name_is_no_contradiction(script, capsys):
    assert run(script(MAKE), "bf16") == 0
    assert "bf16-mixed" in capsys.readouterr().out


def test_a_script_that_makes_no_runtime_is_told_of(script, capsys):
    assert run(script("print(1)")) == 0
    assert "made no PrecisionRuntime in this process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "status"), [("import sys\nsys.exit(7)", 7), ("import sys\nsys.exit('no')", "no"), ("exit()", None)]
)
def test_what_the_script_exits_with_goes_through(script, text, status):
    with pytest.raises(SystemExit) as left:
        run(script(text))
    assert left.value.code == status


@pytest.mark.parametrize("text", ["def f():\n    1 / 0\n\nf()\n", "def f(:\n"], ids=["raised", "not Python"])
def test_an_exception_is_shown_as_python_shows_it(script, capsys, text):
    name = script(text)
    assert run(name) == 1
    expected = subprocess.run([sys.executable, name], capture_output=True, text=True, check=False)
    assert expected.returncode == 1
    assert capsys.readouterr().err == expected.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_it_as_they_end_the_script(script, number):
    name = script(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    ours = [sys.executable, "-m", "precision_runtime.cli", "run", "--precision", "bf16-mixed", name]

    def heard() -> None:  # a shell starts what it runs in the background with SIGINT ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    done = subprocess.run(ours, capture_output=True, check=False, preexec_fn=heard)
    alone = subprocess.run([sys.executable, name], capture_output=True, check=False, preexec_fn=heard)
    assert done.returncode == alone.returncode
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--precision", "bf16-mixd", "s.py"], "Did you mean 'bf16-mixed'?"),
        (["--precision", "bf16", "--accelerator", "cdua", "s.py"], "Did you mean 'cuda'?"),
        (["--precision", "bf16", "absent.py"], "cannot find the script 'absent.py'"),
        (["--precision", "bf16"], "give a script to run"),
        (["--precision", "bf16", "-m"], "give a script to run"),
    ],
)
def test_a_wrong_question_is_answered_before_anything_runs(arguments, said, capsys):
    assert cli.main(["run", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PRECISION_RUNTIME_MODE", "16-true", "--precision bf16-mixed and PRECISION_RUNTIME_MODE=16-true"),
        ("PRECISION_RUNTIME_MODE", "16-tru", "Did you mean '16-true'?"),
        ("PRECISION_RUNTIME_ACCELERATOR", "cuda:1", "--accelerator cpu and PRECISION_RUNTIME_ACCELERATOR=cuda:1"),
    ],
)
def test_an_environment_that_says_something_else_is_an_error(script, monkeypatch, capsys, variable, value, said):
    monkeypatch.setenv(variable, value)
    assert run("--accelerator", "cpu", script("print('ran')")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert os.environ[variable] == value


def test_the_environment_s_accelerator_is_not_lost_where_none_is_named(script, monkeypatch, capsys):
    monkeypatch.setenv("PRECISION_RUNTIME_ACCELERATOR", "cpu")
    monkeypatch.setenv("PRECISION_RUNTIME_MODE", "bf16")  # the same mode under another name
    assert run(script("import os; print(os.environ['PRECISION_RUNTIME_ACCELERATOR'])\n" + MAKE)) == 0
    assert capsys.readouterr().out == "cpu\nPrecisionRuntime('bf16-mixed', accelerator='cpu')\n"


def test_without_a_precision_it_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["run", "script.py"])
    assert left.value.code == 2
    assert "--precision" in capsys.readouterr().err


def test_it_loads_no_torch_of_its_own(script):
    name = script("import sys\nsys.exit('torch' in sys.modules)")
    command = [sys.executable, "-m", "precision_runtime.cli", "run", "--precision", "bf16-mixed", name]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


# -- the environment without the command --------------------------------------------------------------------------


def test_the_environment_s_mode_and_accelerator_count_where_none_is_named(monkeypatch):
    assert PrecisionRuntime(accelerator="cpu").mode.name == "32-true"
    monkeypatch.setenv(environment.MODE, "BF16")
    monkeypatch.setenv(environment.ACCELERATOR, "cpu")
    runtime = PrecisionRuntime()
    assert (runtime.mode.name, str(runtime.device)) == ("bf16-mixed", "cpu")
    with pytest.raises(ConfigurationError, match=r"accelerator='cuda', and the environment asks for 'cpu'"):
        PrecisionRuntime(accelerator="cuda")
    with pytest.raises(ConfigurationError, match="made in apex-O2"):
        PrecisionRuntime(amp_backend="apex", amp_level="O2")


def test_a_wrong_name_in_the_environment_is_said_to_be_there(monkeypatch):
    monkeypatch.setenv(environment.MODE, "bf61")
    with pytest.raises(UnknownNameError, match=r"PRECISION_RUNTIME_MODE is unknown\. Did you mean 'bf16'"):
        PrecisionRuntime()


@pytest.mark.parametrize(
    ("asked", "given", "chosen"),
    [("", "cuda", "cuda"), ("cuda:1", "auto", "cuda:1"), ("cuda:1", "cuda", "cuda:1"), ("cuda", "cuda:1", "cuda:1"),
     ("auto", "cpu", "cpu"), (" CPU ", "cpu", "cpu")],
)  # fmt: skip
def test_the_more_exact_accelerator_counts(monkeypatch, asked, given, chosen):
    monkeypatch.setenv(environment.ACCELERATOR, asked)
    assert environment.chosen_accelerator(given) == chosen


def test_two_cards_contradict_each_other(monkeypatch):
    monkeypatch.setenv(environment.ACCELERATOR, "cuda:1")
    with pytest.raises(ConfigurationError):
        environment.chosen_accelerator("cuda:0")


def test_what_goes_through_many_modes_is_not_led_by_the_environment(monkeypatch):
    monkeypatch.setenv(environment.MODE, "16-true")
    assert measure(MODES["32-true"], "cpu").bits == 32.0
    with environment.ignored():
        assert PrecisionRuntime("64-true", "cpu").mode.name == "64-true"
    with pytest.raises(ConfigurationError):
        PrecisionRuntime("64-true", "cpu")
