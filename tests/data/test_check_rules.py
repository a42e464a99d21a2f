"""Rules of the data doctor that need several rows: preferences, lengths, labels, repetition, languages, licence."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from itertools import combinations, groupby, permutations
from pathlib import Path
from typing import Any

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.check import CheckReport, Finding, check
from accord.data.check.labels import runs_test
from accord.data.check.languages import language
from accord.data.check.preferences import Contradictions
from accord.data.check.report import CheckReport as Report
from accord.data.check.rules import Item, Places
from accord.errors import EmptyDataError
from accord.types import PreferencePair, Source


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def found(report: CheckReport, rule: str) -> Finding:
    return next(finding for finding in report.findings if finding.rule == rule)


def rules(report: CheckReport) -> set[str]:
    return {finding.rule for finding in report.findings}


# --- preferences -----------------------------------------------------------------------------------------------------


def edges_report(edges: list[tuple[str, str, str]]) -> Report:
    """Contradictions and cycles among (prompt, better, worse), one row each."""
    rule, report = Contradictions(Places()), Report("edges")
    for line, (prompt, better, worse) in enumerate(edges, 1):
        pair = PreferencePair(prompt, better, worse)
        list(rule.see(Item(Source("edges.jsonl", line), {}, [pair], [pair])))
    rule.end(report)
    return report


def test_a_cycle_is_named_with_all_its_rows() -> None:
    edges = [("p", "a", "b"), ("p", "b", "c"), ("q", "c", "a"), ("p", "x", "a"), ("p", "c", "a")]
    (cycle,) = edges_report(edges).findings
    assert (cycle.rule, cycle.count, cycle.places) == ("cycle", 1, [Source("edges.jsonl", 1)])
    assert cycle.what == "With edges.jsonl:2, edges.jsonl:5 this preference runs in a circle of 3 completions."


def test_the_same_texts_of_other_prompts_make_no_cycle() -> None:
    assert edges_report([("p", "a", "b"), ("q", "b", "c"), ("r", "c", "a"), ("s", "b", "a")]).findings == []


def test_rows_that_contradict_an_earlier_one_are_counted_each() -> None:
    (finding,) = edges_report([("p", "a", "b"), ("p", "b", "a"), ("p", "a", "b"), ("p", "b", "a")]).findings
    assert (finding.rule, finding.count) == ("contradiction", 2)
    assert [place.line for place in finding.places] == [2, 4]
    assert finding.what == "The opposite preference is at edges.jsonl:1."


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from(list(permutations("abcde", 2)))), max_size=14))
def test_cycles_are_the_strong_components_without_contradicted_pairs(drawn: list[tuple[str, Any]]) -> None:
    edges = [(prompt, *pair) for prompt, pair in drawn]
    opposed = {edge for edge in edges if (edge[0], edge[2], edge[1]) in edges}
    graph = networkx.DiGraph([((p, a), (p, b)) for p, a, b in set(edges) - opposed])
    cycles = [part for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    first: dict[Any, tuple[str, str]] = {}
    against = [edge for edge in edges if first.setdefault((edge[0], frozenset(edge[1:])), edge[1:]) != edge[1:]]
    report = edges_report(edges)
    assert {f.rule: f.count for f in report.findings} == {
        name: count for name, count in (("contradiction", len(against)), ("cycle", len(cycles))) if count
    }


def test_rankings_contradict_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]},
        {"prompt": "p", "chosen": "c", "rejected": "a"},
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]},
    ]
    report = check(write(tmp_path / "rows.jsonl", rows))
    assert [place.line for place in found(report, "contradiction").places] == [2]
    assert "cycle" not in rules(report)  # a ≻ b ≻ c stands, and c ≻ a is already told


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_runs_test_has_the_moments_of_all_arrangements() -> None:
    """Mean and variance of the number of runs over all C(9,4) arrangements of 4 true and 5 false labels."""
    counts = []
    for true in combinations(range(9), 4):
        labels = [k in true for k in range(9)]
        counts.append(sum(1 for _ in groupby(labels)))
    mean = sum(counts) / len(counts)
    deviation = (sum((count - mean) ** 2 for count in counts) / len(counts)) ** 0.5
    expected, p = runs_test(3, 4, 5)
    assert expected == pytest.approx(mean)
    # the normal distribution function at (3 - mean)/deviation, by the error function of the standard library
    assert p == pytest.approx((1 + math.erf((3 - mean) / deviation / 2**0.5)) / 2)


def test_sorted_labels_are_found_and_shuffled_ones_are_not(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{k}", "completion": "c", "label": k >= 40} for k in range(100)]
    report = check(write(tmp_path / "rows.jsonl", rows))
    assert [place.line for place in found(report, "label-runs").places] == [41]  # the longest run: 60 true ones
    assert report.figures["label runs"] == "2, by chance 49; the longest has 60 labels"
    assert report.labels == [0.0] * 20 + [1.0] * 60  # 80 stretches: the first 20 of two labels, the others of one
    random.Random(0).shuffle(rows)
    assert rules(check(write(tmp_path / "rows.jsonl", rows))) == set()


# --- lengths ---------------------------------------------------------------------------------------------------------

WORDS = ("old ", "ferry ", "crossed ", "wide ", "grey ", "river ", "noon ", "rain ", "fell ", "quiet ", "banks ")


def story(seed: int, words: int) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(WORDS) for _ in range(words)).strip()


def test_a_cap_on_words_is_found(tmp_path: Path) -> None:
    lengths = [5 + 3 * k % 60 for k in range(200)]
    whole = [{"prompt": f"p{k}", "completion": story(k, n) + "."} for k, n in enumerate(lengths)]
    assert rules(check(write(tmp_path / "rows.jsonl", whole))) == set()
    cut = [{**row, "completion": " ".join(row["completion"].split()[:40])} for row in whole]
    finding = found(check(write(tmp_path / "rows.jsonl", cut)), "length-cap")
    assert finding.count == sum(n >= 40 for n in lengths)
    assert "exactly 40 words" in finding.what
    assert finding.places[0].line == 1 + next(k for k, n in enumerate(lengths) if n >= 40)


def test_long_completions_in_mid_sentence_are_found(tmp_path: Path) -> None:
    """Of 400 completions the 20 longest lack their end, as a cap on tokens leaves them: each of another length."""
    whole = [{"prompt": f"p{k}", "completion": story(k, 10 + k % 150) + "."} for k in range(380)]
    cut = [{"prompt": f"c{k}", "completion": story(1000 + k, 200 + k)} for k in range(20)]
    report = check(write(tmp_path / "rows.jsonl", whole + cut))
    assert rules(report) == {"unfinished"}
    assert found(report, "unfinished").count == 20
    assert found(report, "unfinished").places[0].line == 381
    no_stops = [{**row, "completion": row["completion"].rstrip(".")} for row in whole + cut]
    assert rules(check(write(tmp_path / "rows.jsonl", no_stops))) == set()


def test_lengths_of_chosen_and_rejected(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "one", "chosen": "four", "rejected": "longer"},
        {"prompt": "three", "completions": ["ab", "a", "abcdefgh"], "ranks": [2, 3, 1]},
    ]
    report = check(write(tmp_path / "rows.jsonl", rows))
    assert report.figures["median length"] == "prompt 4, chosen 6, rejected 4 characters"
    assert {name: sum(histogram.counts) for name, histogram in report.lengths.items()} == {
        "prompt": 2,
        "chosen": 2,
        "rejected": 2,
    }


# --- repetition ------------------------------------------------------------------------------------------------------

LONG = (
    "A farmer sells apples on Monday and pears on Friday. On Monday she earns forty coins and on Friday she earns"
    " half as many. She buys bread for six coins each day of the week. How many coins are left on Sunday evening?"
)


def test_near_duplicate_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": LONG, "completion": "18"}, {"prompt": LONG.upper(), "completion": "b"}]
    rows += [{"prompt": "Please: " + LONG, "completion": "c"}, {"prompt": "Something else", "completion": "d"}]
    report = check(write(tmp_path / "rows.jsonl", rows))
    assert [place.line for place in found(report, "near-duplicate").places] == [3]
    assert report.figures["distinct prompts"] == "3"


def test_overlap_with_a_test_set_and_a_benchmark_of_unknown_columns(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [{"prompt": "Name a  BIRD.", "chosen": "A wren.", "rejected": "A trout."}])
    benchmark = write(tmp_path / "benchmark.jsonl", [{"difficulty": "two words", "turns": [{"puzzle": LONG}]}])
    rows = [
        {"messages": [{"role": "user", "content": "name a bird."}, {"role": "assistant", "content": "A gull."}]},
        {"prompt": "two words", "completion": "no leak"},
        {"prompt": LONG + " Explain.", "completion": "18"},
        {"prompt": LONG + " Explain.", "completion": "20"},
    ]
    spec = write(tmp_path / "rows.jsonl", rows)
    assert rules(check(spec)) == set()
    report = check(spec, against=[test, benchmark])
    assert report.has_errors
    assert rules(report) == {"overlap", "near-overlap"}
    assert found(report, "overlap").places == [Source(spec, 1)]
    assert f"{test}:1" in found(report, "overlap").what
    assert [place.line for place in found(report, "near-overlap").places] == [3, 4]
    assert f"{benchmark}:1" in found(report, "near-overlap").what
    assert report.figures[f"compared with {benchmark}"] == "1 texts"


def test_a_data_set_without_a_text_cannot_be_compared_with(tmp_path: Path) -> None:
    spec = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    numbers = write(tmp_path / "numbers.jsonl", [{"n": 1}])
    with pytest.raises(EmptyDataError):
        check(spec, against=[spec, numbers])


# --- languages, licence ----------------------------------------------------------------------------------------------

ENGLISH = "Could you please tell me which of these two roads leads to the old harbour in the north of the town?"
GERMAN = "Könntest du mir bitte sagen, welche dieser beiden Straßen zum alten Hafen im Norden der Stadt führt?"


def test_languages(tmp_path: Path) -> None:
    rows = [{"prompt": f"{ENGLISH} {k}", "completion": ENGLISH} for k in range(30)]
    rows += [{"prompt": ENGLISH + " Danke", "completion": GERMAN}, {"prompt": GERMAN, "completion": GERMAN}]
    report = check(write(tmp_path / "rows.jsonl", rows))
    assert [place.line for place in found(report, "mixed-languages").places] == [31]
    assert [place.line for place in found(report, "rare-language").places] == [31, 32]
    assert report.figures["languages"].startswith("en 93.8%, de 6.2%")


@pytest.mark.parametrize("text", ["", "Bonjour", "1234567890 " * 20, "=" * 200])
def test_a_text_that_says_little_has_no_language(text: str) -> None:
    assert language(text) is None


def test_a_licence_that_forbids_commercial_use(tmp_path: Path) -> None:
    spec = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    card = tmp_path / "README.md"
    card.write_text("# Sums\n\nlicense: cc-by-4.0\n")
    assert check(spec).findings == []
    (tmp_path / "LICENSE").write_text("for any purpose, commercial or non-commercial\n")
    assert check(spec).findings == []
    card.write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    finding = found(check(spec), "licence")
    assert finding.places == [Source(str(card), 2)]
    (tmp_path / "LICENSE").write_text("You may use this for non-commercial purposes.\n")
    assert found(check(str(tmp_path)), "licence").count == 2
