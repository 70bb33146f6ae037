"""Text for language models: a corpus, its split, batches for truncated BPTT, and what a model must beat."""

import hashlib
import lzma
import math
import pydoc_data.topics
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

HELD_OUT = 0.05  # the last twentieth


class Corpus(NamedTuple):
    """A text and its split; symbols are numbered in their sorted order."""

    name: str
    train: str
    held_out: str
    symbols: str

    @property
    def text(self) -> str:
        """The whole text."""
        return self.train + self.held_out

    @property
    def sha256(self) -> str:
        """The hash by which two machines know that they read the same."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_corpus(name: str) -> Corpus:
    """Load `python-docs`, the standard library's own manual, or any text file by its path."""
    if name == "python-docs":
        # The manual repeats whole paragraphs: left in, they would stand on both sides of the split.
        paragraphs = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
        text = "\n\n".join(dict.fromkeys(paragraph.rstrip() for paragraph in paragraphs))
    else:
        text = Path(name).read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    return Corpus(name, text[:cut], text[cut:], "".join(sorted(set(text))))


def encode(text: str, symbols: str) -> Int[np.ndarray, "characters"]:
    """Number every character by its place in `symbols`."""
    number = {symbol: k for k, symbol in enumerate(symbols)}
    return np.array([number[character] for character in text], np.int32)


def first_symbol(symbols: str) -> str:
    """Return what a sample starts after: a new line, where the corpus has lines."""
    return "\n" if "\n" in symbols else symbols[0]


def batches(
    tokens: Int[np.ndarray, "characters"], steps: range, batch_size: int, seq_len: int
) -> Int[np.ndarray, "steps seq_len+1 batch"]:
    """Cut the batches of some steps: `batch_size` places in the text, read on from step to step, and round at its end.

    Batch k is a function of k alone. Row t+1 of a batch is the target of row t.
    """
    places = np.arange(batch_size) * (len(tokens) // batch_size)
    reads = np.arange(seq_len + 1)[:, None] + places
    return np.stack([tokens[(reads + step * seq_len) % len(tokens)] for step in steps])


def streams(
    tokens: Int[np.ndarray, "characters"], first: int, num_streams: int, warm_up: int
) -> tuple[Int[np.ndarray, "time streams"], Int[np.ndarray, "time streams"], Bool[np.ndarray, "time streams"]]:
    """Lay `tokens[first:]` in columns so that each character is scored once, predicted from those before it.

    A column begins `warm_up` characters before the first one it scores, so that a model knows its context there, as an
    n-gram does everywhere.

    Returns:
      inputs, targets, and True where a target is scored.
    """
    columns = np.array_split(np.arange(first, len(tokens)), num_streams)
    lengths = np.array([len(column) for column in columns])
    starts = np.array([column[0] for column in columns])
    offsets = np.arange(-warm_up, lengths.max())[:, None]
    at = np.clip(starts + offsets, 1, len(tokens) - 1)
    return tokens[at - 1], tokens[at], (offsets >= 0) & (offsets < lengths)


def ngram_bits(corpus: Corpus, order: int) -> float:
    """Return bits per held-out character of an interpolated n-gram model (Witten & Bell 1991).

    P_n(s | context) = (count + u P_{n-1}(s)) / (total + u), with u the number of distinct symbols seen after the
    context, and P_0 uniform over the symbols.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for at, symbol in enumerate(corpus.train):
        for length in range(min(order, at + 1)):
            counts[corpus.train[at - length : at]][symbol] += 1
    totals = {context: counter.total() for context, counter in counts.items()}

    bits, text = 0.0, corpus.text
    for at in range(len(corpus.train), len(text)):
        p = 1 / len(corpus.symbols)
        for length in range(order):
            context = text[at - length : at]
            if context not in totals:
                break
            u = len(counts[context])
            p = (counts[context][text[at]] + u * p) / (totals[context] + u)
        bits -= math.log2(p)
    return bits / len(corpus.held_out)


def xz_bits(corpus: Corpus) -> float:
    """Return bits per held-out character of xz given the training text: size of both less size of the training part."""
    size = lambda text: len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    return 8 * (size(corpus.text) - size(corpus.train)) / len(corpus.held_out)


def baselines(corpus: Corpus) -> dict[str, float]:
    """Return bits per held-out character of everything a language model must beat."""
    return {
        "unigram": ngram_bits(corpus, 1),
        "bigram": ngram_bits(corpus, 2),
        "5-gram": ngram_bits(corpus, 5),
        "xz": xz_bits(corpus),
    }
