"""How each operator's outputs follow from what is known of its inputs; see :class:`onnxslim.graph.facts.Facts`.

A rule returns one fact an output, or None to leave the node to ONNX's shape inference.
"""

from __future__ import annotations

# Each module puts its rules into the table.
from onnxslim.graph import fact_elementwise, fact_layers, fact_layout, fact_parts  # noqa: F401
from onnxslim.graph.fact_values import RULES, broadcast, fixed_integers

__all__ = ["RULES", "broadcast", "fixed_integers"]
