"""Which layers are better left in float for speed: a minimum cut between the nodes in int8 and those in float.

Some kernels are slower in int8 (convolutions of few channels or of narrow groups, 5 x 5 depthwise ones), but a tensor
that changes sides has to be quantized or dequantized, and laid out anew. So each node that may run on codes pays for
its kernel on the side where it ends up, and each tensor that crosses over pays once, however many nodes read it. The
cheapest division is a minimum s-t cut, as these costs are submodular (Greig, Porteous and Seheult 1989).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.node_latency import node_latencies
from onnxslim.passes._placement import Placement
from onnxslim.runtime import Session, interleaved_latency

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["cheapest_division", "faster_in_float", "median_latencies"]

# To quantize a tensor in ONNX Runtime, and take it from one layout of convolutions to the other, or back; measured on
# x86. It need not be exact, as what comes of it is timed.
_NANOSECONDS, _MICROSECONDS = 0.35, 6.0  # an element, and for the kernels that are run
_TOLLS = (0.25, 1.0, 2.0)  # times that, less in small networks: a division for each is timed
_FASTER = 0.97  # times the latency of int8: what some layers in float have to bring it to; less may be noise
_TIMINGS = 20
_TIMING_SECONDS = 0.2, 2.0  # at least, at most
_GLANCES, _CLEAR = 3, 1.25  # timings that do where even the worst of one model is that much better than any of another

_Vertex = str | tuple[str, str]  # a node that may run on codes, by name; a side, or a tensor that crosses over
_INT8, _FLOAT = ("side", "int8"), ("side", "float")


def faster_in_float(
    model: Model,
    placement: Placement,
    written: Callable[[tuple[str, ...]], tuple[Model, Placement]],
    feed: Mapping[str, np.ndarray],
    *,
    spare: bool = False,
) -> dict[str, str]:
    """The anchors without which int8 runs faster here, and why; none where it does not, or where none would be left.

    Args:
        model: in float.
        placement: of all that may run on codes in it.
        written: gives the model with all but some anchors in int8, and the placement in that.
        feed: what is run.
        spare: hold the tensors of two models at most, which takes longer.

    Raises:
        ModelError: one of the models does not run on the feed.
    """
    if len(placement.anchors) < 2:
        return {}
    times = node_latencies(model, feed)
    in_float = {node.outputs[0].name: times[id(node)] for node in model.graph.nodes if id(node) in times}
    int8, on_codes = written(())
    times = node_latencies(int8, feed)
    units = (on_codes.anchors | on_codes.propagators).items()
    in_int8 = {name: times[id(unit.node)] for name, unit in units if id(unit.node) in times}
    found = {cheapest_division(placement, in_float, in_int8, toll) for toll in _TOLLS}
    choices = [slow for slow in sorted(found) if 0 < len(slow) < len(placement.anchors)]
    if not choices:
        return {}
    best: tuple[str, ...] = ()
    fastest = int8
    for rivals in [[choice] for choice in choices] if spare else [choices]:
        models = [fastest, *(written(slow)[0] for slow in rivals)]
        defending, *taken = median_latencies(models, feed)
        if min(taken) <= (defending if best else _FASTER * defending):
            winner = int(np.argmin(taken))
            best, fastest = rivals[winner], models[1 + winner]
    return {name: _compared(in_float[name], in_int8[name]) for name in best}


def median_latencies(models: Sequence[Model], feed: Mapping[str, np.ndarray]) -> list[float]:
    """Milliseconds that each model takes for a feed, on one thread, interleaved; few runs where they differ clearly."""
    runs = {str(index): partial(Session(model, threads=1).run, feed) for index, model in enumerate(models)}
    timings = interleaved_latency(runs, repeats=_GLANCES, warmup=1, min_seconds=0.0).values()
    ordered = sorted(timings, key=lambda timing: timing.median_ms)
    if any(_CLEAR * max(a.samples_ms) > min(b.samples_ms) for a, b in itertools.pairwise(ordered)):
        least, most = _TIMING_SECONDS
        timings = interleaved_latency(runs, repeats=_TIMINGS, warmup=1, min_seconds=least, max_seconds=most).values()
    return [timing.median_ms for timing in timings]


def cheapest_division(
    placement: Placement, in_float: Mapping[str, float], in_int8: Mapping[str, float], toll: float = 1.0
) -> tuple[str, ...]:
    """The anchors of a placement that the cheapest division has in float, in order.

    Args:
        placement: of all that may run on codes, an anchor at least.
        in_float: microseconds of nodes of the float model, by first output. A node that lacks one took none; an anchor
            that does stays in int8, as its time went to what it was fused with.
        in_int8: the same of anchors and propagators on codes; an anchor that lacks one stays in int8 as well.
        toll: times what it is thought to cost that a tensor crosses over.
    """
    unit_of: dict[str, _Vertex] = {name: name for name in (*placement.anchors, *placement.propagators)}
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
    _, (_, beyond) = nx.minimum_cut(costs, _INT8, _FLOAT)
    return tuple(name for name in placement.anchors if name in beyond)


def _compared(in_float: float, in_int8: float) -> str:
    """Why a layer is left in float, by the microseconds of its kernels."""
    if in_float < in_int8:
        return f"it takes {in_float:.0f} µs here in float, {in_int8:.0f} in int8"
    return f"int8 saves less here than its conversions cost: it takes {in_int8:.0f} µs, and {in_float:.0f} in float"


def _charge(costs: nx.DiGraph, tensor: str, maker: _Vertex, readers: set[_Vertex], cost: float) -> None:
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
