"""The report says what the record says, safely, in one small file."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import report_records as records
from report_page import Element, read

from onnxslim.errors import OutputError
from onnxslim.record import Record, Score
from onnxslim.reports import render, write

BUILDERS: list[Callable[[], Record]] = [
    records.goals_met,
    records.goals_missed,
    records.no_labels,
    records.no_goals,
    records.nothing_measured,
    records.hostile,
    records.large,
]
every_record = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def page(record: Record) -> Element:
    return read(render(record).replace("\u00a0", " "))


@cache
def page_of(build: Callable[[], Record]) -> Element:
    return page(build())


def tile(root: Element, label: str) -> str:
    found = [item.text() for item in root.all("li", class_="tile") if item.text().startswith(label)]
    assert len(found) == 1, f"{len(found)} tiles start with {label!r}"
    return found[0]


# What it says


def test_verdict_comes_first_with_each_goal_and_its_margin() -> None:
    root = page_of(records.goals_met)
    assert root.by_id("verdict").text() == "Goals met 3 of 3"
    assert root.table("Goals")[1:] == [
        [
            "met",
            "max_accuracy_drop",
            "≤ 1.00 points",
            "0.35 points",
            "0.65 points to spare; 95 % CI of the drop −0.2 to 0.9 points",
        ],
        ["met", "max_size", "≤ 4 MB", "3.66 MB", "0.34 MB to spare"],
        ["met", "native: max_latency", "≤ 5 ms", "3.10 ms", "1.9 ms to spare"],
    ]
    body = root.all("body")[0].text()
    assert body.index("Goals met") < body.index("3.8 times smaller") < body.index("Before and after")
    assert (
        body.index("The machine was busy")
        < body.index("Latency on raspberry-pi-4: no device")
        < body.index("Before and after")
    )


def test_missed_and_unmeasured_goals_are_told_apart() -> None:
    root = page_of(records.goals_missed)
    assert root.by_id("verdict").text() == "Goals not met 1 of 3"
    rows = root.table("Goals")
    assert [row[0] for row in rows[1:]] == ["met", "not met", "not measured"]
    assert rows[3][3:] == ["–", "was not run counts as not met"]
    assert "goals not met" in root.all("title")[0].text()


def test_without_goals_the_summary_is_made_from_the_numbers() -> None:
    root = page_of(records.no_goals)
    assert root.by_id("verdict").text() == "No goals were set"
    summary = root.all("p", class_="summary")[0].text()
    assert summary == "2 of 3 passes kept: size 14.0 MB → 3.66 MB (−73.8 %), top1 −0.35 points, latency −53.1 %."
    assert not root.all("table", class_="goals")


def test_tiles_show_value_change_and_how_sure_it_is() -> None:
    root = page_of(records.goals_met)
    assert tile(root, "Size on disk") == "Size on disk 3.66 MB ✓ better: −73.8 % (−10.3 MB) 14.0 MB before"
    accuracy = tile(root, "Accuracy: top1")
    assert "71.50 % −0.35 points, within the 95 % confidence interval" in accuracy
    assert "71.85 % before" in accuracy and "95 % CI 69.48 to 73.44 % (Wilson), n = 2,000" in accuracy
    latency = tile(root, "Latency: ONNX Runtime, 2 threads")
    assert "better: −53.1 %" in latency and "0.47×" in latency and "p10 to p90" in latency
    assert "within the noise of the runs" in tile(root, "Latency on native: TVM, 2 threads")
    assert tile(root, "Latency on raspberry-pi-4") == "Latency on raspberry-pi-4 not measured compiled, not run"
    assert tile(root, "MACs").startswith("MACs estimate 8.84 G")
    assert tile(root, "Peak memory") == "Peak memory 31.2 MB ✓ better: −54.4 % (−37.2 MB) 68.4 MB before"
    assert tile(root, "Parameters").startswith("Parameters 11.3 M unchanged")
    assert tile(root, "Nodes") == "Nodes 205 +30.6 % (+48) 157 before"


def test_a_clear_loss_of_accuracy_is_not_called_noise() -> None:
    record = records.goals_met()
    worse = record.after.model_copy(update={"score": records.score(0.60)})
    shown = tile(page(record.model_copy(update={"after": worse})), "Accuracy")
    assert "worse: −11.85 points" in shown and "within" not in shown


def test_a_metric_of_the_user_is_not_taken_for_a_percentage() -> None:
    record = records.goals_met()
    old, new = (Score(metric="my_module:loss", value=v, samples=9, labelled=True) for v in (0.5, 0.75))
    update = {
        "before": record.before.model_copy(update={"score": old}),
        "after": record.after.model_copy(update={"score": new}),
    }
    shown = tile(page(record.model_copy(update=update)), "Accuracy: my_module:loss")
    assert "0.7500" in shown and "+0.250" in shown and "%" not in shown and "no confidence interval" in shown


def test_agreement_is_never_shown_as_accuracy_on_labels() -> None:
    record = records.no_labels()
    root = page(record)
    assert "top-1 agreement 94.20 %" in tile(root, "Against the original")
    assert not [item for item in root.all("li", class_="tile") if item.text().startswith("Accuracy")]
    sqnr = Score(metric="sqnr", value=31.25, samples=64, labelled=False)
    after = record.after.model_copy(update={"score": sqnr})
    shown = tile(page(record.model_copy(update={"after": after})), "Against the original")
    assert shown.startswith("Against the original: sqnr 31.25 dB")
    assert "nothing to compare with" in shown


def test_ledger_has_a_row_for_each_pass_and_says_why() -> None:
    root = page_of(records.goals_missed)
    rows = root.table("Pass ledger")[1:]
    assert [row[1] for row in rows] == ["kept", "no change", "kept", "rolled back", "failed"]
    assert rows[2] == [
        "3. quantize-static lossy",
        "kept",
        "13.8 MB → 3.66 MB −73.6 %",
        "105 → 205 +100",
        "3.50 M → 3.50 M 0 %",
        "71.85 % → 71.50 % −0.35 points",
        "48.2 s 2 attempts",
    ]
    assert rows[1][6] == "20.0 ms from cache"
    assert rows[3][2].startswith("3.66 MB → 2.41 MB") and rows[3][5].endswith("−10.29 points")
    rolled = root.by_id("pass-4").text()
    assert "Top-1 fell 10.6 points at the weakest strength tried" in rolled
    assert "accuracy budget did not hold: 10.6 of 1 point used" in rolled and "1 check, 1 failed" in rolled


def test_pass_details_group_changes_and_refusals_and_lose_none() -> None:
    root = page_of(records.goals_met)
    quantize = root.by_id("pass-3")
    heads = [group.text() for group in quantize.all("p", class_="rule")]
    assert heads == ["quantize-activations 99", "quantize-weights 52", "named in skip 1"]
    items = [item.text() for item in quantize.all("li")]
    assert sum("uint8, zero point 114" in item for item in items) == 99
    assert sum("int8, per channel, scale 0.0021" in item for item in items) == 52
    assert "/classifier/Gemm by rule quantize-weights" in items
    text = quantize.text()
    assert "percentile 99.99" in text and 'skip ["/classifier/Gemm"]' in text and "activations uint8" in text
    assert "weights quantized 52" in text and "mean SQNR in dB 31.4" in text
    assert "depends on the input 4" in root.by_id("pass-2").text()
    assert "same outputs held: max difference 2.1e-6" in root.by_id("pass-1").text()


def test_undone_rewrites_are_named_with_the_output_that_they_broke() -> None:
    text = page_of(records.goals_met).by_id("pass-1").text()
    assert "Undone, because they changed an output conv-batch-norm 1" in text
    assert "/features/features.52/Conv because output 'logits' is off by 0.3" in text
    assert "Undone" not in page_of(records.goals_met).by_id("pass-3").text()


def test_graph_section_says_which_nodes_became_which() -> None:
    root = page_of(records.goals_met)
    section = root.by_id("graph")
    text = section.text()
    assert "157 nodes became 105; 105 are there in both, 3 of them under other names." in text
    heads = [group.text() for group in section.all("p", class_="rule")]
    assert heads == ["Conv + BatchNormalization became Conv 52", "Gemm: attribute alpha: 1.0 → 2.0 52"]
    items = [item.text() for item in section.all("li")]
    assert "/features/0/Conv, /features/0/BatchNormalization → /features/0/Conv" in items
    assert sum("/BatchNormalization → " in item for item in items) == 104
    assert "input 'image': float32 [N, 3, 224, 224] → float32 [1, 3, 224, 224]" in items
    rows = root.table("Constants of 1 KiB")
    assert len(rows) == 53
    assert rows[1][:4] == ["/features/0/weight", "changed", "float32 [32, 3, 3, 3]", "float16 [32, 3, 3, 3]"]
    assert "were not compared" in page_of(records.nothing_measured).by_id("graph").text()


def test_targets_tell_verified_from_compiled_and_list_unsupported_ops() -> None:
    root = page_of(records.goals_missed)
    rows = {row[0].split()[0]: row for row in root.table("Hardware targets")[1:]}
    native = rows["native"]
    assert native[1] == "verified ran on this machine" and native[2] == "4.01 MB bundle 5.12 MB"
    assert native[4].endswith("TVM, 2 threads") and native[6] == "0.94×" and native[7] == "0.0312 SQNR 48.7 dB"
    assert rows["raspberry-pi-4"][1] == "compiled, not run" and "not measured" in rows["raspberry-pi-4"][4]
    assert rows["webgpu"][1] == "unsupported" and rows["metal"][1] == "failed"
    text = root.by_id("targets").text()
    assert "has not been run: nothing is known about its speed" in text
    assert "LSTM 9 /encoder/LSTM_0 , /encoder/LSTM_1 , /encoder/LSTM_2" in text and "/encoder/LSTM_8" in text
    assert "The Metal compiler is missing." in text and "52 of 52 convolutions run in int8." in text
    timed = root.table("Runs on native")
    assert [row[0] for row in timed[1:]] == ["compiled", "reference"] and timed[1][7:9] == ["100", "10"]


def test_kernels_say_where_the_time_goes_on_a_target() -> None:
    root = page_of(records.goals_met)
    table = root.table("Kernels on native")
    assert len(table) == 26, "60 kernels, of which 25 are listed"
    head = "convolution add relu fused_convolution0_add_relu"
    speeds = ["58.2", "60 %", "7.50", "onnxslim"]
    assert table[1] == [head, "1 × 56 × 56 × 64", "2", "50.0 µs", "1.67 %", *speeds]
    text = root.by_id("targets").text()
    assert "All calls of an inference take 3.00 ms on 2 threads" in text and "97.0 GFLOP/s" in text
    assert "35 more kernels are in record.json" in text
    assert "Where the time goes on raspberry-pi-4" not in text


def test_layers_errors_and_ops_before_and_after() -> None:
    root = page_of(records.goals_met)
    layers = root.table("Layers by size")
    assert len(layers) == 53
    assert layers[1][1:5] == ["Conv", "9.44 MB", "2.36 MB", "−75.0 %"]
    worst = root.table("The tensors furthest")[1:]
    assert [row[0] for row in worst] == ["1", "2", "3", "4", "5"]
    levels = [float(row[4].removesuffix(" dB")) for row in worst]
    assert levels == sorted(levels) and levels[0] < 26
    errors = root.table("Error of each tensor")[1:]
    assert len(errors) == 70 and errors[0][3] == "equal"
    assert len(root.by_id("layers").all("tr", class_="worst")) == 5
    ops = {row[0]: row[1:] for row in root.table("Nodes of each op")[1:]}
    assert ops["BatchNormalization"] == ["52", "0", "−52"] and ops["QuantizeLinear"] == ["0", "99", "+99"]


def test_a_layer_that_came_or_went_is_not_paired_with_another() -> None:
    record = records.goals_met()
    gone = record.after.layers[5:]
    new = record.after.layers[0].model_copy(update={"name": "brand-new"})
    after = record.after.model_copy(update={"layers": [*gone, new]})
    rows = {row[0]: row for row in page(record.model_copy(update={"after": after})).table("Layers by size")[1:]}
    assert rows["brand-new"][2] == "–" and rows["brand-new"][4] == "new"
    assert rows[record.before.layers[0].name][3:5] == ["–", "gone"]


def test_what_was_not_measured_stands_at_the_top_and_in_its_section() -> None:
    root = page_of(records.goals_missed)
    sentence = "Latency on raspberry-pi-4: no device was given."
    assert sentence in root.all("header")[0].text()
    section = root.by_id("unmeasured").text()
    assert sentence in section
    assert "latency on raspberry-pi-4 (" not in section  # said once, with its reason
    assert "latency on webgpu (unsupported)" in section and "goal raspberry-pi-4: max_latency" in section
    bare = page_of(records.nothing_measured).by_id("unmeasured").text()
    assert "accuracy; latency in ONNX Runtime; peak memory; MACs; error of each layer" in bare


def test_provenance_reproduces_the_run() -> None:
    record = records.goals_met()
    root = page(record)
    section = root.by_id("reproduce")
    assert section.all("pre", class_="command")[0].text() == record.command
    for digest in (record.before.sha256, record.after.sha256, *(entry.sha256 for entry in record.data)):
        assert digest in section.text()
    recipe = section.all("pre")[1].text()
    assert 'model = "mobilenetv2.onnx"' in recipe and "[[pass]]" in recipe and "per_channel = true" in recipe
    assert "max_latency = null" not in recipe and 'max_latency = "5 ms"' in recipe
    assert "AMD EPYC 9B14" in section.text()
    foot = root.all("footer")[0].text()
    assert "onnxslim 0.1.0" in foot and "2025-06-01 12:00 UTC" in foot and "5 min 12 s" in foot


def test_nothing_measured_says_so_everywhere() -> None:
    root = page_of(records.nothing_measured)
    assert tile(root, "Accuracy") == "Accuracy not measured" and tile(root, "MACs") == "MACs estimate not estimated"
    text = root.all("main")[0].text()
    for sentence in ("No pass was run.", "nothing was compiled", "lists no layers", "was not measured", "used no data"):
        assert sentence in text
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", text)


def test_numbers_that_are_none_of_the_kind_are_survived() -> None:
    record = records.goals_met()
    odd = [
        error.model_copy(update={"sqnr_db": level})
        for error, level in zip(record.layer_errors[:4], (float("inf"), float("nan"), -3.0, None), strict=True)
    ]
    stale = record.before.latency
    assert stale
    empty = stale.model_copy(update={"samples_ms": [], "median_ms": 0.0, "p10_ms": 0.0, "p90_ms": 0.0})
    before = record.before.model_copy(update={"latency": empty, "size_bytes": 0})
    text = page(record.model_copy(update={"layer_errors": odd, "before": before})).all("main")[0].text()
    assert "∞ dB" in text and "−3.00 dB" in text


# How it is made


@every_record
def test_page_is_well_formed_and_accessible(build: Callable[[], Record]) -> None:
    root = page_of(build)
    ids = [element.attrs["id"] for element in root.walk() if "id" in element.attrs]
    assert len(set(ids)) == len(ids)
    for element in root.walk():
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((element.attrs.get(name) or "").split()) <= set(ids)
        if element.tag == "a":
            assert (element.attrs["href"] or "").removeprefix("#") in ids
    for table in root.all("table"):
        assert table.all("caption")[0].text() and all(cell.attrs.get("scope") for cell in table.all("th"))
        widths = {sum(isinstance(c, Element) for c in row.children) for row in table.all("tr")}
        assert len(widths) == 1, table.all("caption")[0].text()
    for box in root.all("div", class_="scroll"):
        assert box.attrs["tabindex"] == "0" and box.attrs["aria-label"]
    levels = [int(element.tag[1]) for element in root.walk() if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert root.all("html")[0].attrs["lang"] == "en" and root.all("main") and root.all("nav") and root.all("footer")


@every_record
def test_page_asks_nothing_of_anyone(build: Callable[[], Record]) -> None:
    root = page_of(build)
    tags = {element.tag for element in root.walk()}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
        "image",
        "foreignobject",
    }
    for element in root.walk():
        for name, value in element.attrs.items():
            assert not name.startswith("on"), f"{name} on <{element.tag}>"
            assert name not in ("src", "srcset", "xlink:href", "xmlns", "action", "ping", "background")
            if name == "href":
                assert value and (value.startswith("#") or value == "data:,")
            if "url(" in (value or ""):
                assert re.fullmatch(r"url\(#[\w-]+\)", value or "")
    style = root.all("style")
    assert len(style) == 1 and not re.search(r"url\(|@import|https?:|expression", style[0].text())
    assert root.all("meta")[1].attrs["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_hostile_names_come_out_as_text() -> None:
    html = render(records.hostile())
    assert "<img" not in html and "</script" not in html and html.count("</style>") == 1
    text = page_of(records.hostile).all("main")[0].text()
    assert text.count("<img src=x onerror=alert(1)>") > 100
    assert "$x^2$" in text  # not read as a formula


def test_characters_that_svg_and_html_cannot_hold_are_replaced() -> None:
    record = records.goals_met()
    name = "a\x00b\x1b[31m\u202ec\ufffe日本語 $\\frac{"
    layers = [layer.model_copy(update={"name": name}) for layer in record.before.layers]
    passes = [entry.model_copy(update={"name": name, "reason": name}) for entry in record.passes]
    before = record.before.model_copy(update={"layers": layers, "path": name})
    html = render(record.model_copy(update={"before": before, "passes": passes}))
    assert not set("\x00\x1b\u202e\ufffe") & set(html) and "日本語 $\\frac{" in html
    read(html)


def test_very_long_names_are_cut() -> None:
    record = records.goals_met()
    passes = [entry.model_copy(update={"reason": "r" * 100_000, "name": "n" * 100_000}) for entry in record.passes]
    assert len(render(record.model_copy(update={"passes": passes}))) < 200_000


@every_record
def test_pictures_take_their_colours_from_the_page(build: Callable[[], Record]) -> None:
    root = page_of(build)
    pictures = root.all("svg", role="img")
    for picture in pictures:
        assert picture.all("title")[0].text() and picture.all("desc")[0].text()
        for element in picture.walk():
            assert not re.search(r"#[0-9a-f]{6}", element.attrs.get("style") or ""), element
            assert "font-family" not in (element.attrs.get("style") or "")
    assert bool(pictures) == (build is not records.nothing_measured)
    if build is records.goals_missed:
        titles = [picture.all("title")[0].text() for picture in pictures]
        assert titles == [
            "Latency of the model, before and after",
            "Size on disk after each pass",
            "Latency on native",
            "The 20 largest layers, before and after",
            "Signal to quantization noise of each tensor, in graph order",
            "Nodes of each op, before and after",
        ]


def test_waterfall_draws_kept_passes_full_and_rolled_back_ones_dashed() -> None:
    picture = next(p for p in page_of(records.goals_missed).all("svg", role="img") if "Size on disk" in p.text())
    words = [text.text() for text in picture.all("text")]
    for expected in ("original", "quantize-static", "−10.2 MB", "rolled back", "failed", "3.66 MB (−73.8 %)"):
        assert expected in words
    tips = {
        g.all("title")[0].text(): g
        for g in picture.all("g")
        if isinstance(g.children[0], Element) and g.children[0].tag == "title"
    }
    dashed = tips["prune-channels, rolled back: −1.25 MB"].all("path")[0].attrs["style"]
    filled = tips["quantize-static, kept: −10.2 MB"].all("path")[0].attrs["style"]
    assert dashed and "stroke-dasharray" in dashed and "fill:none" in dashed
    assert filled and "fill:var(--after)" in filled


def test_same_record_gives_the_same_bytes() -> None:
    first = render(records.goals_missed())
    again = render(Record.model_validate_json(records.goals_missed().model_dump_json()))
    assert first == again
    # Another process, with another seed of hash().
    script = (
        "import sys, report_records as r; from onnxslim.reports import render;"
        "sys.stdout.buffer.write(render(r.goals_missed()).encode())"
    )
    folder = Path(__file__).parent
    other = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, check=True, encoding="utf-8"
    )
    assert other.stdout == first


def test_a_model_of_500_layers_stays_below_a_megabyte_and_says_what_was_cut() -> None:
    record = records.large()
    html = render(record)
    assert len(html.encode()) < 1_000_000
    root = page_of(records.large)
    assert len(root.table("Layers by size")) == 501
    text = root.all("main")[0].text()
    assert "20 of 500 layers are drawn." in text
    assert "The first 1,000 of 2,000 tensors are drawn." in text
    assert "1,500 more tensors are in record.json" in text
    assert "20 more reasons are in record.json" in text
    assert "4 more targets have no chart here" in text
    group = root.by_id("pass-1").all("div", class_="group")[0]
    shown = len(group.all("li"))
    assert f"{223 - shown} more are in record.json" in group.text()


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "report.html"
    write(records.goals_met(), path)
    assert path.read_text(encoding="utf-8") == render(records.goals_met())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"report\.html: .*No space left"):
        write(records.no_goals(), path)
    assert path.read_text(encoding="utf-8") == render(records.goals_met())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        write(records.nothing_measured(), tmp_path / "report.html")


def test_report_knows_the_record_only() -> None:
    script = "import sys, onnxslim.reports as r, report_records as b; r.render(b.goals_met()); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, check=True, text=True
    )
    loaded = set(done.stdout.split())
    ours = Path(__file__).parents[1] / "reports"
    imported = {
        line.split()[1]
        for file in ours.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("from onnxslim")
    }
    assert imported <= {"onnxslim.errors", "onnxslim.record"} | {
        name for name in loaded if name.startswith("onnxslim.reports")
    }
    assert not loaded & {"tvm", "onnxruntime", "matplotlib.pyplot"}
