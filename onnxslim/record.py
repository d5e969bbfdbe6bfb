"""What was found: the typed record of a run, the one source of the report.

Everything that a run measured, decided and could not measure is in a :class:`Record`; ``record.json`` is its
serialisation, and the HTML report is a pure function of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxslim.errors import RecipeError

__all__ = [
    "Check",
    "DataEntry",
    "GoalEntry",
    "GraphDifference",
    "GraphPlace",
    "Interval",
    "KernelTime",
    "Latency",
    "LayerError",
    "LayerSize",
    "NodeChanges",
    "PassEntry",
    "Profile",
    "Record",
    "Rewritten",
    "Score",
    "Snapshot",
    "TargetEntry",
    "TensorChange",
    "UndoneEntry",
]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)  # most commands use a few of these


class Interval(_Entry):
    """A confidence interval."""

    low: float
    high: float
    level: float = 0.95
    method: str = Field(description="how it was computed, such as 'Wilson' or 'bootstrap, 500 resamples'")


class Score(_Entry):
    """Accuracy of one model file on the evaluation data."""

    metric: str
    value: float
    interval: Interval | None = None
    samples: int
    labelled: bool = Field(description="False: agreement with the original model, because there were no labels")


class Latency(_Entry):
    """Time of one inference, measured interleaved with the baseline in one process."""

    runtime: str = Field(description="'onnxruntime' or 'tvm'")
    threads: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    samples_ms: list[float] = Field(default_factory=list, description="every timed run, in order, warm-up excluded")
    warmup_runs: int = 0
    input_shapes: dict[str, list[int]] = Field(default_factory=dict)
    ratio: float | None = Field(
        default=None, description="median of this over the baseline's in the same run; < 1: faster"
    )
    baseline: str | None = Field(default=None, description="what the ratio is to, such as 'original in onnxruntime'")


class KernelTime(_Entry):
    """One function of a compiled model, as timed over whole inferences."""

    name: str
    op: str = Field(description="its steps, such as 'convolution add relu'")
    shape: list[int | str] = Field(default_factory=list, description="of its result")
    calls: int = Field(description="in one inference")
    ms: float = Field(description="of all its calls in one inference, median")
    share: float = Field(description="of the time of all calls")
    flops_per_second: float | None = Field(default=None, description="None: nothing to compute, or sizes are open")
    peak_share: float | None = Field(default=None, description="of what the same threads reach on numbers in registers")
    bytes_per_second: float | None = Field(default=None, description="arguments read and results written")
    writer: str = Field(default="", description="who wrote its loops: 'onnxslim' or 'tvm'; empty: not a kernel")


class Profile(_Entry):
    """Where the time of an inference goes."""

    threads: int
    inferences: int = Field(description="how many were timed call by call")
    peak_flops_per_second: float = Field(description="measured, float32, on numbers in registers")
    kernels: list[KernelTime] = Field(description="those that take longest first")

    @property
    def ms(self) -> float:
        """Time of all calls in one inference."""
        return sum(kernel.ms for kernel in self.kernels)


class LayerSize(_Entry):
    """One node that holds weights or does arithmetic."""

    name: str
    op: str
    parameters: int
    bytes: int
    macs: int | None = Field(default=None, description="estimate: multiply-accumulates of one inference")


class LayerError(_Entry):
    """How far one tensor of the result is from the same tensor of the original, on evaluation or calibration feeds."""

    tensor: str
    node: str
    op: str
    sqnr_db: float | None = Field(description="10 log10(signal / error power); None when the two are equal")
    cosine: float
    max_abs_error: float


class Snapshot(_Entry):
    """One model file: what it is and what was measured on it."""

    path: str
    sha256: str
    size_bytes: int = Field(description="bytes on disk, external data included")
    nodes: int
    parameters: int
    macs: int | None = Field(default=None, description="estimate: multiply-accumulates of one inference")
    opset: int
    ir_version: int
    ops: dict[str, int] = Field(default_factory=dict, description="how many nodes of each op, subgraphs included")
    layers: list[LayerSize] = Field(default_factory=list)
    score: Score | None = None
    latency: Latency | None = None
    peak_memory_bytes: int | None = Field(
        default=None, description="of a fresh process that loads and runs it in ONNX Runtime, above the interpreter"
    )


class Check(_Entry):
    """One guard: what was checked, whether it held, and a sentence on it."""

    name: str
    ok: bool
    detail: str


class UndoneEntry(_Entry):
    """One rewrite of a lossless pass that the guard found to be wrong, by bisection, and that was left out."""

    rule: str
    node: str
    why: str = Field(description="the check that does not hold with it, and the output that it breaks")


class PassEntry(_Entry):
    """One pass of the run, in order."""

    name: str
    options: dict[str, Any]
    lossless: bool
    status: Literal["kept", "rolled back", "no change", "failed"]
    reason: str = Field(description="why it was kept, rolled back or changed nothing; one sentence")
    seconds: float
    cached: bool = Field(default=False, description="taken from an earlier, identical run")
    attempts: int = Field(default=1, description="how many strengths were tried")
    changes: list[dict[str, str]] = Field(default_factory=list, description="rule, node, what")
    refusals: list[dict[str, str]] = Field(default_factory=list, description="rule, node, why")
    undone: list[UndoneEntry] = Field(default_factory=list, description="rewrites left out because they are wrong")
    numbers: dict[str, float] = Field(default_factory=dict)
    plan: dict[str, Any] | None = Field(default=None, description="what the pass decided, for doing it again")
    checks: list[Check] = Field(default_factory=list)
    size_before: int
    size_after: int
    nodes_before: int
    nodes_after: int
    parameters_before: int
    parameters_after: int
    score_before: Score | None = None
    score_after: Score | None = Field(default=None, description="of what the pass made, also when it was rolled back")


class GraphPlace(_Entry):
    """One place where two graphs differ: the names of the nodes there, before and after."""

    before: list[str]
    after: list[str]


class Rewritten(_Entry):
    """Connected nodes that became others; what happened alike in several places is one entry."""

    before: dict[str, int] = Field(description="op -> nodes, in graph order")
    after: dict[str, int] = Field(description="op -> nodes; 'constant' for what is a stored tensor now")
    places: list[GraphPlace]

    @property
    def sentence(self) -> str:
        """What became what, in words."""
        return f"{_in_words(self.before)} became {_in_words(self.after)}"


_NAMED_OPS = 6


def _in_words(ops: dict[str, int]) -> str:
    """Ops with their counts: ``Conv + BatchNormalization``, ``2 Shape + 2 Gather + … (46 nodes)``, ``nothing``."""
    parts = [op if count == 1 else f"{count} {op}{'s' * (op == 'constant')}" for op, count in ops.items()]
    if len(parts) <= _NAMED_OPS:
        return " + ".join(parts) or "nothing"
    return f"{' + '.join(parts[:_NAMED_OPS])} + … ({sum(ops.values())} nodes)"


class NodeChanges(_Entry):
    """Nodes that are there in both graphs and differ in the same way."""

    op: str
    what: str = Field(description="such as 'attribute axis: 1 → 2' or 'input 1: float32 → float16'")
    places: list[GraphPlace]


class TensorChange(_Entry):
    """One constant of at least 1 KiB that only one graph has, or that holds something else in the other."""

    status: Literal["added", "removed", "changed"]
    name: str
    before: str | None = Field(description="dtype and shape")
    after: str | None
    bytes_before: int
    bytes_after: int


class GraphDifference(_Entry):
    """Which nodes of one graph became which of another."""

    same: bool = Field(description="equal but for names")
    nodes_before: int
    nodes_after: int
    matched: int = Field(description="nodes that are there in both")
    renamed: int = Field(description="of those, the ones of another name or with outputs of other names")
    rewritten: list[Rewritten] = Field(description="the most frequent first")
    changed: list[NodeChanges] = Field(description="the most frequent first")
    tensors: list[TensorChange] = Field(description="the largest first")
    constants_added: int = Field(description="constants of any size that only the second graph has")
    constants_removed: int
    bytes_added: int
    bytes_removed: int
    interface: list[str] = Field(description="how inputs and outputs differ, one sentence each")

    @property
    def sentence(self) -> str:
        """How much of the graph is still there, in words."""
        renamed = f", {self.renamed:,} of them under other names" if self.renamed else ""
        if self.same:
            return f"The same graph: {self.matched:,} nodes{renamed}."
        return (
            f"{self.nodes_before:,} nodes became {self.nodes_after:,}; {self.matched:,} are there in both{renamed}. "
            f"Constants: {self.constants_removed:,} gone, {self.constants_added:,} new."
        )


class TargetEntry(_Entry):
    """One hardware target of the run."""

    name: str
    description: str
    status: Literal["verified", "compiled, not run", "unsupported", "failed"]
    reason: str = ""
    unsupported_ops: dict[str, list[str]] = Field(default_factory=dict, description="op -> nodes that TVM lacks")
    bundle: str | None = Field(default=None, description="folder, relative to the output folder")
    bundle_bytes: int | None = None
    library_bytes: int | None = None
    compile_seconds: float | None = None
    latency: Latency | None = None
    reference_latency: Latency | None = Field(
        default=None, description="ONNX Runtime on the same model file, same threads, interleaved"
    )
    profile: Profile | None = Field(default=None, description="where the time goes; None: it was not run here")
    max_abs_error: float | None = Field(default=None, description="against ONNX Runtime on the same model file")
    sqnr_db: float | None = None
    score: Score | None = None
    where: str = Field(default="", description="where it ran: 'this machine', 'qemu-aarch64', …")
    notes: list[str] = Field(default_factory=list)


class GoalEntry(_Entry):
    """One goal and whether it was met; ``met`` is None where it could not be measured, which counts as not met."""

    name: str
    wanted: str
    achieved: str
    met: bool | None
    detail: str = ""


class DataEntry(_Entry):
    """One set of data of the run."""

    role: Literal["calibration", "evaluation"]
    path: str
    sha256: str
    samples: int
    inputs: dict[str, str] = Field(default_factory=dict, description="input -> dtype and shape of one sample")


class Record(_Entry):
    """Everything that one run of the main job found."""

    schema_version: Literal[1] = 1
    tool_version: str
    created: str = Field(description="ISO 8601, UTC")
    seconds: float = 0.0
    command: str = Field(description="the command that reproduces the run")
    recipe: dict[str, Any] = Field(description="the recipe with every default resolved")
    verdict: Literal["met", "not met", "no goals"] = "no goals"
    summary: str = Field(default="", description="one sentence for the top of the report")
    goals: list[GoalEntry] = Field(default_factory=list)
    before: Snapshot
    after: Snapshot
    passes: list[PassEntry] = Field(default_factory=list)
    targets: list[TargetEntry] = Field(default_factory=list)
    layer_errors: list[LayerError] = Field(default_factory=list)
    difference: GraphDifference | None = Field(default=None, description="of the original's graph and the result's")
    data: list[DataEntry] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    not_measured: list[str] = Field(default_factory=list, description="what the report does not show, and why")
    environment: dict[str, str] = Field(default_factory=dict, description="versions, CPU, cores, load, …")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read ``record.json``.

        Raises:
            RecipeError: the file is missing or is not a record of this version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror}). Run `onnxslim optimize` first.") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise RecipeError(f"{path}: not a record of this version of onnxslim ({where}: {first['msg']}).") from None
