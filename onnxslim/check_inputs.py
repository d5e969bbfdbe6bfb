"""What the user wants a model to be checked on: sizes of its inputs, or whole arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxslim.boundary import parse_shapes
from onnxslim.data import Dataset, open_dataset, random_feeds
from onnxslim.errors import DataError
from onnxslim.model import Model
from onnxslim.runtime import Session

__all__ = ["CheckInputs", "parse_check_inputs"]

_FEEDS = 4


@dataclass(frozen=True)
class CheckInputs:
    """Sizes and arrays by input name; what is not named is made up.

    Attributes:
        shapes: sizes of inputs.
        files: ``.npy`` files, one whole input each.
    """

    shapes: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def dataset(self, model: Model) -> tuple[dict[str, list[int]], Dataset | None]:
        """The sizes that made-up inputs must have, and feeds with the arrays, where there are any.

        Raises:
            DataError: an input is not there, a file cannot be read, or does not fit.
            ModelError: the model does not load in ONNX Runtime.
        """
        if not self.shapes and not self.files:
            return {}, None
        specs = Session(model).specs
        names = [spec.name for spec in specs]
        unknown = next((name for name in (*self.shapes, *self.files) if name not in names), None)
        if unknown is not None:
            raise DataError(f"{unknown}: the model has no such input to check with; it has {', '.join(names)}.")
        arrays = {name: _array(path) for name, path in self.files.items()}
        shapes = self.shapes | {name: list(value.shape) for name, value in arrays.items()}
        if not arrays:
            next(random_feeds(specs, fixed=shapes, count=1))  # refuses what does not fit
            return shapes, None
        feeds = random_feeds(specs, fixed=shapes, count=_FEEDS)
        return shapes, open_dataset([feed | arrays for feed in feeds], specs, role="check")


def parse_check_inputs(given: Mapping[str, Sequence[int]] | Iterable[str], separator: str = ":") -> CheckInputs:
    """Read ``{"x": [1, 3]}``, ``x:1,3`` or ``x:data.npy``.

    Raises:
        RecipeError: a text is of another form.
    """
    if isinstance(given, Mapping):
        return CheckInputs(parse_shapes(given))
    texts = [given] if isinstance(given, str) else list(given)
    files = {}
    for text in texts:
        name, mark, path = text.partition(separator) if separator == "=" else text.rpartition(separator)
        if mark and path.endswith(".npy"):
            files[name] = Path(path)
    shapes = parse_shapes([text for text in texts if not text.endswith(".npy")], separator)
    return CheckInputs(shapes, files)


def _array(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as an .npy file ({error}).") from None
