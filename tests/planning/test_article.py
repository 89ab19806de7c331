"""The article's tables: its own numbers as printed there, and the corrected ones as derived by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from efficient_attn.planning import article

DOCS = Path(__file__).parents[2] / "docs"


def column(table: article.Table, heading: str) -> list[str | float]:
    place = table.columns.index(heading)
    return [row[place] for row in table.rows]


def printed(values: list[str | float], digits: int) -> list[str]:
    return [f"{value:,.{digits}f}" for value in values]


def test_pairs() -> None:
    table = article.pairs()
    assert column(table, "article: pairs")[:5] == [64, 256, 1024, 10_000, 1_000_000], "as in both articles"
    assert column(table, "causal pairs") == [n * (n + 1) // 2 for n in column(table, "tokens")]  # type: ignore[operator]
    assert column(table, "core of attention") == [4] * 9
    growth = [2 * (n + 6 * 768) / (n / 2 + 6 * 768) for n in column(table, "tokens")]  # type: ignore[operator]
    assert column(table, "whole layer") == pytest.approx(growth)


def test_flops() -> None:
    table = article.flops()
    lengths = (128, 512, 1024, 2048, 4096, 8192)
    assert [article.article_flops(n, 768) for n in lengths] == [
        25_214_976, 403_439_616, 1_613_758_464, 6_455_033_856, 25_820_135_424, 103_280_541_696,
    ]  # fmt: skip
    assert printed(column(table, "article"), 3) == ["0.025", "0.403", "1.614", "6.455", "25.820", "103.281"]
    corrected = {
        "2 FLOPs a multiply-accumulate": ["0.050", "0.805", "3.221", "12.885", "51.540", "206.158"],
        "of them causal": ["0.025", "0.403", "1.612", "6.446", "25.776", "103.092"],
        "with projections, not causal": ["0.654", "3.221", "8.053", "22.549", "70.867", "244.813"],
    }
    for heading, values in corrected.items():
        assert printed(column(table, heading), 3) == values, heading


def test_memory() -> None:
    table = article.memory()
    gib = column(table, 'article "GB", which are GiB')
    assert printed(gib[:3] + gib[4:7], 2) == ["0.11", "1.27", "18.56", "0.28", "3.38", "49.50"], "as printed"
    assert gib == pytest.approx(
        [0.105, 1.266, 18.562, 290.25, 0.281, 3.375, 49.5, 774, 0.527, 6.328, 92.81, 1451.25, 1.56, 15.63, 212.5, 3250],
        rel=5e-3,
    )  # fmt: skip
    assert [b / a for a, b in zip(gib, column(table, "the same in GB"), strict=True)] == pytest.approx(
        [2**30 / 1e9] * 16
    )
    assert gib[1] / gib[0] == pytest.approx(12.0, abs=0.05), "not 16"
    small = article.article_bytes(4096, 768, 12, 12) / article.article_bytes(2048, 768, 12, 12)
    assert small == pytest.approx(3.78, abs=0.01)
    assert gib[9] / gib[1] == pytest.approx(5.0, abs=0.01), "Small to Large"
    # Flash attention keeps four tensors of 2 n d bytes, and 4 bytes for each head and row.
    kept = [2**30 * value for value in column(table, "kept by flash attention, GiB")]  # type: ignore[operator]
    assert kept[3] == 12 * 32_768 * (4 * 2 * 768 + 4 * 12)


def test_lengths() -> None:
    table = article.lengths()
    assert column(table, "article: scores of 12 layers") == [7637, 9860, 13_944]
    assert column(table, "scores of one layer at a time") == [26_457, 34_156, 48_304]
    assert column(table, "what flash attention keeps") == [226_098, 376_830, 753_660]


def test_times() -> None:
    table = article.times()
    assert printed(column(table, "article, ms"), 2) == [
        "0.03",
        "0.13",
        "0.52",
        "2.06",
        "8.25",
        "32.99",
        "131.94",
    ]
    assert column(table, "article, tokens/s") == [
        15_894_572, 7_947_286, 3_973_643, 1_986_821, 993_411, 496_705, 248_353,
    ]  # fmt: skip
    assert column(table, "ms") == pytest.approx([0.0644, 0.258, 1.031, 4.123, 16.49, 65.97, 263.9], rel=2e-3)


def test_shares() -> None:
    table = article.shares()
    for heading in ("article: attention", "attention"):
        assert printed(column(table, heading), 1) == ["5.3", "10.0", "18.2", "30.8", "47.1"]
    assert printed(column(table, "projections"), 1) == ["31.6", "30.0", "27.3", "23.1", "17.6"]
    assert printed(column(table, "FFN"), 1) == ["63.2", "60.0", "54.5", "46.2", "35.3"]
    causal = [100 * (n + 1) / (n + 1 + 12 * 768) for n in (256, 512, 1024, 2048, 4096)]
    assert column(table, "attention if causal") == pytest.approx(causal)


def test_recurrent_networks() -> None:
    table = article.recurrent()
    assert printed(column(table, "article: n^2 d / n d^2"), 2) == [
        "0.12", "0.25", "0.50", "1.00", "2.00", "4.00", "8.00",
    ]  # fmt: skip
    assert column(table, "core to RNN") == [0.125, 0.25, 0.5, 1, 2, 4, 8]
    assert min(column(table, "with projections to RNN")) > 1  # type: ignore[type-var]


def test_paths() -> None:
    table = article.paths()
    assert column(table, "article: mean path") == [63.5, 127.5, 255.5, 511.5, 1023.5]
    assert printed(column(table, "article: efficiency"), 3) == [
        "254.000",
        "255.000",
        "255.500",
        "255.750",
        "255.875",
    ]
    for length, mean in zip((128, 256), column(table, "mean path"), strict=False):
        distances = [abs(i - j) for i in range(length) for j in range(length) if i != j]
        assert mean == pytest.approx(sum(distances) / len(distances))


def test_variants() -> None:
    table = article.variants()
    assert printed(column(table, "article, speedup")[:4], 1) == ["1.0", "21.3", "128.0", "64.0"]
    assert [round(1e9 * value) for value in column(table, "article, G")[:4]] == [  # type: ignore[operator]
        206_158_430_208, 9_663_676_416, 1_610_612_736, 3_221_225_472,
    ]  # fmt: skip
    assert column(table, "GFLOP") == pytest.approx([824.6, 3.22, 6.44, 12.88, 25.77], rel=8e-3)
    assert column(table, "fewer FLOPs") == pytest.approx([1, 256, 128, 64, 32], rel=8e-3)
    layers = column(table, "fewer FLOPs of a whole layer")
    assert layers[1] == pytest.approx(4.49, abs=0.01) and max(layers) == layers[1]  # type: ignore[type-var]


def test_every_table_is_whole() -> None:
    tables = article.all_tables()
    assert len(tables) == len(article.TABLES) == 9
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title
        assert any(heading.startswith("article") for heading in table.columns), table.title


def test_the_page_is_what_the_generator_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    page = importlib.import_module("complexity").page()
    assert page == (DOCS / "complexity.md").read_text(), (
        "python docs/complexity.py --write brings it up to date"
    )
