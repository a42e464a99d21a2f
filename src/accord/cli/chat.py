"""`accord chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys

__all__ = ["chat"]


def chat(*, model: str, seed: int = 0, set: tuple[str, ...] = ()) -> None:
    """Talk to a model. An empty line or Ctrl-D ends; /new starts over.

    Parameters
    ----------
    model
        Hub id, directory, or `starter`.
    seed
        Seed of the first answer; each answer after it takes the next.
    set
        One setting of the sampler, e.g. --set temperature=0.3; repeat for more.
    """
    from accord.config import parse_assignments
    from accord.models.load import load_policy
    from accord.models.render import Renderer
    from accord.sampling.local import LocalSampler
    from accord.sampling.request import Request, SamplingConfig
    from accord.types import Message

    config = SamplingConfig.build({"temperature": 0.7, **parse_assignments(set)}, where="--set")
    policy = load_policy(model)
    renderer, sampler = Renderer(policy, policy.context - config.max_new_tokens), LocalSampler(policy)
    turns: list[Message] = []
    print(f"{model} is listening (/new starts over, an empty line ends).", file=sys.stderr)
    while (said := _ask()) not in (None, ""):
        if said == "/new":
            turns = []
            continue
        turns.append(Message("user", said or ""))
        ids = tuple(renderer.prompt(tuple(turns)).tolist())
        answer = sampler.sample([Request("chat", ids, seed)], config)[0]
        seed += 1
        print(answer.text + (" …" if answer.stop_reason == "length" else ""), flush=True)
        turns.append(Message("assistant", answer.text))


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
