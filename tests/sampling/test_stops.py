"""Stop strings against the plain rule: a completion ends with the first token after which its whole text holds one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from accord.models.load import load_policy
from accord.models.tiny import save_tiny, tiny_tokenizer
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.stops import StopStrings, cut

TEXTS = st.text(st.sampled_from("abc é€🙂\n"), max_size=12)
STOPS = st.lists(st.text(st.sampled_from("abc é€🙂\n"), min_size=1, max_size=4), min_size=1, max_size=3)


class Words:
    """A tokenizer of the SentencePiece kind: pieces of several letters, spaces as ▁, bytes where it knows no letter."""

    def __init__(self):
        pieces = ["▁", "▁a", "a", "b", "ab", "c", "bc", "▁c", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
        self.model = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
        self.model.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self.size = len(pieces)

    def decode(self, token_ids, skip_special_tokens):
        return self.model.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


BYTES, WORDS = tiny_tokenizer(), Words()


def first_met(tokenizer, token_ids, strings):
    """How many tokens it takes, by the plain rule; None if all do not suffice."""
    for count in range(1, len(token_ids) + 1):
        if any(string in tokenizer.decode(token_ids[:count], skip_special_tokens=True) for string in strings):
            return count
    return None


def followed(tokenizer, token_ids, strings):
    stops = StopStrings(tokenizer, tuple(strings))
    return next((count for count in range(1, len(token_ids) + 1) if stops.met(token_ids[:count])), None)


@given(TEXTS, STOPS)
@example("aab", ["ab"])
@example("€🙂", ["🙂"])
@example("abc", ["abc", "b"])
def test_text_in_single_bytes(text, strings):
    """Every letter beyond ASCII is several tokens; some stop strings begin and end within runs of them."""
    token_ids = BYTES.encode(text)
    assert followed(BYTES, token_ids, strings) == first_met(BYTES, token_ids, strings)


@given(st.lists(st.integers(0, 258), max_size=30), STOPS)
def test_bytes_that_are_no_text(token_ids, strings):
    """Special tokens show nothing; broken characters show a replacement character, until they are complete."""
    assert followed(BYTES, token_ids, strings) == first_met(BYTES, token_ids, strings)


@given(st.lists(st.one_of(st.integers(0, 8), st.sampled_from([9 + b for b in "é€a".encode()])), max_size=15), STOPS)
@example([1, 4, 7], ["a ab"])
def test_pieces_whose_text_depends_on_their_place(token_ids, strings):
    """A space at the very beginning is not shown, as SentencePiece decoders have it."""
    assert followed(WORDS, token_ids, strings) == first_met(WORDS, token_ids, strings)


def test_a_token_costs_the_decoding_of_a_few():
    """Each token is decoded a bounded number of times, however long the completion."""
    decoded = Counter()

    class Counting:
        def decode(self, token_ids, skip_special_tokens):
            decoded.update(["tokens"] * len(token_ids))
            return BYTES.decode(token_ids, skip_special_tokens=skip_special_tokens)

    token_ids = BYTES.encode("abc " * 250)
    assert followed(Counting(), token_ids, ["never"]) is None
    assert decoded["tokens"] <= 4 * len(token_ids)


@pytest.mark.parametrize(
    ("text", "strings", "left"),
    [("one\n\ntwo", ("\n\n",), "one"), ("abc", ("c", "bc"), "a"), ("abc", ("d",), "abc"), ("abc", (), "abc")],
)
def test_the_text_ends_before_the_first_stop_string(text, strings, left):
    assert cut(text, strings) == left


def test_a_completion_ends_with_a_stop_string(tmp_path):
    """Sampled without stop strings first: with them, the same tokens come up to the end that the plain rule gives."""
    policy = load_policy(str(save_tiny(tmp_path / "model")))
    sampler = LocalSampler(policy, "float32")
    requests = [Request(f"p{k}", (30, 40 + k), seed=k) for k in range(24)]
    free = sampler.sample(requests, SamplingConfig(max_new_tokens=40))
    strings = (free[0].text[5:7], free[0].text[9:11], "A", "b")
    stopped = sampler.sample(requests, SamplingConfig(max_new_tokens=40, stop=strings, max_batch=5))
    reasons = Counter()
    for before, after in zip(free, stopped, strict=True):
        spoken = before.token_ids[:-1] if before.stop_reason == "stop" else before.token_ids
        count = first_met(policy.tokenizer, spoken, strings)
        assert after.token_ids == before.token_ids[:count]
        assert after.stop_reason == ("stop" if count else before.stop_reason)
        assert after.text == cut(before.text, strings)
        reasons[count is not None] += 1
    assert reasons[True] > 3
    assert reasons[False] > 3
