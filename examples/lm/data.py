"""Real text as bytes: loading it, drawing batches from it, and the bigram it has to beat."""

from __future__ import annotations

import hashlib
import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import DemoError

VOCABULARY = 256
VALIDATION_PART = 0.1
PYTHON_TOPICS = "pydoc_data.topics"


@dataclass(frozen=True)
class Corpus:
    """A text cut once, at nine tenths: the first part is learned from, the last is never trained on."""

    source: str
    sha256: str
    train: Tensor
    validation: Tensor

    def batch(self, *, seed: int, step: int, batch_size: int, context: int) -> Tensor:
        """The (batch_size, context + 1) bytes of one step: a pure function of (seed, step), so a resumed run
        sees what the uninterrupted one would have seen, without any generator state to save."""
        key = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        starts = torch.randint(len(self.train) - context, (batch_size, 1), generator=generator)
        return self.train[starts + torch.arange(context + 1)].long()

    def validation_windows(self, count: int, context: int) -> Tensor:
        """At most `count` windows of (context + 1) bytes, evenly spread over the held-out text."""
        available = len(self.validation) // (context + 1)
        chosen = torch.linspace(0, available - 1, min(count, available)).long()
        starts = chosen[:, None] * (context + 1)
        return self.validation[starts + torch.arange(context + 1)].long()

    def repeated_lines(self) -> float:
        """The share of held-out lines (30 characters or more) that also stand in the training text."""
        seen = set(_long_lines(self.train))
        held_out = _long_lines(self.validation)
        return sum(line in seen for line in held_out) / max(1, len(held_out))


def load_corpus(path: Path | None, context: int) -> Corpus:
    """The text of `path`, or Python's own language documentation, which comes with every CPython.

    Raises:
        DemoError: if there is no such file, it is not UTF-8 text, or it is too short for `context`.
    """
    source, raw = (PYTHON_TOPICS, _python_topics()) if path is None else (str(path), _read(path))
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DemoError(f"--data {source}: not UTF-8 text (byte {error.start}: {error.reason})") from None
    if b"\0" in raw:
        raise DemoError(f"--data {source}: not text (a zero byte at {raw.index(0)})")
    needed = math.ceil(4 * (context + 1) / VALIDATION_PART)
    if len(raw) < needed:
        raise DemoError(
            f"--data {source}: too short: {len(raw):,} bytes, context {context} needs at least {needed:,}"
        )
    cut = int(len(raw) * (1 - VALIDATION_PART))
    while raw[cut] & 0xC0 == 0x80:  # never cut inside a character
        cut += 1
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return Corpus(source, hashlib.sha256(raw).hexdigest(), tokens[:cut], tokens[cut:])


def count_characters(tokens: Tensor) -> Tensor:
    """UTF-8 characters along the last dimension: every byte but the continuation bytes 10xxxxxx."""
    return ((tokens & 0xC0) != 0x80).sum(-1)


def bigram_bits(corpus: Corpus, windows: Tensor) -> Tensor:
    """Bits (windows, context) that an add-one smoothed bigram of the training text pays for each byte.

    Smoothed over the bytes that the corpus uses, not over all 256: the stronger baseline.
    """
    train = corpus.train.long()
    alphabet = int(torch.cat([corpus.train, corpus.validation]).unique().numel())
    pairs = torch.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2).view(
        VOCABULARY, VOCABULARY
    )
    previous, following = windows[:, :-1], windows[:, 1:]
    seen = pairs[previous, following].double()
    return -((seen + 1) / (pairs.sum(1)[previous] + alphabet)).log2()


def _python_topics() -> bytes:
    try:
        topics = importlib.import_module(PYTHON_TOPICS).topics
    except ImportError:
        raise DemoError(
            "this Python has no pydoc_data.topics (it is not a full CPython): pass --data FILE"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics)).encode("utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DemoError(f"--data {path}: cannot be read: {error.strerror}") from None


def _long_lines(tokens: Tensor) -> list[bytes]:
    lines = (line.strip() for line in bytes(tokens.tolist()).split(b"\n"))
    return [line for line in lines if len(line) >= 30]
