import os
import subprocess
import sys

import numpy as np
import pytest

from onnxslim import metrics
from onnxslim.data import open_dataset
from onnxslim.errors import DataError, RecipeError
from onnxslim.metrics import drop, evaluate, find_metric, wilson
from onnxslim.record import Score
from onnxslim.runtime import TensorSpec

SPEC = [TensorSpec("x", np.dtype(np.float32), ["N", 4])]
NAN = np.float32("nan")


class Fake:
    """A runner that computes its outputs from the feed in Python."""

    def __init__(self, **outputs):
        self.outputs = outputs

    def run(self, feed):
        return {name: value(feed["x"]) for name, value in self.outputs.items()}


def data(x, labels=None):
    return open_dataset([{"x": row[None]} for row in np.asarray(x, np.float32)], SPEC, labels=labels)


SCORES = np.array([[9, 1, 0, 0], [0, 9, 1, 0], [0, 1, 9, 0], [1, 0, 0, 9], [9, 0, 0, 1]], np.float32)
same = Fake(y=lambda x: x)
nothing = Fake(y=lambda x: x * NAN)
reverse = Fake(y=lambda x: -x)


def score(runner, labels=None, metric="top1", x=SCORES, reference=None):
    return evaluate(runner, data(x, labels), metric, reference=reference)


# ----------------------------------------------------------------------------------------------------------- labels


def test_top1_counts_right_answers_with_wilsons_interval():
    found = score(same, [0, 1, 2, 3, 1])
    assert (found.value, found.samples, found.labelled, found.metric) == (0.8, 5, True, "top1")
    assert found.interval.method == "Wilson"
    assert (found.interval.low, found.interval.high) == pytest.approx((0.3755, 0.9638), abs=1e-4)


def test_batches_count_each_row():
    feeds = [{"x": SCORES[:3]}, {"x": SCORES[3:]}]
    found = evaluate(same, open_dataset(feeds, SPEC, labels=[0, 1, 2, 3, 1]), "top1")
    assert (found.value, found.samples) == (0.8, 5)
    fixed = [TensorSpec("x", np.dtype(np.float32), [2, 4])]
    found = evaluate(same, open_dataset({"x": SCORES, "labels": np.array([0, 1, 2, 3, 1])}, fixed), "top1")
    assert (found.value, found.samples) == (1.0, 4)


def test_top5_looks_at_five_and_refuses_what_cannot_fail():
    x = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    spec = [TensorSpec("x", np.dtype(np.float32), ["N", 8])]
    dataset = open_dataset({"x": x, "labels": np.arange(8)}, spec)
    assert evaluate(same, dataset, "top5").value == 5 / 8
    with pytest.raises(RecipeError, match="cannot fail with 4 classes"):
        score(same, [0] * 5, "top5")


def test_equal_scores_do_not_make_every_class_right():
    flat = Fake(y=lambda x: x * 0)
    assert score(flat, [0, 1, 2, 3, 1]).value == 0.2


@pytest.mark.parametrize("metric", ["top1", "agreement", "cosine", "r2", "sqnr", "negative-mae", "negative-mse"])
def test_outputs_that_are_nan_are_the_worst_and_never_equal(metric):
    labels = SCORES if metric.startswith("negative") else [0, 1, 2, 3, 0]
    worst = {"top1": 0, "agreement": 0, "cosine": -1, "r2": -10, "sqnr": -100}
    worst = worst.get(metric, -float(np.finfo(np.float32).max))
    assert score(nothing, labels, metric, reference=same).value == worst
    assert score(nothing, labels, metric, reference=nothing).value == worst
    half = Fake(y=lambda x: np.where(x > 5, NAN, x))
    assert score(half, labels, metric, reference=same).value == worst
    Score.model_validate_json(score(nothing, labels, metric, reference=same).model_dump_json())


def test_infinity_in_the_original_is_compared_in_place():
    masked = Fake(y=lambda x: np.where(x == 0, -np.float32("inf"), x))
    for metric, best in (("agreement", 1), ("cosine", 1), ("r2", 1), ("sqnr", 100)):
        assert score(masked, metric=metric, reference=masked).value == best
    assert score(same, metric="cosine", reference=masked).value == -1


def test_labels_a_position_and_images_of_classes():
    text = Fake(y=lambda x: np.stack([x, -x], axis=1))  # (1, 2, 4): two positions of four classes
    found = score(text, np.array([[0, 1], [1, 0], [2, 0], [3, 1], [0, 0]]))
    assert found.samples == 5 and found.value == pytest.approx(0.8)
    image = Fake(y=lambda x: np.stack([x, 5 - x], axis=1).reshape(1, 2, 2, 2))  # classes on axis 1
    labels = (SCORES < 2.5).astype(int).reshape(5, 2, 2)
    assert score(image, labels).value == 1.0


def test_the_output_that_fits_is_chosen_and_ambiguity_is_an_error():
    both = Fake(state=lambda x: np.zeros((2, 1, 7), np.float32), y=lambda x: x)
    assert score(both, [0, 1, 2, 3, 0]).value == 1.0
    twins = Fake(a=lambda x: x, b=lambda x: -x)
    with pytest.raises(RecipeError, match="outputs a, b all fit the labels; choose one, such as 'top1@a'"):
        score(twins, [0, 1, 2, 3, 0])
    assert score(twins, [0, 1, 2, 3, 0], "top1@a").value == 1.0
    assert score(twins, [0, 1, 2, 3, 0], "top1@b").value == 0.0
    with pytest.raises(RecipeError, match="no output 'c'"):
        score(twins, [0, 1, 2, 3, 0], "top1@c")


def test_top1_of_a_model_that_gives_classes_and_no_scores():
    maps = Fake(label=lambda x: x.argmax(axis=1), probability=lambda x: [{0: 1.0}] * len(x))
    assert find_metric(None, data(SCORES, [0, 1, 2, 3, 1]), maps).name == "top1"
    assert score(maps, [0, 1, 2, 3, 1]).value == 0.8
    names = np.array(["ant", "bee", "cat", "do"], object)
    named = Fake(label=lambda x: names[x.argmax(axis=1)], scores=lambda x: x)
    assert score(named, np.array(["ant", "bee", "cat", "dog", "bee"])).value == 0.6
    # Scores say more than an integer of the labels' shape, which may be something else; a name decides.
    both = Fake(count=lambda x: x.argmin(axis=1), scores=lambda x: x)
    assert score(both, [0, 1, 2, 3, 1]).value == 0.8
    assert score(both, [1, 0, 0, 1, 1], metric="top1@count").value == 0.8
    with pytest.raises(DataError, match="fit no output"):
        score(Fake(a=lambda x: x.argmax(axis=1), b=lambda x: x.argmin(axis=1)), [0, 1, 2, 3, 1])


def test_labels_that_do_not_fit_are_explained():
    for labels, message in (
        (None, "has no labels"),
        ([0, 1, 2, 3, 4], "label 4: the model has 4 classes, 0 to 3"),
        ([0, 1, 2, 3, -1], "label -1"),
        ([0.0, 1, 2, 3, 0], "labels are float64"),
        (["a", "b", "c", "d", "e"], "class numbers"),
        (np.zeros((5, 3), int), r"labels of shape \[1, 3\] fit no output"),
    ):
        with pytest.raises(DataError, match=message):
            score(same, labels)


def test_errors_of_numbers_are_negative():
    labels = SCORES - np.array([1, 2, 3, 4], np.float32)
    assert score(same, labels, "negative-mae").value == -2.5
    assert score(same, labels, "negative-mse").value == -7.5
    assert score(same, SCORES, "negative-mae").value == 0


# --------------------------------------------------------------------------------------------------------- original


def test_agreement_cosine_and_sqnr_tell_models_apart():
    assert score(same, metric="agreement", reference=same).value == 1
    assert score(reverse, metric="agreement", reference=same).value == 0
    assert score(reverse, metric="cosine", reference=same).value == -1
    noisy = Fake(y=lambda x: x * np.float32(1.1))
    assert score(noisy, metric="sqnr", reference=same).value == pytest.approx(20, abs=1e-3)
    assert score(noisy, metric="cosine", reference=same).value == pytest.approx(1)
    found = score(noisy, metric="sqnr", reference=same)
    assert not found.labelled and found.interval.low <= found.value <= found.interval.high
    with pytest.raises(RecipeError, match="none was given"):
        score(same, metric="cosine")


def test_single_numbers_are_compared_with_their_spread():
    """The angle between two single numbers says nothing but their signs."""
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 1)).astype(np.float32)
    dataset = open_dataset({"x": x}, [TensorSpec("x", np.dtype(np.float32), ["N", 1])])
    grades = Fake(y=lambda x: 3 + x / 3)
    found = find_metric(None, dataset, grades)
    assert found.name == "r2"

    def r2(other):
        return evaluate(Fake(y=other), dataset, found, reference=grades)

    assert r2(lambda x: 3 + x / 3).value == 1
    # The mean of all instead of each: nothing of what varies is told, though no number is off by much.
    mean = float(x.mean())
    assert r2(lambda x: np.full_like(x, 3 + mean / 3)).value == pytest.approx(0, abs=0.02)
    assert evaluate(Fake(y=lambda x: 3 + 0 * x), dataset, "cosine", reference=grades).value == 1
    off = r2(lambda x: 3 + x / 3 + np.float32(0.1) * np.sign(x) / 3)
    assert off.value == pytest.approx(1 - 0.01 / x.var(), abs=1e-4)
    assert off.interval is not None and off.interval.low <= off.value <= off.interval.high
    assert r2(lambda x: x * NAN).value == -10
    # An output that never varies has its square to compare with.
    three = Fake(y=lambda x: 3 + 0 * x)
    close = evaluate(Fake(y=lambda x: 3.3 + 0 * x), dataset, "r2", reference=three)
    assert close.value == pytest.approx(0.99, abs=1e-4)


def test_agreement_on_sequences_of_different_length():
    tokens = Fake(y=lambda x: x[0].astype(np.int64))
    shorter = Fake(y=lambda x: x[0, :2].astype(np.int64))
    assert score(tokens, metric="agreement", reference=tokens).value == 1
    assert score(shorter, metric="agreement", reference=tokens).value == 0.5
    assert score(tokens, metric="agreement", reference=shorter).value == 0.5
    assert score(shorter, metric="cosine", reference=Fake(y=lambda x: x[0])).value == -1


def test_agreement_on_labels_that_are_strings():
    names = np.array(["cat", "dog", "emu"], object)
    named = Fake(label=lambda x: names[x.argmax(axis=1) % 3], scores=lambda x: [{"cat": 1.0}] * len(x))
    wrong = Fake(label=lambda x: names[(x.argmax(axis=1) + 1) % 3], scores=lambda x: [{"cat": 1.0}] * len(x))
    found = find_metric(None, data(SCORES), named)
    assert found.name == "agreement"
    assert score(named, metric=found, reference=named).value == 1
    assert score(wrong, metric=found, reference=named).value == 0


def test_two_integer_outputs_and_no_metric_name_one_to_choose():
    two = Fake(index=lambda x: x.argmax(axis=1), box=lambda x: x.argmin(axis=1))
    with pytest.raises(RecipeError, match="metric = 'agreement@index'"):
        find_metric(None, data(SCORES), two)


def test_agreement_refuses_what_is_no_class_or_ambiguous():
    with pytest.raises(RecipeError, match="looks like class scores"):
        score(Fake(y=lambda x: x[:, :1]), metric="agreement", reference=Fake(y=lambda x: x[:, :1]))
    twins = Fake(a=lambda x: x, b=lambda x: x)
    with pytest.raises(RecipeError, match="agreement@a"):
        score(twins, metric="agreement", reference=twins)
    assert score(twins, metric="agreement@b", reference=twins).value == 1


def test_an_output_that_went_missing_is_the_worst():
    assert score(Fake(z=lambda x: x), metric="cosine", reference=same).value == -1


# ---------------------------------------------------------------------------------------------------------- choosing


def test_default_metrics():
    assert find_metric(None, data(SCORES, [0, 1, 2, 3, 0]), same).name == "top1"
    assert find_metric(None, data(SCORES, SCORES), same).name == "negative-mae"
    assert find_metric(None, data(SCORES), same).name == "agreement"
    assert find_metric(None, data(SCORES), Fake(y=lambda x: x[:, :1])).name == "r2"
    assert find_metric(None, data(SCORES), Fake(y=lambda x: np.asarray(x[0, 0]))).name == "r2"
    assert find_metric(None, data(SCORES), Fake(y=lambda x: x[:, :1], z=lambda x: x[:, None, :, None])).name == "r2"
    assert find_metric(None, data(SCORES), Fake(z=lambda x: np.stack([x, x])[:, :, :, None])).name == "cosine"
    mixed = Fake(tokens=lambda x: x.astype(np.int64), logits=lambda x: x)
    assert find_metric(None, data(SCORES), mixed).name == "agreement@tokens"
    with pytest.raises(RecipeError, match="name one"):
        find_metric(None, data(SCORES, ["a", "b", "c", "d", "e"]), same)


def test_a_named_metric_is_tried_early():
    with pytest.raises(DataError, match="has no labels"):
        find_metric("top1", data(SCORES), same)
    with pytest.raises(RecipeError, match="Did you mean 'top1'"):
        find_metric("top-1", data(SCORES), same)
    found = find_metric("top1", data(SCORES, [0, 1, 2, 3, 0]), same)
    assert evaluate(same, data(SCORES, [0, 1, 2, 3, 0]), found).value == 1


def test_drop_is_absolute_and_may_be_negative():
    good, bad = (Score(metric="top1", value=value, samples=1, labelled=True) for value in (0.9, 0.8))
    assert drop(good, bad) == pytest.approx(0.1) and drop(bad, good) == pytest.approx(-0.1)
    low, lower = (Score(metric="negative-mae", value=value, samples=1, labelled=True) for value in (-1.0, -3.0))
    assert drop(low, lower) == 2.0 and drop(lower, low) == -2.0
    with pytest.raises(RecipeError, match="different metrics"):
        drop(good, low)


def test_wilson_matches_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    for right, samples, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        interval = wilson(right, samples)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)
    assert wilson(20, 20).high == 1


def test_progress_counts_feeds():
    seen = []
    evaluate(same, data(SCORES, [0] * 5), "top1", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_no_interval_for_one_sample_of_a_mean():
    assert score(same, metric="sqnr", x=SCORES[:1], reference=same).interval is None


# ---------------------------------------------------------------------------------------------------------- functions


def right(outputs, labels):
    return np.mean([output["y"].argmax() == label for output, label in zip(outputs, labels, strict=True)])


def test_a_function_gets_outputs_by_position_and_name_and_labels_as_given():
    seen = {}

    def scorer(outputs, labels):
        seen["by name"] = outputs[0]["y"]
        seen["last"] = outputs[0][-1]
        seen["labels"] = labels
        return np.concatenate([output[0] for output in outputs]).argmax(axis=1) == labels

    labels = [0, 1, 2, 3, 1]
    found = score(same, labels, scorer)
    assert (found.value, found.samples, found.interval.method) == (0.8, 5, "Wilson")
    assert seen["by name"] is seen["last"] and seen["labels"].tolist() == labels
    assert score(same, None, lambda outputs, labels: 0.0 if labels is not None else 1.0).value == 1


def test_one_number_for_all_gets_a_bootstrap_over_feeds():
    x = np.tile(SCORES, (8, 1))
    found = score(same, [0, 1, 2, 3, 1] * 8, right, x=x)
    assert found.value == 0.8 and "bootstrap over feeds" in found.interval.method
    exact = wilson(32, 40)
    assert found.interval.low == pytest.approx(exact.low, abs=0.06)
    assert found.interval.high == pytest.approx(exact.high, abs=0.06)
    assert found.interval == score(same, [0, 1, 2, 3, 1] * 8, right, x=x).interval
    assert score(same, [0, 1, 2, 3, 1], right).interval is None  # five feeds say too little


def test_a_score_that_depends_on_order_gets_no_interval():
    x = np.arange(160, dtype=np.float32).reshape(40, 4)
    ordered = [output.copy() for output in x]

    def in_order(outputs, labels):
        return float(all((output[0][0] == row).all() for output, row in zip(outputs, ordered, strict=True)))

    found = score(same, None, in_order, x=x)
    assert found.value == 1 and found.interval is None


def test_what_a_function_does_wrong_is_said():
    def broken(outputs, labels):
        raise KeyError("oops")

    for function, message in (
        (broken, "fails: KeyError: 'oops'"),
        (lambda outputs, labels: float("nan"), "NaN"),
        (lambda outputs, labels: "good", "returns a str"),
        (lambda outputs, labels: np.zeros((2, 2)), r"shape \(2, 2\)"),
        (lambda outputs, labels: [], "one number a sample"),
        (7, "is a int"),
    ):
        with pytest.raises(RecipeError, match=message):
            score(same, [0] * 5, function)


RUN = "import sys\nfrom onnxslim.errors import RecipeError\nfrom onnxslim.metrics import _resolve\n"
RUN += "try:\n    print(_resolve(sys.argv[1]).function([], None))\nexcept RecipeError as error:\n    print(error)\n"


def resolve(name, folder, path=None, flag="-c"):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, flag, RUN if flag == "-c" else "runner", name]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_code_beside_a_recipe_is_never_imported(tmp_path):
    (tmp_path / "my_metric.py").write_text("def score(outputs, labels): return 'imported'\n")
    (tmp_path / "runner.py").write_text(RUN)
    for flag in ("-c", "-m"):
        refused = resolve("my_metric:score", tmp_path, flag=flag)
        assert "no module 'my_metric'" in refused and "PYTHONPATH" in refused
        assert resolve("my_metric:score", tmp_path, path=tmp_path, flag=flag) == "imported\n"
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
    assert resolve("my_metric:score", other, path=tmp_path) == "imported\n"


def test_import_failures_are_told_apart(tmp_path):
    (tmp_path / "needs.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "raises.py").write_text("raise ValueError('boom')\n")
    (tmp_path / "fine.py").write_text("score = 3\n")
    other = tmp_path / "other"
    other.mkdir()
    for name, message in (
        ("needs:score", "needs 'not_installed_anywhere'"),
        ("raises:score", "ValueError: boom"),
        ("fine:score", "no function 'score'"),
        ("fine:missing", "no function 'missing'"),
        ("../fine:score", "plain Python names"),
        ("fine:", "plain Python names"),
    ):
        assert message in resolve(name, other, path=tmp_path)


def test_every_built_in_metric_is_documented():
    assert all(f"``{name}``" in metrics.__doc__ for name in metrics.METRICS)
