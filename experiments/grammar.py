"""A small English: "the cats which already ate the king were full because they slept ." Number and gender are exact.

A clause is a subject, a relative clause of any length, was or were, an adjective, because, and a pronoun for the
subject. The nouns of the relative clause have numbers of their own: those of the other number than the subject's are
attractors (Linzen, Dupoux & Goldberg, Assessing the ability of LSTMs to learn syntax-sensitive dependencies, 2016).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

GENDERS = {
    "he": "king uncle brother father monk duke prince wizard grandfather nephew boy husband actor waiter lord emperor "
    "groom steward son wolf",
    "she": "queen aunt sister mother nun duchess lady sorceress grandmother niece girl bride actress waitress princess "
    "empress widow stewardess daughter hen",
    "it": "cat dog rat bird horse cow mouse snail beetle robot train tower",
}
PLURALS = {"wolf": "wolves", "lady": "ladies", "mouse": "mice"}
VERBS = (
    "ate chased saw heard followed liked feared found lost painted pushed pulled helped kissed carried fed met caught "
    "called washed led taught saved hit missed praised visited watched greeted teased trusted warned amused annoyed "
    "copied drew guided joined moved needed slept"
).split()
ADJECTIVES = "full empty tired old young happy sad late early lost found loud quiet warm cold rich poor strong".split()
ADVERBS = "already often quietly once again secretly never always gladly slowly there yesterday".split()


def plural(noun: str) -> str:
    """Return the plural of a noun of this English."""
    return PLURALS.get(noun, noun + ("es" if noun.endswith("s") else "s"))


NOUNS = [noun for nouns in GENDERS.values() for noun in nouns.split()]
PRONOUN = {noun: pronoun for pronoun, nouns in GENDERS.items() for noun in nouns.split()}
WORDS = sorted({
    *". the which was were because they".split(), *GENDERS, *NOUNS, *map(plural, NOUNS), *VERBS, *ADJECTIVES, *ADVERBS,
})  # fmt: skip
NUMBER = {word: n for n, word in enumerate(WORDS)}


class Clause(NamedTuple):
    """A clause, and where its subject stands and what it decides."""

    words: list[str]
    verb: int  # the place of was or were
    pronoun: int  # the place of he, she, it or they


def clause(
    rng: np.random.Generator,
    distance: int,
    between: Sequence[int] | None = None,
    number: int | None = None,
    noun: str = "",
) -> Clause:
    """Write a clause.

    Args:
      rng: draws what is not given.
      distance: words between the subject and its verb: 0, or 2 and more.
      between: the number of each noun between them, 0 for one, 1 for many; by default up to four, of any number. What
        they leave of the distance is adverbs.
      number: of the subject.
      noun: the subject.
    """
    pick = lambda words: words[rng.integers(len(words))]
    number = int(rng.integers(2)) if number is None else number
    noun = noun or pick(NOUNS)
    room = max(distance - 1, 0)
    between = list(rng.integers(2, size=rng.integers(min(4, room // 2) + 1)) if between is None else between)
    if 2 * len(between) > room:
        raise ValueError(f"clause: {len(between)} nouns take a distance of {2 * len(between) + 1}, got {distance}.")
    form = lambda noun, many: plural(noun) if many else noun
    words = ["the", form(noun, number)]
    if distance:
        pieces = [[pick(VERBS), form(pick(NOUNS), many)] for many in between] or [[pick(VERBS)]]
        articles = rng.integers(min(len(between), room - sum(map(len, pieces))) + 1)
        pieces[:articles] = [[verb, "the", noun] for verb, noun in pieces[:articles]]
        pieces += [[pick(ADVERBS)] for _ in range(room - sum(map(len, pieces)))]
        words += ["which", *(word for n in rng.permutation(len(pieces)) for word in pieces[n])]
    verb = len(words)
    pronoun = "they" if number else PRONOUN[noun]
    words += ["were" if number else "was", pick(ADJECTIVES), "because", pronoun, pick(VERBS), "."]
    return Clause(words, verb, verb + 3)


def corpus(
    seed: int, num_texts: int, max_distance: int, num_clauses: int = 2
) -> tuple[Int[np.ndarray, "texts time"], Bool[np.ndarray, "texts time"]]:
    """Write texts of clauses with subjects of their own; return the words' numbers, and True where there is one."""
    rng = np.random.default_rng(seed)
    distances = [0, *range(2, max_distance + 1)]
    texts = [
        [word for _ in range(num_clauses) for word in clause(rng, distances[rng.integers(len(distances))]).words]
        for _ in range(num_texts)
    ]
    return encode(texts, num_clauses * (max_distance + 8))


def encode(texts: list[list[str]], length: int) -> tuple[Int[np.ndarray, "texts time"], Bool[np.ndarray, "texts time"]]:
    """Number the words, each text filled up with full stops."""
    tokens = np.array(
        [[NUMBER[word] for word in text] + [NUMBER["."]] * (length - len(text)) for text in texts], np.int32
    )
    return tokens, np.arange(length) < np.array([len(text) for text in texts])[:, None]
