"""OpenAssistant (Köpf et al. 2023): message trees; sibling replies that people ranked become one ranking, 0 is best.

Deleted messages, and those that reviewers rejected, are left out with all that follows them, and counted. Messages in
rows of their own must stand tree by tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, LeftOut, places, string
from accord.errors import RowError
from accord.types import Message, Ranking, Record, Source

__all__ = ["read_messages", "read_nested", "read_tree"]

Row = Mapping[str, Any]

_ROLES = {"prompter": "user", "assistant": "assistant"}


def read_tree(row: Row, source: Source) -> list[Record | LeftOut]:
    """message_tree_id, prompt: the first message, with replies inside."""
    return _tree(row["prompt"], source)


def read_nested(row: Row, source: Source) -> list[Record | LeftOut]:
    """tree_id, root: the first message, with replies inside."""
    return _tree(row["root"], source)


def read_messages(row: Row, source: Source) -> list[Record | LeftOut]:
    """rows: all rows of one tree, each with message_id, parent_id, text and role."""
    nodes = {item["message_id"]: {**item, "replies": []} for item in row["rows"]}
    roots = []
    for node in nodes.values():
        parent = nodes.get(node["parent_id"])
        if node["parent_id"] is None:
            roots.append(node)
        elif parent is None:
            what = f"The parent of message {node['message_id']!r:.50} is not in the rows beside it."
            raise RowError(what, where=str(source), fix="Sort the file by message_tree_id.")
        else:
            parent["replies"].append(node)
    return [found for root in roots for found in _tree(root, source)]


def _tree(root: Any, source: Source) -> list[Record | LeftOut]:
    try:
        found = list(_below(root, (), source))
    except RecursionError:
        fix = "Remove the tree."
        raise RowError("The replies are nested too deeply.", where=str(source), fix=fix) from None
    return found or [LeftOut("No two replies of this tree were ranked against each other.")]


def _below(node: Any, path: tuple[Message, ...], source: Source) -> Iterator[Record | LeftOut]:
    """Rankings of the replies to this message and to those below it; `path` is what was said before."""
    message = _message(node, source)
    if node.get("deleted") or node.get("review_result") is False:
        cause = "deleted" if node.get("deleted") else "rejected by reviewers"
        yield LeftOut(f"A message was {cause}; it and its {_size(node) - 1} replies are not used.")
        return
    path = (*path, message)
    replies = node.get("replies") or []
    ranked = [
        reply
        for reply in replies
        if _message(reply, source).role == "assistant"
        and reply.get("rank") is not None
        and not reply.get("deleted")
        and reply.get("review_result") is not False
    ]
    if message.role == "user" and len(ranked) > 1:
        texts = tuple((_message(reply, source),) for reply in ranked)
        yield Ranking(path, texts, places([reply["rank"] for reply in ranked], source), source)
    for reply in replies:
        yield from _below(reply, path, source)


def _message(node: Any, source: Source) -> Message:
    if not isinstance(node, dict) or node.get("role") not in _ROLES or "text" not in node:
        what = "A message must have a text, and the role prompter or assistant."
        raise RowError(what, where=str(source), fix="Mend or remove the tree.")
    return Message(_ROLES[node["role"]], string(node, "text", source))


def _size(node: Row) -> int:
    return 1 + sum(_size(reply) for reply in node.get("replies") or [])


FORMATS.add("oasst-tree", Format(("message_tree_id", "prompt"), "Ranking", read_tree))
FORMATS.add("oasst-root", Format(("tree_id", "root"), "Ranking", read_nested))
FORMATS.add(
    "oasst-messages",
    Format(
        ("message_tree_id", "message_id", "parent_id", "text", "role"),
        "Ranking",
        read_messages,
        together="message_tree_id",
    ),
)
