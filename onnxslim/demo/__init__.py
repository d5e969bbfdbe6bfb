"""The bundled demonstration: a trained Fashion-MNIST classifier, calibration images and labelled evaluation images.

See README.md beside this file for where the data comes from, its licence and the accuracy measured.
"""

import shutil
from pathlib import Path

from onnxslim.errors import OutputError

__all__ = ["CALIBRATION", "EVALUATION", "MODEL", "RECIPE", "copy_inputs"]

_FOLDER = Path(__file__).resolve().parent

MODEL: Path = _FOLDER / "fashion_cnn.onnx"
"""Residual CNN with BatchNormalization; input `image` uint8 [N, 1, 28, 28], output `logits` float32 [N, 10]."""

CALIBRATION: Path = _FOLDER / "calibration.npz"
"""400 training images without labels: `image` uint8 [400, 1, 28, 28]."""

EVALUATION: Path = _FOLDER / "evaluation.npz"
"""1,000 test images, 100 of each class: `image` uint8 [1000, 1, 28, 28] and `labels` int64 [1000]."""

RECIPE: Path = _FOLDER / "recipe.toml"
"""What ``onnxslim demo`` runs."""


def copy_inputs(folder: Path) -> Path:
    """Copy the model, the data and the recipe into a folder, to run and to play with; return the recipe there.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in (MODEL, CALIBRATION, EVALUATION, RECIPE):
            shutil.copyfile(source, folder / source.name)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}).") from None
    return folder / RECIPE.name
