"""onnxslim: make trained ONNX models smaller and faster, on any hardware, and show what it cost."""

from onnxslim.errors import DataError, ModelError, OutputError, RecipeError, SlimError, TargetError
from onnxslim.model import Model, load

__all__ = ["DataError", "Model", "ModelError", "OutputError", "RecipeError", "SlimError", "TargetError", "load"]

__version__ = "0.1.0"
