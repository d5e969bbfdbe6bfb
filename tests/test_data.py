import itertools
import os
import zipfile

import numpy as np
import onnx
import pytest

from onnxslim.data import Dataset, open_dataset, random_feeds, resized_feeds
from onnxslim.errors import DataError
from onnxslim.runtime import TensorSpec

RNG = np.random.default_rng(0)


def spec(name="x", shape=("N", 3), dtype="float32", **more):
    return TensorSpec(name, np.dtype(dtype), None if shape is None else list(shape), **more)


IMAGE = spec("image", ("N", 3, "H", "W"))
STATEFUL = [spec("input", (None, None)), spec("state", (2, None, 4)), spec("rate", (), "int64")]


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def saved(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], strict=True)


# ------------------------------------------------------------------------------------------------------------- .npz


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_is_cut_into_samples_again_and_again(tmp_path, compressed, order):
    x, labels = np.array(floats(7, 3), order=order), np.arange(7)
    data = open_dataset(saved(tmp_path / "d.npz", compressed, x=x, labels=labels), [spec()])
    assert (len(data), data.samples) == (7, 7)
    for _ in range(2):
        same(data, [{"x": x[i : i + 1]} for i in range(7)])
    np.testing.assert_array_equal(data.labels, labels)
    assert data.describe() == {"x": "float32 [1, 3]"}


def test_feeds_belong_to_the_caller(tmp_path):
    data = open_dataset(saved(tmp_path / "d.npz", x=floats(3, 3)), [spec()])
    digest = data.sha256
    for feed in data:
        feed["x"][:] = 9
    assert open_dataset(tmp_path / "d.npz", [spec()]).sha256 == digest


def test_fixed_batch_takes_groups_and_says_what_it_drops(tmp_path):
    x = floats(11, 3)
    data = open_dataset(saved(tmp_path / "d.npz", x=x, labels=np.arange(11)), [spec(shape=(4, 3))])
    same(data, [{"x": x[:4]}, {"x": x[4:8]}])
    assert data.samples == 8 and data.labels.tolist() == list(range(8))
    assert "last 3 of 11" in data.warnings[0]
    assert [labels.tolist() for _, labels in data.labelled()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(data.take(5)) == 2 and data.take(4).samples == 4


def test_one_axis_more_holds_whole_feeds_and_scalars(tmp_path):
    arrays = {"input": floats(5, 8), "state": floats(5, 2, 1, 4), "rate": np.array([8, 8, 16, 16, 8])}
    data = open_dataset(saved(tmp_path / "d.npz", **arrays), STATEFUL)
    third = next(itertools.islice(data, 2, None))
    assert third["input"].shape == (1, 8) and third["state"].shape == (2, 1, 4)
    assert third["rate"].shape == () and third["rate"] == 16
    arrays["rate"] = np.array(16)
    constant = open_dataset(saved(tmp_path / "c.npz", **arrays), STATEFUL)
    assert [int(feed["rate"]) for feed in constant] == [16] * 5


def test_mapping_file_and_feeds_hash_alike_when_they_hold_the_same(tmp_path):
    x = floats(4, 3)
    hashes = {
        open_dataset(source, [spec()]).sha256
        for source in (
            saved(tmp_path / "a.npz", x=x),
            saved(tmp_path / "b.npz", True, x=x),
            {"x": x},
            [{"x": row[None]} for row in x],
        )
    }
    assert len(hashes) == 1
    for changed in (x[::-1].copy(), x[:3], x + np.float32(1e-6)):
        assert open_dataset({"x": changed}, [spec()]).sha256 not in hashes
    assert open_dataset({"x": x, "labels": np.arange(4)}, [spec()]).sha256 not in hashes
    assert open_dataset({"x": x}, [spec()]).take(2).sha256 == open_dataset({"x": x[:2]}, [spec()]).sha256


def test_optional_input_may_be_left_out(tmp_path):
    specs = [spec(), spec("bias", (3,), optional=True)]
    assert open_dataset({"x": floats(2, 3)}, specs).samples == 2
    assert set(next(iter(open_dataset({"x": floats(2, 3), "bias": floats(2, 3)}, specs)))) == {"x", "bias"}


def test_an_input_called_labels_is_an_input():
    data = open_dataset({"labels": floats(2, 3)}, [spec("labels")])
    assert data.labels is None and data.samples == 2


def test_strings_need_no_pickle(tmp_path):
    data = open_dataset(saved(tmp_path / "d.npz", s=np.array(["a", "bé"])), [spec("s", ("N",), object)])
    assert [feed["s"].tolist() for feed in data] == [["a"], ["bé"]]
    assert data.describe() == {"s": "string [1]"}


def bad_npz(tmp_path):
    good = floats(4, 3)
    yield {"images": good}, "'images' is not an input"
    yield {"x": good, "classes": np.zeros(len(good))}, "labels go under 'labels'"
    yield {"x": good, "label": np.zeros(len(good))}, "labels go under 'labels'"
    yield {"X": good}, "did you mean 'x'"
    yield {}, "input 'x' is missing"
    yield {"x": good.astype(np.float64)}, r"float64, the model wants float32; convert it with .astype\('float32'\)"
    yield {"x": good.astype(">f4")}, ">f4"
    yield {"x": floats(4, 5)}, r"axis 1 must be 3"
    yield {"x": floats(3)}, r"shape \[3\].*give 2 axes"
    yield {"x": floats(4, 1, 1, 3)}, "give 2 axes"
    yield {"x": floats(0, 3)}, "no samples"
    yield {"x": np.where(good > 0.5, np.float32("nan"), good)}, "'x' holds NaN or infinity"
    yield {"x": np.where(good == good[3, 2], np.float32("inf"), good)}, "sample 3: 'x' holds NaN or infinity"
    yield {"x": good, "labels": np.arange(3)}, "3 labels for 4 samples"
    yield {"x": np.array([good, None], object)}, "never unpickled"
    yield {"x": good, "labels": np.array([1, "a", None, 2], object)}, "'labels' holds Python objects"


@pytest.mark.parametrize("case", range(14))
@pytest.mark.parametrize("compressed", [False, True])
def test_what_does_not_fit_is_one_clear_error(tmp_path, case, compressed):
    arrays, message = list(bad_npz(tmp_path))[case]
    path = saved(tmp_path / "bad.npz", compressed, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(path, [spec()])
    assert "\n" not in str(caught.value) and "bad.npz" in str(caught.value)


def test_unequal_counts_are_listed(tmp_path):
    specs = [spec("a"), spec("b")]
    with pytest.raises(DataError, match="'a' 4, 'b' 5"):
        open_dataset({"a": floats(4, 3), "b": floats(5, 3)}, specs)


def test_broken_files_are_refused(tmp_path):
    path = saved(tmp_path / "good.npz", True, x=floats(400, 3))
    content = path.read_bytes()
    cases = {"cut": content[: len(content) // 2], "empty": b"", "text": b"hello", "npy": b"\x93NUMPY\x01\x00"}
    middle = len(content) // 2
    cases["flipped"] = (
        content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 40]) + content[middle + 40 :]
    )
    for name, changed in cases.items():
        (tmp_path / f"{name}.npz").write_bytes(changed)
        with pytest.raises(DataError, match=f"{name}.npz"):
            open_dataset(tmp_path / f"{name}.npz", [spec()])
    with pytest.raises(DataError, match="no such file"):
        open_dataset(tmp_path / "missing.npz", [spec()])


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path):
    path = saved(tmp_path / "x.npz", x=floats(4, 3))
    with zipfile.ZipFile(path) as archive:
        member = archive.read("x.npy")
    for shape in (b"(9, 3)", b"(9999999999, 3)"):
        lying = member.replace(b"(4, 3), }" + b" " * (len(shape) - 6), shape + b", }")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", lying)
        with pytest.raises(DataError, match="truncated"):
            open_dataset(path, [spec()])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hi")
    with pytest.raises(DataError, match=r"readme\.txt.*no array"):
        open_dataset(path, [spec()])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DataError, match="not a regular file"):
        open_dataset(tmp_path / "pipe.npz", [spec()])


# ---------------------------------------------------------------------------------------------------- folders, feeds


def test_folder_of_npz_is_ragged_and_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        saved(tmp_path / f"{i}.npz", image=floats(1, 3, 8, i + 20), labels=np.array(i))
    data = open_dataset(tmp_path, [IMAGE])
    assert [feed["image"].shape[3] for feed in data] == [21, 22, 30]
    assert data.labels.tolist() == [1, 2, 10]
    assert data.describe() == {"image": "float32 [1, 3, 8, 21..30]"}
    saved(tmp_path / "3.npz", image=floats(1, 3, 8, 8))
    with pytest.raises(DataError, match=r"3\.npz: has no 'labels'"):
        open_dataset(tmp_path, [IMAGE])
    np.save(tmp_path / "labels.npy", np.arange(4))
    assert open_dataset(tmp_path, [IMAGE]).labels.tolist() == [0, 1, 2, 3]
    np.save(tmp_path / "labels.npy", np.arange(5))
    with pytest.raises(DataError, match="5 labels for 4 feeds"):
        open_dataset(tmp_path, [IMAGE])


def test_ragged_labels_stay_apart(tmp_path):
    for i in range(3):
        saved(tmp_path / f"{i}.npz", image=floats(1, 3, 8, 8), labels=np.arange(i))
    data = open_dataset(tmp_path, [IMAGE])
    assert data.labels.dtype == object and [len(label) for label in data.labels] == [0, 1, 2]
    assert data.sha256 != open_dataset([dict(feed) for feed in data], [IMAGE]).sha256


def test_onnx_test_data_is_read_by_name_or_position(tmp_path):
    for i in range(12):
        folder = tmp_path / f"test_data_set_{i}"
        folder.mkdir()
        value = np.full((1, 3), i, np.float32)
        name = "x" if i % 2 else "other"
        (folder / "input_0.pb").write_bytes(onnx.numpy_helper.from_array(value, name).SerializeToString())
        (folder / "output_0.pb").write_bytes(b"ignored")
    assert [int(feed["x"][0, 0]) for feed in open_dataset(tmp_path, [spec()])] == list(range(12))
    assert len(open_dataset(tmp_path / "test_data_set_3", [spec()])) == 1
    (tmp_path / "test_data_set_3" / "input_0.pb").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"test_data_set_3.*input_0\.pb"):
        open_dataset(tmp_path, [spec()])
    outside = onnx.TensorProto(name="x", data_type=1, dims=[1, 3], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "test_data_set_3" / "input_0.pb").write_bytes(outside.SerializeToString())
    with pytest.raises(DataError, match="external file"):
        open_dataset(tmp_path, [spec()])


def test_folders_without_data_or_with_dangling_links_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no \.npz files"):
        open_dataset(tmp_path, [spec()])
    (tmp_path / "a.npz").symlink_to(tmp_path / "gone.npz")
    with pytest.raises(DataError, match=r"a\.npz: a link"):
        open_dataset(tmp_path, [spec()])


def test_a_generator_is_kept_and_a_re_iterable_is_not():
    feeds = [{"x": floats(1, 3)} for _ in range(4)]
    data = open_dataset((feed for feed in feeds), [spec()])
    same(data, feeds)
    same(data, feeds)

    class Counted:
        runs = 0

        def __iter__(self):
            self.runs += 1
            yield from feeds

    counted = Counted()
    data = open_dataset(counted, [spec()])
    before = counted.runs
    same(data, feeds)
    assert counted.runs == before + 1


def test_labels_of_feeds_are_one_a_feed_or_one_a_row():
    feeds = [{"x": floats(2, 3)}, {"x": floats(3, 3)}]
    rows = open_dataset(feeds, [spec()], labels=[0, 1, 2, 3, 4])
    assert rows.samples == 5 and [part.tolist() for _, part in rows.labelled()] == [[0, 1], [2, 3, 4]]
    one = open_dataset(feeds, [spec()], labels=["a", "b"])
    assert one.samples == 2 and [part.tolist() for _, part in one.labelled()] == [["a"], ["b"]]
    with pytest.raises(DataError, match="3 labels for 2 feeds with 5 rows"):
        open_dataset(feeds, [spec()], labels=[0, 1, 2])
    assert rows.take(1).labels.tolist() == [0, 1]


def test_feeds_of_the_wrong_kind_are_named():
    for feeds, message in (
        ([{"x": floats(1, 3)}, {"x": floats(1, 4)}], "feed 1.*axis 1 must be 3"),
        ([{"x": floats(1, 3)}, [1]], "feed 1: is a list"),
        ([{"x": [[1.0, 2, 3]]}], "'x' is a list; give a NumPy array"),
        ([{"x": floats(3)}], r"\(1 axes\)"),
        ([], "no feeds"),
        (7, "is a int"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(feeds, [spec()])
    with pytest.raises(DataError, match="is a sequence"):
        open_dataset({"x": floats(1, 3)}, [spec(kind="sequence")])


# ---------------------------------------------------------------------------------------------------------- batches


def test_batches_stack_only_what_may_be_stacked():
    x = floats(7, 3)
    data = open_dataset({"x": x}, [spec()])
    assert [len(batch["x"]) for batch in data.batches(3)] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in data.batches(3)]), x)
    same(data.batches(1), data)

    ragged = [{"image": floats(1, 3, 8, width)} for width in (8, 8, 9, 8, 8, 8)]
    shapes = [batch["image"].shape for batch in open_dataset(ragged, [IMAGE]).batches(2)]
    assert shapes == [(2, 3, 8, 8), (1, 3, 8, 9), (2, 3, 8, 8), (1, 3, 8, 8)]


def test_batches_leave_lengths_scalars_and_fixed_batches_alone():
    words = [{"x": floats(length, 3)} for length in (4, 4, 5)]
    same(open_dataset(words, [spec(shape=("length", 3))]).batches(8), words)

    fixed = open_dataset({"x": floats(4, 3)}, [spec(shape=(1, 3))])
    same(fixed.batches(8), fixed)

    stateful = open_dataset({"input": floats(3, 8), "state": floats(3, 2, 1, 4), "rate": np.array(8)}, STATEFUL)
    same(stateful.batches(8), stateful)

    two = [spec("a", ("N", 3)), spec("b", ("T", 3))]
    different = open_dataset({"a": floats(4, 3), "b": floats(4, 3)}, two)
    same(different.batches(8), different)


def test_take_is_a_prefix():
    data = open_dataset({"x": floats(5, 3), "labels": np.arange(5)}, [spec()])
    same(data.take(2), itertools.islice(data, 2))
    assert data.take(2).labels.tolist() == [0, 1]
    assert data.take(99) is data and data.take(0).samples == 1
    assert isinstance(data.take(2).take(1), Dataset) and data.take(2).take(1).samples == 1


def test_small_data_is_read_into_memory_once():
    class Counted:
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return iter([{"x": floats(2, 3)} for _ in range(4)])

    data = open_dataset(Counted(), [spec()])
    Counted.reads = 0
    kept = data.in_memory(4 * 24)
    same(kept, kept)
    same(kept.batches(1), kept)
    assert Counted.reads == 1 and kept.samples == data.samples
    assert data.in_memory(4 * 24 - 1) is data


# ----------------------------------------------------------------------------------------------------- made-up feeds


def test_random_feeds_keep_symbols_alike_and_fixed_sizes():
    specs = [spec("a", ("N", "T", 3)), spec("b", ("T", 2)), spec("c", (4,), "int64"), spec("d", (), "bool")]
    sizes = set()
    for feed in random_feeds(specs, count=20, seed=3):
        assert feed["a"].shape[1] == feed["b"].shape[0]
        assert feed["a"].shape[2] == 3 and feed["c"].shape == (4,) and feed["d"].shape == ()
        assert all(feed[one.name].dtype == one.dtype for one in specs)
        assert (feed["c"] >= 0).all() and np.isfinite(feed["a"]).all()
        sizes.add(feed["a"].shape[:2])
    assert len({n for n, _ in sizes}) >= 3 and len({t for _, t in sizes}) >= 4


def test_random_feeds_repeat_with_their_seed_and_include_zeros():
    specs = [spec()]
    same(random_feeds(specs, seed=1), random_feeds(specs, seed=1))
    assert any(
        (a["x"] != b["x"]).any() for a, b in zip(random_feeds(specs, seed=1), random_feeds(specs, seed=2), strict=True)
    )
    scales = [float(np.abs(feed["x"]).max()) for feed in random_feeds([spec(shape=("N", 999))], count=12)]
    assert 0.0 in scales and max(scales) > 20 and sorted(scales)[len(scales) // 2] < 101


def test_random_feeds_obey_given_shapes_through_their_symbols():
    specs = [IMAGE, spec("mask", ("N", "H"), "uint8"), spec("extra", ("N",), optional=True)]
    for feed in random_feeds(specs, fixed={"image": [2, 3, 8, 9]}, count=6):
        assert feed["image"].shape == (2, 3, 8, 9) and feed["mask"].shape == (2, 8) and "extra" not in feed
    with pytest.raises(DataError, match=r"fixed shape of 'image'.*axis 1 must be 3"):
        next(random_feeds(specs, fixed={"image": [2, 4, 8, 9]}))
    with pytest.raises(DataError, match="cannot be made up"):
        next(random_feeds([spec(kind="sequence")]))


def test_random_feeds_cover_types():
    kinds = ["float16", "float64", "int8", "uint8", "int32", "uint16", "bool", "complex64"]
    specs = [spec(kind, ("N", 50), kind) for kind in kinds] + [spec("text", ("N",), object), spec("any", None)]
    feeds = list(random_feeds(specs, count=10))
    assert all(feed[kind].dtype == kind for feed in feeds for kind in kinds)
    assert min(feed["int8"].min() for feed in feeds) < -100 and max(feed["uint8"].max() for feed in feeds) > 200
    assert all(isinstance(item, str) for feed in feeds for item in feed["text"])
    assert {feed["any"].ndim for feed in feeds} == {0, 1, 2, 3, 4}
    import ml_dtypes

    assert next(random_feeds([spec(dtype=ml_dtypes.bfloat16)]))["x"].dtype == ml_dtypes.bfloat16


def test_random_feeds_stay_small():
    video = spec("v", ("N", 3, "T", "H", "W"))
    assert all(feed["v"].size <= 2**22 for feed in random_feeds([video], count=20))


def test_hints_are_used_for_single_integers():
    seen = {int(feed["rate"]) for feed in random_feeds(STATEFUL, count=20, hints={"rate": [8000, 16000]})}
    assert {8000, 16000} <= seen and len(seen) > 2


def test_resized_feeds_change_one_axis_everywhere_it_is():
    specs = [spec("a", ("N", "T")), spec("b", ("T", 2))]
    feed = {"a": floats(2, 6), "b": floats(6, 2)}
    resized = list(resized_feeds(feed, specs))
    assert {one["a"].shape for one in resized} == {(3, 6), (4, 6), (1, 6), (2, 7), (2, 12), (2, 3)}
    for one in resized:
        assert one["a"].shape[1] == one["b"].shape[0] and one["b"].shape[1] == 2
    longer = next(one for one in resized if one["b"].shape[0] == 7)
    np.testing.assert_array_equal(longer["b"][6], feed["b"][0])
    assert (2, 50) in {one["a"].shape for one in resized_feeds(feed, specs, [50])}


def test_an_empty_input_beside_others_is_data():
    specs = [spec("ids", (1, "T"), "int64"), spec("past", (1, "P", 2))]
    feed = {"ids": np.ones((1, 3), np.int64), "past": floats(1, 0, 2)}
    assert len(open_dataset([feed, feed], specs)) == 2
    assert {one["past"].shape for one in resized_feeds(feed, specs)} == {(1, 0, 2), (1, 1, 2)}
    with pytest.raises(DataError, match="holds no values: 'past'"):
        open_dataset([{"past": feed["past"]}], specs[1:])
