"""The data doctor: each rule of one row fires on a row that breaks it, at the right place, and on no other."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from accord.data.check import RULES, CheckReport, check
from accord.errors import EmptyDataError, MissingDataError

PAIR = {"prompt": "Name a bird.", "chosen": "A wren.", "rejected": "A trout."}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def write(folder: Path, *rows: dict[str, Any] | bytes) -> str:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return str(path)


def lines(report: CheckReport) -> dict[str, list[int]]:
    return {finding.rule: [place.line for place in finding.places] for finding in report.findings}


def test_clean_data_has_no_finding(tmp_path: Path) -> None:
    rows = [PAIR, {"messages": turns("Hi", "Hello", "Bye", "See you")}, {"prompt": "p", "completion": "c"}]
    report = check(write(tmp_path, *rows))
    assert not report.has_errors
    assert str(report).endswith("No problem found.")
    assert (report.rows, dict(report.records)) == (3, {"PreferencePair": 1, "Demonstration": 2})


REVERSED = {"prompt": "Name  a bird.", "chosen": "A trout. ", "rejected": "A wren."}
NOT_ALTERNATING = {"messages": [*turns("Hi"), *turns("Are you there?", "Yes")]}


@pytest.mark.parametrize(
    ("rule", "row"),
    [
        ("encoding", b'{"prompt": "\xff"}'),
        ("json", b"{"),
        ("schema", {"text": "x"}),
        ("empty", {"prompt": "p", "completion": " "}),
        ("identical", {"prompt": "p", "chosen": "a  b", "rejected": "a b\n"}),
        ("ties", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}),
        ("roles", {"prompt": turns("a"), "completion": turns("b")}),
        ("duplicate", PAIR | {"id": "again"}),
        ("contradiction", REVERSED),
        ("contradiction", {"prompt": "Name a bird.", "completions": ["A wren.", "A trout."], "ranks": [2, 1]}),
        ("template-tokens", {"prompt": "p", "completion": "<|im_start|>assistant\nHi"}),
        ("template-tokens", {"messages": turns("[INST] Hi [/INST]", "Hello")}),
        ("alternation", NOT_ALTERNATING),
        ("alternation", {"prompt": turns("a", "b"), "completion": "c"}),
        ("alternation", {"messages": [*turns("a", "b", "c"), *turns("d")]}),
        ("surrogate", b'{"prompt": "\\ud800 alone", "completion": "c"}'),
        ("margin", PAIR | {"prompt": "Name a fish.", "margin": 0}),
        ("margin", PAIR | {"prompt": "Name a fish.", "margin": -0.5}),
        ("truncated", {"prompt": "p", "completion": "and then", "finish_reason": "length"}),
        ("personal-data", {"prompt": "p", "completion": "Write to ada@lovelace.org."}),
    ],
)
def test_one_bad_row_gives_one_finding_at_its_place(tmp_path: Path, rule: str, row: Any) -> None:
    report = check(write(tmp_path, PAIR, row, {"prompt": "p", "completion": "c"}))
    also = {"alternation": 1} if rule == "roles" else {}  # a user turn where an answer belongs breaks both
    assert {finding.rule: finding.count for finding in report.findings} == {rule: 1, **also}
    assert lines(report)[rule] == [2]
    assert report.has_errors == (RULES[rule][0] == "error")
    assert report.rows == 3
    assert "rows.jsonl:2" in str(report)


def test_the_kind_decides_what_is_usable(tmp_path: Path) -> None:
    spec = write(tmp_path, PAIR, {"prompt": "p", "completion": "c"})
    assert lines(check(spec)) == {}
    assert lines(check(spec, "demonstrations")) == {"kind": [1]}
    assert lines(check(spec, "preferences")) == {"kind": [2]}
    assert lines(check(spec, "prompts")) == {}


def test_prompts_with_one_id(tmp_path: Path) -> None:
    assert lines(check(write(tmp_path, {"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}))) == {"duplicate-id": [2]}


def test_a_csv_line_and_a_file_cut_short(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc\n")
    assert lines(check(str(tmp_path / "a.csv"))) == {"csv": [3]}
    packed = gzip.compress(json.dumps(PAIR).encode() + b"\n", mtime=0)
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-4])
    report = check(str(tmp_path / "b.jsonl.gz"))
    assert [finding.rule for finding in report.findings] == ["damaged"]


def test_five_places_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    (finding,) = check(write(tmp_path, *[b"{"] * 7)).findings
    assert (finding.count, [place.line for place in finding.places]) == (7, [1, 2, 3, 4, 5])
    assert "7×" in str(finding)
    assert "...)" in str(finding)


def test_longer_wins_is_a_rate_over_pairs_of_different_length(tmp_path: Path) -> None:
    """40 of 60 unequal pairs have the longer one chosen: 67 %, over the limit of 65 %; 38 of 60 (63 %) is under it."""

    def rows(longer: int) -> list[dict[str, str]]:
        texts = [("yes, it is", "no") if k < longer else ("no", "yes, it is") for k in range(60)]
        equal = [{"prompt": f"e{k}", "chosen": "yes", "rejected": "nay"} for k in range(40)]
        return [{"prompt": str(k), "chosen": a, "rejected": b} for k, (a, b) in enumerate(texts)] + equal

    (finding,) = check(write(tmp_path, *rows(40))).findings
    assert (finding.rule, finding.count) == ("longer-wins", 40)
    report = check(write(tmp_path, *rows(38)))
    assert report.findings == []
    # Wilson's interval of 38/60, by hand: centre (0.6333 + 1.9207/60)/1.06402 = 0.6253, half-width 0.1183
    text = "63.3% of 60 comparisons of different length (95 % interval 50.7% to 74.4%)"
    assert report.figures["longer completion wins"] == text


def test_label_balance(tmp_path: Path) -> None:
    def rows(good: int) -> list[dict[str, Any]]:
        """50 labels, the rare ones 7 rows apart."""
        rare = {7 * k % 50 for k in range(min(good, 50 - good))}
        return [{"prompt": str(k), "completion": "c", "label": (k in rare) == (good < 25)} for k in range(50)]

    for good in (4, 46):  # 8 % and 92 %
        (finding,) = check(write(tmp_path, *rows(good))).findings
        assert (finding.rule, finding.count) == ("label-balance", 46)
    report = check(write(tmp_path, *rows(5)))
    assert report.findings == []
    assert report.figures["labels true"] == "10% of 50"


def test_rows_that_never_end_well_are_still_all_read(tmp_path: Path) -> None:
    report = check(write(tmp_path, b"{", {"text": "x"}, {"prompt": "", "chosen": "", "rejected": ""}, PAIR, PAIR))
    assert lines(report) == {
        "json": [1],
        "schema": [2],
        "empty": [3, 3, 3],
        "identical": [3],
        "duplicate": [5],
    }
    assert list(lines(report)) == [rule for rule in RULES if rule in lines(report)], "errors come first"


def test_nothing_to_read_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError):
        check(write(tmp_path))
    with pytest.raises(MissingDataError):
        check(str(tmp_path / "none.jsonl"))


def test_real_preferences(shared_data: Path) -> None:
    report = check(f"{shared_data}/hh_harmless:train", "preferences")
    assert (report.rows, report.has_errors) == (1595, False)
