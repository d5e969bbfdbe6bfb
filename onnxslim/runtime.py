"""ONNX Runtime: sessions that give the same numbers every time, fair timing, peak memory, what the machine is.

ONNX Runtime is imported when the first session is made, never by ``import onnxslim``.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError

from onnxslim.errors import ModelError
from onnxslim.model import Model, load
from onnxslim.staging import EXOTIC_TYPES, Staged
from onnxslim.tensors import NO_SYMBOLS, tensor_nbytes

if TYPE_CHECKING:
    from onnxslim.record import Latency

__all__ = [
    "Feed",
    "ModelSource",
    "Runner",
    "Session",
    "TensorSpec",
    "Timing",
    "detached",
    "environment",
    "interleaved_latency",
    "max_ir_version",
    "peak_memory",
    "usable_cores",
]

_INLINE_BYTES = 32 << 20  # of weights: more are mapped from a file, of which ONNX Runtime makes no copy to parse

Feed = dict[str, np.ndarray]
"""One inference: input (or output) name -> array. Sequence outputs are lists of arrays."""

Kind: TypeAlias = Literal["tensor", "sequence", "optional", "map"]
ModelSource: TypeAlias = Model | Path | str | bytes | onnx.ModelProto


class Runner(Protocol):
    """Anything that turns a feed into named outputs: a :class:`Session`, a compiled bundle."""

    def run(self, feed: Feed) -> Feed:
        """Run one inference."""
        ...


# -------------------------------------------------------------------------------------------------------- sessions


@dataclass(frozen=True)
class TensorSpec:
    """What a model declares of one input.

    Attributes:
        name: of the input.
        dtype: of the tensor, or of the elements of a sequence; ``object`` for strings.
        shape: an int where fixed, a str where symbolic, None where unknown; ``[]`` is a scalar, None an unknown rank.
        kind: what the input holds; only tensors can be fed from data.
        optional: it has a default in the model (an initializer that is also an input), so a feed may leave it out.
    """

    name: str
    dtype: np.dtype
    shape: list[int | str | None] | None
    kind: Kind = "tensor"
    optional: bool = False

    def __str__(self) -> str:
        kind = "" if self.kind == "tensor" else f"{self.kind} of "
        dtype = "string" if self.dtype == object else str(self.dtype)
        if self.shape is None:
            return f"{kind}{dtype} of any rank"
        return f"{kind}{dtype} [{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


class Session:
    """A model in ONNX Runtime on the CPU, with deterministic kernels and nothing written to the terminal.

    Attributes:
        inputs: the inputs that every feed must hold.
        optional_inputs: the inputs that a feed may hold, because the model has a default for them.
        output_names: what :meth:`run` returns, in order.
        outputs: what ONNX Runtime knows of each before it runs; a shape of None is a scalar's, or an unknown rank.
        threads: threads inside one operator; 0: as many as there are cores.
        optimize: whether ONNX Runtime has optimised the graph.
    """

    def __init__(
        self,
        model: ModelSource | Staged,
        *,
        threads: int = 0,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
        spare: bool = False,
    ) -> None:
        """Load a model; a file is loaded as it is, so that what is measured is what is shipped.

        Args:
            model: a model, its file or its protobuf. None is changed; the IR version is capped on the way.
            threads: threads inside one operator; 0: as many as there are cores.
            outputs: tensors of the main graph to fetch instead of the outputs, inner ones included.
            optimize: False runs the graph as it stands, without ONNX Runtime's optimisations and caches, and without a
                copy of a :class:`Model`'s weights: quick to load and small, for a few runs.
            spare: True lays out convolutions as the model does. In ONNX Runtime's blocked layout they are up to twice
                as fast, but what turns it back for ``outputs`` runs last, so that all that lead to some are held.

        Raises:
            ModelError: ONNX Runtime cannot load the model, or ``outputs`` names no tensor of its main graph.
        """
        self.threads = threads
        self.optimize = optimize
        named = model.model if isinstance(model, Staged) else model
        self._name = str(named) if isinstance(named, (str, Path)) else str(getattr(named, "path", None) or "the model")
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._kept: Any = None
        self._watching = outputs is not None
        self._spare = spare
        self._session = self._load(model, outputs, optimize=optimize)
        arguments = self._session.get_inputs()
        defaults = self._session.get_overridable_initializers()
        ranks: dict[str, bool] = {}
        if any(not argument.shape for argument in (*arguments, *defaults)):
            ranks = _declared_ranks(model)
        self.inputs = {argument.name: _spec(argument, ranks) for argument in arguments}
        self.optional_inputs = {argument.name: _spec(argument, ranks, optional=True) for argument in defaults}
        self.outputs = {argument.name: _spec(argument, {}) for argument in self._session.get_outputs()}
        self.output_names = list(dict.fromkeys(outputs)) if outputs is not None else list(self.outputs)

    @property
    def specs(self) -> list[TensorSpec]:
        """Every input that a feed may hold, the optional ones last."""
        return [*self.inputs.values(), *self.optional_inputs.values()]

    def run(self, feed: Mapping[str, np.ndarray]) -> Feed:
        """Run one inference.

        Returns:
            Output name -> array; a list of arrays for a sequence, None for an empty optional.

        Raises:
            ModelError: the feed does not fit the model, or an operator fails; the message names operator and node.
        """
        values = {
            name: _ort_value(value) if isinstance(value, np.ndarray) and value.dtype.name in EXOTIC_TYPES else value
            for name, value in feed.items()
        }
        try:
            results = self._session.run(self.output_names, values, self._run_options())
        except Exception as error:  # ONNX Runtime's own exception types share no base below Exception
            raise ModelError(f"{self._name}: {_reason(error)}") from None
        return dict(zip(self.output_names, results, strict=True))

    def _load(self, model: ModelSource | Staged, outputs: Sequence[str] | None, *, optimize: bool) -> Any:
        import onnxruntime

        whole = model.model if isinstance(model, Staged) else model
        staged: Staged | None = None
        if isinstance(whole, Model) and not optimize:  # optimisations would read the weights where they are not
            staged = model if isinstance(model, Staged) else Staged(whole)
        extra = onnx.ModelProto()
        if outputs is not None:
            extra.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._inner(whole, outputs))
        while True:
            options = self._options(optimize=optimize)
            try:
                source = self._source(whole, extra, options) if staged is None else self._shared(staged, extra, options)
                return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # as above
                if isinstance(error, ModelError):
                    raise
                if "Unsupported model IR version" in str(error) and not extra.ir_version:
                    extra.ir_version = max_ir_version()
                elif staged is not None:
                    staged = None  # what is wrong with the model itself is said of the whole
                else:
                    raise ModelError(f"{self._name}: {_reason(error)}") from None

    def _options(self, *, optimize: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.use_deterministic_compute = True
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        if self._watching:
            # In the order of the graph, so that what only measures a tensor runs before the tensor is let go of.
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
            options.enable_mem_pattern = False  # one block for all tensors of a run: a third more, and no faster
        if self._spare:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # Idle workers of one session otherwise spin on the cores while another one is being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Such a session runs a few times: waiting workers, weights in a second layout and memory kept for the
            # next run would not pay.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_mem_pattern = False
        return options

    def _run_options(self) -> Any:
        """None, or how to run without keeping the memory for the next run."""
        if self.optimize:
            return None
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _shared(self, staged: Staged, extra: onnx.ModelProto, options: Any) -> str:
        """The path of a model without weights, which ``options`` then takes from memory, where they stay."""
        self._kept = [staged, {name: _ort_value(values) for name, values in staged.weights.items()}]
        for name, value in self._kept[1].items():
            options.add_initializer(name, value)
        appendix = extra.SerializeToString()
        if not appendix:
            return str(staged.path)
        path = staged.path.with_name("session.onnx")
        path.write_bytes(staged.path.read_bytes() + appendix)
        return str(path)

    def _source(self, model: ModelSource, extra: onnx.ModelProto, options: Any) -> str | bytes:
        """What to hand to ONNX Runtime: a path, or bytes.

        ``extra`` is merged by appending it: protobuf defines the concatenation of two messages as their merge, so the
        model is changed without a copy of it being parsed or built.
        """
        appendix: bytes = extra.SerializeToString()
        if isinstance(model, (str, Path)):
            path = Path(model)
            if not path.is_file():
                raise ModelError(f"{path}: no such model file.")
            if not appendix:
                return str(path)
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.resolve().parent)
            )
            return path.read_bytes() + appendix
        if isinstance(model, bytes):
            return bytes(model) + appendix
        try:
            if not _is_heavy(model):
                content = model.to_bytes() if isinstance(model, Model) else model.SerializeToString()
                return bytes(content) + appendix
        except EncodeError:  # 2 GiB and more in places where weights are not counted
            pass
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="onnxslim-", ignore_cleanup_errors=True)
            whole = load(model) if isinstance(model, onnx.ModelProto) else model
            whole.save(Path(self._folder.name) / "model.onnx", external_data=True)
        path = Path(self._folder.name)
        (path / "session.onnx").write_bytes((path / "model.onnx").read_bytes() + appendix)
        return str(path / "session.onnx")

    def _inner(self, model: ModelSource, outputs: Sequence[str]) -> list[str]:
        """Which of the wanted tensors are not outputs of the model yet."""
        if isinstance(model, Model):
            known = {tensor.name for node in model.graph.nodes for tensor in (*node.inputs, *node.outputs)}
            known.update(tensor.name for tensor in (*model.graph.inputs, *model.graph.__dict__.get("initializers", ())))
            declared = {tensor.name for tensor in model.graph.outputs}
        else:
            graph = _parsed(model).graph
            known = {name for node in graph.node for name in node.output}
            known |= {value.name for value in (*graph.input, *graph.initializer)}
            known |= {value.values.name for value in graph.sparse_initializer}
            declared = {value.name for value in graph.output}
        missing = [name for name in outputs if name not in known or not name]
        if missing:
            raise ModelError(f"{self._name}: the main graph has no tensor {missing[0]!r} to fetch.")
        return [name for name in dict.fromkeys(outputs) if name not in declared]


def detached(values: Feed) -> Feed:
    """The same in memory of their own, to be kept: an array that a session gave keeps all of its memory alive."""
    return {
        name: value.copy() if isinstance(value, np.ndarray) and not value.flags.owndata else value
        for name, value in values.items()
    }


def _is_heavy(model: Model | onnx.ModelProto) -> bool:
    """Whether the model holds many weights, found without reading them."""
    if isinstance(model, Model):
        return sum(tensor_nbytes(constant) for constant in model.constants()) > _INLINE_BYTES
    sizes = (
        np.prod(tensor.dims, dtype=np.float64) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
        if tensor.data_type not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
    )
    return bool(sum(sizes) > _INLINE_BYTES)


@functools.lru_cache(maxsize=1)
def max_ir_version() -> int:
    """The newest ONNX file format that the installed ONNX Runtime reads, found by asking it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", [info("x", 1, [1])], [info("y", 1, [1])]
    )
    for version in range(int(onnx.IR_VERSION), 7, -1):
        probe = onnx.helper.make_model(
            graph, ir_version=version, opset_imports=[onnx.helper.make_opsetid("", 13)]
        ).SerializeToString()
        try:
            onnxruntime.InferenceSession(probe, options, providers=["CPUExecutionProvider"])
        except Exception:  # this version is too new; the exception types share no base
            continue
        return version
    return 7


def _parsed(model: Path | str | bytes | onnx.ModelProto) -> onnx.ModelProto:
    """The structure of a model; external weights are not there."""
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_model_from_string(model)
        return onnx.load_model(str(model), load_external_data=False)
    except (DecodeError, OSError) as error:
        name = "the model" if isinstance(model, bytes) else model
        raise ModelError(f"{name}: not an ONNX model, or truncated ({error}).") from None


def _declared_ranks(model: ModelSource | Staged) -> dict[str, bool]:
    """Input name -> whether its rank is declared. ONNX Runtime shows a scalar and an unknown rank alike, as []."""
    if isinstance(model, Staged):
        model = model.model
    if isinstance(model, Model):
        return {tensor.name: tensor.shape is not None for tensor in model.graph.inputs}
    return {value.name: value.type.tensor_type.HasField("shape") for value in _parsed(model).graph.input}


def _ort_value(values: np.ndarray) -> Any:
    """An array for ONNX Runtime, which uses the memory as it is; both must outlive the session."""
    import onnxruntime

    values = np.ascontiguousarray(values).reshape(values.shape)
    code = EXOTIC_TYPES.get(values.dtype.name)
    if code is None:
        return onnxruntime.OrtValue.ortvalue_from_numpy(values)
    raw = values.view(np.uint8 if values.dtype.itemsize == 1 else np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, code)


_NUMPY_TYPES = {
    "float": "float32",
    "double": "float64",
    "string": "object",
}


def _spec(argument: Any, ranks: dict[str, bool], *, optional: bool = False) -> TensorSpec:
    """Read a type such as ``tensor(float)``, ``seq(tensor(int64))`` or ``optional(tensor(float))``."""
    kinds: dict[str, Kind] = {"seq": "sequence", "optional": "optional", "map": "map"}
    kind: Kind = kinds.get(argument.type.split("(")[0], "tensor")
    element = argument.type.replace(")", "").split("(")[-1].split(",")[-1]
    element = _NUMPY_TYPES.get(element, element)
    try:
        dtype = np.dtype(element)
    except TypeError:
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, element.replace("float8e", "float8_e"), np.void))
    shape: list[int | str | None] | None = None
    if argument.shape or ranks.get(argument.name, False):
        shape = [None if dim in NO_SYMBOLS or (isinstance(dim, int) and dim < 0) else dim for dim in argument.shape]
    return TensorSpec(argument.name, dtype, shape, kind, optional)


def _reason(error: Exception) -> str:
    """One line out of ONNX Runtime's message, led by operator and node where it names them."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    # Names of files and functions of ONNX Runtime's sources mean nothing to a user.
    text = re.sub(r"/\S*onnxruntime\S*\.(cc|h):\d+ .*?\)( const)?( \[with [^]]*\])? ", "", text)
    # The innermost node is named last where it lies in the body of another.
    running = re.search(r".*returned while running (\S+) node\. Name:'([^']*)' Status Message: (.*)", text)
    if running:
        op, node, why = running.groups()
        return f"{op} node {node!r} fails in ONNX Runtime: {why.rstrip('.')}."
    text = re.sub(r"^Load model from \S* failed:\s*", "", text)
    loading = re.search(r'In Node, \("([^"]*)", (\w+),.*?-> \((?:"([^"]*)")?.*?, Error (.*)', text)
    if loading:
        node, op, output, why = loading.groups()
        which = f"{node!r}" if node else f"that makes {output!r}"
        return f"{op} node {which} is refused by ONNX Runtime: {why.rstrip('.')}."
    return f"ONNX Runtime: {text.rstrip('.')}."


# ---------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Timed runs of one runner.

    Attributes:
        samples_ms: milliseconds of every timed run, in order, warm-up excluded.
        warmup_runs: how many untimed runs came first.
    """

    samples_ms: list[float]
    warmup_runs: int = 0

    @property
    def median_ms(self) -> float:
        """The median in milliseconds."""
        return float(np.median(self.samples_ms))

    @property
    def p10_ms(self) -> float:
        """The 10th percentile in milliseconds."""
        return float(np.percentile(self.samples_ms, 10))

    @property
    def p90_ms(self) -> float:
        """The 90th percentile in milliseconds."""
        return float(np.percentile(self.samples_ms, 90))

    def latency(
        self,
        *,
        runtime: str,
        threads: int,
        input_shapes: dict[str, list[int]] | None = None,
        baseline: Timing | None = None,
        baseline_name: str | None = None,
    ) -> Latency:
        """The entry of a record; with ``baseline``, timed in the same run, also the ratio of the medians."""
        from onnxslim.record import Latency

        return Latency(
            runtime=runtime,
            threads=threads,
            median_ms=self.median_ms,
            p10_ms=self.p10_ms,
            p90_ms=self.p90_ms,
            samples_ms=self.samples_ms,
            warmup_runs=self.warmup_runs,
            input_shapes=input_shapes or {},
            ratio=None if baseline is None else self.median_ms / baseline.median_ms,
            baseline=None if baseline is None else baseline_name,
        )


def interleaved_latency(
    runners: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 50,
    warmup: int = 5,
    min_seconds: float = 0.5,
    max_seconds: float = 30.0,
) -> dict[str, Timing]:
    """Time runners in turn, so that what slows the machine down for a while slows all of them alike.

    Every round runs each runner once, starting one further along than the round before. Rounds go on until there are
    ``repeats`` of them and ``min_seconds`` have passed, or until ``max_seconds`` have, warm-up included; a runner is
    timed at least once. Thread counts are for the caller to pin when making the runners.

    Args:
        runners: name -> a call without arguments that runs one inference.
        repeats: timed rounds wanted.
        warmup: untimed rounds before those.
        min_seconds: time at least as long as this, for short inferences.
        max_seconds: stop after this long even with fewer rounds.
    """
    names = list(runners)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    warmed = 0
    while warmed < warmup and (warmed == 0 or time.perf_counter() - start < max_seconds / 2):
        for name in names:
            runners[name]()
        warmed += 1
    timed_from = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(sys.maxsize):
            now = time.perf_counter()
            enough = done >= repeats and now - timed_from >= min_seconds
            if done and (enough or now - start >= max_seconds):
                break
            offset = done % len(names) if names else 0
            for name in names[offset:] + names[:offset]:
                begin = time.perf_counter_ns()
                runners[name]()
                samples[name].append((time.perf_counter_ns() - begin) / 1e6)
            if not names:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(samples[name], warmed) for name in names}


# ---------------------------------------------------------------------------------------------------------- memory

# Runs in a fresh process. VmHWM belongs to the process image; ru_maxrss would still hold the parent's peak after exec.
_PEAK_SCRIPT = """
import json, os, sys
import numpy, onnxruntime

def peak():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        import psutil
        return psutil.Process().memory_info().peak_wset

model, feed_path, threads, cap = sys.argv[1], sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4])
with numpy.load(feed_path, allow_pickle=False) as arrays:
    feed = {name[5:]: arrays[name] for name in arrays.files}
before = peak()
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = threads
def load(source):
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

try:
    session = load(model)
except Exception as error:
    if "Unsupported model IR version" not in str(error):
        raise
    folder = os.path.dirname(model)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    with open(model, "rb") as file:
        session = load(file.read() + cap)
for _ in range(2):
    session.run(None, feed)
print(json.dumps(peak() - before))
"""


def peak_memory(
    model_path: str | Path, feed: Mapping[str, np.ndarray], *, threads: int = 1, timeout: float = 300.0
) -> int | None:
    """Peak resident bytes of a fresh process that loads a model file and runs it twice, above the same process before.

    Args:
        model_path: an ONNX file; its IR version is capped in memory where ONNX Runtime reads none that new.
        feed: one inference.
        threads: threads inside one operator; each brings buffers of its own.
        timeout: seconds after which the measurement is given up.

    Returns:
        Bytes, or None where it cannot be measured: the file does not run, the time is up, the system tells nothing.
    """
    with tempfile.TemporaryDirectory(prefix="onnxslim-", ignore_cleanup_errors=True) as folder:
        feed_path = Path(folder) / "feed.npz"
        # A prefix, because savez has parameters of its own that an input may be named like.
        arrays: dict[str, Any] = {f"feed:{name}": _storable(value) for name, value in feed.items()}
        if any(value.dtype.kind in "OV" for value in arrays.values()):
            return None
        np.savez(feed_path, **arrays)
        cap = onnx.ModelProto(ir_version=max_ir_version()).SerializeToString().hex()
        arguments = [str(Path(model_path).resolve()), str(feed_path), str(threads), cap]
        command = [sys.executable, "-c", _PEAK_SCRIPT, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, check=True, cwd=folder)
            peak = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.SubprocessError, OSError, ValueError, IndexError):
            return None
    return int(peak) if peak > 0 else None


def _storable(value: np.ndarray) -> np.ndarray:
    """Strings as fixed-width text, which needs no pickle; the rest as it is."""
    return value.astype(np.str_) if value.dtype == object else value


# ----------------------------------------------------------------------------------------------------- environment

_CPU_FEATURES = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni", "avx_vnni_int8", "amx_int8", "amx_bf16", "asimd", "neon", "asimdhp", "asimddp", "i8mm", "bf16",
    "sve", "sve2", "sme", "v",
)  # fmt: skip


def usable_cores() -> int:
    """Processors that this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """What a measurement depends on: versions, system, processor, load and memory, for the record.

    TVM's version comes from its package metadata; TVM itself is not loaded.
    """
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("onnxslim", "numpy", "onnx", "onnxruntime", "onnx-graphsurgeon", "apache-tvm"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    model, features = _processor()
    found["system"] = platform.platform()
    found["machine"] = platform.machine()
    found["cpu"] = model
    found["cpu features"] = features or "unknown"
    found["cores"] = _cores()
    try:
        found["load"] = " ".join(f"{value:.2f}" for value in os.getloadavg())
    except (AttributeError, OSError):
        found["load"] = "unknown"
    import psutil

    memory = psutil.virtual_memory()
    found["memory"] = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"
    return found


def _cores() -> str:
    import psutil

    logical = os.cpu_count() or 0
    physical = psutil.cpu_count(logical=False)
    usable = usable_cores()
    return f"{usable} usable, {logical} logical, {physical if physical else 'unknown'} physical"


def _processor() -> tuple[str, str]:
    """The name of the processor and which of the features that matter here it has."""
    model, flags = platform.processor() or "unknown", set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = _sysctl()
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "Model", "machdep.cpu.brand_string"):
            model = value
        elif key in ("flags", "Features", "machdep.cpu.features", "machdep.cpu.leaf7_features"):
            flags |= set(value.lower().split())
        elif key.startswith("hw.optional.") and value == "1":
            flags.add(key.rsplit(".", 1)[1].lower().removeprefix("feat_"))
    return model, " ".join(name for name in _CPU_FEATURES if name in flags)


def _sysctl() -> str:
    """What macOS says of its processor; empty elsewhere."""
    if sys.platform != "darwin":
        return ""
    try:
        return subprocess.run(["/usr/sbin/sysctl", "-a"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
