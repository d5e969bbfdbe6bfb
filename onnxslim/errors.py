"""What can go wrong because of what a user gave us. Each is one clear message; the CLI prints it and exits with 2."""

__all__ = ["DataError", "ModelError", "OutputError", "RecipeError", "SlimError", "TargetError", "reason_of"]


class SlimError(Exception):
    """Base of every error that a user can cause and mend: the message names the file, node and op, and what to do."""


class ModelError(SlimError):
    """The model file cannot be read, is not legal ONNX, or does not run."""


class DataError(SlimError):
    """Calibration or evaluation data does not fit the model, or holds nothing usable."""


class RecipeError(SlimError):
    """A recipe, option, goal, metric, pass or target name is unknown or contradicts another."""


class TargetError(SlimError):
    """A target cannot compile or run this model."""


class OutputError(SlimError):
    """The output cannot be written where it was asked for."""


def reason_of(error: Exception) -> str:
    """One sentence on an error for a record: our own say enough, others need their type."""
    return str(error) if isinstance(error, SlimError) else f"{type(error).__name__}: {error}"
