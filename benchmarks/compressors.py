"""Make one model smaller with one tool: what ``compression.py`` runs, in the tool's own environment, and measures.

``python compressors.py TOOL SOURCE TARGET FEEDS STEPS``: FEEDS is a folder of ``.npz`` files, one feed each; STEPS are
passes and how strong they are, such as ``prune=0.3,codebook=4``: the share of the channels to remove, the share of the
parameters of what can be factorised to keep (``low-rank``), the bits of an index. Nothing is imported but what the tool
needs. A peer without a step fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_CALIBRATION_SAMPLES = 8  # what onnxsim takes by default; all of ours make no difference to it but in time


def _feeds(folder: str) -> Iterator[dict[str, np.ndarray]]:
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as arrays:
            yield dict(arrays)


def ours(source: str, target: str, folder: str, steps: list[tuple[str, float]]) -> None:
    """What ``onnxslim optimize`` does with these passes, without its measuring."""
    import onnxslim
    from onnxslim.data import open_dataset
    from onnxslim.passes import Context, FactorizeLowRank, FoldConstants, PruneChannels, ShareWeights, Simplify
    from onnxslim.runtime import Session

    made = {
        "prune": lambda amount: PruneChannels(ratio=amount),
        "prune-size": lambda amount: PruneChannels(ratio=amount, cost="parameters"),
        "low-rank": lambda amount: FactorizeLowRank(keep=amount, cost="parameters"),
        "codebook": lambda amount: ShareWeights(bits=int(amount)),
    }
    model = onnxslim.load(source)
    data = open_dataset(folder, Session(source).specs)
    for step in (FoldConstants(), Simplify(), *(made[name](amount) for name, amount in steps)):
        outcome = step.run(model, Context(calibration=data))
    for refusal in outcome.refusals:
        print(refusal.node, refusal.why)
    print(outcome.numbers)
    model.save(target)


def onnxsim(source: str, target: str, folder: str, steps: list[tuple[str, float]]) -> None:
    """Wanda's criterion for whole channels, and the fine-tuning that goes with it."""
    import onnx
    from onnxsim import apply_pruning_finetune, apply_structured_wanda_pruning

    ((name, amount),) = steps
    if name not in ("prune", "prune-size"):
        raise ValueError(f"onnxsim has no {name}")
    samples = list(_feeds(folder))[:_CALIBRATION_SAMPLES]
    dense = onnx.load(source)
    pruned = apply_structured_wanda_pruning(dense, calibration_data=samples, sparsity=amount)
    onnx.save(apply_pruning_finetune(dense, pruned, calibration_data=samples), target)


def torch_pruning(source: str, target: str, folder: str, steps: list[tuple[str, float]]) -> None:
    """Torch-Pruning on what onnx2torch makes of the file: the coupled channels of least magnitude, its default.

    No fine-tuning, as that needs labels. What makes an output of the model is to keep all of its channels, which
    Torch-Pruning leaves to its user to say.
    """
    import onnx
    import torch
    import torch_pruning as tp
    from onnx2torch import convert

    ((name, amount),) = steps
    if name != "prune":
        raise ValueError(f"Torch-Pruning has no {name}")
    dense = onnx.load(source)
    network = convert(dense).eval()
    stored = {tensor.name for tensor in dense.graph.initializer}
    inputs, outputs = [tensor for tensor in dense.graph.input if tensor.name not in stored], list(dense.graph.output)
    feed = next(_feeds(folder))
    example = tuple(torch.from_numpy(feed[tensor.name]) for tensor in inputs)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(
        network, example, importance, pruning_ratio=amount, ignored_layers=_last_layers(network)
    ).step()
    torch.onnx.export(
        network,
        example,
        target,
        input_names=[tensor.name for tensor in inputs],
        output_names=[tensor.name for tensor in outputs],
        dynamic_axes={tensor.name: _free_axes(tensor) for tensor in (*inputs, *outputs)},
        dynamo=False,
    )


def _last_layers(network: Any) -> list[Any]:
    """The modules with weights behind which there are none on the way to an output."""
    modules, waiting, seen, found = dict(network.named_modules()), [], set(), []
    waiting.extend(next(node for node in network.graph.nodes if node.op == "output").all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is not None and getattr(module, "weight", None) is not None:
            found.append(module)
        else:
            waiting.extend(node.all_input_nodes)
    return found


def _free_axes(tensor: Any) -> dict[int, str]:
    sizes = enumerate(tensor.type.tensor_type.shape.dim)
    return {axis: size.dim_param or f"{tensor.name}_{axis}" for axis, size in sizes if not size.HasField("dim_value")}


if __name__ == "__main__":
    tool, model, result, data, said = sys.argv[1:]
    wanted = [(name, float(amount)) for name, _, amount in (step.partition("=") for step in said.split(","))]
    tools = {"ours": ours, "onnxsim": onnxsim, "torch-pruning": torch_pruning}
    tools[tool](model, result, data, wanted)
