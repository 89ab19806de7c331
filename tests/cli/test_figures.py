"""The figures: every one is drawn, shows the numbers that it claims to show, and becomes an SVG that fits its page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from efficient_attn import MECHANISMS, FullAttention, Shape
from efficient_attn.cli.figures import FIGURES, Data, NoData, draw, measured, theory
from efficient_attn.cli.figures.style import VARIABLES, inline_svg, look
from efficient_attn.planning import MechanismSpec
from tests.cli.examples import DEMO, DEVICE, RECORDS, demo, written
from tests.cli.running import ran, refused

FEW = [MechanismSpec("full"), MechanismSpec("linear")]
EVERYTHING = Data(records=RECORDS, demo=DEMO, device=DEVICE, mechanisms=FEW)


def lines(figure: Figure, axes: int = 0) -> dict[str, list[tuple[float, float]]]:
    """The points of each line by its label."""
    return {
        str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in figure.axes[axes].lines
    }


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_and_stands_on_its_own_in_a_page(name: str) -> None:
    svg = inline_svg(draw(name, EVERYTHING), name, "a label")
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    assert 'aria-label="a label"' in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids and all(each.startswith(f"{name}-") for each in ids), "two figures of a page share no id"
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    assert used <= set(ids)
    for drawn in VARIABLES:
        assert drawn not in svg, "colours of text and axes are those of the page"
    assert any(variable in svg for variable in ("var(--ink)", "var(--faint)"))
    assert not re.search(r"(?:href|src)=\"https?:", svg)
    assert inline_svg(draw(name, EVERYTHING), name, "a label") == svg, "the same twice"


def test_flops_are_those_of_full_attention() -> None:
    figure = draw("flops", Data())
    shown = figure.axes[0].collections[0].get_array()
    assert shown is not None
    counted = FullAttention().cost(Shape(1, 12, 1024, 1024, 64)).flops.forward
    assert counted == 2 * 1024**2 * 2 * 768 == 3_221_225_472, (
        "the article's width, 2 for each multiply-accumulate"
    )


def test_memory_is_what_the_article_says_where_weights_are_written_out() -> None:
    texts = [text.get_text() for text in draw("memory", Data()).axes[0].texts]
    by_model = [texts[i : i + 7] for i in range(0, len(texts), 7)]
    lengths = theory.powers(512, 32_768)
    column = {n: i for i, n in enumerate(lengths)}
    for row, expected in enumerate(
        ({512: "0.11", 2048: "1.3", 8192: "19", 32_768: "290"}, {512: "0.28", 32_768: "774"})
    ):
        assert {n: by_model[row][column[n]] for n in expected} == expected


def test_lines_of_recurrent_layers_cross_where_planning_says() -> None:
    figure = draw("rnn", Data())
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"512", "1,536", "2,048"} <= texts, "core against RNN, GRU and LSTM of width 512"
    drawn = lines(figure)
    assert dict(drawn["attention"])[512] == dict(drawn["RNN"])[512] == 4 * 512**3


def test_shares_are_those_of_the_article() -> None:
    figure = draw("shares", Data())
    assert "half at 4,608" in {text.get_text() for text in figure.axes[0].texts}
    from efficient_attn.planning import Model, layer_shares

    found = layer_shares(Model(1, 768, 12, is_causal=False), 4096)
    assert round(found.attention, 3) == 0.471


def test_variants_scale_as_they_are_counted() -> None:
    drawn = {name: dict(points) for name, points in lines(draw("variants", Data())).items()}
    assert list(drawn) == list(MECHANISMS)
    assert drawn["full"][16_384] == 824_633_720_832
    assert drawn["full"][16_384] / drawn["linear"][16_384] == 256
    causal = Data(mechanisms=[MechanismSpec("linformer"), MechanismSpec("linear")])
    causal.layer = replace(causal.layer, is_causal=True)
    assert list(lines(draw("variants", causal))) == ["linear"]


def test_latency_is_a_lower_bound_on_a_datasheet() -> None:
    drawn = {name: dict(points) for name, points in lines(draw("latency", Data(mechanisms=FEW))).items()}
    assert drawn["full"][65_536] == pytest.approx(12 * 4 * 65_536**2 * 768 / 989e12)


def test_measured_times_are_those_of_the_records() -> None:
    drawn = lines(draw("times", EVERYTHING))
    assert drawn["linear"] == [(n, pytest.approx(1e-6 * n)) for n in (1024, 2048, 4096)]


def test_the_roofline_shows_what_was_reached_of_a_measured_device() -> None:
    reached = lines(draw("roofline", EVERYTHING))
    assert reached["this machine"][-1][1] == DEVICE.flops_per_second
    ((intensity, rate),) = reached["linear"]
    assert (intensity, rate) == (4096 / 4, pytest.approx(4096 * 2048 / 1e-6))
    expected = lines(draw("roofline", Data(mechanisms=FEW)))
    assert expected["full"][0][1] == Data().device.flops_per_second
    assert expected["linear"][0][1] < expected["full"][0][1], "traffic decides"


def test_predictions_are_the_roofline_of_the_device() -> None:
    slow = replace(DEVICE, mechanism_flops_per_second={"LinearAttention": 10**9})
    full, linear = RECORDS[0], RECORDS[3]
    assert measured.predicted_seconds(full, DEVICE) == 1024**2 * 2048 / 1e11
    assert measured.predicted_seconds(linear, slow) == 1024**2 * 2048 / 1e9, "the rate that it reached itself"
    assert measured.predicted_seconds(full, Data().device) is None, "of another dtype"


def test_quality_and_state_show_what_was_found() -> None:
    points = draw("quality", EVERYTHING).axes[0].containers
    found = {each.get_label(): each[0].get_xydata().tolist() for each in points}
    assert found["sliding_window"] == [[11_000, 2.5]]
    assert lines(draw("learning", EVERYTHING))["full"] == [(100, 3.1), (400, 2.6)]
    assert lines(draw("layer-time", EVERYTHING))["linear"][-1] == (4096, pytest.approx(4096e-6))
    held = dict(lines(draw("state", EVERYTHING))["full"])
    assert held[1024] == 1024 * 768 * 2 * 2, "keys and values in bfloat16"


@pytest.mark.parametrize(
    ("name", "why"),
    [("times", "no records"), ("predicted", "no records"), ("quality", "no results of the demo")],
)
def test_what_cannot_be_drawn_says_why(name: str, why: str) -> None:
    with pytest.raises(NoData, match=why):
        draw(name, Data())


def test_a_mechanism_looks_the_same_everywhere_and_unlike_the_others() -> None:
    assert look("linear") == look("linear causal") == look("linear:feature_map=elu")
    assert len({str(look(name)) for name in MECHANISMS}) == len(MECHANISMS)
    assert look("somebody_elses")["color"]


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_plot_writes_the_format_of_the_name(tmp_path: Path, suffix: str, magic: bytes) -> None:
    out = tmp_path / "new" / f"a.{suffix}"
    found = ran("plot", "state", "--mechanisms", "full", "linear", "--out", out, "--json")
    assert found.json["drawn"] == {"state": str(out)}
    assert out.read_bytes().startswith(magic)


def test_plot_draws_one_mechanism_with_its_options(tmp_path: Path) -> None:
    out = tmp_path / "matrix.svg"
    assert (
        ran(
            "plot", "matrix-sliding_window", "--mechanisms", "sliding_window:window_size=3", "--out", out
        ).code
        == 0
    )
    assert "window_size=3" in out.read_text()


def test_plot_all_draws_what_it_can_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: dict[str, Any] = {name: FIGURES[name] for name in ("shares", "times", "quality")}
    for module in ("efficient_attn.cli.plot.FIGURES", "efficient_attn.cli.figures.FIGURES"):
        monkeypatch.setattr(module, few)
    found = ran("plot", "all", "--out", tmp_path / "figures", "--records", written(tmp_path / "b.jsonl"))
    assert found.code == 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"shares.svg", "times.svg"}
    assert "quality: not drawn: no results of the demo were given" in found.err


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("pip install 'efficient-attn[plot]'", "plot", "shares", "--out", "/tmp/never.svg")


@pytest.mark.parametrize(
    ("complaint", "arguments"),
    [
        ("unknown figure 'shaers'", ["shaers"]),
        ("must end in .svg, .png, .pdf", ["shares", "--out", "shares.gif"]),
        ("cannot write", ["shares", "--out", "/dev/null/shares.svg"]),
        ("cannot write", ["all", "--out", "/dev/null"]),
        ("no records of efficient-attn bench were given", ["times", "--out", "/tmp/never.svg"]),
        ("none.jsonl: no such file", ["times", "--records", "none.jsonl"]),
        ("cannot read none.json", ["quality", "--demo", "none.json"]),
        ("unknown mechanism 'x'", ["variants", "--mechanisms", "x"]),
        ("must be one of RTX 3090", ["latency", "--on", "abacus"]),
    ],
)
def test_bad_arguments_are_refused(complaint: str, arguments: list[str]) -> None:
    refused(complaint, "plot", *arguments)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"mechanisms": 3}')
    refused("does not hold results of", "plot", "quality", "--demo", other)
    other.write_text('{"mechanisms": {"full": {"history": []}}}')
    refused("lacks audit, bigram_bits_per_character", "plot", "quality", "--demo", other)
    refused("holds no records", "plot", "times", "--records", other)
    foreign = written(
        tmp_path / "cpu.jsonl", [RECORDS[0] | {"cell": RECORDS[0]["cell"] | {"section": "window"}}]
    )
    refused("holds no records of efficient-attn bench", "plot", "times", "--records", foreign)
    assert (
        ran("plot", "quality", "--demo", demo(tmp_path / "results.json"), "--out", tmp_path / "q.svg").code
        == 0
    )
