"""One wrong rewrite among many costs that rewrite, not the others."""

from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxslim
from onnxslim import passes as registry
from onnxslim.culprit import run_checked
from onnxslim.graph.walk import remove_node
from onnxslim.guard import check_lossless
from onnxslim.passes import Context, Outcome, Pass

LENGTH = 20


def _chain():
    """A chain of Identity nodes with two Neg among them."""
    ops = ["Identity"] * LENGTH
    ops[7] = ops[13] = "Neg"
    nodes = "\n".join(
        f"[n{i}] {'y' if i == LENGTH - 1 else f't{i}'} = {op} ({'x' if i == 0 else f't{i - 1}'})"
        for i, op in enumerate(ops)
    )
    text = f'<ir_version: 10, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) {{ {nodes} }}'
    return onnx.parser.parse_model(text)


class _DropUnary(Pass):
    """Drop every node but the last, as if each were an Identity: wrong at those named in ``wrong``."""

    name: ClassVar[str] = "drop-unary"
    lossless: ClassVar[bool] = True
    honest: bool = True
    wrong: tuple[str, ...] = ("n7",)

    def run(self, model, context: Context) -> Outcome:
        outcome = Outcome()
        for node in list(model.graph.nodes)[:-1]:
            if node.op != "Identity" and node.name not in self.wrong:
                continue
            if self.honest and (len(outcome.changes) == context.limit or not context.allows("drop", node.name)):
                continue
            source, target = node.inputs[0], node.outputs[0]
            for reader in list(target.outputs):
                reader.inputs[reader.inputs.index(target)] = source
            remove_node(model.graph, node)
            outcome.change("drop", node.name, f"dropped {node.op}")
        return outcome


class _Blind(_DropUnary):
    """The same, but it knows of no limit."""

    name: ClassVar[str] = "blind"
    honest: bool = False


def _run(pass_, counts=None):
    model = onnxslim.load(_chain())

    def check(candidate):
        if counts is not None:
            counts.append(1)
        return check_lossless(model, candidate)

    return model, run_checked(pass_, model, Context(), check)


def test_a_right_pass_is_checked_once():
    counts = []
    _, found = _run(_DropUnary(wrong=()), counts)
    assert found.kept and not found.undone
    assert len(counts) == 1
    assert len(found.model.graph.nodes) == 3


@pytest.mark.parametrize("wrong", [("n7",), ("n13",)])
def test_the_one_wrong_rewrite_is_undone_and_the_rest_kept(wrong):
    model, found = _run(_DropUnary(wrong=wrong))
    assert found.kept
    assert [(entry.rule, entry.node) for entry in found.undone] == [("drop", wrong[0])]
    assert "output 'y'" in found.undone[0].why
    assert [node.op for node in found.model.graph.nodes] == ["Neg", "Neg", "Identity"]
    assert len(found.outcome.changes) == LENGTH - 3
    assert len(model.graph.nodes) == LENGTH


def test_rewrites_that_are_right_only_together_stay():
    """Two dropped Neg cancel out, so nothing is wrong with the result."""
    _, found = _run(_DropUnary(wrong=("n7", "n13")))
    assert found.kept and not found.undone
    assert [node.op for node in found.model.graph.nodes] == ["Identity"]


def test_a_pass_that_knows_no_limit_is_dropped_whole():
    _, found = _run(_Blind())
    assert not found.kept and not found.undone
    assert found.broken.name == "outputs"


def test_more_wrong_rewrites_than_are_worth_searching_drop_the_pass():
    proto = _chain()
    for node in proto.graph.node[:12]:
        node.op_type = "Softplus"
    model = onnxslim.load(proto)
    names = tuple(node.name for node in proto.graph.node[:-1])
    found = run_checked(_DropUnary(wrong=names), model, Context(), lambda other: check_lossless(model, other))
    assert not found.kept and not found.undone


def test_optimize_keeps_the_rest_and_says_what_it_undid(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.PASSES, "drop-unary", _DropUnary)
    run = onnxslim.optimize(_chain(), output=tmp_path / "out", passes=["drop-unary"])
    entry = run.record.passes[0]
    assert entry.status == "kept"
    assert [(undone.rule, undone.node) for undone in entry.undone] == [("drop", "n7")]
    assert entry.nodes_after == 3
    assert any("undone: drop at n7, because output 'y'" in warning for warning in run.record.warnings)
    x = np.arange(-2, 3, dtype=np.float32)
    np.testing.assert_array_equal(
        onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"x": x})[0], x
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "n7" in page
