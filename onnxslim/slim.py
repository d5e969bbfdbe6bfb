"""Lossless simplification of one model, checked against the original; called as the PyPI package ``onnxslim`` is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from onnxslim.boundary import cut, fix_input_shapes, parse_shapes
from onnxslim.check_inputs import CheckInputs, parse_check_inputs
from onnxslim.culprit import run_checked
from onnxslim.errors import OutputError, RecipeError
from onnxslim.float_type import FLOAT_TYPES, convert_floats
from onnxslim.guard import check_lossless
from onnxslim.ledger import SlimReport, figures
from onnxslim.model import Model, load
from onnxslim.model_files import check_not_input, size_on_disk
from onnxslim.passes import Context, Outcome, Simplify
from onnxslim.record import Check, UndoneEntry
from onnxslim.runtime import ModelSource, Session
from onnxslim.skipping import rules_to_skip

__all__ = ["SlimOptions", "SlimRun", "check_output_file", "simplify_model", "slim", "slim_file"]

_ABOUT_CASTS = frozenset({"dead-node", "drop-cast", "fuse-casts"})


@dataclass(frozen=True)
class SlimOptions:
    """What is asked of one simplification, beside the model.

    Attributes:
        check: compare the outputs with ONNX Runtime, on several inputs and sizes.
        check_inputs: sizes and arrays for that comparison.
        input_shapes: shapes to declare for inputs.
        inputs: cut the model here; see :func:`onnxslim.boundary.cut`.
        outputs: cut the model here.
        dtype: the float type to convert to; None leaves it.
        skip_rules: names of rules that are not to be applied.
    """

    check: bool = True
    check_inputs: CheckInputs = field(default_factory=CheckInputs)
    input_shapes: dict[str, list[int]] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    dtype: str | None = None
    skip_rules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SlimRun:
    """A simplified model and how it came about.

    Attributes:
        model: the result; a copy of the original where nothing was changed or nothing could be kept.
        outcome: what was rewritten and what was declined, and why.
        checks: of the result against the original; of what was thrown away, where nothing could be kept.
        undone: rewrites that changed an output and were left out.
        kept: whether the result is what the rewrites made.
    """

    model: Model
    outcome: Outcome
    checks: list[Check] = field(default_factory=list)
    undone: list[UndoneEntry] = field(default_factory=list)
    kept: bool = True


def simplify_model(
    model: Model,
    options: SlimOptions | None = None,
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> SlimRun:
    """Simplify a copy of a model; what changes an output is found by bisection and left out.

    The model is cut, and its inputs are fixed, before it is simplified, so the result is compared with that part of it.
    It is converted to float32 before and to float16 after, so that no weight is computed in float16; rounding to
    float16 is not judged.

    Args:
        model: left as it is.
        options: None for the defaults.
        progress: called as ``progress(what, done, total)``.

    Raises:
        ModelError: the model does not load in ONNX Runtime and is to be checked, or does not load when converted.
        DataError: ``check_inputs`` does not fit the model.
        RecipeError: an option names what is not there.
    """
    options = options or SlimOptions()
    dtype = FLOAT_TYPES.get(options.dtype or "", None)
    original = model.copy()
    if options.inputs or options.outputs:
        cut(original, options.inputs, options.outputs)
    if options.input_shapes:
        fix_input_shapes(original, options.input_shapes)
    if options.dtype is not None and dtype is not np.float16:
        original = convert_floats(original, options.dtype)
    run = _simplify(original, options, progress)
    if dtype is not np.float16 or options.dtype is None:
        return run
    converted = convert_floats(run.model, options.dtype)
    # Casts from the one type to the other have become casts to what is there already.
    others = frozenset(Simplify().rules()) - _ABOUT_CASTS
    Simplify().run(converted, Context(skip_rules=others | options.skip_rules))
    if options.check:
        # ONNX Runtime's own optimisations crash on some float16 models that it runs well without.
        Session(converted, optimize=False)
    return replace(run, model=converted)


def slim_file(
    path: Path,
    output: Path,
    options: SlimOptions,
    *,
    external_data: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[SlimRun, SlimReport]:
    """Simplify a model file into another one, and report on both.

    Raises:
        ModelError: the file cannot be read, and as :func:`simplify_model`.
        OutputError: ``output`` is the input file, or cannot be written.
        DataError: as :func:`simplify_model`.
        RecipeError: as :func:`simplify_model`.
    """
    model = load(path)
    check_output_file(model, output)
    run = simplify_model(model, options, progress=progress)
    progress("writing", 0, 0)
    run.model.save(output, external_data=external_data)
    report = SlimReport(
        input=str(path),
        output=str(output),
        before=figures(model, size_on_disk(path)),
        after=figures(run.model, size_on_disk(output)),
        changes=[vars(change) for change in run.outcome.changes],
        refusals=[vars(refusal) for refusal in run.outcome.refusals],
        undone=run.undone,
        checks=run.checks,
        kept=run.kept,
    )
    return run, report


def _simplify(original: Model, options: SlimOptions, progress: Callable[[str, int, int], None]) -> SlimRun:
    shapes, dataset = options.check_inputs.dataset(original)
    checked = 0

    def check(candidate: Model) -> list[Check]:
        nonlocal checked
        checked += 1
        progress("comparing with the original" if checked == 1 else "searching for what went wrong", 0, 0)
        return check_lossless(original, candidate, dataset=dataset, shapes=shapes) if options.check else []

    progress("simplifying", 0, 0)
    found = run_checked(Simplify(), original, Context(shapes=shapes, skip_rules=options.skip_rules), check)
    if options.check and found.broken is not None and found.broken.name == "runs":
        Session(original)  # where the original does not load, that is what to say
    kept = found.broken is None
    result = found.model if kept and found.model is not None else original
    return SlimRun(result, found.outcome, found.checks, found.undone, kept)


def slim(
    model: ModelSource | Sequence[ModelSource],
    output_model: str | Path | None = None,
    *,
    model_check: bool = True,
    input_shapes: Mapping[str, Sequence[int]] | Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    no_shape_infer: bool = False,
    skip_optimizations: Sequence[str] | None = None,
    dtype: str | None = None,
    skip_fusion_patterns: Sequence[str] | None = None,
    size_threshold: int | None = None,
    inspect: bool = False,
    dump_to_disk: bool = False,
    save_as_external_data: bool = False,
    model_check_inputs: Mapping[str, Sequence[int]] | Sequence[str] | None = None,
    verbose: bool = False,
) -> onnx.ModelProto | None:
    """Simplify a model without changing what it computes. Takes the arguments of the PyPI package ``onnxslim``.

    Args:
        model: a file, its bytes, a ModelProto or a loaded Model; never modified. A list of them is only looked at, as
            with ``inspect``.
        output_model: where to write the result; without it the result is returned.
        model_check: compare the outputs before and after in ONNX Runtime, on several inputs and sizes, and leave out
            the rewrites with which they differ. On unless switched off.
        input_shapes: shapes to declare for inputs in the result: ``{"x": [1, 3, 224, 224]}`` or
            ``["x:1,3,224,224"]``.
        inputs: cut the model at these tensors of the main graph, which become its inputs: ``["x"]``, or
            ``["x:fp16"]`` with a type (fp32, fp16, int32, int64, bool) from which the input is then converted.
        outputs: the same for its outputs; inputs that they do not need are dropped.
        no_shape_infer: without effect: shapes are inferred in memory only, and never written to the result.
        skip_optimizations: rules to leave out, by the names that ``onnxslim passes simplify`` lists or by the PyPI
            package's: constant_folding, graph_fusion, dead_node_elimination, subexpression_elimination, weight_tying.
        dtype: convert the model to ``fp16`` or ``fp32``, its inputs and outputs too; see
            :func:`onnxslim.float_type.convert_floats`.
        skip_fusion_patterns: rules to leave out, by our names or by the PyPI package's, such as FusionConvBN.
        size_threshold: refused: folding weighs the bytes that it makes against those that it frees, so there is
            nothing to set.
        inspect: simplify nothing; print what the model is made of and return None.
        dump_to_disk: with ``inspect``: also write every node with the types and shapes of its outputs to
            ``<model>_model_info.csv`` in the working folder.
        save_as_external_data: write the weights to ``<output_model>.data``.
        model_check_inputs: sizes or arrays for the comparison: ``{"x": [1, 3]}``, ``["x:1,3"]`` or ``["x:data.npy"]``.
        verbose: print which rules were applied and declined, where and why.

    Returns:
        The simplified ModelProto; None when it was written to ``output_model``, or with ``inspect``.

    Raises:
        ModelError: the model cannot be read, or does not load in ONNX Runtime.
        OutputError: ``output_model`` is the input file, or cannot be written.
        DataError: ``model_check_inputs`` does not fit the model.
        RecipeError: an option names what is not there, or makes no sense with another.
    """
    if size_threshold is not None:
        raise RecipeError(
            "size_threshold: leave it out. Folding weighs the bytes that it makes against those that it frees."
        )
    if isinstance(model, Sequence) and not isinstance(model, (str, bytes)):
        models: list[ModelSource] = list(model)
        inspect = True
    else:
        models = [model]
    if dump_to_disk and not inspect:
        raise RecipeError("dump_to_disk: only with inspect=True.")
    if save_as_external_data and output_model is None:
        raise RecipeError("save_as_external_data: give output_model too; a ModelProto holds its weights.")
    if model_check_inputs and not model_check:
        raise RecipeError("model_check_inputs: the check is switched off by model_check=False.")
    if inspect:
        if output_model is not None:
            raise RecipeError("output_model: nothing is written when models are only inspected.")
        from onnxslim.listing import look_at  # prints, so it is above this module

        look_at(models, dump=dump_to_disk)
        return None
    loaded = load(models[0])
    if output_model is not None:
        check_output_file(loaded, Path(output_model))
    options = SlimOptions(
        check=model_check,
        check_inputs=parse_check_inputs(model_check_inputs or ()),
        input_shapes=parse_shapes(input_shapes or ()),
        inputs=inputs or (),
        outputs=outputs or (),
        dtype=dtype,
        skip_rules=rules_to_skip([*_listed(skip_optimizations), *_listed(skip_fusion_patterns)]),
    )
    run = simplify_model(loaded, options)
    if verbose:
        from rich.console import Console

        from onnxslim.console_slim import explain  # prints, so it is above this module

        explain(Console(), run)
    if output_model is None:
        return run.model.to_proto()
    run.model.save(output_model, external_data=save_as_external_data)
    return None


def _listed(names: Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()


def check_output_file(model: Model, output: Path) -> None:
    """Refuse an output that is the input, a folder, or in a folder that does not exist."""
    check_not_input(model, output)
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; name a file.")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: the folder {output.parent} does not exist.")
