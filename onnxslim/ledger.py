"""What was done to a model and what was declined, grouped for reading: by rule, with counts, places and reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, Field

from onnxslim.graph.cost import layer_costs, node_count, op_histogram, parameter_count, total_macs
from onnxslim.model import Model
from onnxslim.passes import Change, Refusal
from onnxslim.record import Check, UndoneEntry

__all__ = ["Figures", "RuleLines", "SlimReport", "figures", "grouped"]

# Shapes are inferred for an estimate of the work, which takes as long as simplifying a model of many nodes does.
_MOST_NODES_FOR_MACS = 1_000


class Figures(BaseModel):
    """What a model is made of."""

    size_bytes: int | None = Field(description="bytes on disk, external data included; None for a model in memory")
    nodes: int = Field(description="Constant nodes left out, as an initializer does the same; subgraphs included")
    parameters: int
    macs: int | None = Field(description="estimate: multiply-accumulates of one inference, dynamic sizes as 1")
    ops: dict[str, int] = Field(description="how many nodes of each op, as for ``nodes``")


class SlimReport(BaseModel):
    """All that one ``onnxslim slim`` did, for machines."""

    input: str
    output: str
    before: Figures
    after: Figures
    changes: list[dict[str, str]] = Field(description="rule, node, what; in the order in which they were made")
    refusals: list[dict[str, str]] = Field(description="rule, node, why")
    undone: list[UndoneEntry] = Field(description="rewrites that changed an output and were left out")
    checks: list[Check] = Field(description="empty where nothing was checked")
    kept: bool = Field(description="False: the simplified model did not hold, and the output is what went in")


@dataclass(frozen=True)
class RuleLines:
    """What one rule did, or declined to do: how often, and each place with a sentence."""

    rule: str
    places: list[tuple[str, str]]


def grouped(items: Iterable[Change] | Iterable[Refusal]) -> list[RuleLines]:
    """Group by rule; the most frequent first, then in order of appearance."""
    found: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        found.setdefault(item.rule, []).append((item.node, item.what if isinstance(item, Change) else item.why))
    return [RuleLines(rule, places) for rule, places in sorted(found.items(), key=lambda pair: -len(pair[1]))]


def figures(model: Model, size_bytes: int | None) -> Figures:
    """Count what a model is made of; its work only where that is cheap."""
    nodes = node_count(model)
    return Figures(
        size_bytes=size_bytes,
        nodes=nodes,
        parameters=parameter_count(model),
        macs=total_macs(layer_costs(model)) if nodes <= _MOST_NODES_FOR_MACS else None,
        ops=op_histogram(model),
    )
