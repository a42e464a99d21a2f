"""The only place where text becomes tokens: chat template, prompt boundary, loss mask, stop token, truncation.

A conversation is rendered once, as a whole, and encoded once. A token that merges the end of the prompt with the start
of the completion belongs to the completion. Sampled tokens are never encoded again (`sampled_tree`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from accord.errors import ChatTemplateError, ConfigError, RowError
from accord.models.network import Network, RewardModel
from accord.models.trees import Branch, IntArray, Tree
from accord.types import (
    Completion,
    Content,
    Demonstration,
    LabelledCompletion,
    Message,
    PreferencePair,
    Ranking,
    RatedCompletion,
    Record,
    Source,
)

__all__ = ["Renderer", "Tools", "sampled_tree", "signature"]

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of functions, as chat templates show them to a model."""

_THINK = "<think>"
_THOUGHT = f"{_THINK}\nA thought.\n</think>\n\n"
P = ParamSpec("P")
T = TypeVar("T")


class _Parts(NamedTuple):
    """What a tree needs of a record."""

    prompt: Content
    completions: tuple[Content, ...]
    ranks: tuple[int, ...] = (0,)
    margin: float = 0.0
    probability: float = 1.0
    labels: tuple[bool, ...] = ()
    ratings: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """One prompt with one completion as text, and the character spans that carry loss."""

    text: str
    spans: list[tuple[int, int]]
    plain: bool


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One prompt with one completion: tokens, where the prompt ends, and which tokens carry loss."""

    tokens: IntArray
    boundary: int
    loss_mask: np.ndarray[tuple[int], np.dtype[np.bool_]]


class Renderer:
    """Renders records for one model.

    Attributes:
        max_tokens: longest prompt with completion; longer completions lose their end, longer prompts are an error.
        truncated: how many completions were cut so far.
    """

    def __init__(self, network: Network, max_tokens: int | None = None) -> None:
        self.tokenizer = network.tokenizer
        self.stop_ids = np.array(network.stop_ids)
        self.attributes = network.attributes if isinstance(network, RewardModel) else ()
        self.max_tokens = max_tokens or network.context
        self.truncated = 0
        if self.max_tokens > network.context:
            fix = f"Set max_tokens to at most {network.context}."
            raise ConfigError(f"max_tokens = {max_tokens} is more than the model's context.", fix=fix)

    def tree(self, record: Record) -> Tree:
        """A record as a prompt tree.

        Raises:
            RowError: the prompt leaves no room for a completion, or a completion is empty.
            ChatTemplateError: messages, but the model has no chat template (or one that rewrites earlier turns).
        """
        (tree,) = self.trees([record])
        if isinstance(tree, RowError):
            raise tree
        return tree

    def trees(self, records: Sequence[Record]) -> list[Tree | RowError]:
        """Many records as prompt trees, encoded in one call; in the place of one that cannot be used, its error."""
        drafts = [self._attempt(self._drafts, record) for record in records]
        texts = [draft for each in drafts if not isinstance(each, RowError) for draft in each]
        encodings = iter(self._encode([(draft.text, draft.plain) for draft in texts]))
        return [
            each
            if isinstance(each, RowError)
            else self._attempt(self._tree, record, each, list(islice(encodings, len(each))))
            for record, each in zip(records, drafts, strict=True)
        ]

    @staticmethod
    def _attempt(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | RowError:
        try:
            return function(*arguments, **named)
        except RowError as error:
            return error

    def prompt(self, content: Content, source: Source | None = None, tools: Tools = ()) -> IntArray:
        """The tokens of a prompt that awaits a completion."""
        if isinstance(content, str):
            ((tokens, _),) = self._encode([(content, True)])
        else:
            ((tokens, _),) = self._encode([(self._chat(content, generation=True, source=source, tools=tools), False)])
        if len(tokens) >= self.max_tokens:
            raise self._too_long(len(tokens), source)
        return tokens

    def observation(
        self,
        prompt: Content,
        messages: Sequence[Message],
        source: Source | None = None,
        tools: Tools = (),
        *,
        stopped: bool,
    ) -> IntArray:
        """The tokens that follow a turn of the model: what closes it, then these messages, then its next turn's start.

        Args:
            prompt: what the conversation began with.
            stopped: whether the turn has ended with a stop token, which then is not repeated.

        Raises:
            RowError: the chat template refuses these messages.
            ChatTemplateError: it does not show where an answer ends.
        """
        text, start = self._behind(prompt, messages, source, tools)
        if stopped:
            stops = [str(self.tokenizer.convert_ids_to_tokens(int(token))) for token in self.stop_ids]
            rest = text[start:]
            closing = max((stop for stop in stops if rest.lstrip().startswith(stop)), key=len, default="")
            start += rest.find(closing) + len(closing) if closing else 0
        ((tokens, ends),) = self._encode([(text, False)])
        first = int(np.searchsorted(ends, start, side="right"))
        if first == 0 or ends[first - 1] != start:
            what = "A token holds both the end of an answer and what the chat template puts behind it."
            raise ChatTemplateError(
                what, where=_at(source), fix="Use a template that ends answers with a special token."
            )
        return tokens[first:]

    def check_turns(self, prompt: Content, role: str, tools: Tools = (), source: Source | None = None) -> None:
        """Check that a conversation can go on from the tokens that were sampled, where messages of this role answer.

        That is: the text of a conversation begins with the text that it had a turn before, and goes on with what was
        said since. What was said holds a thought, too, where the template knows of thoughts.

        Raises:
            RowError: the prompt is plain text, or the chat template refuses answers of this role.
            ChatTemplateError: earlier turns are written differently once others follow; or tools are not shown.
        """
        observed = Message(role, "What was observed.")
        text, end = self._behind(prompt, [observed], source, tools)
        assert not isinstance(prompt, str)
        start = self._chat(prompt, generation=True, source=source, tools=tools)
        if tools and start == self._chat(prompt, generation=True, source=source):
            fix = "Use a model that was trained with tools, or --set chat_template=PATH_OF_A_JINJA_FILE."
            raise ChatTemplateError("The chat template does not show tools to the model.", fix=fix)
        thoughts = ["", _THOUGHT] if _THINK in str(self.tokenizer.chat_template) else [""]
        for answer in (thought + "What was said." for thought in thoughts):
            said = answer.removeprefix(f"{_THINK}\n") if start.rstrip().endswith(_THINK) else answer
            before, messages = start, list(prompt)
            for _ in range(2):
                messages += [Message("assistant", answer), observed]
                after = self._chat(messages, generation=True, source=source, tools=tools)
                if not after.startswith(before) or not after[len(before) :].endswith(said + text[end:]):
                    raise _rewritten(before + said, after, role)
                before = after

    def _behind(
        self, prompt: Content, messages: Sequence[Message], source: Source | None, tools: Tools
    ) -> tuple[str, int]:
        """A text in which these messages follow an answer, and where the answer ends."""
        if isinstance(prompt, str):
            fix = 'Write the prompts as messages: [{"role": "user", "content": …}]; docs/data.md shows how.'
            raise RowError("A plain-text prompt begins no conversation.", where=_at(source), fix=fix)
        mark = "‖answer‖"
        turns = (*prompt, Message("assistant", mark), *messages)
        text = self._chat(turns, generation=True, source=source, tools=tools)
        before, found, _ = text.rpartition(mark)
        if not found or any(mark in message.content for message in (*prompt, *messages)):
            what = "The chat template does not show where an answer ends."
            raise ChatTemplateError(what, where=_at(source), fix="Use a template that writes out every message.")
        return text, len(before) + len(mark)

    def _drafts(self, record: Record) -> list[_Draft]:
        parts = _parts(record)
        return [self._draft(parts.prompt, completion, record.source) for completion in parts.completions]

    def _tree(self, record: Record, drafts: Sequence[_Draft], encodings: Sequence[tuple[IntArray, IntArray]]) -> Tree:
        parts, source = _parts(record), record.source
        encoded = [self._masked(draft, *each, source) for draft, each in zip(drafts, encodings, strict=True)]
        shared = min(each.boundary for each in encoded)
        first = encoded[0].tokens
        for each in encoded[1:]:
            length = min(shared, len(each.tokens))
            same = each.tokens[:length] == first[:length]
            shared = length if bool(same.all()) else int(np.argmin(same))
        if shared >= self.max_tokens:
            raise self._too_long(shared, source)
        branches = tuple(self._branch(each, shared) for each in encoded)
        return Tree(
            first[:shared],
            branches,
            parts.ranks,
            parts.margin,
            source,
            probability=parts.probability,
            ratings=(self._standardised(parts.ratings),) if parts.ratings is not None else (),
            labels=parts.labels,
        )

    def _standardised(self, ratings: Mapping[str, float]) -> tuple[float | None, ...]:
        """The ratings that the reward model knows, in its order."""
        return tuple(
            attribute.standardise(ratings[attribute.name]) if attribute.name in ratings else None
            for attribute in self.attributes
        )

    def _branch(self, encoded: _Encoded, shared: int) -> Branch:
        tokens, mask = encoded.tokens[shared : self.max_tokens], encoded.loss_mask[shared : self.max_tokens]
        cut = len(encoded.tokens) > self.max_tokens
        self.truncated += cut
        return Branch(tokens, mask, truncated=cut)

    def _draft(self, prompt: Content, completion: Content, source: Source | None) -> _Draft:
        """Prompt and completion as one text."""
        if isinstance(prompt, str) != isinstance(completion, str):
            fix = "Write both as plain text, or both as messages."
            raise RowError("The prompt and the completion are of different kinds.", where=_at(source), fix=fix)
        if isinstance(prompt, str) and isinstance(completion, str):
            return _Draft(prompt + completion, [(len(prompt), len(prompt) + len(completion))], plain=True)
        assert not isinstance(prompt, str)
        assert not isinstance(completion, str)
        return _Draft(*self._conversation(prompt, completion, source), plain=False)

    def _masked(self, draft: _Draft, tokens: IntArray, ends: IntArray, source: Source | None) -> _Encoded:
        """Which tokens carry loss, and where the prompt ends."""
        spans = draft.spans
        starts_after = [int(np.searchsorted(ends, start, side="right")) for start, _ in spans]
        is_stop = (tokens[:, None] == self.stop_ids).any(axis=1)
        mask = np.zeros(len(tokens), dtype=np.bool_)
        for first, (_, stop) in zip(starts_after, spans, strict=True):
            mask[first : int(np.searchsorted(ends, stop, side="right"))] = True
            # What a template puts behind the stop token (a line break) is never sampled, so it is not trained.
            stops = np.flatnonzero(mask[first:] & is_stop[first:])
            if len(stops):
                mask[first + int(stops[-1]) + 1 : int(np.searchsorted(ends, stop, side="right"))] = False
        last = int(np.flatnonzero(mask)[-1]) if mask.any() else -1
        if last < starts_after[-1]:
            raise RowError("The completion is empty.", where=_at(source), fix="Remove the row, or fill it in.")
        tokens, mask = tokens[: last + 1], mask[: last + 1]
        if tokens[-1] not in self.stop_ids:
            tokens, mask = np.append(tokens, self.tokenizer.eos_token_id), np.append(mask, True)
        return _Encoded(tokens, starts_after[0], mask)

    def _conversation(
        self, prompt: tuple[Message, ...], completion: tuple[Message, ...], source: Source | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the character span of every assistant turn of the completion."""
        messages = (*prompt, *completion)
        text = self._chat(messages, generation=False, source=source)
        spans = []
        for index in range(len(prompt), len(messages)):
            if messages[index].role == "assistant":
                before = self._chat(messages[:index], generation=True, source=source)
                is_last = index + 1 == len(messages)
                through = text if is_last else self._chat(messages[: index + 1], generation=False, source=source)
                if not (text.startswith(before) and text.startswith(through)):
                    fix = "Use a chat template that only appends, or give the last turn alone as the completion."
                    what = "The chat template rewrites earlier turns, so it is unclear which tokens are the answer."
                    raise ChatTemplateError(what, where=_at(source), fix=fix)
                spans.append((len(before), len(through)))
        if not spans:
            fix = 'A completion needs a message with the role "assistant".'
            raise RowError("The completion holds no assistant turn.", where=_at(source), fix=fix)
        return text, spans

    def _chat(self, messages: Sequence[Message], *, generation: bool, source: Source | None, tools: Tools = ()) -> str:
        if not self.tokenizer.chat_template:
            fix = "Use an instruction-tuned model, plain-text data, or --set chat_template=PATH_OF_A_JINJA_FILE."
            raise ChatTemplateError(
                "The data holds messages and the model has no chat template.", where=_at(source), fix=fix
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # a template may raise anything; jinja2 wraps what it raises itself
            fix = "Check the roles and their order against the model's chat template."
            raise RowError(f"The chat template refuses these messages: {error}", where=_at(source), fix=fix) from None
        return rendered

    def _encode(self, texts: Sequence[tuple[str, bool]]) -> list[tuple[IntArray, IntArray]]:
        """Tokens of each text, and for each token the number of characters up to its end.

        A text that is marked as plain gets the model's own BOS. The tokenizer is called once for all of a kind: it then
        works on all cores.
        """
        encoded: dict[int, tuple[IntArray, IntArray]] = {}
        for kind in (True, False):
            places = [place for place, (_, plain) in enumerate(texts) if plain == kind]
            if not places:
                continue
            encoding: Any = self.tokenizer(
                [texts[place][0] for place in places], add_special_tokens=kind, return_offsets_mapping=True
            )
            for place, ids, offsets in zip(places, encoding["input_ids"], encoding["offset_mapping"], strict=True):
                ends = np.array([end for _, end in offsets], dtype=np.int64)
                encoded[place] = np.array(ids, dtype=np.int64), np.maximum.accumulate(ends) if len(ends) else ends
        return [encoded[place] for place in range(len(texts))]

    def _too_long(self, length: int, source: Source | None) -> RowError:
        what = f"The prompt has {length} tokens and the limit for prompt and completion is {self.max_tokens}."
        fix = "Shorten or remove the row, or raise --set max_tokens (up to the model's context)."
        return RowError(what, where=_at(source), fix=fix)


def _parts(record: Record) -> _Parts:
    match record:
        case Demonstration():
            return _Parts(record.prompt, (record.completion,))
        case LabelledCompletion():
            return _Parts(record.prompt, (record.completion,), labels=(record.label,))
        case PreferencePair():
            probability = 1.0 if record.probability is None else record.probability
            return _Parts(record.prompt, (record.chosen, record.rejected), (0, 1), record.margin or 0.0, probability)
        case Ranking():
            return _Parts(record.prompt, record.completions, record.ranks)
        case RatedCompletion():
            return _Parts(record.prompt, (record.completion,), ratings=record.ratings)
        case _:
            raise TypeError(f"{type(record).__name__} holds nothing that a network could learn.")


def sampled_tree(
    prompt_ids: IntArray, completions: Sequence[Completion], ranks: tuple[int, ...], source: Source | None = None
) -> Tree:
    """A tree from the sampler's own tokens; every sampled token carries loss, and no other."""
    branches = tuple(
        Branch(np.array(each.token_ids, dtype=np.int64), np.array(each.sampled, dtype=np.bool_)) for each in completions
    )
    return Tree(prompt_ids, branches, ranks, source=source)


def signature(tokenizer: Any) -> tuple[str, str]:
    """What decides the tokens of a text: the tokenizer's vocabulary with its rules, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return vocabulary, str(tokenizer.chat_template or "")


def _rewritten(expected: str, found: str, role: str) -> ChatTemplateError:
    pairs = zip(expected, found, strict=False)
    differing = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    at = max(0, differing - 20)
    what = (
        "The chat template writes earlier turns differently once others follow, so a conversation cannot go on from "
        f"the tokens that were sampled: {expected[at:]!r:.90} becomes {found[at:]!r:.90}."
    )
    fix = "Give a template that only appends: --set chat_template=PATH_OF_A_JINJA_FILE"
    return ChatTemplateError(what, where=f"a message of the role {role!r}", fix=fix)


def _at(source: Source | None) -> str | None:
    return str(source) if source else None
