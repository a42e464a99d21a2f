"""`accord sample`: completions for a file of prompts."""

from __future__ import annotations

from pathlib import Path

__all__ = ["sample"]


def sample(
    *,
    model: str,
    data: str,
    out: Path,
    n: int = 1,
    seed: int = 0,
    limit: int | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Sample completions for a file of prompts; one JSON row per completion, with tokens and log-probabilities.

    Parameters
    ----------
    model
        Hub id, directory, or `starter`.
    data
        Prompts: file (jsonl, csv, parquet, also .gz), directory, or hub id; other columns are not read.
    out
        JSON-lines file; must not exist.
    n
        Completions per prompt.
    seed
        Seed of everything random.
    limit
        Use this many prompts only.
    set
        One setting of the sampler, e.g. --set temperature=0.8 or --set max_new_tokens=128; repeat for more.
    """
    from accord.config import parse_assignments
    from accord.data.load import load
    from accord.errors import ConfigError, RunError

    if n < 1:
        raise ConfigError(f"n = {n} asks for no completion.", where="--n", fix="Give at least 1.")
    if out.exists():
        raise RunError("This file exists.", where=str(out), fix="Choose another file with --out.")
    loaded = load(data, "prompts", limit)
    print(loaded.summary())

    from pydantic import TypeAdapter

    from accord.evaluate.answers import complete
    from accord.files import write_text
    from accord.models.load import load_policy
    from accord.sampling.request import SamplingConfig
    from accord.types import Completion

    config = SamplingConfig.build(parse_assignments(set), where="--set")
    prompts = {prompt.id: prompt for prompt in loaded.records}
    completions = complete(load_policy(model), loaded.records, [config.temperature] * n, config, seed, "Sampling")
    adapter = TypeAdapter(Completion)
    write_text(out, "".join(_row(prompts[each.prompt_id].content, adapter.dump_json(each)) for each in completions))
    cut = sum(each.stop_reason == "length" for each in completions)
    print(f"{len(completions):,} completions: {out}" + (f" ({cut:,} reached max_new_tokens)" if cut else ""))


def _row(prompt: object, completion: bytes) -> str:
    from pydantic import TypeAdapter

    from accord.types import Content

    content = TypeAdapter(Content).dump_json(prompt).decode()  # type: ignore[arg-type]
    return f'{{"prompt":{content},"completion":{completion.decode()}}}\n'
