"""From rollouts to what an optimiser update takes: scores, advantages, and trees with their share of the step.

K = completions of one prompt, L = tokens of one completion, S = those of them that the policy sampled: what an
environment answered in between has no advantage, no weight, no KL and no value, and counts in no average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from accord.advantages import BoundAdvantage, Credit, Group, is_idle, overlong_penalty, token_weights
from accord.models.render import sampled_tree
from accord.models.trees import Branch, FloatArray, Tree
from accord.train.loop import Update
from accord.train.online_config import RolloutConfig
from accord.train.rollouts import Rollout
from accord.types import Episode

__all__ = [
    "Doubles",
    "best_trees",
    "corrected",
    "differs",
    "divide",
    "groups_of",
    "kl_metrics",
    "pair_trees",
    "policy_trees",
    "rollout_metrics",
    "sampled_by_itself",
    "scores_of",
    "teacher_metrics",
    "trees_of",
    "weighted_updates",
    "whole_updates",
]

Doubles = npt.NDArray[np.float64]


def scores_of(rollout: Rollout, config: RolloutConfig, max_new_tokens: int) -> Doubles:
    """The reward of every completion, less the penalties on its length: [K]; NaN where the reward failed."""
    scores = []
    for completion, reward in zip(rollout.completions, rollout.rewards, strict=True):
        score = np.nan if reward.value is None else reward.value
        score -= config.eos_penalty * (completion.stop_reason == "length")
        if config.overlong_buffer:
            buffer = max(1, round(config.overlong_buffer * max_new_tokens))
            score += overlong_penalty(len(completion.token_ids), max_new_tokens, buffer)
        scores.append(score)
    return np.array(scores)


def differs(scores_K: Doubles) -> bool:
    """Whether the scores say that one completion is better than another."""
    present = scores_K[~np.isnan(scores_K)]
    return len(present) > 1 and bool(present.min() < present.max())


def trees_of(rollouts: Sequence[Rollout]) -> list[Tree]:
    """A tree for every prompt, with a branch for every completion and the log-probabilities of its sampling."""
    trees = []
    for rollout in rollouts:
        completions, prompt = rollout.completions, rollout.prompt
        tree = sampled_tree(prompt.ids_P, completions, (0,) * len(completions), prompt.prompt.source)
        branches = tuple(
            replace(
                branch,
                truncated=completion.stop_reason == "length",
                behaviour_L=np.array(completion.logprobs, np.float32),
            )
            for branch, completion in zip(tree.branches, completions, strict=True)
        )
        trees.append(replace(tree, branches=branches))
    return trees


def corrected(
    trees: Sequence[Tree], said: Sequence[Sequence[FloatArray]], cap: float
) -> tuple[list[Tree], dict[str, float]]:
    """Trees as if the policy of now had sampled them: with its log-probabilities, and truncated importance weights.

    The weight of a token is min(π_now/π_sampled, cap) (Ionides 2008; of rollouts, Yao et al. 2025). Ratios of the loss
    are then taken to the policy of now, and the weights make up for what has sampled.

    Args:
        said: log-probabilities of the policy of now, for every branch of every tree.

    Returns:
        The trees, and metrics over all sampled tokens: TRL's names, and (Σw)²/(N·Σw²) of the weights (Kish 1965).
    """
    found, weights, differences = [], [], []
    for tree, of_tree in zip(trees, said, strict=True):
        branches = []
        for branch, now_L in zip(tree.branches, of_tree, strict=True):
            assert branch.behaviour_L is not None
            difference_L = now_L - branch.behaviour_L
            weight_L = np.exp(np.minimum(difference_L, np.log(cap))).astype(np.float32)
            branches.append(replace(branch, behaviour_L=now_L, weight_L=weight_L))
            weights.append(weight_L[branch.loss_mask_L])
            differences.append(np.abs(difference_L[branch.loss_mask_L]))
        found.append(replace(tree, branches=tuple(branches)))
    weight_N, difference_N = np.concatenate(weights).astype(float), np.concatenate(differences).astype(float)
    return found, {
        "sampling/importance_sampling_ratio/min": float(weight_N.min()),
        "sampling/importance_sampling_ratio/mean": float(weight_N.mean()),
        "sampling/importance_sampling_ratio/max": float(weight_N.max()),
        "sampling/sampling_logp_difference/mean": float(difference_N.mean()),
        "sampling/sampling_logp_difference/max": float(difference_N.max()),
        "sampling/effective_sample_size": float(weight_N.sum() ** 2 / (len(weight_N) * (weight_N**2).sum())),
    }


def sampled_by_itself(tree: Tree) -> Tree:
    """The tree without log-probabilities of its sampling: ratios are those to the policy that learns."""
    return replace(tree, branches=tuple(replace(branch, behaviour_L=None) for branch in tree.branches))


def groups_of(
    trees: Sequence[Tree], scores: Sequence[Doubles], values: Sequence[Sequence[FloatArray]] | None
) -> list[Group]:
    """What the advantage sees of each prompt; trees that carry reference log-probabilities give log-ratios."""
    groups = []
    for index, (tree, scores_K) in enumerate(zip(trees, scores, strict=True)):
        ratios = [
            (branch.behaviour_L - branch.reference_L)[branch.loss_mask_L]
            for branch in tree.branches
            if branch.behaviour_L is not None and branch.reference_L is not None
        ]
        groups.append(
            Group(
                scores_K,
                lengths=tuple(map(_sampled, tree.branches)),
                truncated=tuple(branch.truncated for branch in tree.branches),
                log_ratios=tuple(ratios),
                values=tuple(
                    value_L[branch.loss_mask_L] for value_L, branch in zip(values[index], tree.branches, strict=True)
                )
                if values is not None
                else (),
            )
        )
    return groups


def policy_trees(
    trees: Sequence[Tree],
    groups: Sequence[Group],
    advantage: BoundAdvantage,
    config: RolloutConfig,
    max_new_tokens: int,
) -> tuple[list[Tree], list[bool]]:
    """The same trees with advantages, weights and returns, and which of them have no advantage at all.

    Weights that tokens have already are multiplied by those of the average.
    A completion whose reward failed is left out, with its share of every average; so is a prompt that has no other.
    """
    found, idle = [], []
    for tree, group, credits in zip(trees, groups, advantage(groups), strict=True):
        kept = [k for k, score in enumerate(group.scores_K) if not np.isnan(score)]
        if not kept:
            continue
        weights, _ = token_weights([group.lengths[k] for k in kept], config.average, max_new_tokens)
        branches = tuple(
            _earning(tree.branches[k], credits[k], weight, group.values[k] if group.values else None)
            for k, weight in zip(kept, weights, strict=True)
        )
        found.append(replace(tree, branches=branches, ranks=(0,) * len(branches)))
        idle.append(is_idle([credits[k] for k in kept]))
    return found, idle


def _earning(branch: Branch, credit: Credit, weight: float, value_S: npt.NDArray[np.floating] | None) -> Branch:
    weight_S = np.full(_sampled(branch), weight)
    if branch.weight_L is not None:
        weight_S = weight_S * branch.weight_L[branch.loss_mask_L]
    return replace(
        branch,
        advantage_L=_spread(branch, credit.advantage_L),
        weight_L=_spread(branch, weight_S),
        value_L=None if value_S is None else _spread(branch, value_S),
        return_L=None if credit.return_L is None else _spread(branch, credit.return_L),
    )


def _sampled(branch: Branch) -> int:
    return int(branch.loss_mask_L.sum())


def _spread(branch: Branch, values_S: npt.NDArray[np.floating]) -> FloatArray:
    """The numbers of sampled tokens in the places of these, zero elsewhere: [L]."""
    values_L = np.zeros(len(branch.tokens_L), np.float32)
    values_L[branch.loss_mask_L] = values_S
    return values_L


def pair_trees(trees: Sequence[Tree], scores: Sequence[Doubles]) -> list[Tree]:
    """The best and the worst completion of each prompt, as a pair; of equals the first. No pair where all are equal."""
    pairs = []
    for tree, scores_K in zip(trees, scores, strict=True):
        if differs(scores_K):
            branches = tree.branches[int(np.nanargmax(scores_K))], tree.branches[int(np.nanargmin(scores_K))]
            pairs.append(replace(tree, branches=branches, ranks=(0, 1)))
    return pairs


def best_trees(trees: Sequence[Tree], scores: Sequence[Doubles], least: float | None) -> list[Tree]:
    """The best completion of each prompt (of equals the first) whose score is at least this."""
    best = []
    for tree, scores_K in zip(trees, scores, strict=True):
        if not np.isnan(scores_K).all() and (least is None or np.nanmax(scores_K) >= least):
            best.append(replace(tree, branches=(tree.branches[int(np.nanargmax(scores_K))],), ranks=(0,)))
    return best


def divide(
    trees: Sequence[Tree], config: RolloutConfig, seeds: Sequence[int], make: Callable[[Sequence[int]], Update | None]
) -> list[Update]:
    """The updates of a step: in every epoch each tree once, in mini-batches that are drawn anew.

    Args:
        seeds: what the draw depends on.
        make: an update of the trees with these indices; None if there is nothing to learn from them.
    """
    updates = []
    for epoch in range(config.epochs):
        order = np.arange(len(trees))
        if config.mini_batches > 1:
            order = np.random.default_rng([*seeds, epoch]).permutation(len(trees))
        made = [make(part.tolist()) for part in np.array_split(order, config.mini_batches) if len(part)]
        updates += [update for update in made if update is not None]
    return updates


def whole_updates(trees: Sequence[Tree], config: RolloutConfig, seeds: Sequence[int]) -> list[Update]:
    """Updates of trees whose loss averages by itself: pairs, demonstrations."""
    return divide(trees, config, seeds, lambda part: Update([trees[index] for index in part]))


def weighted_updates(
    trees: Sequence[Tree],
    idle: Sequence[bool],
    config: RolloutConfig,
    max_new_tokens: int,
    seeds: Sequence[int],
) -> list[Update]:
    """Updates of trees whose tokens carry weights.

    Args:
        idle: trees that need not be computed: they have no gradient, and keep their share of the denominator.
    """

    def make(part: Sequence[int]) -> Update | None:
        lengths = [_sampled(branch) for index in part for branch in trees[index].branches]
        _, denominator = token_weights(lengths, config.average, max_new_tokens)
        learned = [trees[index] for index in part if not idle[index]]
        return Update(learned, denominator) if learned else None

    return divide(trees, config, seeds, make)


def teacher_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The reverse KL to the teacher, as an estimate from what was sampled: nats per token."""
    ratio_N = np.concatenate([ratio_L for group in groups for ratio_L in group.log_ratios])
    return {"teacher/kl": float(ratio_N.mean(dtype=float))}


def rollout_metrics(rollouts: Sequence[Rollout], version: int, *, scored: bool = True) -> dict[str, float]:
    """What a step has sampled, under TRL's names where it has one; without `scored` nothing of what it is worth."""
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    values = [
        np.array([np.nan if reward.value is None or not scored else reward.value for reward in rollout.rewards])
        for rollout in rollouts
    ]
    everything = np.concatenate(values)
    everything = everything[~np.isnan(everything)]
    stds = [float(np.nanstd(value_K, ddof=1)) for value_K in values if (~np.isnan(value_K)).sum() > 1]
    metrics = {"reward": float(everything.mean())} if len(everything) else {}
    if stds:
        metrics["reward_std"] = float(np.mean(stds))
        metrics["frac_reward_zero_std"] = 1 - float(np.mean([differs(value_K) for value_K in values]))
    elif len(everything) > 1:
        metrics["reward_std"] = float(everything.std(ddof=1))
    lengths = np.array([completion.length for completion in completions])
    ended = np.array([completion.stop_reason == "stop" for completion in completions])
    metrics |= _lengths(lengths, "length") | _lengths(lengths[ended], "terminated_length")
    metrics["completions/clipped_ratio"] = 1 - float(ended.mean())
    metrics["sampling/version_lag"] = float(np.mean([version - each.policy_version for each in completions]))
    return metrics | _episode_metrics([completion.episode for completion in completions if completion.episode])


def _episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What conversations were like; a part that one did not name counts as 0 there."""
    if not episodes:
        return {}
    observed = [len(episode.sampled) - sum(episode.sampled) for episode in episodes]
    metrics = {
        "environment/turns": float(np.mean([episode.turns for episode in episodes])),
        "environment/observed_tokens": float(np.mean(observed)),
        "environment/failed": float(np.mean([bool(episode.failure) for episode in episodes])),
    }
    for name in sorted({name for episode in episodes for name in episode.parts}):
        metrics[f"environment/{name}"] = float(np.mean([episode.parts.get(name, 0.0) for episode in episodes]))
    return metrics


def _lengths(lengths: npt.NDArray[np.int64], name: str) -> dict[str, float]:
    if not len(lengths):
        return {}
    named: Mapping[str, float] = {"mean": lengths.mean(), "min": lengths.min(), "max": lengths.max()}
    return {f"completions/{what}_{name}": float(value) for what, value in named.items()}


def kl_metrics(groups: Sequence[Group], coefficient: float, target: float | None = None) -> dict[str, float]:
    """The KL in the reward: of a completion, in nats, the one that it is led to, and what it takes from the score."""
    kls = [float(ratio_L.sum(dtype=float)) for group in groups for ratio_L in group.log_ratios]
    if not kls:
        return {}
    kl = float(np.mean(kls))
    return {
        "objective/kl": kl,
        "objective/kl_coefficient": coefficient,
        "objective/non_score_reward": -coefficient * kl,
        **({} if target is None else {"objective/kl_target": target}),
    }
