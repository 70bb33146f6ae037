"""A small fragment of English with exact number and gender.

Example: "the cats which already ate the king were full because they slept ." A clause is a subject, a relative clause
of any length, was or were, an adjective, because, and a pronoun for the subject. A noun in the relative clause that
differs from the subject in number is an attractor (Linzen, Dupoux & Goldberg, Assessing the ability of LSTMs to learn
syntax-sensitive dependencies, 2016).
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
    """Return the plural of a noun of this fragment."""
    return PLURALS.get(noun, noun + ("es" if noun.endswith("s") else "s"))


NOUNS = [noun for nouns in GENDERS.values() for noun in nouns.split()]
PRONOUN = {noun: pronoun for pronoun, nouns in GENDERS.items() for noun in nouns.split()}
WORDS = sorted({
    *". the which was were because they".split(), *GENDERS, *NOUNS, *map(plural, NOUNS), *VERBS, *ADJECTIVES, *ADVERBS,
})  # fmt: skip
NUMBER = {word: n for n, word in enumerate(WORDS)}


class Clause(NamedTuple):
    """A clause, and the indices of the two words that agree with its subject."""

    words: list[str]
    verb: int  # index of was or were
    pronoun: int  # index of he, she, it or they


def clause(
    rng: np.random.Generator,
    distance: int,
    between: Sequence[int] | None = None,
    number: int | None = None,
    noun: str = "",
) -> Clause:
    """Generate a clause.

    Args:
      rng: draws everything that is not given.
      distance: number of words between the subject and its verb: 0, or at least 2.
      between: the number of each noun between them, 0 for singular, 1 for plural; by default up to four nouns of random
        number. Adverbs fill the rest of the distance.
      number: 0 for a singular subject, 1 for a plural one.
      noun: the subject in the singular.

    Raises:
      ValueError: `distance` is too short for the nouns of `between`.
    """

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    number = int(rng.integers(2)) if number is None else number
    noun = noun or pick(NOUNS)
    room = max(distance - 1, 0)
    between = list(rng.integers(2, size=rng.integers(min(4, room // 2) + 1)) if between is None else between)
    if 2 * len(between) > room:
        raise ValueError(
            f"clause: {len(between)} nouns need a distance of at least {2 * len(between) + 1}, got {distance}."
        )
    words = ["the", _inflected(noun, number)]
    if distance:
        pieces = [[pick(VERBS), _inflected(pick(NOUNS), many)] for many in between] or [[pick(VERBS)]]
        articles = rng.integers(min(len(between), room - sum(map(len, pieces))) + 1)
        pieces[:articles] = [[verb, "the", noun] for verb, noun in pieces[:articles]]
        pieces += [[pick(ADVERBS)] for _ in range(room - sum(map(len, pieces)))]
        words += ["which", *(word for n in rng.permutation(len(pieces)) for word in pieces[n])]
    verb = len(words)
    pronoun = "they" if number else PRONOUN[noun]
    words += ["were" if number else "was", pick(ADJECTIVES), "because", pronoun, pick(VERBS), "."]
    return Clause(words, verb, verb + 3)


def _inflected(noun: str, number: int) -> str:
    return plural(noun) if number else noun


def corpus(
    seed: int, num_texts: int, max_distance: int, num_clauses: int = 2
) -> tuple[Int[np.ndarray, "texts time"], Bool[np.ndarray, "texts time"]]:
    """Generate texts of clauses with independent subjects; return word indices and a mask that is False at padding."""
    rng = np.random.default_rng(seed)
    distances = [0, *range(2, max_distance + 1)]
    texts = [
        [word for _ in range(num_clauses) for word in clause(rng, distances[rng.integers(len(distances))]).words]
        for _ in range(num_texts)
    ]
    return encode(texts, num_clauses * (max_distance + 8))


def encode(texts: list[list[str]], length: int) -> tuple[Int[np.ndarray, "texts time"], Bool[np.ndarray, "texts time"]]:
    """Replace words by indices and pad with full stops; return the indices and a mask that is False at padding."""
    tokens = np.array(
        [[NUMBER[word] for word in text] + [NUMBER["."]] * (length - len(text)) for text in texts], np.int32
    )
    return tokens, np.arange(length) < np.array([len(text) for text in texts])[:, None]
