"""Near-duplicate texts by MinHash (Broder 1997, "On the resemblance and containment of documents").

The resemblance of two texts is the Jaccard index of their shingles: all runs of five words. The probability that two
sets have the same minimum under a random hash is their Jaccard index, so the share of equal minima among P hashes
estimates it, with a standard error of at most 0.5/sqrt(P). Texts meet only if all minima of one band are equal
(locality-sensitive hashing; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4), so adding a text does
not compare it with every other. Of a minimum only 8 bits are kept (Li and König 2010, "b-bit minwise hashing").
"""

from __future__ import annotations

import hashlib
import re
import zlib
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from accord.errors import ConfigError

__all__ = ["CAPACITY", "SHINGLE", "NearDuplicates"]

T = TypeVar("T")
U64 = NDArray[np.uint64]

SHINGLE = 5
"""Words in a shingle; a shorter text is one shingle."""
CAPACITY = 1 << 20
"""Texts remembered. After that the oldest are forgotten, which keeps memory under about 0.5 GB."""

_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
_RECALL = 0.9
"""Least probability that a text at the threshold meets its near-duplicate in some band."""
_CHAIN = 32
"""Most texts looked at in one band, newest first: boilerplate that thousands share must not make adding slow."""
_ROWS_AT_ONCE = 1024
_CHANCE = 1 / 256
"""Probability that the 8 bits of two different minima agree."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


class NearDuplicates(Generic[T]):
    """Texts seen so far, by what they resemble. The same texts in the same order give the same answers.

    Example:
        >>> seen: NearDuplicates[str] = NearDuplicates()
        >>> seen.add("Name three birds that sing at night.", "a.jsonl:1")
        >>> seen.add("name three birds that  sing at night.", "a.jsonl:9")
        'a.jsonl:1'
    """

    def __init__(self, threshold: float = 0.8, permutations: int = 128) -> None:
        """Find texts whose estimated resemblance is at least `threshold`.

        Raises:
            ConfigError: `threshold` is not in (0, 1] or `permutations` is under 1.
        """
        if not 0 < threshold <= 1 or permutations < 1:
            what = f"A threshold of {threshold:g} with {permutations} permutations finds nothing."
            raise ConfigError(what, fix="Give a threshold over 0 and up to 1, and at least 1 permutation.")
        self.threshold = threshold
        self.forgotten = 0
        """Texts no longer compared with, because there were more than CAPACITY."""
        generator = np.random.default_rng(0)
        self._factor = generator.integers(1 << 63, size=permutations, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offset = generator.integers(1 << 63, size=permutations, dtype=np.uint64)
        self._bands, self._rows = _bands(threshold, permutations)
        self._places: list[T] = []
        self._count = 0
        # Zeroed memory costs nothing until it is written to. Texts are numbered from 1; 0 is "none".
        self._signatures = np.zeros((CAPACITY + 1, permutations), np.uint8)
        self._newest = np.zeros((self._bands, CAPACITY), np.int32)
        self._before = np.zeros((CAPACITY + 1, self._bands), np.int32)

    def add(self, text: str, place: T, *, group: str = "") -> T | None:
        """The place of an earlier near-duplicate; if there is none, remember the text and return None.

        Only texts of the same group are alike.
        """
        signature = self._signature(text, group)
        slots = self._slots(signature)
        earlier = self._find(signature, slots)
        if earlier:
            return self._places[earlier - 1]
        number = self._count % CAPACITY + 1
        if self._count < CAPACITY:
            self._places.append(place)
        else:
            self.forgotten += 1
            self._places[number - 1] = place
        bands = np.arange(self._bands)
        self._signatures[number] = signature
        self._before[number] = self._newest[bands, slots]
        self._newest[bands, slots] = number
        self._count += 1
        return None

    def find(self, text: str) -> T | None:
        """The place of a near-duplicate among the texts remembered, or None; the text itself is not remembered."""
        signature = self._signature(text)
        earlier = self._find(signature, self._slots(signature))
        return self._places[earlier - 1] if earlier else None

    def _find(self, signature: NDArray[np.uint8], slots: NDArray[np.int64]) -> int:
        """The number of the first remembered text that is alike enough, 0 if there is none."""
        bands = np.arange(self._bands)
        numbers = self._newest[bands, slots]
        for _ in range(_CHAIN):
            met = numbers > 0
            if not met.any():
                return 0
            bands, numbers = bands[met], numbers[met]
            candidates = np.unique(numbers)
            agreement = (self._signatures[candidates] == signature).mean(axis=1)
            alike = candidates[(agreement - _CHANCE) / (1 - _CHANCE) >= self.threshold]
            if len(alike):
                return int(alike[0])
            numbers = self._before[numbers, bands]
        return 0

    def _signature(self, text: str, group: str = "") -> NDArray[np.uint8]:
        """[P] every permutation's minimum, hashed to one byte."""
        shingles_S = _shingles(text)
        if group:
            salt = hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            shingles_S = _mixed(shingles_S + np.frombuffer(salt, np.uint64))
        minima_P = np.full(len(self._factor), np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles_S), _ROWS_AT_ONCE):
            hashes_SP = shingles_S[start : start + _ROWS_AT_ONCE, None] * self._factor + self._offset
            np.minimum(minima_P, hashes_SP.min(axis=0), out=minima_P)
        return _mixed(minima_P).astype(np.uint8)

    def _slots(self, signature: NDArray[np.uint8]) -> NDArray[np.int64]:
        """[bands] the slot of each band's minima in its table."""
        rows = signature[: self._bands * self._rows].reshape(self._bands, self._rows)
        return np.array([zlib.crc32(row.tobytes()) for row in rows], np.int64) % CAPACITY


def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows per band: as many rows as still find a text at the threshold with probability _RECALL."""
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return permutations, 1


def _shingles(text: str) -> U64:
    """[S] one hash per run of SHINGLE words, in any case and spacing."""
    words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text.casefold())]
    length = min(SHINGLE, len(words))
    words_W = np.array(words, np.uint64)
    count = max(1, len(words) - length + 1)
    hashes_S = np.full(count, length, np.uint64)
    for k in range(length):
        hashes_S = _mixed(hashes_S + words_W[k : k + count])
    return hashes_S


def _mixed(values: U64) -> U64:
    """A bijection of 64-bit numbers; every output bit depends on every input bit (Steele et al. 2014, SplitMix)."""
    values = values + _MIX
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
