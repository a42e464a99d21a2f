"""How a step averages: what each token weighs, and what the weighted sum is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

__all__ = ["Average", "overlong_penalty", "token_weights"]

Average = Literal["token", "sequence", "constant"]
"""Over tokens (DAPO), over completions of which each averages its tokens (GRPO), or over the tokens that there could
have been (Dr.GRPO)."""


def token_weights(lengths: Sequence[int], average: Average, max_new_tokens: int) -> tuple[list[float], float]:
    """The weight of every token of each completion, and the denominator.

    The three divide Σ of the tokens' losses by: all tokens (Yu et al. 2025, eq. 12); the completion's tokens and the
    number of completions (Shao et al. 2024, eq. 3); the number of completions times `max_new_tokens` (Liu et al. 2025).

    Args:
        lengths: tokens of each completion of the optimiser step, also of those without a gradient that are not
            computed; 0 leaves a completion out of everything.

    Example:
        >>> token_weights([1, 3], "sequence", 8)
        ([1.0, 0.3333333333333333], 2.0)
    """
    counted = sum(length > 0 for length in lengths)
    if average == "sequence":
        return [1 / length if length else 0.0 for length in lengths], float(counted)
    denominator = sum(lengths) if average == "token" else counted * max_new_tokens
    return [float(length > 0) for length in lengths], float(denominator)


def overlong_penalty(length: int, max_new_tokens: int, buffer: int) -> float:
    """0 to −1: what is added to the score of a completion that comes near the limit (Yu et al. 2025, eq. 13).

    Args:
        buffer: tokens before the limit in which the penalty grows.

    Example:
        >>> [overlong_penalty(length, 100, 20) for length in (80, 90, 100, 101)]
        [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= max_new_tokens:
        raise ValueError(f"The buffer must be 1 to {max_new_tokens} tokens, not {buffer}.")
    return max(-1.0, min(0.0, (max_new_tokens - buffer - length) / buffer))
