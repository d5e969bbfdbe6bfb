"""The command line: parse, call, print."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, TypeAdapter
from rich.console import Console

import onnxslim
from onnxslim import console as show
from onnxslim.errors import RecipeError, SlimError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Make trained ONNX models smaller and faster: simplify, prune, quantize, compile with TVM, measure, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="an ONNX model")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors")]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", metavar="NAME=1,3,224,224", help="sizes for a dynamic input; repeatable")
]
Tune = Annotated[str | None, typer.Option(metavar="TIME", help="spend this on faster kernels, such as 10min")]
Threads = Annotated[int, typer.Option(min=0, help="threads for measuring; 0: one for each core")]


def _emit(value: BaseModel | list[Any], *, as_json: bool, quiet: bool, printer: Any) -> None:
    """Print a result once: as JSON, as tables, or not at all."""
    if as_json:
        sys.stdout.write(TypeAdapter(type(value)).dump_json(value, indent=1).decode() + "\n")
    elif not quiet:
        printer(Console(), value)


def _shapes(values: list[str] | None) -> dict[str, list[int]]:
    from onnxslim.boundary import parse_shapes

    try:
        return parse_shapes(values or (), "=")
    except RecipeError as error:
        raise RecipeError(f"--shape {error}") from None


def _pass_table(text: str) -> dict[str, Any]:
    """Read ``prune-channels:ratio=0.3,multiple_of=16``; values are JSON where they parse as such."""
    name, _, options = text.partition(":")
    table: dict[str, Any] = {"name": name}
    # A comma inside of brackets belongs to a list.
    for part in filter(None, re.split(r",(?![^\[]*\])", options)):
        key, separator, value = part.partition("=")
        if not separator:
            raise RecipeError(f"--pass {text}: write options as NAME:option=value,option=value.")
        try:
            table[key] = json.loads(value)
        except json.JSONDecodeError:
            table[key] = value
    return table


def _version(value: bool) -> None:
    if value:
        typer.echo(onnxslim.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Make trained ONNX models smaller and faster."""


@app.command()
def slim(
    model: ModelFile,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="where to write the result")],
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME=1,3,224,224", help="declare this shape for an input; repeatable"),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input-name", metavar="TENSOR[:TYPE]", help="cut the model here, as an input; repeatable"),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option("--output-name", metavar="TENSOR[:TYPE]", help="cut the model here, as an output; repeatable"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="fp16|fp32", help="convert the model to this float type")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="leave a rule out; repeatable; --explain names them")
    ] = None,
    check: Annotated[bool, typer.Option(help="compare the outputs before and after in ONNX Runtime")] = True,
    check_input: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=1,3|NAME=FILE.npy", help="compare on this size, or array, of an input; repeatable"),
    ] = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="write the weights to OUTPUT.data, beside the model")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="list every rule that was applied or declined, where and why")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simplify a model without changing what it computes."""
    from onnxslim.check_inputs import parse_check_inputs
    from onnxslim.skipping import rules_to_skip
    from onnxslim.slim import SlimOptions, slim_file

    if check_input and not check:
        raise RecipeError("--check-input: the check is switched off by --no-check.")
    options = SlimOptions(
        check=check,
        check_inputs=parse_check_inputs(check_input or (), "="),
        input_shapes=_shapes(shape),
        inputs=inputs or (),
        outputs=outputs or (),
        dtype=dtype,
        skip_rules=rules_to_skip(skip or ()),
    )
    with show.progress_bar(Console(stderr=True), shown=not (quiet or as_json)) as progress:
        run, found = slim_file(model, output, options, external_data=external_data, progress=progress)

    def printer(console: Console, _: BaseModel) -> None:
        from onnxslim.console_slim import explain as print_explanation
        from onnxslim.console_slim import print_slim

        print_slim(console, found.before, found.after, run)
        if explain:
            print_explanation(console, run)

    _emit(found, as_json=as_json, quiet=quiet, printer=printer)


@app.command()
def optimize(
    source: Annotated[Path, typer.Argument(metavar="MODEL_OR_RECIPE", help="an ONNX model, or a recipe (.toml)")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="where everything is written")
    ] = Path("out"),
    data: Annotated[Path | None, typer.Option(help="calibration data, no labels needed")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="evaluation data, with labels if there are any")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="a metric, or module:function")] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", metavar="NAME[:OPTION=VALUE,…]", help="a pass, in order; repeatable; see `onnxslim passes`"
        ),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="compile for this; repeatable; see `onnxslim targets`")
    ] = None,
    tune: Tune = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="goal: largest loss against the original")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="goal: smallest score of the result")] = None,
    max_size: Annotated[str | None, typer.Option(help="goal: largest file, such as '2 MB'")] = None,
    min_compression: Annotated[float | None, typer.Option(help="goal: size before over after, at least")] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="goal: slowest median in ONNX Runtime, such as '5 ms'")
    ] = None,
    shape: Shapes = None,
    threads: Annotated[int | None, typer.Option(min=0, help="threads for measuring; 0: one for each core")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="seeds whatever is random")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Apply passes step by step, guard each, compile, measure, judge against the goals, report."""
    from onnxslim.recipe import read_recipe

    recipe = read_recipe(source) if source.suffix.lower() == ".toml" else None
    if tune is not None and not target:
        raise RecipeError("--tune: there is no --target to tune for; in a recipe, write tune under [[target]].")
    goals = {
        "max_accuracy_drop": max_accuracy_drop,
        "min_accuracy": min_accuracy,
        "max_size": max_size,
        "min_compression": min_compression,
        "max_latency": max_latency,
    }
    _optimize(
        recipe.model if recipe else source,
        recipe,
        as_json=as_json,
        quiet=quiet,
        output=output,
        calibration=data,
        evaluation=evaluation,
        metric=metric,
        passes=[_pass_table(text) for text in passes] if passes else None,
        targets=[{"name": name, "tune": tune} for name in target] if target else None,
        goals=goals,
        shapes=_shapes(shape),
        threads=threads,
        seed=seed,
    )


def _optimize(model: str | Path, recipe: Any, *, as_json: bool, quiet: bool, **asked: Any) -> None:
    from onnxslim.goals import EXIT_CODES

    with show.progress_bar(Console(stderr=True), shown=not (quiet or as_json)) as progress:
        run = onnxslim.optimize(model, recipe, progress=progress, **asked)
    _emit(run.record, as_json=as_json, quiet=quiet, printer=show.print_record)
    if not (as_json or quiet):
        typer.echo(f"Report: {run.report}")
    raise typer.Exit(EXIT_CODES[run.record.verdict])


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="where everything is written")
    ] = Path("demo-out"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the main job on the bundled trained model and data, which it copies to FOLDER/input."""
    from onnxslim.demo import copy_inputs
    from onnxslim.recipe import read_recipe

    recipe = read_recipe(copy_inputs(output / "input"))
    _optimize(recipe.model, recipe, as_json=as_json, quiet=quiet, output=output)


@app.command()
def compile(
    model: ModelFile,
    target: Annotated[str, typer.Option(help="what to compile for; see `onnxslim targets`")] = "native",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="the bundle")] = Path("bundle"),
    tune: Tune = None,
    shape: Shapes = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a model for a target with TVM, verify it and bundle it."""
    from onnxslim.deploy import deploy_file
    from onnxslim.goals import EXIT_CODES
    from onnxslim.recipe import parse_seconds

    options: dict[str, Any] = {
        "shapes": _shapes(shape),
        "tune": None if tune is None else parse_seconds(tune, "--tune"),
    }
    with show.progress_bar(Console(stderr=True), shown=not (quiet or as_json)) as progress:
        entry = deploy_file(model, target, output=output, threads=threads, progress=progress, **options)
    _emit(entry, as_json=as_json, quiet=quiet, printer=lambda out, found: show.print_targets_of(out, [found]))
    raise typer.Exit(EXIT_CODES["not met"] if entry.status == "failed" else 0)


@app.command()
def bench(
    paths: Annotated[
        list[Path], typer.Argument(metavar="MODEL_OR_BUNDLE…", help="models and bundles; the first is the baseline")
    ],
    data: Annotated[Path | None, typer.Option(help="time the first sample of this data")] = None,
    shape: Shapes = None,
    threads: Annotated[int, typer.Option(min=1, help="threads for each")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="stop after about this long")] = 20.0,
    profile: Annotated[bool, typer.Option("--profile", help="also say where the time of each bundle goes")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time models and bundles beside each other, interleaved: medians and ratios."""
    from onnxslim.bench import bench as run_bench

    with show.progress_bar(Console(stderr=True), shown=not (quiet or as_json)) as progress:
        progress("timing", 0, 0)
        entries = run_bench(
            paths, data=data, shapes=_shapes(shape), threads=threads, max_seconds=seconds, profile=profile
        )
    _emit(entries, as_json=as_json, quiet=quiet, printer=show.print_bench)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="the reference")],
    b: Annotated[Path, typer.Argument(metavar="B", help="what is compared with it")],
    data: Annotated[Path | None, typer.Option(help="inputs to compare on; made up without")] = None,
    shape: Shapes = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how two models differ: outputs, layer by layer, what they are made of, which nodes became which."""
    from onnxslim.compare import compare as run_compare

    with show.progress_bar(Console(stderr=True), shown=not (quiet or as_json)) as progress:
        progress("comparing", 0, 0)
        found = run_compare(a, b, data=data, shapes=_shapes(shape))
    _emit(found, as_json=as_json, quiet=quiet, printer=show.print_comparison)


@app.command()
def inspect(
    model: ModelFile,
    data: Annotated[Path | None, typer.Option(help="calibration data, to try the passes that need some")] = None,
    target: Annotated[list[str] | None, typer.Option(help="targets to look at; repeatable")] = None,
    shape: Shapes = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model, and what each pass and target could do with it."""
    from onnxslim.inspection import inspect_model

    with show.progress_bar(Console(stderr=True), shown=not (quiet or as_json)) as progress:
        found = inspect_model(model, data=data, shapes=_shapes(shape), targets=target, progress=progress)
    _emit(found, as_json=as_json, quiet=quiet, printer=show.print_inspection)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="the output of optimize")]) -> None:
    """Render the HTML report again from the record."""
    from onnxslim.record import Record
    from onnxslim.reports import write

    path = folder / "report.html"
    write(Record.read(folder / "record.json"), path)
    typer.echo(f"Report: {path}")


@app.command()
def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="PASS", help="only this pass, with its whole description")
    ] = None,
    as_json: Json = False,
) -> None:
    """List every pass with its options, or describe one."""
    from onnxslim.passes import PASSES, find_pass

    kinds = [find_pass(name)] if name is not None else list(PASSES.values())
    if as_json:
        typer.echo(json.dumps({kind.name: kind.model_json_schema() for kind in kinds}, indent=1))
    else:
        show.print_passes(Console(), kinds, whole=name is not None)


@app.command()
def targets(
    fetch: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="download TVM's small runtime for this target (100 MB once), for its bundles"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List every target, or fetch what its bundles need to run on a bare device."""
    from onnxslim.targets import TARGETS, fetch_runtime, find_target

    if fetch is not None:
        with show.progress_bar(Console(stderr=True), shown=not as_json) as progress:
            progress("fetching TVM's runtime", 0, 0)
            paths = fetch_runtime(find_target(fetch).machine)
        typer.echo("\n".join(map(str, paths)))
        return
    if as_json:
        typer.echo(json.dumps({name: item.model_dump(mode="json") for name, item in TARGETS.items()}, indent=1))
    else:
        show.print_targets(Console())


def main() -> None:
    """Run the command line: exit code 0 done, 1 goals not met, 2 bad input."""
    arguments = sys.argv[1:]
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands and len(arguments) >= 2:
        arguments = ["slim", *arguments]  # `onnxslim model.onnx slim.onnx`
    try:
        app(args=arguments)
    except SlimError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
    except OSError as error:  # a full disk, a file that vanished: nobody's mistake, and still one sentence
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command resumes")
        sys.exit(130)
