import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from precision_runtime import cli, commands
from precision_runtime.errors import ConfigurationError

NAMES = [found.name for found in pkgutil.iter_modules(commands.__path__)]


def test_every_file_in_commands_is_a_subcommand(capsys):
    assert "support" in NAMES
    assert cli.main([]) == 0
    help_text = capsys.readouterr().out
    assert all(f"    {name} " in help_text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_each_has_examples(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code == 0
    assert f"examples:\n  precision-runtime {name}" in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["suport"])
    assert left.value.code == 2
    assert "invalid choice: 'suport'" in capsys.readouterr().err


def test_our_errors_are_told_without_a_traceback(monkeypatch, capsys):
    def fails(options):
        raise ConfigurationError("what and why")

    monkeypatch.setattr("precision_runtime.commands.support.run", fails)
    assert cli.main(["support"]) == 2
    assert capsys.readouterr().err == "precision-runtime support: what and why\n"


def test_help_comes_without_torch():
    code = (
        "import sys\nfrom precision_runtime.cli import main\n"
        "try: main(['support', '--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("module", ["precision_runtime", "precision_runtime.cli"])
def test_it_is_a_program(tmp_path, module):
    done = subprocess.run(
        [sys.executable, "-m", module, "support", "64-true", "--accelerator", "cpu"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "native" in done.stdout
    assert (
        'precision-runtime = "precision_runtime.cli:main"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    )
