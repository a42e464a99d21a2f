"""MinHash against the exact Jaccard index, and the promises of `NearDuplicates`."""

from __future__ import annotations

import random

import numpy as np
import pytest

from accord.data import minhash
from accord.data.minhash import SHINGLE, NearDuplicates
from accord.errors import ConfigError

VOCABULARY = [f"word{k}" for k in range(3000)]


def text(seed: int, length: int = 120) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def jaccard(one: list[str], other: list[str]) -> float:
    """The oracle: exact, from sets of tuples."""
    first, second = ({tuple(words[k : k + SHINGLE]) for k in range(len(words) - SHINGLE + 1)} for words in (one, other))
    return len(first & second) / len(first | second)


def test_the_estimate_is_the_jaccard_index() -> None:
    """With P = 4096 the standard error is at most 0.5/64 < 0.008; 5 of them bound the error in every case."""
    seen: NearDuplicates[int] = NearDuplicates(permutations=4096)
    for seed, kept in enumerate([0, 30, 60, 90, 110, 119, 120]):
        one, rest = text(seed), text(seed + 100)
        other = one[:kept] + rest[kept:]
        agreement = float(np.mean(seen._signature(" ".join(one)) == seen._signature(" ".join(other))))
        assert (agreement - 1 / 256) / (1 - 1 / 256) == pytest.approx(jaccard(one, other), abs=0.04)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    """Changing the last c of 120 words leaves J = (116 - c)/(116 + c): c = 4 gives 0.93, c = 40 gives 0.49."""
    seen: NearDuplicates[int] = NearDuplicates()
    texts = [text(seed) for seed in range(300)]
    assert [seen.add(" ".join(words), k) for k, words in enumerate(texts)] == [None] * 300
    near = [seen.add(" ".join(words[:-4] + text(k + 1000)[:4]), k + 300) for k, words in enumerate(texts)]
    # An estimate of 0.93 falls under 0.8 with probability < 1e-6; a band misses all with probability < 1e-5.
    assert near == list(range(300))
    far = [seen.add(" ".join(words[:-40] + text(k + 2000)[:40]), k) for k, words in enumerate(texts)]
    assert far == [None] * 300  # 0.49 is nine standard errors below 0.8


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("What is two and two?", "what is  TWO\nand two?", True),
        ("What is 2 + 2?", "What is 2 - 2?", False),
        ("Hi", "hi", True),
        ("Hi", "Ho", False),
        ("", " ", True),
        ("!!!", "???", False),
        ("天は青い。なぜですか", "天は青い。なぜですか ", True),
        ("天は青い。なぜですか", "山は高い。本当ですね", False),
    ],
)
def test_short_texts_are_alike_only_if_their_words_are_equal(one: str, other: str, alike: bool) -> None:
    seen: NearDuplicates[str] = NearDuplicates()
    assert seen.add(one, "one") is None
    assert seen.add(other, "other") == ("one" if alike else None)


def test_memory_is_bounded_and_what_is_forgotten_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minhash, "CAPACITY", 8)
    seen: NearDuplicates[int] = NearDuplicates()
    texts = [" ".join(text(seed)) for seed in range(12)]
    for k, words in enumerate(texts):
        assert seen.add(words, k) is None
    assert seen.forgotten == 4
    assert [seen.add(words, 99) for words in texts[4:]] == list(range(4, 12))
    assert seen.add(texts[0], 99) is None  # forgotten, so it is new again


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_a_text_at_the_threshold(threshold: float) -> None:
    bands, rows = minhash._bands(threshold, 128)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.9


@pytest.mark.parametrize(("threshold", "permutations"), [(0.0, 128), (1.2, 128), (float("nan"), 128), (0.8, 0)])
def test_impossible_settings_are_refused(threshold: float, permutations: int) -> None:
    with pytest.raises(ConfigError, match="finds nothing"):
        NearDuplicates(threshold, permutations)
