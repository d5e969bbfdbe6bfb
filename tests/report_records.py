"""Records as real runs leave them, for the tests of the report."""

from __future__ import annotations

import math
import random

from onnxslim.record import (
    Check,
    DataEntry,
    GoalEntry,
    GraphDifference,
    GraphPlace,
    Interval,
    KernelTime,
    Latency,
    LayerError,
    LayerSize,
    NodeChanges,
    PassEntry,
    Profile,
    Record,
    Rewritten,
    Score,
    Snapshot,
    TargetEntry,
    TensorChange,
    UndoneEntry,
)

HOSTILE = (
    "</script></style></title><img src=x onerror=alert(1)>\"'`&amp; $x^2$ javascript:alert(1) http://evil.example/"
)


def wilson(share: float, samples: int) -> Interval:
    z = 1.96
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2)) / (1 + z * z / samples)
    return Interval(low=middle - half, high=middle + half, method="Wilson")


def score(share: float, *, metric: str = "top1", samples: int = 2000, labelled: bool = True) -> Score:
    return Score(metric=metric, value=share, interval=wilson(share, samples), samples=samples, labelled=labelled)


def latency(
    median: float, *, runtime: str = "onnxruntime", spread: float = 0.04, runs: int = 100, **more: object
) -> Latency:
    source = random.Random(f"{median}{runtime}")
    times = [median * (1 + spread * source.gauss(0, 1) + (0.3 if source.random() < 0.04 else 0)) for _ in range(runs)]
    ranked = sorted(times)
    return Latency(
        runtime=runtime,
        threads=2,
        median_ms=ranked[runs // 2],
        p10_ms=ranked[runs // 10],
        p90_ms=ranked[runs * 9 // 10],
        samples_ms=times,
        warmup_runs=10,
        input_shapes={"image": [1, 3, 224, 224]},
        **more,  # type: ignore[arg-type]
    )


def layers(number: int, shrink: float = 1.0) -> list[LayerSize]:
    made = []
    for place in range(number):
        wide = 16 * 2 ** min(5, place * 6 // max(number, 1))
        parameters = wide * wide * (9 if place % 3 == 0 else 1) + wide
        made.append(
            LayerSize(
                name=f"/features/features.{place // 3}/conv/conv.{place % 3}/Conv",
                op="Conv" if place < number - 1 else "Gemm",
                parameters=parameters,
                bytes=int(parameters * 4 * shrink) + (8 * wide if shrink < 1 else 0),
                macs=parameters * 784,
            )
        )
    return made


def errors(number: int) -> list[LayerError]:
    source = random.Random(7)
    made = []
    for place in range(number):
        level = 46 - 18 * place / number + source.gauss(0, 2.2) - (14 if place in (number // 3, number // 3 + 1) else 0)
        made.append(
            LayerError(
                tensor=f"/features/features.{place}/Clip_output_0",
                node=f"/features/features.{place}/Clip",
                op="Clip" if place % 2 else "Conv",
                sqnr_db=None if place < 2 else level,
                cosine=1.0 if place < 2 else 1 - 10 ** (-level / 10) / 2,
                max_abs_error=0.0 if place < 2 else 10 ** (-level / 20) * 3,
            )
        )
    return made


def snapshot(path: str, *, size: int, depth: int = 52, shrink: float = 1.0, **more: object) -> Snapshot:
    parts = layers(depth, shrink)
    values: dict[str, object] = {
        "path": path,
        "sha256": ("ab12" if shrink == 1 else "cd34") * 16,
        "size_bytes": size,
        "nodes": 157 if shrink == 1 else 205,
        "parameters": sum(layer.parameters for layer in parts),
        "macs": sum(layer.macs or 0 for layer in parts),
        "opset": 17,
        "ir_version": 8,
        "layers": parts,
    }
    return Snapshot(**{**values, **more})  # type: ignore[arg-type]


def entry(name: str, before: int, after: int, **more: object) -> PassEntry:
    values: dict[str, object] = {
        "name": name,
        "options": {},
        "lossless": True,
        "status": "kept",
        "reason": "Outputs are the same over 8 inputs.",
        "seconds": 0.8,
        "size_before": before,
        "size_after": after,
        "nodes_before": 157,
        "nodes_after": 157,
        "parameters_before": 3_500_000,
        "parameters_after": 3_500_000,
    }
    return PassEntry(**{**values, **more})  # type: ignore[arg-type]


def difference(places: int = 52, kinds: int = 1, names: str = "/features") -> GraphDifference:
    """Convolutions that took in their BatchNormalizations, one changed attribute, one changed weight."""
    made = [
        GraphPlace(before=[f"{names}/{i}/Conv", f"{names}/{i}/BatchNormalization"], after=[f"{names}/{i}/Conv"])
        for i in range(places)
    ]
    pieces = [
        Rewritten(before={"Conv": 1, "BatchNormalization": 1}, after={"Conv": 1 + kind}, places=made)
        for kind in range(kinds)
    ]
    changed = [
        NodeChanges(op="Gemm", what=f"attribute alpha: 1.0 → {2.0 + kind}", places=made) for kind in range(kinds)
    ]
    tensors = [
        TensorChange(
            status="changed",
            name=f"{names}/{i}/weight",
            before="float32 [32, 3, 3, 3]",
            after="float16 [32, 3, 3, 3]",
            bytes_before=3456,
            bytes_after=1728,
        )
        for i in range(places)
    ]
    return GraphDifference(
        same=False,
        nodes_before=157,
        nodes_after=105,
        matched=105,
        renamed=3,
        rewritten=pieces,
        changed=changed,
        tensors=tensors,
        constants_added=52,
        constants_removed=260,
        bytes_added=13_500_000,
        bytes_removed=14_000_000,
        interface=["input 'image': float32 [N, 3, 224, 224] → float32 [1, 3, 224, 224]"],
    )


def profile(kernels: int) -> Profile:
    """The first kernel computes, the last one is of the runtime and has no counts."""
    share = 1 / kernels
    rows = [
        KernelTime(
            name=f"fused_convolution{i}_add_relu",
            op="convolution add relu",
            shape=[1, 56, 56, 64],
            calls=2,
            ms=3.0 * share,
            share=share,
            flops_per_second=58.2e9,
            peak_share=0.6,
            bytes_per_second=7.5e9,
            writer="onnxslim",
        )
        for i in range(kernels - 1)
    ]
    rest = KernelTime(name="memory", op="memory, shapes, checks", calls=9, ms=3.0 * share, share=share)
    return Profile(threads=2, inferences=50, peak_flops_per_second=97e9, kernels=[*rows, rest])


def goals_met() -> Record:
    ops = {"Conv": 52, "Clip": 35, "Add": 10, "BatchNormalization": 52, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    slim_ops = {"Conv": 52, "Clip": 35, "Add": 10, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    slim_ops |= {"QuantizeLinear": 99, "DequantizeLinear": 204}
    before, after = score(0.7185), score(0.7150)
    return Record(
        tool_version="0.1.0",
        created="2025-06-01T12:00:00Z",
        seconds=312.4,
        command="onnxslim optimize mobilenetv2.onnx --output out --data imagenet-2k.npz --target native --seed 0",
        recipe={
            "model": "mobilenetv2.onnx",
            "seed": 0,
            "goals": {"max_accuracy_drop": 0.01, "max_size": "4 MB", "max_latency": None},
            "pass": [{"name": "simplify"}, {"name": "quantize-static", "per_channel": True, "skip": []}],
            "target": [{"name": "native", "max_latency": "5 ms"}],
        },
        verdict="met",
        summary="3.8 times smaller and 2.1 times faster; top-1 stays within the confidence interval.",
        goals=[
            GoalEntry(
                name="max_accuracy_drop",
                wanted="≤ 1.00 points",
                achieved="0.35 points",
                met=True,
                detail="0.65 points to spare; 95 % CI of the drop −0.2 to 0.9 points",
            ),
            GoalEntry(name="max_size", wanted="≤ 4 MB", achieved="3.66 MB", met=True, detail="0.34 MB to spare"),
            GoalEntry(
                name="native: max_latency", wanted="≤ 5 ms", achieved="3.10 ms", met=True, detail="1.9 ms to spare"
            ),
        ],
        before=snapshot(
            "models/mobilenetv2.onnx",
            size=13_964_571,
            ops=ops,
            score=before,
            latency=latency(6.6),
            peak_memory_bytes=68_400_000,
        ),
        after=snapshot(
            "out/model.onnx",
            size=3_655_012,
            shrink=0.25,
            ops=slim_ops,
            score=after,
            latency=latency(3.1, ratio=0.47, baseline="original in onnxruntime"),
            peak_memory_bytes=31_200_000,
        ),
        passes=[
            entry(
                "fuse-batch-norm",
                13_964_571,
                13_826_300,
                changes=[
                    {
                        "rule": "conv-batch-norm",
                        "node": f"/features/features.{i}/Conv",
                        "what": "BatchNormalization folded into it",
                    }
                    for i in range(52)
                ],
                undone=[
                    UndoneEntry(
                        rule="conv-batch-norm",
                        node="/features/features.52/Conv",
                        why="output 'logits' is off by 0.3 (allowed 0.001, value 2.5)",
                    )
                ],
                nodes_after=105,
                checks=[
                    Check(name="onnx.checker", ok=True, detail="valid at opset 17"),
                    Check(name="same outputs", ok=True, detail="max difference 2.1e-6 over 8 inputs and 3 batch sizes"),
                ],
            ),
            entry(
                "fold-constants",
                13_826_300,
                13_826_300,
                status="no change",
                reason="Nothing depends on constants alone.",
                refusals=[{"rule": "fold", "node": f"/Shape_{i}", "why": "depends on the input"} for i in range(4)],
                cached=True,
                seconds=0.02,
            ),
            entry(
                "quantize-static",
                13_826_300,
                3_655_012,
                lossless=False,
                options={
                    "per_channel": True,
                    "activations": "uint8",
                    "skip": ["/classifier/Gemm"],
                    "percentile": 99.99,
                },
                reason="Top-1 fell 0.35 points, within the 1 point that the goal allows.",
                seconds=48.2,
                attempts=2,
                nodes_before=105,
                nodes_after=205,
                changes=[
                    {
                        "rule": "quantize-weights",
                        "node": f"/features/features.{i}/Conv",
                        "what": "int8, per channel, scale 0.0021",
                    }
                    for i in range(52)
                ]
                + [
                    {"rule": "quantize-activations", "node": f"t{i}", "what": "uint8, zero point 114"}
                    for i in range(99)
                ],
                refusals=[{"rule": "quantize-weights", "node": "/classifier/Gemm", "why": "named in skip"}],
                numbers={"weights quantized": 52, "calibration samples": 256, "mean SQNR in dB": 31.4},
                checks=[Check(name="accuracy budget", ok=True, detail="0.35 of 1 point used")],
                score_before=before,
                score_after=after,
            ),
        ],
        targets=[
            TargetEntry(
                name="native",
                description="x86-64-v4, AVX-512 VNNI, 2 cores",
                status="verified",
                bundle="targets/native",
                bundle_bytes=5_120_400,
                library_bytes=4_012_000,
                compile_seconds=33.1,
                latency=latency(3.1, runtime="tvm", ratio=0.94, baseline="ONNX Runtime on the same file"),
                reference_latency=latency(3.3),
                profile=profile(60),
                max_abs_error=0.0312,
                sqnr_db=48.7,
                score=after,
                where="this machine",
                notes=["52 of 52 convolutions run in int8."],
            ),
            TargetEntry(
                name="raspberry-pi-4",
                description="Cortex-A72, 4 cores, aarch64",
                status="compiled, not run",
                reason="No device was given.",
                bundle="targets/raspberry-pi-4",
                bundle_bytes=4_800_000,
                library_bytes=3_900_000,
                compile_seconds=41.0,
            ),
        ],
        layer_errors=errors(70),
        difference=difference(),
        data=[
            DataEntry(
                role="calibration",
                path="calib.npz",
                sha256="11" * 32,
                samples=256,
                inputs={"image": "float32 3×224×224"},
            ),
            DataEntry(
                role="evaluation",
                path="imagenet-2k.npz",
                sha256="22" * 32,
                samples=2000,
                inputs={"image": "float32 3×224×224"},
            ),
        ],
        warnings=["The machine was busy while latency was measured (load 1.7 on 2 cores)."],
        not_measured=["Latency on raspberry-pi-4: no device was given."],
        environment={
            "onnxruntime": "1.31.1",
            "tvm": "0.27.0",
            "CPU": "AMD EPYC 9B14",
            "cores": "2",
            "load": "1.7",
            "Python": "3.11.2",
        },
    )


def goals_missed() -> Record:
    """A pass that was rolled back, a target that cannot compile the model, one that failed, a goal without a value."""
    record = goals_met()
    bad = score(0.6121)
    rolled = entry(
        "prune-channels",
        3_655_012,
        2_410_000,
        status="rolled back",
        lossless=False,
        reason="Top-1 fell 10.6 points at the weakest strength tried; the goal allows 1.",
        attempts=3,
        options={"ratio": 0.3},
        seconds=75.0,
        parameters_after=2_400_000,
        score_before=score(0.7150),
        score_after=bad,
        checks=[Check(name="accuracy budget", ok=False, detail="10.6 of 1 point used")],
        changes=[{"rule": "drop-channels", "node": "/features/features.1/Conv", "what": "96 → 67 channels"}],
    )
    failed = entry(
        "factorize-low-rank", 3_655_012, 3_655_012, status="failed", lossless=False, reason="The SVD did not converge."
    )
    return record.model_copy(
        update={
            "verdict": "not met",
            "summary": "Accuracy holds, but the file is larger than wanted.",
            "goals": [
                record.goals[0],
                GoalEntry(name="max_size", wanted="≤ 3 MB", achieved="3.66 MB", met=False, detail="0.66 MB too large"),
                GoalEntry(
                    name="raspberry-pi-4: max_latency", wanted="≤ 40 ms", achieved="", met=None, detail="was not run"
                ),
            ],
            "passes": [*record.passes, rolled, failed],
            "targets": [
                *record.targets,
                TargetEntry(
                    name="webgpu",
                    description="WebGPU compute shaders",
                    status="unsupported",
                    reason="TVM has no importer for 2 ops of this model.",
                    unsupported_ops={"LSTM": [f"/encoder/LSTM_{i}" for i in range(9)], "Loop": ["/decoder/Loop"]},
                ),
                TargetEntry(
                    name="metal", description="Apple GPU", status="failed", reason="The Metal compiler is missing."
                ),
            ],
        }
    )


def no_labels() -> Record:
    record = goals_met()
    names = {"metric": "top-1 agreement", "labelled": False}
    before = record.before.model_copy(update={"score": score(1.0, **names)})  # type: ignore[arg-type]
    after = record.after.model_copy(update={"score": score(0.9420, **names)})  # type: ignore[arg-type]
    return record.model_copy(
        update={
            "before": before,
            "after": after,
            "data": record.data[:1],
            "not_measured": [
                "Accuracy on labels: the evaluation data has none, so agreement with the original stands in."
            ],
        }
    )


def no_goals() -> Record:
    return goals_met().model_copy(update={"verdict": "no goals", "goals": [], "summary": "", "warnings": []})


def nothing_measured() -> Record:
    """Every optional field at its default."""
    bare = {"sha256": "0" * 64, "nodes": 3, "parameters": 0, "opset": 13, "ir_version": 7}
    return Record(
        tool_version="0.1.0",
        created="2025-06-01T12:00:00Z",
        command="onnxslim optimize tiny.onnx",
        recipe={},
        before=Snapshot(path="tiny.onnx", size_bytes=420, **bare),  # type: ignore[arg-type]
        after=Snapshot(path="out/model.onnx", size_bytes=420, **bare),  # type: ignore[arg-type]
    )


def hostile() -> Record:
    """Everything that a stranger can name is hostile markup."""
    record = goals_missed()

    def poison(value: object) -> object:
        if isinstance(value, dict):
            return {f"{key} {HOSTILE}": poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return f"{HOSTILE} {value}" if isinstance(value, str) else value

    strict = {"status", "role", "verdict", "schema_version"}

    def walk(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: item
                if key in strict
                else poison(item)
                if key
                in ("options", "numbers", "recipe", "environment", "inputs", "input_shapes", "unsupported_ops", "ops")
                else [{name: f"{HOSTILE} {text}" for name, text in line.items()} for line in item]
                if key in ("changes", "refusals")
                else walk(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [walk(item) for item in value]
        return f"{HOSTILE} {value}" if isinstance(value, str) else value

    return Record.model_validate(walk(record.model_dump()))


def large(depth: int = 500) -> Record:
    """A model of 500 layers, whose passes touched everything and said why at length."""
    record = goals_missed()
    deep = f"/model/{'/'.join(f'block_{i}' for i in range(12))}/layer"
    passes = []
    for number in range(14):
        passes.append(
            record.passes[2].model_copy(
                update={
                    "name": f"pass-{number}",
                    "changes": [
                        {
                            "rule": f"rule-{i % 9}",
                            "node": f"{deep}_{i}/MatMul",
                            "what": f"rewrote number {i} of many, at length",
                        }
                        for i in range(4 * depth)
                    ],
                    "refusals": [
                        {"rule": "r", "node": f"{deep}_{i}", "why": f"reason {i % 40}"} for i in range(2 * depth)
                    ],
                }
            )
        )

    def renamed(parts: list[LayerSize]) -> list[LayerSize]:
        return [part.model_copy(update={"name": f"{deep}_{i}/MatMul"}) for i, part in enumerate(parts)]

    targets = [
        record.targets[0].model_copy(
            update={
                "name": f"target-{i}",
                "latency": latency(3.0 + i, runs=1000),
                "reference_latency": latency(4.0 + i, runs=1000),
            }
        )
        for i in range(12)
    ]
    return record.model_copy(
        update={
            "before": record.before.model_copy(update={"layers": renamed(layers(depth))}),
            "after": record.after.model_copy(update={"layers": renamed(layers(depth, 0.25))}),
            "passes": passes,
            "targets": targets,
            "difference": difference(places=4 * depth, kinds=60, names=deep),
            "layer_errors": [
                error.model_copy(update={"tensor": f"{deep}_{i}/MatMul_output_0", "node": f"{deep}_{i}/MatMul"})
                for i, error in enumerate(errors(4 * depth))
            ],
        }
    )
