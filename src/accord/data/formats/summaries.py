"""Comparisons of summaries, summarize_from_feedback (Stiennon et al. 2020): plain text, `choice` is the better one.

The prompt's template is the paper's and depends on what is summarised: Reddit posts and CNN/DailyMail articles stand
in different batches and in different fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, items, string
from accord.data.formats.comparisons import compared
from accord.errors import RowError
from accord.types import Record, Source

__all__ = ["read"]

Row = Mapping[str, Any]


def read(row: Row, source: Source) -> list[Record]:
    """info, summaries: two objects with text, choice: 0 or 1, and optionally batch."""
    texts = [item.get("text") if isinstance(item, dict) else None for item in items(row, "summaries", source)]
    choice = row["choice"]
    if len(texts) != 2 or choice not in (0, 1):
        what = f"There must be two summaries and a choice of 0 or 1, not {len(texts)} and {choice!r:.40}."
        raise RowError(what, where=str(source), fix="Mend or remove the row.")
    first, second = (string({"summaries": text}, "summaries", source) for text in texts)
    return [*compared(_prompt(row, source), first, second, -1 if choice else 1, source)]


def _prompt(row: Row, source: Source) -> str:
    info = row["info"] if isinstance(row["info"], dict) else {}
    batch = row.get("batch") or ""
    is_news = bool(info.get("article"))
    if is_news == bool(info.get("post")) or (batch and str(batch).startswith("cnndm") != is_news):
        what = f"Of the batch {batch!r:.40} it is unclear whether a post or an article was summarised."
        fix = "`info` must have a post (Reddit), or an article in a batch named cnndm... (CNN/DailyMail)."
        raise RowError(what, where=str(source), fix=fix)
    if is_news:
        return f"Article:\n\n{string(info, 'article', source)}\n\nTL;DR:"
    fields = {name: string(info, name, source) if name in info else "" for name in ("subreddit", "title", "post")}
    return "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:".format(**fields)


FORMATS.add("summaries", Format(("info", "summaries", "choice"), "PreferencePair", read))
