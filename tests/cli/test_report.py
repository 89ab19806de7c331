"""The report: one page that loads nothing, and that a real browser shows as it should."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from efficient_attn import MECHANISMS
from efficient_attn.benchmarking.cells import FORWARD, TRAINING
from efficient_attn.benchmarking.tables import Table
from efficient_attn.cli.figures import FIGURES, Data
from efficient_attn.cli.page.contents import _unmeasured
from efficient_attn.cli.page.html import sort_value, table_html
from efficient_attn.planning import save_device
from tests.cli.browser import CHROMIUM, DRIVER, Browser
from tests.cli.examples import DEVICE, RECORDS, demo, record, written
from tests.cli.running import ran, refused


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything: records, a demo and a measured device."""
    folder = tmp_path_factory.mktemp("report")
    save_device(DEVICE, folder / "device.json")
    records = written(folder / "bench.jsonl")
    with open(records, "ab") as file:
        file.write(b'{"torn')
    out = folder / "report.html"
    given = ("--records", records, "--demo", demo(folder / "results.json"), "--on", folder / "device.json")
    found = ran("report", *given, "--out", out, "--title", "A <report> & more", "--json")
    assert found.code == 0, found.err
    assert found.json["records"] == len(RECORDS)
    assert "not JSON; skipped" in found.err
    return out


class Tags(html.parser.HTMLParser):
    """Every tag is closed, in the order in which they were opened."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [str(given["id"])] if "id" in given else []
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = given.get(name) or ""
            if tag != "a" and value and not value.startswith(("#", "data:")):
                self.loaded.append(f"{tag} {name}={value}")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_the_page_is_whole_and_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.loaded == []
    assert len(tags.ids) == len(set(tags.ids)), "ids are unique"
    assert not re.search(r"@import|url\((?!#)|\bfetch\(|XMLHttpRequest|import\(", text)
    assert page.stat().st_size < 3_000_000


def test_what_others_wrote_is_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<title>A &lt;report&gt; &amp; more</title>" in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert " &lt;b&gt;&amp; the &lt;/b&gt;" in text
    assert text.count("<script>") == 1


def test_what_has_no_number_stands_once_for_each_reason() -> None:
    lost = [record("full", FORWARD, n, 0.0, "oom", "MemoryError") for n in (4096, 1024)]
    (table,) = _unmeasured(Data(records=[*lost, record("full", TRAINING, 8, 0.0, "timeout", "too slow")]))
    assert table.count("<tr>") == 1 + 2
    assert ">1,024, 4,096</td>" in table


def test_a_page_without_measurements_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficient_attn.cli.page.contents.THEORY", ("shares",))
    monkeypatch.setattr("efficient_attn.cli.page.contents.MATRICES", ())
    out = tmp_path / "report.html"
    assert ran("report", "--out", out).code == 0
    text = out.read_text(encoding="utf-8")
    assert "Not measured here: no records of efficient-attn bench were given." in text
    assert 'id="measured"' not in text
    assert 'id="demo"' not in text
    assert 'id="figure-shares"' in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"], "nothing else is left behind"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,024", 1024.0),
        ("3.22 G", 3.22e9),
        ("64x", 64.0),
        ("127 KiB", 127 * 1024.0),
        ("4.1 ms", 4.1e-3),
        ("3e-07", 3e-7),
        ("+0.614 ±0.01", 0.614),
        ("-0.07 ±0.01", -0.07),
        ("12%", 0.12),
        ("out of memory", None),
        ("-", None),
        ("", None),
        ("oom", None),
        ("3.11.2", None),
    ],
)
def test_a_cell_sorts_by_the_number_that_it_shows(text: str, value: float | None) -> None:
    found = sort_value(text)
    assert found is None if value is None else found == pytest.approx(value)


def test_a_table_is_escaped_and_marks_what_is_alarming() -> None:
    made = table_html(Table("<t>", ["a", "b"], [["<x>", "1 k"], ["oom", "-"]], "<n>"))
    assert '<td class="text">&lt;x&gt;</td><td class="" data-v="1000.0">1 k</td>' in made
    assert '<td class="text bad">oom</td><td class="" data-v="">-</td>' in made
    assert "<caption>&lt;t&gt;</caption>" in made and "&lt;n&gt;" in made


@pytest.mark.parametrize(
    ("complaint", "arguments"),
    [
        ("none.jsonl: no such file", ["--records", "none.jsonl"]),
        ("cannot read none.json", ["--demo", "none.json"]),
        ("cannot write", ["--out", "/dev/null/report.html"]),
        ("is a directory", ["--out", "/tmp"]),
        ("must be one of RTX 3090", ["--on", "abacus"]),
    ],
)
def test_bad_arguments_are_refused(complaint: str, arguments: list[str]) -> None:
    refused(complaint, "report", *arguments)


def test_a_damaged_record_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    damaged = tmp_path / "bench.jsonl"
    line = json.dumps(RECORDS[0] | {"check": "0123"})
    damaged.write_text(line)
    out = tmp_path / "report.html"
    out.write_text("the old page")
    refused("line 1: its checksum does not fit", "report", "--records", damaged, "--out", out)
    assert damaged.read_text() == line
    assert out.read_text() == "the old page"


needs_a_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="NO BROWSER: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Browser]:
    with Browser() as running:
        running.open(page)
        yield running


@needs_a_browser
def test_the_browser_finds_no_fault_and_every_figure(browser: Browser) -> None:
    assert [entry for entry in browser.console() if entry["level"] in ("SEVERE", "WARNING")] == []
    shown = browser.run(
        "return [...document.querySelectorAll('figure')].map(f => {"
        "  const svg = f.querySelector('svg'), box = svg.getBoundingClientRect();"
        "  return [f.id, box.width > 200 && box.height > 100, svg.querySelectorAll('path, image').length]})"
    )
    assert {name for name, _, _ in shown} == {f"figure-{name}" for name in FIGURES}
    assert [name for name, large, parts in shown if not large or not parts] == []
    assert (
        browser.run(
            "return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
        )
        == 0
    )


COLUMN = """
const table = [...document.querySelectorAll('#measured table')][0];
const heads = [...table.tHead.rows[0].cells];
const at = heads.findIndex(h => h.textContent.trim() === '{heading}');
{click}
return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
"""


@needs_a_browser
def test_tables_sort_by_number_and_by_word_and_back(browser: Browser) -> None:
    def sorted_by(heading: str) -> list[str]:
        return browser.run(COLUMN.format(heading=heading, click="heads[at].querySelector('button').click();"))

    before = browser.run(COLUMN.format(heading="tokens", click=""))
    ascending = [int(text.replace(",", "")) for text in sorted_by("tokens")]
    assert ascending == sorted(ascending)
    assert len(ascending) == len(before) == len(RECORDS)
    assert "1,048,576" in before, "which as a word would stand elsewhere"
    descending = [int(text.replace(",", "")) for text in sorted_by("tokens")]
    assert descending == ascending[::-1]
    names = sorted_by("mechanism")
    assert names == sorted(names)
    times = sorted_by("ms")
    assert times[-1] == "", "what is missing stands last"
    assert sorted_by("ms")[-1] == ""
    state = "return [...document.querySelectorAll('#measured th[aria-sort]')].map(h => h.ariaSort)"
    assert browser.run(state) == ["descending"]


CLIPPED = """
const out = [];
for (const text of document.querySelectorAll('figure svg text')) {
  const [inner, outer] = [text.getBoundingClientRect(), text.closest('svg').getBoundingClientRect()];
  if (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1
      || inner.bottom > outer.bottom + 1) out.push([text.closest('figure').id, text.textContent]);
}
return out;
"""
CONTRAST = """
function light(colour) {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour;
  }
  return 'rgb(255, 255, 255)';
}
const poor = [];
const read = 'h1, h2, h3, p, td, th, caption, figcaption, nav a, dt, dd, svg text';
for (const element of document.querySelectorAll(read)) {
  if (!element.textContent.trim()) continue;
  if (element.closest('#figure-flops, #figure-memory') && element.matches('svg text')) continue;  // on a colour map
  const style = getComputedStyle(element);
  const [a, b] = [light(element.matches('svg text') ? style.fill : style.color), light(behind(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) poor.push([element.tagName, element.textContent.trim().slice(0, 30), contrast]);
}
return poor;
"""
LETTERS = """
const small = [];
for (const text of document.querySelectorAll('svg text')) {
  const style = getComputedStyle(text), matrix = text.getScreenCTM();
  const pixels = parseFloat(style.fontSize) * Math.hypot(matrix.a, matrix.b);
  if (pixels < %s) small.push([text.textContent, pixels]);
}
return small;
"""


@needs_a_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_is_readable_in_light_and_dark_on_a_desk_and_on_a_phone(
    page: Path, width: int, dark: bool
) -> None:
    with Browser(width, 844, dark=dark) as window:
        window.open(page)
        red = int(window.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
        assert (red < 128) is dark
        assert window.run("return matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert window.run(CONTRAST) == [], "letters are told from what is behind them"
        assert window.run(LETTERS % 9) == []
        assert window.run(CLIPPED) == [], "no word is cut off"
        assert window.run("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
        levels = [entry["level"] for entry in window.console()]
        assert "SEVERE" not in levels


def test_every_mechanism_is_in_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in MECHANISMS:
        assert f'id="figure-matrix-{name}"' in text
        assert f">{name}</td>" in text
