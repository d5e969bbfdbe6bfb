"""What calibration sees of activations, and the ranges that it chooses: against NumPy and by force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_quantize_static import Builder, images, mobile_block, quantize

from onnxslim import load
from onnxslim.passes import _quantizer
from onnxslim.passes._calibration import Histogram, choose_range, observe
from onnxslim.passes._qdq import code_of_range
from onnxslim.runtime import Session
from onnxslim.stages import Draft


def test_extremes_of_all_feeds_are_observed():
    proto = mobile_block()
    model = load(proto)
    feeds = images(3)
    feeds[1]["x"][0, 0, 0, 0] = 50.0
    seen = observe(model, ["x", "r1"], feeds, {"x": 1, "r1": 7})
    assert seen["x"].high == 50.0
    assert seen["x"].low == min(feed["x"].min() for feed in feeds)
    assert seen["r1"].low == 0.0
    assert seen["r1"].elements == 32 * 144
    assert seen["x"].histogram.counts.sum() == 3 * 3 * 144
    assert seen["r1"].histogram.counts.sum() == 3 * -(-32 * 144 // 7)


def test_what_follows_from_other_tensors_is_not_fetched_but_known(monkeypatch: pytest.MonkeyPatch):
    b = Builder()
    b.node("Relu", [b.conv("x", "c1", 3, 32)], "r1")  # the convolution writes the codes of the Relu
    b.conv("r1", "c2", 32, 32)
    b.node("Mul", ["c2", b.node("Sigmoid", ["c2"], "gate")], "swish")
    b.node("LeakyRelu", [b.conv("swish", "c3", 32, 32)], "leaky", alpha=0.1)
    b.node("MaxPool", ["leaky"], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    b.conv("pooled", "c4", 32, 32)
    b.node("HardSigmoid", ["c4"], "hard", alpha=1 / 6, beta=0.5)
    b.conv(b.node("Mul", ["c4", "hard"], "swished"), "y", 32, 8)
    proto = b.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 8, 6, 6]})
    feeds = images(8)
    fetched: set[str] = set()

    def watched(model, names, data, steps=None, *rest, **options):
        if steps is not None:
            fetched.update(names)
        return observe(model, names, data, steps, *rest, **options)

    known: dict[str, object] = {}
    stored = _quantizer.Quantizer._stored
    monkeypatch.setattr(_quantizer, "observe", watched)
    monkeypatch.setattr(
        _quantizer.Quantizer, "_stored", lambda self, *plan: known.update(self.observed) or stored(self, *plan)
    )
    quantize(proto, feeds, equalize=False)
    assert fetched == {"x", "r1", "c2", "swish", "c3", "c4", "swished", "y"}
    follow = ["gate", "leaky", "pooled", "hard"]
    model = load(proto)
    seen = observe(model, follow, feeds, dict.fromkeys(follow, 1))
    for name in follow:
        # What was pooled holds no more than what it was pooled of.
        where = seen["leaky" if name == "pooled" else name]
        assert known[name].elements == seen[name].elements
        assert (known[name].low, known[name].high) == pytest.approx((where.low, where.high), rel=1e-5)
        true, found = (choose_range(e.low, e.high, e.histogram, "mse", 99.99) for e in (where, known[name]))
        assert found == pytest.approx(true, abs=0.03 * (true[1] - true[0]))


def test_observation_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch):
    model = load(mobile_block())
    names, steps = ["x", "r1"], {"x": 1, "r1": 7}
    feeds = [{"x": feed["x"] * (1 + index)} for index, feed in enumerate(images(5))]
    whole = observe(model, names, feeds, steps)
    monkeypatch.setattr("onnxslim.passes._calibration._SAVE_SECONDS", -1)
    draft = Draft(tmp_path / "new" / "draft.npz")

    def broken_off():
        yield from feeds[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(model, names, broken_off(), steps, draft=draft)
    ran = []
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda self, feed: ran.append(feed) or run(self, feed))
    resumed = observe(model, names, feeds, steps, draft=draft)
    assert len(ran) == 2  # of five feeds
    again = observe(model, names, feeds, steps, draft=draft)
    assert len(ran) == 2
    for found in (resumed, again):
        assert list(found) == names
        for name in names:
            assert (found[name].low, found[name].high) == (whole[name].low, whole[name].high)
            assert found[name].elements == whole[name].elements
            assert found[name].histogram.width == whole[name].histogram.width
            assert found[name].histogram.first == whole[name].histogram.first
            np.testing.assert_array_equal(found[name].histogram.counts, whole[name].histogram.counts)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", None])
def test_a_draft_that_cannot_be_read_or_written_costs_nothing_but_time(tmp_path: Path, content: bytes | None):
    model = load(mobile_block())
    path = tmp_path / "draft.npz"
    if content is None:
        path = path / "file" / "draft.npz"
        path.parent.parent.write_bytes(b"a file where a folder should be")
    else:
        path.write_bytes(content)
    feeds = images(2)
    found = observe(model, ["x"], feeds, {"x": 1}, draft=Draft(path))
    assert found["x"].high == observe(model, ["x"], feeds)["x"].high
    # Of other tensors, nothing is taken.
    assert list(observe(model, ["r1"], feeds, draft=Draft(path))) == ["r1"]


def test_mse_range_cuts_an_outlier_and_minmax_does_not():
    random = np.random.default_rng(0)
    values = np.append(np.abs(random.normal(size=100_000)), 40.0)
    seen = Histogram()
    seen.add(values.astype(np.float32))
    seen.counts[:-1] *= 1000
    low, high = choose_range(0.0, 40.0, seen, "mse", 99.99)
    assert low == 0.0 and high < 20
    assert choose_range(0.0, 40.0, seen, "minmax", 99.99) == (0.0, 40.0)
    assert choose_range(0.0, 40.0, seen, "percentile", 99.9)[1] < 5


def test_entropy_range_cuts_what_is_far_out_and_keeps_what_is_even():
    random = np.random.default_rng(0)
    cases = {"outlier": np.append(random.normal(size=100_000), 40.0), "even": random.uniform(-1, 2, 100_000)}
    cases["relu"] = np.maximum(cases["outlier"], 0)  # the zeros are held exactly whatever the range is
    found = {}
    for name, values in cases.items():
        seen = Histogram()
        seen.add(values.astype(np.float32))
        found[name] = choose_range(float(values.min()), float(values.max()), seen, "entropy", 99.99)
    assert found["outlier"][0] < -3.5 and 3.5 < found["outlier"][1] < 8
    assert found["relu"][0] == 0 and 3.5 < found["relu"][1] < 8
    assert found["even"] == pytest.approx((-1, 2), abs=0.1)


def test_mse_range_has_the_least_error_of_all_that_are_tried():
    values = np.random.default_rng(0).standard_t(4, size=20_000).astype(np.float32)
    ends = float(values.min()), float(values.max())
    seen = Histogram()
    seen.add(values)

    def error(low: float, high: float) -> float:
        code = code_of_range(low, high).read
        codes = np.clip(np.rint(values / code.scale) + code.zero, 0, 255)
        return float(np.square(code.scale * (codes - code.zero) - values).mean())

    best = min(error(ends[0] * a, ends[1] * b) for a in np.linspace(0.1, 1, 37) for b in np.linspace(0.1, 1, 37))
    assert error(*choose_range(*ends, seen, "mse", 99.99)) < 1.03 * best


def test_histogram_of_parts_that_spread_is_that_of_the_whole():
    random = np.random.default_rng(0)
    parts = [(random.normal(size=5000) * gain).astype(np.float32) for gain in (1e-3, 1.0, 0.1, 300.0, 2.0)]
    parts[2][7] = np.nan
    grown, whole = Histogram(), Histogram()
    for part in (np.zeros(3, np.float32), *parts, np.zeros(0, np.float32)):
        grown.add(part)
    whole.add(np.concatenate(parts))
    assert (grown.width, grown.first) == (whole.width, whole.first)
    assert 2048 <= grown.counts.size <= 4097
    assert np.array_equal(grown.counts, whole.counts) and whole.counts.sum() == 24_999
    index = np.flatnonzero(grown.counts)
    assert grown.centres[index[0]] == pytest.approx(np.nanmin(np.concatenate(parts)), abs=grown.width)
    assert grown.centres[index[-1]] == pytest.approx(np.nanmax(np.concatenate(parts)), abs=grown.width)
