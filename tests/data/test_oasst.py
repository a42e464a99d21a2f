"""OASST: ranked replies of a tree of messages become rankings, whichever way the tree is written down."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from accord.data.check import check
from accord.data.formats import read_row, read_units
from accord.data.load import load, read_records
from accord.data.problems import Problem
from accord.errors import RowError
from accord.types import Message, Ranking, Source

PLACE = Source("rows.jsonl", 7)
Q, GOOD, POOR = Message("user", "Why?"), Message("assistant", "Good."), Message("assistant", "Poor.")


def node(name: str, role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"message_id": name, "role": role, "text": text, "lang": "en", "replies": list(replies), **more}


TREE = node(
    "q", "prompter", "Why?",
    node("a", "assistant", "Poor.", rank=1),
    node("b", "assistant", "Good.", node("b1", "prompter", "And?",
        node("c", "assistant", "Yes.", rank=0), node("d", "assistant", "No.", rank=2),
        node("e", "assistant", "Gone.", node("e1", "prompter", "?"), rank=1, deleted=True)), rank=0),
    node("f", "assistant", "Unranked."),
    node("g", "assistant", "Spam.", rank=2, review_result=False),
)  # fmt: skip
RANKED = [
    Ranking((Q,), ((POOR,), (GOOD,)), (1, 0), PLACE),
    Ranking(
        (Q, GOOD, Message("user", "And?")),
        ((Message("assistant", "Yes."),), (Message("assistant", "No."),)),
        (0, 1),
        PLACE,
    ),
]
GONE = {
    "A message was deleted; it and its 1 replies are not used.",
    "A message was rejected by reviewers; it and its 0 replies are not used.",
}


@pytest.mark.parametrize("row", [{"message_tree_id": "q", "prompt": TREE}, {"tree_id": "q", "root": TREE}])
def test_ranked_siblings_become_rankings_and_deleted_ones_are_counted(row: dict[str, Any]) -> None:
    problems: list[Problem] = []
    assert read_row(row, PLACE, None, problems.append) == RANKED
    assert {problem.what for problem in problems} == GONE
    assert [problem.rule for problem in problems] == ["left-out"] * 2


def flat(tree: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    own = {"parent_id": parent, "message_tree_id": "q", "rank": None, "deleted": False, **tree}
    replies = own.pop("replies")
    return [own, *(row for reply in replies for row in flat(reply, tree["message_id"]))]


def test_messages_of_one_tree_are_read_together() -> None:
    """The same tree as one row per message, between two other trees: same rankings, at the place of its first row."""
    lone = {"message_id": "z", "parent_id": None, "text": "Hm?", "role": "prompter", "rank": None}
    rows = [{**lone, "message_tree_id": "y"}, *flat(TREE), {**lone, "message_tree_id": "z"}]
    problems: list[Problem] = []
    units = list(read_units([(Source("m.jsonl", k), row) for k, row in enumerate(rows, 1)], None, problems.append))
    assert [source.line for source, _, _ in units] == [1, 2, len(rows)]
    assert [(record.prompt, record.ranks) for record in units[1][2] if isinstance(record, Ranking)] == [
        (record.prompt, record.ranks) for record in RANKED
    ]
    assert {problem.what for problem in problems} == GONE | {
        "No two replies of this tree were ranked against each other."
    }
    with pytest.raises(RowError, match="cannot be read one by one"):
        read_row(rows[0], PLACE)
    orphan = [(PLACE, {**lone, "parent_id": "elsewhere", "message_tree_id": "y"})]
    problems.clear()
    assert list(read_units(orphan, None, problems.append)) == []
    assert "is not in the rows beside it" in problems[0].what


def test_a_bottomless_tree_is_refused() -> None:
    tree = node("0", "prompter", "Why?")
    for k in range(1, 5000):
        tree = node(str(k), ("prompter", "assistant")[k % 2], "x", tree)
    with pytest.raises(RowError, match="nested too deeply"):
        read_row({"tree_id": "q", "root": tree}, PLACE)


def test_what_is_left_out_does_not_stop_training_and_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    rows = [{"tree_id": "q", "root": root} for root in (TREE, node("x", "prompter", "Hm?"))]
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load(str(path), "preferences")
    assert len(loaded.records) == 2
    assert loaded.rows == 2
    assert [place.line for place in loaded.dropped["left-out"]] == [1, 1, 2]
    told = f"2 records from 2 rows; parts left out: 3 ({path}:1, {path}:1, {path}:2)"
    assert loaded.summary() == told, "the first row gave its records, so it was not dropped"
    report = check(str(path), "preferences")
    assert not report.has_errors
    assert {finding.rule: finding.count for finding in report.findings}["left-out"] == 3


def test_the_trees_beside_the_checkout_give_the_pairs_that_were_made_of_them(shared_data: Path) -> None:
    """The folder's own pairs are those of human replies; the readings of its trees must contain them all."""
    trees = shared_data / "oasst_trees" / "trees.jsonl.gz"
    problems: list[Problem] = []
    better = set()
    for _, _, records in read_records(str(trees), problems.append):
        for record in records:
            assert isinstance(record, Ranking)
            by_rank = sorted(zip(record.ranks, record.completions, strict=True), key=lambda item: item[0])
            texts = [text[0].content for _, text in by_rank if isinstance(text[0], Message)]
            better |= {(high, low) for k, high in enumerate(texts) for low in texts[k + 1 :]}
    with gzip.open(trees.with_name("pairs.jsonl.gz"), "rt", encoding="utf-8") as file:
        pairs = [(row["chosen"], row["rejected"]) for row in map(json.loads, file)]
    assert len(pairs) > 500
    assert set(pairs) <= better
    assert {problem.rule for problem in problems} <= {"left-out"}
