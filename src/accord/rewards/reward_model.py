"""`reward_model`: the score of a trained reward model, with a tokenizer and a chat template of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from accord.config import read_template
from accord.errors import RowError
from accord.rewards.base import REWARDS, Failed, Outcome, RewardConfig, RewardFunction, RewardKind
from accord.types import Completion, Content, Message, Prompt, Ranking

if TYPE_CHECKING:
    from accord.models.render import Renderer
    from accord.models.trees import Tree

__all__ = ["RewardModelRewardConfig", "reward_model"]


class RewardModelRewardConfig(RewardConfig):
    """Settings of `reward_model`."""

    model: str
    """Its directory or hub id."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the reward model's own chat template."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest prompt with completion (default: its context). The end of a longer completion is not seen."""


def reward_model(config: RewardModelRewardConfig, tokenizer: Any) -> RewardFunction:
    """The score of each completion after its prompt.

    If tokenizer and chat template are the policy's (`tokenizer`), the sampler's own tokens are scored. Otherwise the
    text of prompt and completion is rendered anew, as the reward model was trained to read it. The completions of one
    prompt share it: it is computed once.

    Raises:
        ModelError: it cannot be found, or is no reward model.
    """
    # torch is imported where a reward model is used, and nowhere else in this package.
    from accord.engine.engine import Engine, EngineConfig
    from accord.models.load import load_judge
    from accord.models.render import Renderer, signature

    network = load_judge(config.model, chat_template=read_template(config.chat_template))
    renderer = Renderer(network, config.max_tokens)
    engine = Engine(network, EngineConfig(), alone=True)  # one process scores for the whole job
    same = tokenizer is not None and signature(tokenizer) == signature(network.tokenizer)

    def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Outcome]:
        outcomes: list[Outcome] = [Failed("the completion is empty")] * len(completions)
        trees: list[Tree] = []
        owners: list[list[int]] = []
        for members in _groups(prompts, completions):
            try:
                trees.append(_tree(renderer, prompts[members[0]], [completions[k] for k in members], same=same))
                owners.append(members)
            except RowError as error:
                for k in members:
                    outcomes[k] = Failed(f"cannot be read: {error.what}")
        # The engine packs by length and under its budget of tokens.
        for members, answers in zip(owners, engine.forward(trees) if trees else [], strict=True):
            for k, answer in zip(members, answers, strict=True):
                outcomes[k] = float(answer[0])
        return outcomes

    return reward


def _groups(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
    """The places of the completions that are not empty, those of one prompt together."""
    groups: dict[tuple[str, Content], list[int]] = {}
    for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if completion.text.strip():
            groups.setdefault((prompt.id, prompt.content), []).append(k)
    return list(groups.values())


def _tree(renderer: Renderer, prompt: Prompt, completions: Sequence[Completion], *, same: bool) -> Tree:
    from accord.models.render import sampled_tree

    ranks = tuple(range(len(completions)))
    if same:
        prompt_P = renderer.prompt(prompt.content, prompt.source)
        longest = len(prompt_P) + max(len(completion.token_ids) for completion in completions)
        if longest <= renderer.max_tokens:
            return sampled_tree(prompt_P, completions, ranks, prompt.source)
    plain = isinstance(prompt.content, str)
    contents: tuple[Content, ...] = tuple(
        each.text if plain else each.episode.messages if each.episode else (Message("assistant", each.text),)
        for each in completions
    )
    return renderer.tree(Ranking(prompt.content, contents, ranks, prompt.source))


REWARDS.add("reward_model", RewardKind(RewardModelRewardConfig, reward_model))
