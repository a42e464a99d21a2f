"""What `accord train` and `accord plan` learn from: one data set, or several in shares, in memory or from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accord.errors import ConfigError

if TYPE_CHECKING:
    from accord.data.problems import Problem
    from accord.data.usable import Kind
    from accord.errors import RowError
    from accord.models.render import Renderer
    from accord.train import OnlineConfig, TrainConfig
    from accord.train.examples import Trees
    from accord.types import Record

__all__ = ["Examples", "online_settings_of", "settings_of"]

S = TypeVar("S", "TrainConfig", "OnlineConfig")

_STREAMED = (
    "More than {:,} rows: the others are read from disk, and checked, as training goes.\n"
    "To check them all beforehand: accord data check --data {}"
)


def settings_of(
    recipe: str,
    data: Sequence[str],
    config: Path | None,
    assignments: Sequence[str],
    base: Mapping[str, Any] | None = None,
    *,
    lora: bool,
) -> TrainConfig:
    """The settings of a run, with the shares of its data where --data gives several.

    Raises:
        ConfigError: a wrong setting; or data is named nowhere, or in two places.
    """
    from accord.train import resolve

    def build(extra: dict[str, Any]) -> TrainConfig:
        return resolve(recipe, config, assignments, extra, base)

    return _with_data(build, data, _adapters(assignments, lora=lora))


def online_settings_of(
    recipe: str,
    data: Sequence[str],
    config: Path | None,
    assignments: Sequence[str],
    base: Mapping[str, Any] | None = None,
    *,
    lora: bool,
    rewards: Sequence[str],
    sampler: str | None,
    environment: str | None = None,
) -> OnlineConfig:
    """The same for a recipe that learns from what the policy samples.

    Args:
        rewards: names of rewards that need no settings.
        sampler: address of a server that samples.
        environment: name of what answers the policy; its rewards are the run's where no others are named.

    Raises:
        ConfigError: a wrong setting; data or rewards are named nowhere, or in two places.
    """
    from accord.train import method_of, resolve_online

    given = _adapters(assignments, lora=lora) | ({"sampler": {"url": sampler}} if sampler else {})
    given |= {"environment": {"name": environment}} if environment else {}
    settings = resolve_online(recipe, config, assignments, given, base)
    named, method = settings.rewards, method_of(settings)
    if not method.reads_scores and method.teacher is None:
        fix = "Give the model to learn from: --set advantage.teacher=MODEL"
        raise ConfigError("No teacher is named.", where="advantage.teacher", fix=fix)
    if named and rewards:
        fix = "Leave out --reward, or [[rewards]] in the settings."
        raise ConfigError("The settings name rewards already.", where="--reward", fix=fix)
    if settings.environment and method.reads_scores and not named and not rewards:
        rewards = ("environment",)
    if not named and not rewards and method.reads_scores:
        fix = "Give --reward NAME, e.g. --reward exact_answer, or [[rewards]] in --config; docs/rewards.md lists them."
        raise ConfigError("No reward is named.", where="--reward", fix=fix)
    if rewards:
        given["rewards"] = [{"name": name} for name in rewards]

    def build(extra: dict[str, Any]) -> OnlineConfig:
        return resolve_online(recipe, config, assignments, extra, base)

    return _with_data(build, data, given)


def _adapters(assignments: Sequence[str], *, lora: bool) -> dict[str, Any]:
    from accord.config import parse_assignments

    return {"lora": {}} if lora and "lora" not in parse_assignments(assignments) else {}


def _with_data(build: Callable[[dict[str, Any]], S], data: Sequence[str], extra: dict[str, Any]) -> S:
    """The settings, with the shares of --data where it gives several."""
    from accord.data.mix import read_shares

    settings = build(extra)
    if settings.data is None and not data:
        fix = "Give --data FILE, or several with their weights: --data a.jsonl=0.7 --data b.jsonl=0.3"
        raise ConfigError("No data is named.", where="--data", fix=fix)
    if settings.data and data:
        what = f"The settings name data already: {', '.join(settings.data)}."
        raise ConfigError(what, where="--data", fix="Leave out --data, or [data] in the settings.")
    return build(extra | {"data": read_shares(data)}) if len(data) > 1 else settings


class Examples:
    """The data of a run, read; what was read and drawn is printed.

    Labels and ratings are looked at all together (how many are good, on which scale), so they stay in memory; so do
    prompts, which come again and again.

    Attributes:
        name: what the user called it.
        records: all that is trained on, in order; of large data some, to know its kind by.
        large: whether the rows are read from disk as training goes.
        left_out: what is wrong with the rows in memory that cannot be used.
    """

    def __init__(
        self, data: Sequence[str], settings: TrainConfig | OnlineConfig, kind: Kind, *, skip_bad: bool = False
    ) -> None:
        from accord.data.load import is_rowwise, load
        from accord.data.mix import check_shares, mix_records
        from accord.data.rows import STREAM_ABOVE

        self.kind, self.seed = kind, settings.seed
        self.shares = check_shares(settings.data) if settings.data else {}
        self.name = ", ".join(f"{spec}={weight:g}" for spec, weight in self.shares.items()) or data[0]
        specs = list(self.shares) or [data[0]]
        may_stream = kind not in ("labels", "ratings", "prompts") and all(map(is_rowwise, specs))
        limit = STREAM_ABOVE + 1 if may_stream else None
        loaded = {spec: load(spec, kind, limit, skip_bad=skip_bad) for spec in specs}
        self.large = may_stream and any(len(each.records) > STREAM_ABOVE for each in loaded.values())
        if self.large and any("left-out" in each.dropped for each in loaded.values()):
            # What a format leaves out on purpose is counted, so everything is read.
            self.large, loaded = False, {spec: load(spec, kind, skip_bad=skip_bad) for spec in specs}
        problems = [problem for each in loaded.values() for problem in each.problems if problem.stops]
        self.left_out: list[Problem] = [] if self.large else problems
        self.records: list[Record] = [record for each in loaded.values() for record in each.records]
        if self.large:
            large = [spec for spec, each in loaded.items() if len(each.records) > STREAM_ABOVE]
            print(_STREAMED.format(STREAM_ABOVE, large[0]))
        elif self.shares:
            for spec, each in loaded.items():
                print(f"{spec}: {each.summary()}")
            parts = {spec: each.records for spec, each in loaded.items()}
            self.records, counts = mix_records(parts, self.shares, self.seed)
            self._say_shares(counts)
        else:
            print(loaded[specs[0]].summary())

    def trees(self, renderer: Renderer, skipped: Path | None = None) -> Trees:
        """The records as trees.

        Args:
            skipped: leave out rows that cannot be used; of data that streams, they are listed in this file.
        """
        from accord.data.mix import MixedRows
        from accord.train.examples import render, stream

        if self.large:
            self.records.clear()
            trees = stream(self.shares or self.name, self.kind, renderer, skipped, self.seed)
            if isinstance(trees.rows, MixedRows):
                self._say_shares(trees.rows.counts)
            return trees
        bad: list[RowError] = []
        made = render(renderer, self.records, bad if skipped else None)
        for error in bad:
            print(f"Left out: {error}")
        return made

    def list_left_out(self, file: Path) -> None:
        """Write what is wrong with each row in memory that was left out, a line of JSON each; no file if none was."""
        import json

        from accord.files import write_text

        rows = [{"source": str(each.source), "rule": each.rule, "what": each.what} for each in self.left_out]
        if rows:
            write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(f"{len(rows):,} rows could not be used and were left out: {file}")

    def _say_shares(self, counts: Mapping[str, int]) -> None:
        total = sum(counts.values())
        drawn = [f"{count:,} of {spec} ({count / total:.1%})" for spec, count in counts.items()]
        print(f"Mixture of {total:,} rows: {', '.join(drawn)}")
