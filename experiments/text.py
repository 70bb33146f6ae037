"""Text for language models: a corpus and its split, batches for truncated backpropagation, and baselines."""

import hashlib
import lzma
import math
import pydoc_data.topics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

HELD_OUT = 0.05  # fraction of the text, taken from its end
STREAMS, WARM_UP = 32, 256  # columns of the held-out text; characters read in each before the first one is scored


class Corpus(NamedTuple):
    """A text and its split. Symbols are numbered in sorted order."""

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
        """A hash of the text, to check that two machines read the same one."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_corpus(name: str) -> Corpus:
    """Load `python-docs`, the standard library's own manual, or any text file by its path."""
    if name == "python-docs":
        # The manual repeats whole paragraphs. Without this, some of them would be in both parts of the split.
        paragraphs = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
        text = "\n\n".join(dict.fromkeys(paragraph.rstrip() for paragraph in paragraphs))
    else:
        text = Path(name).read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    return Corpus(name, text[:cut], text[cut:], "".join(sorted(set(text))))


def load_or_exit(experiment: str, name: str, batch: int) -> Corpus:
    """Load a corpus for an experiment, or exit with one line that says why it cannot be used.

    Args:
      experiment: name at the start of the line.
      name: as in `load_corpus`.
      batch: number of characters in one training batch.
    """
    try:
        corpus = load_corpus(name)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{experiment}: --corpus {name} cannot be read as UTF-8 text: {error}")
    if "\0" in corpus.symbols:
        sys.exit(f"{experiment}: --corpus {name} is not a text file: it contains NUL characters.")
    if len(corpus.symbols) < 2:
        found = f"contains only one symbol, {corpus.symbols!r}" if corpus.symbols else "is empty"
        sys.exit(f"{experiment}: --corpus {name} {found}; there is nothing to predict.")
    if len(corpus.train) < batch or len(corpus.held_out) < STREAMS:
        sys.exit(
            f"{experiment}: --corpus {name} is too short: it has {len(corpus.train)} characters for training and "
            f"{len(corpus.held_out)} held out; one batch needs {batch} (--batch-size times --seq-len), the evaluation "
            f"{STREAMS}."
        )
    return corpus


def encode(text: str, symbols: str) -> Int[np.ndarray, "characters"]:
    """Replace every character by its index in `symbols`."""
    number = {symbol: k for k, symbol in enumerate(symbols)}
    return np.array([number[character] for character in text], np.int32)


def first_symbol(symbols: str) -> str:
    """Return the symbol that samples start from: a newline if the corpus has lines."""
    return "\n" if "\n" in symbols else symbols[0]


def batches(
    tokens: Int[np.ndarray, "characters"], steps: range, batch_size: int, seq_len: int
) -> Int[np.ndarray, "steps seq_len+1 batch"]:
    """Cut the batches of the given steps.

    A batch reads the text at `batch_size` evenly spaced places. The next batch continues where this one stops, and
    wraps around at the end of the text. Batch k depends only on k, so a resumed run reads the same batches. Row t+1 of
    a batch is the target of row t.
    """
    places = np.arange(batch_size) * (len(tokens) // batch_size)
    reads = np.arange(seq_len + 1)[:, None] + places
    return np.stack([tokens[(reads + step * seq_len) % len(tokens)] for step in steps])


def streams(
    tokens: Int[np.ndarray, "characters"], first: int, num_streams: int, warm_up: int
) -> tuple[Int[np.ndarray, "time streams"], Int[np.ndarray, "time streams"], Bool[np.ndarray, "time streams"]]:
    """Arrange `tokens[first:]` in columns, so that each character is scored exactly once.

    Each column starts `warm_up` characters before the first one it scores. So a recurrent model has context there, as
    an n-gram model has everywhere.

    Returns:
      The inputs, the targets, and a mask that is True where a target is scored.
    """
    columns = np.array_split(np.arange(first, len(tokens)), num_streams)
    lengths = np.array([len(column) for column in columns])
    starts = np.array([column[0] for column in columns])
    offsets = np.arange(-warm_up, lengths.max())[:, None]
    at = np.clip(starts + offsets, 1, len(tokens) - 1)
    return tokens[at - 1], tokens[at], (offsets >= 0) & (offsets < lengths)


def held_out_streams(
    corpus: Corpus,
) -> tuple[Int[np.ndarray, "time streams"], Int[np.ndarray, "time streams"], Bool[np.ndarray, "time streams"]]:
    """Return the `streams` of the held-out text."""
    return streams(encode(corpus.text, corpus.symbols), len(corpus.train), STREAMS, WARM_UP)


def ngram_bits(corpus: Corpus, order: int) -> float:
    """Return bits per held-out character of an interpolated n-gram model (Witten & Bell 1991).

    P_n(s | context) = (count + u P_{n-1}(s)) / (total + u), where u is the number of distinct symbols seen after the
    context, and P_0 is uniform over the symbols.
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
    """Return bits per held-out character of xz, which has also seen the training text.

    It is the difference in compressed size between the whole text and the training text.
    """
    added = _compressed_size(corpus.text) - _compressed_size(corpus.train)
    return 8 * added / len(corpus.held_out)


def _compressed_size(text: str) -> int:
    return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def baselines(corpus: Corpus) -> dict[str, float]:
    """Return bits per held-out character of the models that a language model should beat."""
    return {
        "unigram": ngram_bits(corpus, 1),
        "bigram": ngram_bits(corpus, 2),
        "5-gram": ngram_bits(corpus, 5),
        "xz": xz_bits(corpus),
    }
