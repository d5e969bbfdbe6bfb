"""What ``import onnxslim`` gives, and how little it loads."""

import subprocess
import sys

import pytest

import onnxslim


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_every_public_name_is_there():
    for name in onnxslim.__all__:
        assert getattr(onnxslim, name).__module__.startswith("onnxslim."), name
        assert name in dir(onnxslim)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = onnxslim.nothing


@pytest.mark.parametrize(
    "code",
    [
        "import onnxslim, onnxslim.slim, onnxslim.optimize",
        "from onnxslim.slim import SlimRun; from onnxslim.optimize import Run; import onnxslim",
        "import onnxslim; from onnxslim import *",
        "import onnxslim; onnxslim.optimize; onnxslim.slim",
        "import onnxslim, onnxslim.targets.compile as found; assert found is onnxslim.compile",
    ],
)
def test_a_function_is_not_hidden_by_the_module_that_it_lies_in(code):
    assert run(f"{code}; print(callable(onnxslim.slim), callable(onnxslim.optimize))") == ["True", "True"]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import onnxslim", ["onnx", "numpy", "pydantic"]),
        ("import onnxslim; onnxslim.load", ["onnxruntime", "pydantic", "rich", "tvm", "matplotlib", "networkx"]),
        ("import onnxslim; onnxslim.slim", ["onnxruntime", "tvm", "matplotlib"]),
    ],
)
def test_only_what_is_needed_is_loaded(code, absent):
    assert (
        run(f"{code}; import sys; print(*sorted({absent} & sys.modules.keys()))".replace("[", "{").replace("]", "}"))
        == []
    )
