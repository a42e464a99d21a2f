"""`accord plan` of a recipe that learns from what the model samples: memory by part, and two steps that are tried."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from accord.cli.online import reference_of
from accord.cli.plan import advised, duration, parts
from accord.errors import ConfigError, RunError
from accord.tracking import Progress

if TYPE_CHECKING:
    import torch

    from accord.train.online_plan import OnlinePlan

__all__ = ["Tried", "lines", "plan_online"]

_BESIDE = {
    "reference": "reference model, or teacher",
    "critic": "critic, its gradients and optimiser moments",
    "ahead": "copy of the policy that samples ahead",
    "rewards": "rewards",
}
_STEPS = 2
"""Steps that are tried: the first one warms up."""
_PAUSE = 0.02
"""Seconds between two looks at the run that is tried."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What the second of two steps measured.

    Attributes:
        seconds: of the step.
        shares: of its parts, by name.
        length: tokens of a completion, mean.
        peak: bytes; of a GPU, of all that runs on it.
    """

    seconds: float
    shares: dict[str, float]
    length: float
    peak: int


def plan_online(
    recipe: str,
    *,
    model: str,
    data: tuple[str, ...],
    config: Path | None,
    set: tuple[str, ...],
    lora: bool,
    reward: tuple[str, ...],
    sampler: str | None,
) -> int:
    """Plan an online recipe; see `accord.cli.plan.plan`."""
    from accord.cli.examples import Examples, online_settings_of
    from accord.types import Prompt

    settings = online_settings_of(recipe, data, config, set, lora=lora, rewards=reward, sampler=sampler)
    if settings.environment:
        what = "A plan samples completions of one turn, and these settings name an environment."
        fix = (
            "Leave out [environment], and plan with a reward that needs none: sampling.max_new_tokens bounds the whole."
        )
        raise ConfigError(what, where="[environment]", fix=fix)
    examples = Examples(data, settings, "prompts")
    prompts = [record for record in examples.records if isinstance(record, Prompt)]

    from accord.models.load import default_device, load_critic, load_policy
    from accord.models.render import Renderer
    from accord.rewards import Rewards
    from accord.train import encode_prompts, method_of
    from accord.train.online_plan import memory_in_use
    from accord.train.online_plan import plan_online as make

    device = default_device()
    program = memory_in_use(device)
    policy = load_policy(model, chat_template=settings.template())
    encoded = encode_prompts(Renderer(policy, settings.max_tokens), prompts, settings.sampling.max_new_tokens)
    before = memory_in_use(device)
    rewards = Rewards(settings.rewards, policy.tokenizer) if settings.rewards else Rewards.none()
    rewards.check(prompts)
    own = settings.critic.model if settings.critic else None
    size = 0 if settings.workers.rewards else memory_in_use(device) - before
    critic = load_critic(own, policy.tokenizer) if own else None
    teacher = reference_of(model, settings, policy) if method_of(settings).teacher else None
    made = make(policy, critic, encoded, settings, program=program, rewards=size, teacher=teacher)
    counts = f"{settings.batch_size} prompts with {settings.rollout.completions} completions"
    print("\n".join(lines(made, counts, settings.sampling.max_new_tokens)))
    if not made.fits:
        return 1
    del policy, critic, rewards, teacher  # what is tried has the memory to itself
    options: dict[str, Any] = {"--model": [model], "--data": data, "--config": [config] if config else [], "--set": set}
    options |= {"--reward": reward, "--sampler": [sampler] if sampler else []}
    words = [str(word) for flag, values in options.items() for value in values for word in (flag, value)]
    tried = _try([recipe, *words, *(["--lora"] if lora else [])], device)
    print("\n".join(_timing(made, tried, settings.sampling.max_new_tokens)))
    return 0


def lines(made: OnlinePlan, counts: str, max_new_tokens: int) -> Iterator[str]:
    """The plan as lines of text."""
    from accord.engine.memory import gigabytes

    median, most, longest = made.data.lengths
    yield f"\nSteps: {made.data.steps:,}, each of {counts} of at most {max_new_tokens:,} tokens"
    yield f"Prompts: median {median:,} tokens, 90 % at most {most:,}, longest {longest:,}"
    yield (
        f"Tokens per step: at most {made.data.tokens:,} unique, in {made.data.micro_batches:,} micro-batches of "
        f"at most {made.tokens:,}"
    )
    again = "computed again in the backward pass" if made.checkpointing else "kept"
    yield f"\nMemory at the peak of learning, activations {again}:"
    yield from parts(made.learning)
    for name, bytes_ in made.beside.items():
        yield f"  {gigabytes(bytes_):>10}  {_BESIDE[name]}"
    beside = sum(made.beside.values())
    yield f"  {gigabytes(made.learning.total + beside):>10}  in all"
    if made.sampling:
        yield (
            f"  {gigabytes(made.sampling.total + beside):>10}  in all while it samples, of which "
            f"{gigabytes(made.sampling.workspace)} for keys, values and logits"
        )
    if made.critic:
        yield f"  {gigabytes(made.critic):>10}  in all while the critic learns"
    verdict = "it fits" if made.fits else "it does not fit"
    yield f"\nNeeded: {gigabytes(made.needed)} of {gigabytes(made.capacity)} that may be used: {verdict}."
    yield from advised(made.advice, made.capacity)


def _timing(made: OnlinePlan, tried: Tried, max_new_tokens: int) -> Iterator[str]:
    from accord.engine.memory import gigabytes

    shares = ", ".join(f"{name} {share:.0%}" for name, share in tried.shares.items())
    yield f"Measured peak of two steps: {gigabytes(tried.peak)} ({tried.peak / made.needed - 1:+.0%})."
    yield f"A step: {tried.seconds:.3g} s ({shares}), with completions of {tried.length:.0f} tokens on average"
    total = made.data.steps * tried.seconds
    longest = total * max(1.0, max_new_tokens / tried.length)
    yield (
        f"Training: {duration(total)}, if completions stay so long "
        f"(about {duration(longest)}, if all become as long as they may)"
    )


def _try(arguments: Sequence[str], device: torch.device) -> Tried:
    """Start the run in a temporary directory, and end it after two steps.

    Raises:
        RunError: it ended by itself; the message is its own.
    """
    with TemporaryDirectory(prefix="accord-plan-", ignore_cleanup_errors=True) as directory:
        out, said = Path(directory) / "run", Path(directory) / "said.txt"
        quiet = ["samples=0", "trackers=[]", f"checkpoint_every={1 << 30}", f"steps={_STEPS + 1}"]
        words = [word for setting in quiet for word in ("--set", setting)]
        with said.open("w") as file:
            command = [sys.executable, "-m", "accord", "train", *arguments, *words, "--out", str(out)]
            process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            peak = _watch(process, out / "metrics.jsonl", device)
        finally:
            process.kill()
            process.wait()
        rows = [json.loads(line) for line in _complete(out / "metrics.jsonl")]
        if len(rows) < _STEPS:
            message = said.read_text(encoding="utf-8", errors="replace").strip()
            raise RunError(f"The steps that were tried failed.\n{message}", where="accord train")
    last = rows[_STEPS - 1]
    shares = {name.partition("/")[2]: value for name, value in last.items() if name.startswith("time/")}
    return Tried(last["seconds"], shares, last["completions/mean_length"], peak)


def _watch(process: subprocess.Popen[bytes], metrics: Path, device: torch.device) -> int:
    """Wait until the steps are made, or it has ended; the most memory that was seen."""
    import psutil
    import torch

    peak, free = 0, torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    with Progress("Try two steps", _STEPS, unit="tokens") as progress:
        done = 0
        while done < _STEPS and process.poll() is None:
            time.sleep(_PAUSE)
            try:
                used = psutil.Process(process.pid).memory_info().rss
            except psutil.Error:
                continue
            peak = max(peak, free - torch.cuda.mem_get_info(device)[0] if free else used)
            rows = _complete(metrics)
            if len(rows) > done:
                progress.advance(len(rows) - done, work=json.loads(rows[-1])["tokens"])
                done = len(rows)
    return peak


def _complete(path: Path) -> list[str]:
    """The whole lines of a file that may still grow; none while it is not there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.splitlines()[: text.count("\n")]
