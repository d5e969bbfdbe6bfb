"""Run the main job over pairs of a trained model and labelled data, and print what it did to each.

A pair is a Python module in a folder of your own::

    NAME = "my_model"
    def load(split):            # "calib" or "test" -> (path of the ONNX file, list of feeds, labels)
    def score(outputs, labels): # outputs[i][0] is the first output of feed i -> float, higher is better
    def run(session, feeds):    # optional: for feeds that depend on earlier outputs (recurrent state)
    def flat_feeds(split):      # optional: ordinary feeds of such a model, for calibration

Run as ``python benchmarks/pairs.py FOLDER -o out/ [--pass quantize-static …] [NAME …]``. Size, score and latency are of
the files on disk; latency is the median in ONNX Runtime, one thread, interleaved with the original.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime

import onnxslim


def main() -> None:
    """Parse, run every pair, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of pair modules")
    parser.add_argument("names", nargs="*", help="only these modules")
    parser.add_argument("-o", "--output", type=Path, default=Path("pairs-out"))
    parser.add_argument("--pass", dest="passes", action="append", help="NAME[:OPTION=VALUE,…]; repeatable")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.01)
    arguments = parser.parse_intermixed_args()
    sys.path.insert(0, str(arguments.folder))
    passes = arguments.passes or ["fold-constants", "simplify", "quantize-static"]
    print("| pair | size, kB | score | 1 thread, ms | passes | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for name in arguments.names or sorted(path.stem for path in arguments.folder.glob("p[0-9]*.py")):
        try:
            row = _row(importlib.import_module(name), passes, arguments.output / name, arguments.max_accuracy_drop)
        except FileNotFoundError as error:
            row = f"not here: {error.filename}"
        print(f"| {name} | {row} |", flush=True)


def _row(pair: ModuleType, passes: list[str], output: Path, budget: float) -> str:
    started = time.perf_counter()
    path, calibration, _ = pair.load("calib")
    if hasattr(pair, "flat_feeds"):
        calibration = pair.flat_feeds("calib")
    _, feeds, labels = pair.load("test")
    scored: dict[str, Any] = {}
    if not hasattr(pair, "run"):
        scored = {"evaluation": feeds, "metric": lambda outputs, _: pair.score(outputs, labels)}
    run = onnxslim.optimize(
        path,
        onnxslim.Recipe(model=str(path), threads=1),
        output=output,
        passes=[_table(text) for text in passes],
        calibration=calibration[:256],
        goals={"max_accuracy_drop": budget},
        **scored,
    )
    record = run.record
    scores = [_score(pair, file, feeds, labels) for file in (path, output / "model.onnx")]
    latencies = [
        "–" if shot.latency is None else f"{shot.latency.median_ms:.3g}" for shot in (record.before, record.after)
    ]
    ledger = "; ".join(f"{entry.name}: {entry.status}" for entry in record.passes)
    for entry in record.passes:
        reasons = {refusal["why"] for refusal in entry.refusals}
        if entry.status != "kept" or entry.name == "quantize-static":
            ledger += f"<br>{entry.name}: {entry.reason}; {len(entry.refusals)} refusals, {len(reasons)} reasons"
    return (
        f"{record.before.size_bytes / 1e3:.0f} → {record.after.size_bytes / 1e3:.0f} | "
        f"{scores[0]:.4f} → {scores[1]:.4f} | {latencies[0]} → {latencies[1]} | {ledger} | "
        f"{time.perf_counter() - started:.0f}"
    )


def _table(text: str) -> dict[str, Any]:
    name, _, options = text.partition(":")
    table: dict[str, Any] = {"name": name}
    for part in filter(None, options.split(",")):
        key, _, value = part.partition("=")
        table[key] = json.loads(value)
    return table


def _score(pair: ModuleType, path: Path | str, feeds: list[Any], labels: Any) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    run = getattr(pair, "run", lambda session, feeds: [session.run(None, feed) for feed in feeds])
    return float(pair.score(run(session, feeds), labels))


if __name__ == "__main__":
    main()
