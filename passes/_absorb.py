"""Padding in front of a convolution and a vector added behind it become its own: on codes nothing else fuses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim.graph.walk import constant_value, is_graph_output, remove_node

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["absorb_adds", "absorb_pads"]


def absorb_pads(model: Model) -> int:
    """Merge Pad nodes of the main graph that only convolutions read into their ``pads``; return how many. Exact."""
    absorbed = 0
    for pad in [node for node in model.graph.nodes if node.op == "Pad" and not node.domain]:
        pads = _zero_pads(pad)
        result = pad.outputs[0]
        readers = list(result.outputs)
        if pads is None or not readers or is_graph_output(model.graph, result):
            continue
        half = len(pads) // 2
        # The first two axes are those of the batch and of the channels.
        inner = pads[2:half] + pads[half + 2 :]
        if any(pads[axis] for axis in (0, 1, half, half + 1)) or min(inner, default=0) < 0:
            continue
        if not all(_takes(reader, result, len(inner)) for reader in readers):
            continue
        for reader in readers:
            own = reader.attrs.get("pads") or [0] * len(inner)
            reader.attrs["pads"] = [mine + added for mine, added in zip(own, inner, strict=True)]
            reader.attrs.pop("auto_pad", None)
            reader.inputs[0] = pad.inputs[0]
        remove_node(model.graph, pad)
        absorbed += 1
    return absorbed


def _zero_pads(pad: gs.Node) -> list[int] | None:
    """The amounts of a Pad with constant zero, begins then ends; None when it is another kind."""
    if pad.attrs.get("mode", "constant") != "constant" or len(pad.inputs) < 2:
        return None
    if len(pad.inputs) > 2 and not pad.inputs[2].is_empty():
        value = constant_value(pad.inputs[2])
        if value is None or value.size != 1 or value.reshape(-1)[0] != 0:
            return None
    if len(pad.inputs) > 3 and not pad.inputs[3].is_empty():
        return None
    amounts = constant_value(pad.inputs[1])
    return None if amounts is None else [int(amount) for amount in amounts]


def _takes(node: gs.Node, tensor: gs.Tensor, amounts: int) -> bool:
    return (
        node.op == "Conv"
        and not node.domain
        and node.inputs[0] is tensor
        and not any(other is tensor for other in node.inputs[1:])
        and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and len(node.attrs.get("pads") or [0] * amounts) == amounts
    )


def absorb_adds(model: Model) -> int:
    """Merge constant vectors added to the channels of a convolution's only use into its bias; return how many."""
    absorbed = 0
    for add in [node for node in model.graph.nodes if node.op == "Add" and not node.domain and len(node.inputs) == 2]:
        index = 1 if isinstance(add.inputs[1], gs.Constant) else 0
        vector, source = add.inputs[index], add.inputs[1 - index]
        conv = source.inputs[0] if len(source.inputs) == 1 else None
        if conv is None or conv.op != "Conv" or conv.domain or not isinstance(vector, gs.Constant):
            continue
        weight, bias = conv.inputs[1], conv.inputs[2] if len(conv.inputs) > 2 else None
        if len(source.outputs) != 1 or is_graph_output(model.graph, source) or not isinstance(weight, gs.Constant):
            continue
        if bias is not None and not isinstance(bias, gs.Constant):
            continue
        rank, channels = len(weight.shape), weight.shape[0]
        if [1] * (rank - len(vector.shape)) + list(vector.shape) != [1, channels] + [1] * (rank - 2):
            continue
        total = vector.values.reshape(-1) + (bias.values if bias is not None else 0)
        merged = gs.Constant(model.fresh_name(vector.name), total)
        if bias is None:
            conv.inputs.append(merged)
        else:
            conv.inputs[2] = merged
        result = add.outputs[0]
        remove_node(model.graph, add)
        conv.outputs[0] = result
        absorbed += 1
    return absorbed
