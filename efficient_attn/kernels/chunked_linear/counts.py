"""What the kernels multiply: the products of tiles over all programs of all launches, padding included.

The normaliser is added up beside the products, by other units, and is not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..configs import INTERPRETER, Config, size_class
from .configs import COLUMNS, DECODE_BLOCKS, TABLE, named, padded, span_of

AGAIN = ("features", "state", "scores")
"""Of a backward pass, what the forward pass has computed before."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One call: queries are the last `length` of `num_keys` positions."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    num_keys: int
    width: int
    values: int
    features: int
    """How many there are."""
    projected: bool
    """Whether they are made of random projections."""
    has_exponent: bool
    is_causal: bool
    halves: bool = True
    """Whether sums and projections are multiplied in two halves, as all dtypes but fp32 are."""
    itemsize: int = 2
    """Bytes of an operand: 2 in bf16; fp16 is multiplied as tf32, 4."""
    architecture: int = 90
    both_ways: bool = False
    """Whether there are walks in both directions: of documents without causality, as if there were some."""

    def __post_init__(self) -> None:
        if 0 in (self.batch, self.length, self.num_keys, self.values):
            object.__setattr__(self, "batch", 0)

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.length

    @property
    def keys(self) -> int:
        return self.batch * self.kv_heads * self.num_keys

    @property
    def span(self) -> int:
        tokens = max(self.num_keys, self.length)
        return span_of(self.batch * self.kv_heads, tokens, self.architecture == INTERPRETER)

    def config(self, kernel: str) -> Config:
        key = self.architecture, self.itemsize, size_class(min(256, max(self.width, self.values)))
        return TABLE[named(kernel, self.projected)][key]

    def blocks(self, config: Config) -> tuple[int, int]:
        """The width of a block of features, and of all columns of values."""
        return min(config["BLOCK_M"], padded(self.features)), padded(self.values)

    def column_blocks(self, config: Config) -> tuple[int, int]:
        """The width of a block of the values' columns, and how many there are."""
        block = min(config["BLOCK_V"], padded(self.values))
        return block, -(-self.values // block)

    def launches(self, config: Config) -> list[int]:
        """How many blocks of features each launch takes."""
        block, most = self.blocks(config)[0], config["FEATURES"]
        return [-(-min(most, self.features - first) // block) for first in range(0, self.features, most)]

    def row_chunks(self, chunk: int) -> int:
        """Chunks that are walked for the rows, from the start of the span in which the first of them stands."""
        start = (self.num_keys - self.length) % self.span if self.is_causal else 0
        return -(-(start + self.length) // chunk)

    def key_chunks(self, chunk: int) -> int:
        """Chunks that are walked for the keys."""
        return -(-self.num_keys // chunk)

    def projection(self, chunk: int, block: int) -> int:
        """The projections of a chunk onto a block of features."""
        columns = min(padded(self.width), COLUMNS)
        width = -(-self.width // columns) * columns
        return (1 + self.halves) * 2 * chunk * block * width if self.projected else 0

    def split(self, *sizes: int) -> int:
        """A product with a state."""
        return (1 + self.halves) * _product(*sizes)


def _product(rows: int, columns: int, inner: int) -> int:
    return 2 * rows * columns * inner


def _times(counts: Counter[str], times: int) -> Counter[str]:
    return Counter({name: count * times for name, count in counts.items()})


def exponents(s: Sizes, exponent_itemsize: int) -> Counter[str]:
    """The projections of which each token's largest is taken."""
    if not (s.projected and s.has_exponent):
        return Counter()
    key = s.architecture, exponent_itemsize, size_class(min(256, s.width))
    config = TABLE["exponents"][key]
    chunk, block = config["CHUNK"], s.blocks(config)[0]
    chunks = s.batch * (s.heads * -(-s.length // chunk) + s.kv_heads * s.key_chunks(chunk))
    return Counter(features=chunks * -(-s.features // block) * s.projection(chunk, block))


def states(s: Sizes, chunks: int) -> Counter[str]:
    """The sums of so many chunks."""
    config = s.config("states")
    chunk, block = config["CHUNK"], s.blocks(config)[0]
    column, columns = s.column_blocks(config)
    programs = chunks * -(-s.features // block) * columns
    return Counter(
        features=programs * s.projection(chunk, block), state=programs * _product(column, block, chunk)
    )


def key_states(s: Sizes) -> Counter[str]:
    """The sums over the keys of each span."""
    return states(s, s.batch * s.kv_heads * s.key_chunks(s.config("states")["CHUNK"]))


def rows(s: Sizes) -> Counter[str]:
    """The outputs."""
    config = s.config("rows")
    chunk, block = config["CHUNK"], s.blocks(config)[0]
    column, columns = s.column_blocks(config)
    chunks = s.batch * s.heads * columns * s.row_chunks(chunk)
    each = Counter(features=s.projection(chunk, block), reading=s.split(column, chunk, block))
    launch: Counter[str] = Counter()
    if s.is_causal:
        each += Counter(
            features=s.projection(chunk, block),
            pairs=_product(chunk, chunk, block),
            state=_product(column, block, chunk),
        )
        launch["pairs"] = _product(column, chunk, chunk)
    launches = s.launches(config)
    return _times(_times(each, sum(launches)) + _times(launch, len(launches)), chunks)


def row_gradients(s: Sizes) -> Counter[str]:
    """dq."""
    config = s.config("row_gradients")
    chunk, (block, column) = config["CHUNK"], s.blocks(config)
    each = Counter(features=s.projection(chunk, block), gradients=s.split(block, chunk, column))
    launch: Counter[str] = Counter()
    if s.is_causal:
        each += Counter(
            features=s.projection(chunk, block),
            gradients=_product(block, chunk, chunk),
            state=_product(block, column, chunk),
        )
        launch["gradients"] = _product(chunk, chunk, column)
    if s.projected:
        each["gradients"] += _product(chunk, padded(s.width), block)
    launches, chunks = s.launches(config), s.batch * s.heads * s.row_chunks(chunk)
    return _times(_times(each, sum(launches)) + _times(launch, len(launches)), chunks)


def row_states(s: Sizes) -> Counter[str]:
    """The sums over the rows of each span."""
    counts = states(s, s.batch * s.heads * s.row_chunks(s.config("states")["CHUNK"]))
    return Counter(features=counts["features"], gradients=counts["state"])


def key_gradients(s: Sizes) -> Counter[str]:
    """dk and dv."""
    config = s.config("key_gradients")
    chunk, (block, column) = config["CHUNK"], s.blocks(config)
    each = Counter(
        features=s.projection(chunk, block),
        gradients=s.split(column, chunk, block) + s.split(block, chunk, column),
    )
    if s.is_causal:
        row = Counter(
            features=s.projection(chunk, block),
            scores=_product(chunk, chunk, block),
            gradients=2 * _product(chunk, chunk, column)
            + _product(chunk, chunk, block)
            + _product(column, block, chunk),
        )
        each += _times(row, s.heads // s.kv_heads)
    if s.projected:
        each["gradients"] += _product(chunk, padded(s.width), block)
    return _times(each, sum(s.launches(config)) * s.batch * s.kv_heads * s.key_chunks(chunk))


def forward(s: Sizes, exponent_itemsize: int = 2) -> Counter[str]:
    """FLOPs of a forward pass by what they are for; exponents are cut by the bytes of an input."""
    if s.batch == 0:
        return Counter()
    return exponents(s, exponent_itemsize) + _times(key_states(s) + rows(s), 1 + s.both_ways)


def backward(s: Sizes, exponent_itemsize: int = 2) -> Counter[str]:
    """FLOPs of a backward pass; those in AGAIN are recomputation."""
    if s.batch == 0:
        return Counter()
    walks = key_states(s) + row_gradients(s) + row_states(s) + key_gradients(s)
    return exponents(s, exponent_itemsize) + _times(walks, 1 + s.both_ways)


def step(s: Sizes) -> Counter[str]:
    """FLOPs of one new token: each program of a query makes the state that it reads, of some columns, anew."""
    block, column = DECODE_BLOCKS
    programs = s.batch * s.heads * -(-s.values // column)
    size = -(-s.features // block) * block
    projections = 2 * (1 + s.has_exponent) if s.projected else 0
    return Counter(
        features=programs * projections * 2 * size * padded(s.width),
        state=programs * 2 * size * column,
        reading=programs * 2 * size * column,
    )


def workspace(s: Sizes, training: bool) -> int:
    """Numbers in fp32 that are neither inputs nor outputs nor saved, at most at one time."""
    if s.batch == 0:
        return 0
    spans = max(-(-s.num_keys // s.span), -(-s.row_chunks(1) // s.span) if training else 0) + 1
    numbers = s.batch * s.kv_heads * spans * s.features * (s.values + 1)
    numbers += (s.rows + 3 * s.keys) * s.has_exponent + s.rows * training
    parts = 0
    if len(s.launches(s.config("rows"))) > 1:
        parts = s.rows * (s.values + 1)
    if training and len(s.launches(s.config("row_gradients"))) > 1:
        parts = max(parts, s.rows * s.width)
    if training and len(s.launches(s.config("key_gradients"))) > 1:
        parts = max(parts, s.keys * (s.width + s.values))
    return numbers + parts
