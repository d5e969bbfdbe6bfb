import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import parser

from onnxslim import differences, guard, trial_feeds
from onnxslim.data import open_dataset
from onnxslim.differences import within_noise
from onnxslim.errors import ModelError
from onnxslim.guard import check_lossless, check_runs, layer_errors, output_errors
from onnxslim.model import load
from onnxslim.runtime import Session
from onnxslim.staging import Staged
from onnxslim.trial_feeds import compared_with

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
CHAIN = "graph (float[N, 4] x) => (float[N, 4] y) { a = Relu(x)  b = Sigmoid(a)  y = Tanh(b) }"


def model(text):
    return load(parser.parse_model(text if text.startswith("<") else HEAD + text))


def failed(checks):
    return [check.name for check in checks if not check.ok]


def detail(checks, name):
    return next(check.detail for check in checks if check.name == name)


def lossless(before, after, **options):
    return check_lossless(model(before), model(after), **options)


# ---------------------------------------------------------------------------------------------------------- lossless


def test_the_same_model_passes_every_check_over_several_sizes():
    checks = lossless(CHAIN, CHAIN)
    assert [check.name for check in checks] == ["checker", "loads", "signature", "outputs"]
    assert not failed(checks)
    assert "N 1, 2, 3, 5" in detail(checks, "outputs")


def test_a_different_result_fails_and_names_output_and_input():
    checks = lossless(CHAIN, CHAIN.replace("Tanh", "Softsign"))
    assert failed(checks) == ["outputs"]
    assert "output 'y' is off by" in detail(checks, "outputs") and "x [1, 4]" in detail(checks, "outputs")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # each agrees with the original on positive, on short, on batch-of-one or on non-zero inputs only
        ("y = Abs(x)", "y = Identity(x)"),
        ("y = Relu(x)", "c = Constant<value = float {0.01}>()  s = Mul(x, c)  y = Max(x, s)"),
        ("s = Shape(x) y = Reshape(x, s)", "s = Constant<value = int64[2] {1, 4}>() y = Reshape(x, s)"),
        ("y = Div(x, x)", "z = Sub(x, x) c = Constant<value = float {1}>() y = Add(z, c)"),
        ("y = Round(x)", "h = Constant<value = float {0.5}>() a = Add(x, h) y = Floor(a)"),
        ("y = Clip(x)", "lo = Constant<value = float {-50}>() y = Clip(x, lo)"),
    ],
)
def test_rewrites_that_hold_only_sometimes_are_found(before, after):
    head = "graph (float[N, 4] x) => (float[N, 4] y) {"
    assert failed(lossless(f"{head} {before} }}", f"{head} {after} }}")) == ["outputs"]


def test_rounding_differences_pass():
    before = "graph (float[N, 4] x) => (float[N, 4] y) { a = Mul(x, x) b = Mul(a, x) y = Mul(b, x) }"
    after = "graph (float[N, 4] x) => (float[N, 4] y) { a = Mul(x, x) y = Mul(a, a) }"
    assert not failed(lossless(before, after))


def test_integers_must_be_exact():
    before = "graph (int32[N] x) => (int32[N] y) { y = Identity(x) }"
    after = "graph (int32[N] x) => (int32[N] y) { c = Constant<value = int32 {5000}>() q = Div(x, c) y = Add(x, q) }"
    assert not failed(lossless(before, after))  # no made-up integer reaches 5000
    data = open_dataset([{"x": np.array([1, 70000], np.int32)}], Session(model(before)).specs)
    checks = lossless(before, after, dataset=data)
    assert failed(checks) == ["outputs"] and "differs in 1 of 2 values" in detail(checks, "outputs")


def test_nan_must_stay_where_it_is():
    before = "graph (float[N] x) => (float[N] y) { y = Sqrt(x) }"
    after = "graph (float[N] x) => (float[N] y) { a = Abs(x) y = Sqrt(a) }"
    assert not failed(lossless(before, before))
    assert "NaN or infinity in other places" in detail(lossless(before, after), "outputs")


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("graph (float[N, 4] z) => (float[N, 4] y) { y = Tanh(z) }", "input 'x'"),
        ("graph (float[N, 4] x) => (float[M, 4] y) { y = Tanh(x) }", "output 'y'"),
        ("graph (float[N, 4] x) => (float[N, 4] w) { w = Tanh(x) }", "output 'y'"),
        ("graph (float[2, 4] x) => (float[N, 4] y) { y = Tanh(x) }", r"input 'x' \(float32 \['N', 4\]\) became 'x'"),
        ("graph (double[N, 4] x) => (float[N, 4] y) { a = Cast<to = 1>(x) y = Tanh(a) }", "float64"),
        ("graph (float[N, 4] x) => (float[N, 4] y, float[N, 4] a) { y = Tanh(x) a = Relu(x) }", "nothing became 'a'"),
    ],
)
def test_inputs_and_outputs_must_be_declared_as_before(after, message):
    before = "graph (float[N, 4] x) => (float[N, 4] y) { y = Tanh(x) }"
    checks = lossless(before, after)
    assert failed(checks) == ["signature"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(detail(checks, "signature"))


def test_a_model_that_does_not_load_fails():
    broken = model(CHAIN)
    broken.graph.nodes[1].op = "Nonsense"
    checks = check_lossless(model(CHAIN), broken)
    assert failed(checks) == ["checker", "loads"]
    assert "Nonsense" in detail(checks, "loads")


def test_an_original_that_does_not_load_is_the_users_error():
    broken = model(CHAIN)
    broken.graph.nodes[1].op = "Nonsense"
    with pytest.raises(ModelError, match="Nonsense"):
        check_lossless(broken, broken)


def test_what_the_original_fails_in_the_checker_too_is_a_warning():
    def with_two_names(proto):
        proto.graph.node.append(proto.graph.node[0])  # the same output twice: not SSA
        return proto

    plain, doubled = parser.parse_model(HEAD + CHAIN), with_two_names(parser.parse_model(HEAD + CHAIN))
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(doubled)
    check = guard._check_onnx(load(doubled), Staged(load(doubled)))
    assert check.ok and check.detail.startswith("warning: not legal ONNX, as the original")
    check = guard._check_onnx(load(plain), Staged(load(doubled)))
    assert not check.ok and "no longer legal ONNX" in check.detail


def test_a_stale_declaration_is_a_warning():
    stale = model("graph (float[N, 4] x) => (float[N, 5] y) { y = Tanh(x) }")
    check = guard._check_onnx(stale, Staged(stale))
    assert check.ok and "shape inference" in check.detail and "original" in check.detail


def test_failing_at_one_size_only_fails():
    before = "graph (float[N, 4] x) => (float[N, 4] y) { y = Tanh(x) }"
    after = """graph (float[N, 4] x) => (float[N, 4] y)
    { s = Constant<value = int64[2] {3, 4}>() e = Expand(x, s) y = Tanh(e) }"""
    checks = lossless(before, after)
    assert failed(checks) == ["outputs"]


def test_nothing_compared_is_a_failure_of_its_own():
    # no made-up input is a permutation of 0 to 6, which the Gather with a fixed bound asks for
    text = """graph (int64[7] x, float[N] f) => (float[7] y) {
        c = Constant<value = int64 {100000}>()  far = Add(x, c)
        t = Constant<value = float[2] {1, 2}>()  y = Gather(t, far)
    }"""
    checks = lossless(text, text)
    assert failed(checks) == ["feeds"]
    assert "nothing was compared" in detail(checks, "feeds") and "Gather node" in detail(checks, "feeds")
    assert not any(check.name == "outputs" for check in checks)
    data = open_dataset([{"x": np.full(7, -99999, np.int64), "f": np.ones(1, np.float32)}], Session(model(text)).specs)
    checks = lossless(text, text, dataset=data)
    assert not failed(checks)


def test_inputs_that_are_sequences_cannot_be_made_up():
    text = "graph (seq(float[N]) s) => (int64 n) { n = SequenceLength(s) }"
    checks = lossless(text, text)
    assert failed(checks) == ["feeds"] and "is a sequence" in detail(checks, "feeds")


def test_given_shapes_are_used():
    text = "graph (float[N, M] x) => (float[N, M] y) { y = Tanh(x) }"
    described = detail(lossless(text, text, shapes={"x": [7, 9]}), "outputs")
    assert "N 1, 3, 7, 8, 14; M 1, 4, 9, 10, 18" in described


def test_random_outputs_are_compared_in_shape_only_and_the_others_fully():
    text = "graph (float[N, 4] x) => (float[N, 4] r, float[N, 4] y) { r = RandomNormalLike(x) y = Tanh(x) }"
    # a node before it gives the generator another seed
    moved = text.replace("r = RandomNormalLike(x)", "s = Abs(x) r = RandomNormalLike(s)")
    checks = lossless(text, moved)
    assert not failed(checks)
    assert "r draws random numbers" in detail(checks, "outputs")
    assert failed(lossless(text, text.replace("Tanh", "Sin"))) == ["outputs"]
    wider = text.replace("r = RandomNormalLike(x)", "w = Concat<axis = 0>(x, x) r = RandomNormalLike(w)")
    checks = lossless(text, wider)
    assert failed(checks) == ["outputs"] and "has shape" in detail(checks, "outputs")


def test_sequences_and_strings_are_compared():
    text = """graph (float[N, 4] x, string[N] s) => (seq(float[N, 4]) q, string[N] t)
    { a = Tanh(x) q = SequenceConstruct(x, a) t = Identity(s) }"""
    assert not failed(lossless(text, text))
    assert "is off by" in detail(lossless(text, text.replace("Tanh", "Sin")), "outputs")
    assert "sequence of 2, now 3" in detail(lossless(text, text.replace("(x, a)", "(x, a, a)")), "outputs")


BRANCHES = """graph (float[N, 4] x, int64 rate) => (float[N, 4] y) {
    wanted = Constant<value = int64 {16000}>()
    high = Equal(rate, wanted)
    y = If (high) <
        then_branch = fast () => (float[N, 4] t) { t = Tanh(x) },
        else_branch = slow () => (float[N, 4] e) { e = Sin(x) }
    >
}"""


@pytest.mark.parametrize(("old", "new"), [("Tanh", "Sigmoid"), ("Sin", "Cos")])
def test_both_branches_are_reached(old, new):
    assert not failed(lossless(BRANCHES, BRANCHES))
    assert failed(lossless(BRANCHES, BRANCHES.replace(old, new))) == ["outputs"]


def test_lengths_that_few_inputs_have_are_found():
    # a window of 300 samples: most made-up lengths do not run, the smallest that run give nothing
    text = """graph (float[?, ?] x) => (float[?, ?, ?] y)
    <float[1, 1, 300] w = {%s}>
    {
        c = Constant<value = int64[1] {1}>()  u = Unsqueeze(x, c)
        z = Conv(u, w)  y = Relu(z)
    }""" % ", ".join(["0.1"] * 300)  # noqa: UP031 - braces
    assert not failed(lossless(text, text))
    assert failed(lossless(text, text.replace("0.1,", "0.2,", 1))) == ["outputs"]


def test_data_at_other_sizes_is_tried_too():
    before = "graph (float[N, T] x) => (float[N, T] y) { y = Tanh(x) }"
    after = """graph (float[N, T] x) => (float[N, T] y)
    { s = Constant<value = int64[2] {-1, 6}>() r = Reshape(x, s) y = Tanh(r) }"""
    data = open_dataset([{"x": np.ones((2, 6), np.float32)}], Session(model(before)).specs)
    assert failed(lossless(before, after, dataset=data)) == ["outputs"]


@pytest.mark.parametrize(
    ("head", "before", "after"),
    [
        ("float[64] x", "y = Clip(x)", "lo = Constant<value = float {-50}>() y = Clip(x, lo)"),
        ("float[N, 64] x", "y = Clip(x)", "lo = Constant<value = float {-50}>() y = Clip(x, lo)"),
        ("float[N, 4] x", "y = Tanh(x)", "s = Constant<value = int64[2] {1, 4}>() t = Tanh(x) y = Reshape(t, s)"),
        ("float[4, M] x", "y = Tanh(x)", "s = Constant<value = int64[2] {4, 64}>() t = Tanh(x) y = Reshape(t, s)"),
        (
            "float[4, M] x",
            "y = Tanh(x)",
            "i = Constant<value = int64[2] {0, 1}>() t = Gather<axis = 1>(x, i) y = Tanh(x)",
        ),
    ],
)
def test_what_is_needed_is_run_however_dear_a_run_is(monkeypatch, head, before, after):
    """Edge values, size 1 of a dynamic axis and another one; the last pair differs in size 1 alone."""
    monkeypatch.setattr(trial_feeds, "_ENOUGH_CPU_SECONDS", -1.0)
    texts = [f"graph ({head}) => ({head.replace(' x', ' y')}) {{ {body} }}" for body in (before, after)]
    assert not failed(lossless(texts[0], texts[0]))
    assert failed(lossless(*texts)) == ["outputs"]


def test_no_more_than_needed_is_run_where_a_run_is_dear(monkeypatch):
    monkeypatch.setattr(trial_feeds, "_ENOUGH_CPU_SECONDS", -1.0)
    assert "same outputs on 2 inputs (N 1, 2)" in detail(lossless(CHAIN, CHAIN), "outputs")
    static = CHAIN.replace("N, 4", "4, 4")
    assert detail(lossless(static, static), "outputs") == "same outputs on 2 inputs"
    both = lossless(BRANCHES, BRANCHES)
    assert "never with" not in detail(both, "outputs")
    assert failed(lossless(BRANCHES, BRANCHES.replace("Sin", "Cos"))) == ["outputs"]


@pytest.mark.parametrize("size", [1, 7, 24])
def test_outputs_are_compared_alike_in_blocks_of_any_size(monkeypatch, size):
    rng = np.random.default_rng(0)
    for _ in range(30):
        expected = (rng.standard_normal(24) * 10 ** rng.uniform(-3, 3, 24)).astype(np.float32)
        got = expected + (rng.standard_normal(24) * 10 ** rng.uniform(-6, -3)).astype(np.float32)
        expected[rng.random(24) < 0.1] = np.nan
        got[np.isnan(expected)] = np.nan if rng.random() < 0.8 else 0
        monkeypatch.setattr(differences, "_BLOCK", 24)
        whole = differences.value_fault(expected.reshape(4, 6), got.reshape(4, 6))
        monkeypatch.setattr(differences, "_BLOCK", size)
        assert differences.value_fault(expected.reshape(4, 6), got.reshape(4, 6)) == whole


def test_half_precision_has_its_own_tolerance():
    before = "graph (float16[N, 64] x) => (float16[N] y) { a = Mul(x, x) y = ReduceSum<keepdims = 0>(a, ax) }"
    before = before.replace("{ a", "{ ax = Constant<value = int64[1] {1}>() a")
    after = before.replace("a = Mul(x, x)", "f = Cast<to = 1>(x) g = Mul(f, f) a = Cast<to = 10>(g)")
    assert not failed(lossless(before, after))
    worse = before.replace(
        "a = Mul(x, x)", "c = Constant<value = float {1.05}>() k = Cast<to = 10>(c) m = Mul(x, k) a = Mul(x, m)"
    )
    assert failed(lossless(before, worse)) == ["outputs"]


def test_what_the_runtime_itself_changes_is_allowed_and_said():
    expected, plain = np.array([1.0, 2.0], np.float32), np.array([1.0, 2.1], np.float32)
    assert within_noise(expected, plain, np.array([1.7, 2.0], np.float32))
    assert not within_noise(expected, plain, np.array([1.9, 2.0], np.float32))
    assert not within_noise(expected, expected, np.array([1.01, 2.0], np.float32))
    assert not within_noise(expected, plain, np.array([np.nan, 2.0], np.float32))
    assert within_noise(np.array([3, 4]), np.array([3, 5]), np.array([3, 5]))
    assert not within_noise(np.array([3, 4]), np.array([3, 5]), np.array([3, 6]))


def test_constants_that_inputs_are_compared_with_are_found():
    assert compared_with(model(BRANCHES)) == {"rate": [16000, 16001]}


# --------------------------------------------------------------------------------------------------------------- runs


def runs(before, after, dataset=None):
    return check_runs(model(after), dataset, before=model(before))


def test_a_lossy_result_may_differ_but_must_be_sound():
    text = "graph (float[N, 4] x) => (float[N, 4] y) { y = Tanh(x) }"
    assert not failed(runs(text, text.replace("Tanh", "Sin")))
    checks = runs(text, text.replace("Tanh", "Log"))
    assert failed(checks) == ["outputs"] and "NaN or infinite values where the original has none" in detail(
        checks, "outputs"
    )
    log = text.replace("Tanh", "Log")
    assert not failed(runs(log, log))
    assert not failed(runs(log, text))
    narrower = "graph (float[N, 4] x) => (float[N, 4] y) { a = Tanh(x) y = ReduceMean<axes = [1]>(a) }"
    checks = runs(text, narrower)
    assert failed(checks) == ["outputs"] and "has shape [1, 4], now [1, 1]" in detail(checks, "outputs")


def test_sizes_that_depend_on_values_may_change():
    text = "graph (float[N, 4] x) => (int64[2, found] y) { y = NonZero(x) }"
    after = "graph (float[N, 4] x) => (int64[2, found] y) { a = Relu(x) y = NonZero(a) }"
    assert not failed(runs(text, after))
    tied = text.replace("found", "N")
    assert failed(runs(tied, after.replace("found", "N"))) == ["outputs"]


def test_a_lossy_result_that_crashes_fails():
    before = "graph (float[N, 4] x) => (float[N, 4] y) { y = Tanh(x) }"
    after = "graph (float[N, 4] x) => (float[N, 4] y) { s = Constant<value = int64[2] {1, 4}>() y = Reshape(x, s) }"
    checks = runs(before, after)
    assert failed(checks) == ["outputs"]
    assert "Reshape node" in detail(checks, "outputs") and "The original runs on this" in detail(checks, "outputs")


# ------------------------------------------------------------------------------------------------------------- errors


def feeds(*rows):
    return [{"x": np.array([row], np.float32)} for row in rows]


def test_layer_errors_are_in_graph_order_with_right_numbers():
    after = CHAIN.replace("b = Sigmoid(a)", "k = Constant<value = float {1.1}>() s = Sigmoid(a) b = Mul(s, k)")
    given = feeds([0, 1, 2, 3], [-1, -2, 5, 0])
    entries = layer_errors(model(CHAIN), model(after), given)
    assert [(entry.tensor, entry.op) for entry in entries] == [("a", "Relu"), ("b", "Sigmoid"), ("y", "Tanh")]
    exact, scaled, _ = entries
    assert (exact.sqnr_db, exact.cosine, exact.max_abs_error) == (None, 1.0, 0.0)
    assert scaled.sqnr_db == pytest.approx(20, abs=1e-3) and scaled.cosine == pytest.approx(1)
    largest = max(1 / (1 + np.exp(-max(value, 0))) for feed in given for value in feed["x"][0])
    assert scaled.max_abs_error == pytest.approx(0.1 * largest, rel=1e-4)


def test_layer_errors_stream_in_groups_and_take_iterators(monkeypatch):
    nodes = "".join(f" t{i} = Sin(t{i - 1})" for i in range(1, 40))
    text = f"graph (float[N, 4] x) => (float[N, 4] y) {{ t0 = Sin(x){nodes} y = Sin(t39) }}"
    made = []
    real = guard.Session
    monkeypatch.setattr(guard, "Session", lambda *a, **k: made.append(len(k["outputs"])) or real(*a, **k))
    given = feeds([1, 2, 3, 4], [0, 0, 0, 0])
    whole = layer_errors(model(text), model(text), iter(given))
    assert [entry.tensor for entry in whole] == [f"t{i}" for i in range(40)] + ["y"]
    assert made == [4, 4, 37, 37]
    made.clear()
    assert layer_errors(model(text), model(text), given, max_bytes=16 * 3) == whole
    assert max(made) == 4 and made[-1] <= 3


def test_layer_errors_leave_out_what_cannot_be_compared():
    before = (
        "graph (float[N, 4] x) => (float[N, 4] y) { a = Relu(x) i = Cast<to = 7>(a) b = Cast<to = 1>(i) y = Add(a, b) }"
    )
    after = """graph (float[N, 4] x) => (float[N, 4] y)
    { r = Relu(x) a = Concat<axis = 1>(r, r) i = Cast<to = 7>(r) b = Cast<to = 1>(i) y = Add(r, b) }"""
    assert [entry.tensor for entry in layer_errors(model(before), model(after), feeds([1, 2, 3, 4]))] == ["b", "y"]


def test_a_layer_that_became_nan_has_the_worst_numbers_json_can_hold():
    after = CHAIN.replace("Sigmoid(a)", "Log(a)")
    entry = layer_errors(model(CHAIN), model(after), feeds([-1, 1, 2, 3]))[1]
    assert entry.tensor == "b" and entry.sqnr_db == -200 and entry.cosine == 0 and entry.max_abs_error > 1e38
    assert type(entry).model_validate_json(entry.model_dump_json()) == entry


def test_nested_and_mutated_models_are_compared_by_main_graph_names():
    before = model(BRANCHES)
    after = before.copy()
    after.graph.nodes[-1].attrs["then_branch"].nodes[0].op = "Sin"
    given = [{"x": np.ones((1, 4), np.float32), "rate": np.array(rate)} for rate in (16000, 8000)]
    entries = {entry.tensor: entry for entry in layer_errors(before, after, given)}
    assert list(entries) == ["y"] and entries["y"].max_abs_error == pytest.approx(np.sin(1) - np.tanh(1), rel=1e-4)


def test_output_errors_compare_outputs_of_one_name():
    before, after = Session(model(CHAIN)), Session(model(CHAIN.replace("Tanh", "Sin")))
    (entry,) = output_errors(before, after, feeds([1, 2, 3, 4]))
    assert entry.tensor == "y" and 0 < entry.max_abs_error < 1
    other = Session(model("graph (float[N, 4] x) => (float[N, 4] z) { z = Tanh(x) }"))
    assert output_errors(before, other, feeds([1, 2, 3, 4])) == []


def test_output_errors_compare_labels_as_numbers():
    outputs = "(int64[N] best, bool[N, 4] up)"
    graph = f"graph (float[N, 4] x) => {outputs} {{ best = ArgMax <axis = 1, keepdims = 0> (x) up = IsNaN(x) }}"
    before, after = (Session(model(text)) for text in (graph, graph.replace("ArgMax", "ArgMin")))
    best, up = output_errors(before, after, feeds([1, 2, 3, 4]))
    assert (best.tensor, best.max_abs_error, up.tensor, up.max_abs_error) == ("best", 3, "up", 0)


def test_guards_change_neither_model():
    before = model("graph (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> { a = Mul(x, w) y = Tanh(a) }")
    constant = next(t for t in before.graph.nodes[0].inputs if isinstance(t, gs.Constant) or t.name == "w")
    content = before.to_proto().SerializeToString()
    after = before.copy()
    check_lossless(before, after)
    check_runs(after, before=before)
    layer_errors(before, after, feeds([1, 2, 3, 4]))
    assert constant.name == "w" and before.to_proto().SerializeToString() == content
