"""Every example of the README runs as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from onnxslim.recipe import make_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def _blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def _commands(block):
    joined = block.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the demo has run, as the README's first command leaves it."""
    folder = tmp_path_factory.mktemp("readme")
    command = _blocks(_section("From a bare machine to a finished report"), "sh")[0].split("&&")[-1]
    assert command.split() == [".venv/bin/onnxslim", "demo"]
    done = _run("onnxslim demo", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _run(line, folder):
    # The console script beside the interpreter that runs the tests, whether or not its folder is on the PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        shlex.split(line), cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )


def test_the_demo_meets_its_goals(folder):
    """At most 1.5 points lost and at least 6 times smaller; compiled for both targets."""
    from onnxslim.record import Record

    record = Record.read(folder / "demo-out" / "record.json")
    assert record.verdict == "met"
    assert record.before.score.value - record.after.score.value <= 0.015
    assert record.before.size_bytes >= 6 * record.after.size_bytes
    assert (folder / "demo-out" / "model.onnx").stat().st_size == record.after.size_bytes
    assert [entry.name for entry in record.passes if entry.status == "kept"][-2:] == [
        "prune-channels",
        "quantize-static",
    ]
    native, pi = record.targets
    assert native.status == "verified"
    assert native.latency is not None
    assert pi.status in ("verified", "compiled, not run")
    assert pi.latency is None
    page = (folder / "demo-out" / "report.html").read_text(encoding="utf-8")
    assert "raspberry-pi-4" in page
    assert "prune-channels" in page


def test_every_command_runs_as_written(folder):
    commands = [line for block in _blocks(_section("Your own model"), "sh") for line in _commands(block)]
    assert len(commands) >= 10
    for line in commands:
        done = _run(line, folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr


def test_the_python_example_runs_as_written(folder):
    (block,) = _blocks(README, "python")
    done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("met ")


def test_the_recipe_is_legal():
    (block,) = _blocks(_section("A recipe"), "toml")
    recipe = make_recipe(tomllib.loads(block), "README")
    assert recipe.goals.max_size == 2_000_000
    assert [table["name"] for table in recipe.passes] == ["prune-channels", "quantize-static"]


def test_ci_runs_the_test_command_as_written():
    (block,) = _blocks(_section("From a bare machine to passing tests"), "sh")
    assert block.strip() == (
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n 2"
    )
    assert "From a bare machine to passing tests" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
