"""What is asked: the typed, validated recipe of a run, read from TOML, from flags or from Python."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tomlkit
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from onnxslim.errors import RecipeError
from onnxslim.model import atomic_write
from onnxslim.suggest import unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DataOptions",
    "Goals",
    "Lock",
    "Milliseconds",
    "Recipe",
    "Seconds",
    "TargetOptions",
    "make_recipe",
    "parse_seconds",
    "read_recipe",
    "write_lock",
]

_TIME_UNITS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1000.0}
_LONG_TIME_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def _milliseconds(value: Any) -> Any:
    """Read '5 ms', '800 us' or '1.5 s'; a bare number is milliseconds."""
    if not isinstance(value, str):
        return value
    return _time(value, _TIME_UNITS, "'5 ms' or '1.5 s'")


def _seconds(value: Any) -> Any:
    """Read '90 s', '10 min' or '1 h'; a bare number is seconds."""
    return _time(value, _LONG_TIME_UNITS, "'90 s' or '10 min'") if isinstance(value, str) else value


def _time(text: str, units: dict[str, float], example: str) -> float:
    match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-zµ]+)\s*", text)
    if match is None or match[2] not in units:
        raise ValueError(f"write a time with its unit, such as {example}")
    return float(match[1]) * units[match[2]]


Milliseconds = Annotated[float, BeforeValidator(_milliseconds), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataOptions(_Options):
    """Where the data is and how it is scored."""

    calibration: str | None = Field(default=None, description="inputs without labels, for lossy passes")
    evaluation: str | None = Field(default=None, description="inputs, with labels where there are any, for the score")
    metric: str | None = Field(
        default=None,
        description="a metric by name, or 'module:function' from an installed module; by default what fits the data",
    )


class Goals(_Options):
    """What the result has to reach; the verdict and the exit code follow from it."""

    max_accuracy_drop: float | None = Field(
        default=None, ge=0, description="largest loss against the original, absolute, in the metric's own unit"
    )
    min_accuracy: float | None = Field(default=None, description="smallest score of the result")
    max_size: ByteSize | None = Field(default=None, gt=0, description="largest model file, such as '2 MB'")
    min_compression: float | None = Field(default=None, gt=0, description="size before over size after, at least")
    max_latency: Milliseconds | None = Field(
        default=None, description="longest median time of one inference in ONNX Runtime on this machine"
    )


class TargetOptions(_Options):
    """One hardware target to compile for."""

    name: str
    max_latency: Milliseconds | None = Field(default=None, description="longest median time of the compiled model")
    tune: Seconds | None = Field(
        default=None, description="time to spend on faster tiles for its kernels, such as '10 min', on such a device"
    )


class Lock(_Options):
    """What a finished run pinned: a recipe that carries it refuses to run on anything else."""

    model_sha256: str
    calibration_sha256: str | None = None
    evaluation_sha256: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class Recipe(_Options):
    """A whole run: the model, the data, the goals, the passes in order, the targets."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    model: str
    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0, description="threads for measuring latency; 0: one for each core")
    shapes: dict[str, list[Annotated[int, Field(ge=0)]]] = Field(default_factory=dict)
    data: DataOptions = DataOptions()
    goals: Goals = Goals()
    passes: list[dict[str, Any]] = Field(default_factory=list, alias="pass")
    targets: list[TargetOptions] = Field(default_factory=list, alias="target")
    lock: Lock | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if any(not isinstance(table.get("name"), str) for table in self.passes):
            raise ValueError("every [[pass]] needs a name")
        names = [target.name for target in self.targets]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"target {sorted(twice)[0]!r} is there twice")
        return self

    def tables(self) -> dict[str, Any]:
        """The recipe as plain tables, as TOML would hold it, without what is unset."""
        tables = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        tables["pass"] = [{key: value for key, value in table.items() if value is not None} for table in tables["pass"]]
        return tables


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML. Paths in it are relative to its folder and come back resolved against it.

    Raises:
        RecipeError: the file is missing, is not TOML, or holds an unknown key or an illegal value.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}.") from None
    recipe = make_recipe(tables, str(path))

    def resolve(value: str | None) -> str | None:
        return None if value is None else str(path.parent / value)

    data = recipe.data.model_copy(
        update={"calibration": resolve(recipe.data.calibration), "evaluation": resolve(recipe.data.evaluation)}
    )
    passes = [_with_paths(table, resolve) for table in recipe.passes]
    return recipe.model_copy(update={"model": resolve(recipe.model), "data": data, "passes": passes})


_PATH_OPTIONS = ("plan",)


def _with_paths(table: dict[str, Any], change: Callable[[str | None], str | None]) -> dict[str, Any]:
    """A pass with another path wherever an option is one."""
    return {name: change(value) if name in _PATH_OPTIONS else value for name, value in table.items()}


def make_recipe(tables: dict[str, Any], origin: str) -> Recipe:
    """Build a recipe from plain tables; ``origin`` names them in messages.

    Raises:
        RecipeError: a key is unknown or a value illegal.
    """
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        # A misspelt key also leaves the right one missing; the misspelling is what to show.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        loc = [str(part) for part in first["loc"]]
        where = ".".join(loc)
        if first["type"] == "extra_forbidden":
            known = _known_keys(loc[:-1])
            raise RecipeError(f"{origin}: {unknown_name('key', where, known)}") from None
        if first["type"] == "missing":
            raise RecipeError(f"{origin}: {where} is missing.") from None
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{origin}: {where + ': ' if where else ''}{message}.") from None


def _known_keys(loc: list[str]) -> list[str]:
    tables: dict[str, type[BaseModel]] = {"data": DataOptions, "goals": Goals, "target": TargetOptions, "lock": Lock}
    table = tables.get(loc[0]) if loc else Recipe
    prefix = f"{loc[0]}." if loc else ""
    return [prefix + (field.alias or name) for name, field in table.model_fields.items()] if table else []


def parse_seconds(text: str, origin: str) -> float:
    """Read a time such as '10 min'; ``origin`` names it in messages.

    Raises:
        RecipeError: it is none.
    """
    try:
        return float(TypeAdapter(Seconds).validate_python(text))
    except ValidationError as error:
        raise RecipeError(f"{origin} {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None


def write_lock(recipe: Recipe, path: Path) -> None:
    """Write a resolved recipe as TOML: read back, it reproduces the run. Paths in it become relative to its folder."""
    folder = path.resolve().parent

    def relative(value: str | None) -> str | None:
        if value is None or value.startswith("<"):
            return value
        return Path(os.path.relpath(Path(value).resolve(), folder)).as_posix()

    data = recipe.data.model_copy(
        update={"calibration": relative(recipe.data.calibration), "evaluation": relative(recipe.data.evaluation)}
    )
    passes = [_with_paths(table, relative) for table in recipe.passes]
    tables = recipe.model_copy(update={"model": relative(recipe.model), "data": data, "passes": passes}).tables()
    with atomic_write(path) as temporary:
        temporary.write_text(tomlkit.dumps(tables), encoding="utf-8")
