"""Which layers are better left in float for speed: a minimum cut between the nodes in int8 and those in float.

Some kernels are slower in int8 (convolutions of few channels or of narrow groups, 5 x 5 depthwise ones), but a tensor
that changes sides has to be quantized or dequantized, and laid out anew. So each node that may run on codes pays for
its kernel on the side where it ends up, and each tensor that crosses over pays once, however many nodes read it. The
cheapest division is a minimum s-t cut, as these costs are submodular (Greig, Porteous and Seheult 1989).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import networkx as nx
import onnx_graphsurgeon as gs

from onnxslim.passes._placement import Placement

__all__ = ["faster_in_float"]

# To quantize a tensor in ONNX Runtime, and take it from one layout of convolutions to the other, or back; measured on
# x86. It need not be exact, as what comes of it is timed.
_NANOSECONDS, _MICROSECONDS = 0.35, 6.0  # an element, and for the kernels that are run

_INT8, _FLOAT = "int8", "float"
_Unit = str | tuple[str, str]


def faster_in_float(
    placement: Placement, in_float: Mapping[str, float], in_int8: Mapping[str, float], toll: float = 1.0
) -> tuple[str, ...]:
    """The anchors of a placement that the cheapest division has in float, in order.

    Args:
        placement: of all that may run on codes.
        in_float: microseconds of nodes of the float model, by first output. A node that lacks one took none; an anchor
            that does stays in int8, as its time went to what it was fused with.
        in_int8: the same of anchors and propagators on codes; an anchor that lacks one stays in int8 as well.
        toll: times what it is thought to cost that a tensor crosses over.
    """
    unit_of = {name: name for name in (*placement.anchors, *placement.propagators)}
    unit_of |= {node.outputs[0].name: name for name, chain in placement.chains.items() for node in chain.nodes}
    idle = min((*in_float.values(), *in_int8.values()), default=0.0)  # what a kernel that does nothing takes
    costs = nx.DiGraph()
    for name in placement.anchors:
        known = name in in_float and name in in_int8
        costs.add_edge(_INT8, name, capacity=in_float[name] - idle if known else math.inf)
        costs.add_edge(name, _FLOAT, capacity=in_int8[name] - idle if known else 0.0)
    for name in placement.propagators:
        costs.add_edge(_INT8, name, capacity=max(in_float.get(name, idle) - idle, 0.0))
        costs.add_edge(name, _FLOAT, capacity=max(in_int8.get(name, idle) - idle, 0.0))
    for name, chain in placement.chains.items():  # on codes it is no kernel at all
        taken = (in_float.get(node.outputs[0].name, idle) - idle for node in chain.nodes)
        costs.add_edge(_INT8, name, capacity=sum(taken))
    for tensor in _tensors(placement):
        cost = toll * (_NANOSECONDS * 1e-3 * placement.elements[tensor.name] + _MICROSECONDS)
        maker = unit_of.get(tensor.inputs[0].outputs[0].name, _FLOAT) if tensor.inputs else _FLOAT
        readers = {unit_of.get(node.outputs[0].name, _FLOAT) for node in tensor.outputs if node.outputs}
        if any(tensor is output for output in placement.graph.outputs):
            readers.add(_FLOAT)
        _charge(costs, tensor.name, maker, readers - {maker}, cost)
    if not costs:
        return ()
    _, (_, beyond) = nx.minimum_cut(costs, _INT8, _FLOAT)
    return tuple(name for name in placement.anchors if name in beyond)


def _charge(costs: nx.DiGraph, tensor: str, maker: _Unit, readers: set[str], cost: float) -> None:
    """Let a tensor pay where its maker and any of its readers are on different sides."""
    for reader in readers - {_FLOAT}:
        costs.add_edge(reader, ("quantized", tensor), capacity=math.inf)
        costs.add_edge(("quantized", tensor), maker, capacity=cost)
    for reader in readers if maker != _FLOAT else ():
        costs.add_edge(maker, ("dequantized", tensor), capacity=cost)
        costs.add_edge(("dequantized", tensor), reader, capacity=math.inf)


def _tensors(placement: Placement) -> list[gs.Tensor]:
    """Those of which a size is known, and that are no constants."""
    tensors = (*placement.graph.inputs, *(tensor for node in placement.graph.nodes for tensor in node.outputs))
    return [tensor for tensor in tensors if placement.elements.get(tensor.name)]
