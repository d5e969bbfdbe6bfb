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


if __name__ == "__main__":
    tool, model, result, data, said = sys.argv[1:]
    wanted = [(name, float(amount)) for name, _, amount in (step.partition("=") for step in said.split(","))]
    {"ours": ours, "onnxsim": onnxsim}[tool](model, result, data, wanted)
