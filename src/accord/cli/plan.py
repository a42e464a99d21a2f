"""`accord plan RECIPE`: what a run will cost, and what to change if it does not fit. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accord.engine.memory import Memory
    from accord.train.plan import Advice, Data, Plan, Timing

__all__ = ["advised", "duration", "lines", "parts", "plan"]

_PARTS = {
    "program": "program and libraries",
    "weights": "weights",
    "low_precision": "low-precision copy of the weights",
    "gradients": "gradients",
    "moments": "optimiser moments",
    "activations": "activations kept for the backward pass",
    "logits": "logits kept",
    "workspace": "workspace of the backward pass",
    "heap": "free memory between blocks (heap)",
}


def plan(
    recipe: str,
    /,
    *,
    model: str,
    data: tuple[str, ...] = (),
    config: Path | None = None,
    set: tuple[str, ...] = (),
    lora: bool = False,
    reward: tuple[str, ...] = (),
    sampler: str | None = None,
) -> int:
    """Say what `accord train` with the same arguments will cost: memory by part, tokens per step, time to finish.

    Memory is predicted; a few steps on the data, if they fit, give the time and the measured peak. Exit code 1: it does
    not fit, and what to change is listed.

    Parameters
    ----------
    recipe
        What to do: the name of a recipe.
    model
        Hub id, directory, or `starter`.
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id; of several, DATA=WEIGHT each.
    config
        TOML file with settings over the recipe's.
    set
        One setting, e.g. --set engine.micro_batch_tokens=512; repeat for more.
    lora
        Train low-rank adapters (and a reward model's score head) instead of all weights.
    reward
        Online recipes: a reward, e.g. exact_answer; repeat for more.
    sampler
        Online recipes: address of a server that samples.
    """
    from accord.cli.examples import Examples, settings_of
    from accord.cli.train import load_network, refuse_online
    from accord.train import is_online, view_of

    if is_online(recipe):
        from accord.cli.online_plan import plan_online

        given: dict[str, Any] = {"model": model, "data": data, "config": config, "set": set, "lora": lora}
        return plan_online(recipe, **given, reward=reward, sampler=sampler)
    refuse_online(recipe, reward, sampler)
    settings = settings_of(recipe, data, config, set, lora=lora)
    view = view_of(settings)
    examples = Examples(data, settings, view.kind)

    from accord.models.network import RewardModel
    from accord.models.render import Renderer
    from accord.train.plan import make_plan

    network = load_network(model, view.network is RewardModel, settings, examples.records)
    trees = examples.trees(Renderer(network, settings.max_tokens))
    made = make_plan(network, trees, settings)
    print("\n".join(lines(made)))
    return 0 if made.fits else 1


def lines(made: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    from accord.engine.memory import gigabytes

    yield from _data(made.data, made.tokens)
    again = "computed again in the backward pass" if made.checkpointing else "kept"
    yield f"\nMemory at the peak of training, activations {again}:"
    yield from parts(made.memory)
    yield f"  {gigabytes(made.memory.total):>10}  in all"
    if made.reference:
        yield f"  {gigabytes(made.reference.total):>10}  in the reference pass, before that"
    verdict = "it fits" if made.fits else "it does not fit"
    yield f"\nNeeded: {gigabytes(made.needed)} of {gigabytes(made.capacity)} that may be used: {verdict}."
    if made.timing:
        yield from _timing(made.timing, made.needed)
    yield from advised(made.advice, made.capacity)


def advised(changes: Sequence[Advice], capacity: int) -> Iterator[str]:
    """What to change where it does not fit, a line each."""
    from accord.engine.memory import gigabytes

    if changes:
        yield "To change, with the memory that it would then need:"
    for advice in changes:
        mark = "fits" if advice.memory <= capacity else "too much"
        yield f"  {gigabytes(advice.memory):>10}  {mark:<8}  {advice.what}: {advice.type}"


def _data(data: Data, budget: int) -> Iterator[str]:
    median, most, longest = data.lengths
    share = "" if data.looked_at >= data.steps else f" (from {data.looked_at:,} of them)"
    yield f"\nSteps: {data.steps:,}{share}"
    yield (
        f"Tokens per step: {data.tokens:,.0f} unique, {data.loss_tokens:,.0f} carry loss, "
        f"in {data.micro_batches:.1f} micro-batches of at most {budget:,}"
    )
    yield f"Prompt with completion: median {median:,} tokens, 90 % at most {most:,}, longest {longest:,}"


def parts(memory: Memory) -> Iterator[str]:
    """What the parts of the memory take, a line each."""
    from accord.engine.memory import gigabytes

    for field in fields(memory):
        size = getattr(memory, field.name)
        if size:
            yield f"  {gigabytes(size):>10}  {_PARTS[field.name]}"


def _timing(timing: Timing, needed: int) -> Iterator[str]:
    from accord.engine.memory import gigabytes

    yield f"Measured peak of three steps: {gigabytes(timing.peak)} ({timing.peak / needed - 1:+.0%})."
    if timing.reference:
        yield f"Reference log-probabilities, once: {duration(timing.reference)}"
    yield (
        f"Training: {duration(timing.training)} "
        f"(by the faster and the slower of two steps: {duration(timing.fastest)} to {duration(timing.slowest)})"
    )


def duration(seconds: float) -> str:
    """``35 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
