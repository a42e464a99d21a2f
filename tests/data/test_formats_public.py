"""Rows of the public preference sets, in our own words with their real columns: which side wins, and what is left out.

For every format of two answers the row says that the answer "Good." is better, however the format says it; a golden
test with the sides or the sign exchanged must give the same pair with the texts exchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accord.data.formats import FORMATS, LeftOut, matching_formats, read_row, read_units, split_format
from accord.data.load import load
from accord.data.problems import Problem
from accord.data.write import canonical
from accord.errors import RowError, UnknownNameError
from accord.types import (
    Demonstration,
    LabelledCompletion,
    Message,
    PreferencePair,
    Ranking,
    RatedCompletion,
    Record,
    Source,
)

PLACE = Source("rows.jsonl", 7)
Q, GOOD, POOR = Message("user", "Why?"), Message("assistant", "Good."), Message("assistant", "Poor.")
PREFERRED = PreferencePair((Q,), (GOOD,), (POOR,), None, PLACE)
TIED = Ranking((Q,), ((GOOD,), (POOR,)), (0, 0), PLACE)


def margin(value: float) -> PreferencePair:
    return PreferencePair((Q,), (GOOD,), (POOR,), value, PLACE)


def turn(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


def webgpt(first: str, second: str, score: float) -> dict[str, Any]:
    question = {"dataset": "eli5", "id": "x1", "full_text": "Why?"}
    answers = {"answer_0": first, "answer_1": second, "score_0": score, "score_1": -score}
    return {"question": question, "quotes_0": {"title": []}, "tokens_0": {}, **answers}


def shp(first: str, second: str, label: int, ratio: float = 3.0) -> dict[str, Any]:
    sides = {"human_ref_A": first, "human_ref_B": second, "labels": label}
    return {"post_id": "p", "history": "Why?", "score_A": 30, "score_B": 10, "score_ratio": ratio, **sides}


def helpsteer2(first: str, second: str, strength: int) -> dict[str, Any]:
    sides = {"response_1": first, "response_2": second, "preference_strength": strength}
    return {"split": "train", "prompt": "Why?", "preference_statement": "...", **sides}


def helpsteer3(first: str, second: str, preference: int) -> dict[str, Any]:
    sides = {"response1": first, "response2": second, "overall_preference": preference}
    one = [{"score": preference, "reasoning": "...", "feedback1": "...", "feedback2": "..."}]
    context = [turn("user", "Why?")]
    return {"domain": "general", "language": "english", "context": context, "individual_preference": one, **sides}


def pku(first: str, second: str, better: int, safer: int) -> dict[str, Any]:
    safe = {"is_response_0_safe": safer == 0, "is_response_1_safe": safer == 1}
    chosen = {"better_response_id": better, "safer_response_id": safer}
    return {"prompt": "Why?", "response_0": first, "response_1": second, **safe, **chosen}


def arena(first: str, second: str, winner: str) -> dict[str, Any]:
    sides = {
        f"conversation_{side}": [turn("user", "Why?"), turn("assistant", text)]
        for side, text in (("a", first), ("b", second))
    }
    return {"question_id": "x", "model_a": "m", "model_b": "n", "winner": winner, "judge": "j", "turn": 1, **sides}


def arena55(first: str, second: str, winner: str) -> dict[str, Any]:
    votes = {f"winner_{name}": int(name == winner) for name in ("model_a", "model_b", "tie")}
    sides = {"prompt": '["Why?"]', "response_a": json.dumps([first]), "response_b": json.dumps([second])}
    return {"id": 1, "model_a": "m", "model_b": "n", **sides, **votes}


def binarized(better: float, worse: float) -> dict[str, Any]:
    sides = {"chosen": [turn("user", "Why?"), turn("assistant", "Good.")], "score_chosen": better}
    return {
        "prompt": "Why?",
        "prompt_id": "x",
        **sides,
        "rejected": [turn("user", "Why?"), turn("assistant", "Poor.")],
        "score_rejected": worse,
    }


def label_studio(*results: dict[str, Any], cancelled: bool = False, **fields: Any) -> dict[str, Any]:
    fields = fields or {"prompt": "Why?", "answer1": "Good.", "answer2": "Poor."}
    annotation = {"id": 3, "completed_by": 1, "was_cancelled": cancelled, "lead_time": 9.5, "result": list(results)}
    return {"id": 1, "data": fields, "annotations": [annotation], "predictions": []}


def result(kind: str, value: dict[str, Any], to: str = "answer1,answer2") -> dict[str, Any]:
    return {"id": "r", "from_name": "verdict", "to_name": to, "type": kind, "value": value}


def argilla(question: str, *values: Any, status: str = "submitted", **fields: str) -> dict[str, Any]:
    fields = fields or {"prompt": "Why?", "response1": "Good.", "response2": "Poor."}
    given = [{"value": value, "user_id": f"u{k}", "status": status} for k, value in enumerate(values)]
    return {"id": "1", "fields": fields, "metadata": {}, "suggestions": {}, "responses": {question: given}}


def argilla_flat(question: str, value: Any, **fields: str) -> dict[str, Any]:
    said = {f"{question}.responses": [value], f"{question}.responses.users": ["u"]}
    states = {f"{question}.responses.status": ["submitted"]}
    return {"id": "1", "status": "completed", "_server_id": "s", **fields, **said, **states}


def summary(info: dict[str, Any], batch: str, choice: int) -> dict[str, Any]:
    summaries = [{"text": text, "policy": "sup1", "note": None} for text in (" Good.", " Poor.")]
    return {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "batch": batch, "extra": {}}


POST = {"id": "t3", "post": "Long story.", "title": "A title", "subreddit": "cats", "article": None}
NEWS = {"id": "n1", "post": None, "title": None, "subreddit": None, "article": "A long report."}
POST_PROMPT = "SUBREDDIT: r/cats\n\nTITLE: A title\n\nPOST: Long story.\n\nTL;DR:"
NEWS_PROMPT = "Article:\n\nA long report.\n\nTL;DR:"
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def completion(text: str, ratings: tuple[str, ...], overall: float) -> dict[str, Any]:
    annotations = {name: {"Rating": rating, "Rationale": "..."} for name, rating in zip(ASPECTS, ratings, strict=True)}
    return {"model": "m", "response": text, "annotations": annotations, "overall_score": overall, "critique": "..."}


RANKING_PAIR = Ranking((Q,), ((GOOD,), (POOR,)), (0, 1), PLACE)
BOTH_BAD = [LabelledCompletion((Q,), (text,), False, PLACE) for text in (GOOD, POOR)]

CASES: list[tuple[str, dict[str, Any], list[Record]]] = [
    ("webgpt", webgpt("Good.", "Poor.", 0.5), [PREFERRED]),
    ("webgpt", webgpt("Poor.", "Good.", -1.0), [PREFERRED]),
    ("webgpt", webgpt("Good.", "Poor.", 0.0), [TIED]),
    ("shp", shp("Good.", "Poor.", 1), [PREFERRED]),  # 1 means that A is better
    ("shp", shp("Poor.", "Good.", 0), [PREFERRED]),
    ("shp", shp("Good.", "Poor.", 1, ratio=1.1), [PREFERRED]),
    ("summaries", summary(POST, "batch3", 0), [PreferencePair(POST_PROMPT, " Good.", " Poor.", None, PLACE)]),
    ("summaries", summary(NEWS, "cnndm0", 1), [PreferencePair(NEWS_PROMPT, " Poor.", " Good.", None, PLACE)]),
    ("helpsteer2-preference", helpsteer2("Good.", "Poor.", -2), [margin(2.0)]),  # negative: response 1 is better
    ("helpsteer2-preference", helpsteer2("Poor.", "Good.", 3), [margin(3.0)]),
    ("helpsteer2-preference", helpsteer2("Good.", "Poor.", 0), [TIED]),
    ("helpsteer3", helpsteer3("Good.", "Poor.", -1), [margin(1.0)]),
    ("helpsteer3", helpsteer3("Poor.", "Good.", 3), [margin(3.0)]),
    ("helpsteer3", helpsteer3("Good.", "Poor.", 0), [TIED]),
    (
        "helpsteer2",
        {
            "prompt": "Hi\n\n<extra_id_1>Assistant\nHello\n\n<extra_id_1>User\nWhy?",
            "response": "Good.",
            "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 0, "verbosity": 1,
        },
        [
            RatedCompletion(
                (Message("user", "Hi"), Message("assistant", "Hello"), Q),
                (GOOD,),
                {"helpfulness": 3.0, "correctness": 4.0, "coherence": 4.0, "complexity": 0.0, "verbosity": 1.0},
                PLACE,
            )
        ],
    ),
    (
        "rated",
        {"prompt": "2+2=", "completion": " 4", "ratings": {"a": 1, "b": None}},
        [RatedCompletion("2+2=", " 4", {"a": 1.0}, PLACE)],
    ),
    (
        "ultrafeedback",
        {
            "source": "x",
            "instruction": "Why?",
            "models": ["m", "n"],
            "completions": [completion("Poor.", ("2", "N/A", "2", "5"), 4.0), completion("Good.", ("5",) * 4, 10.0)],
        },
        [
            RatedCompletion(
                (Q,),
                (POOR,),
                {"helpfulness": 2.0, "instruction_following": 2.0, "truthfulness": 5.0, "overall": 4.0},
                PLACE,
            ),
            RatedCompletion((Q,), (GOOD,), {**dict.fromkeys(ASPECTS, 5.0), "overall": 10.0}, PLACE),
            Ranking((Q,), ((POOR,), (GOOD,)), (1, 0), PLACE),
        ],
    ),
    ("ultrafeedback-binarized", binarized(8.5, 4.0), [PREFERRED]),
    ("ultrafeedback-binarized", binarized(5.0, 5.0), [TIED]),
    ("arena", arena("Good.", "Poor.", "model_a"), [PREFERRED]),
    ("arena", arena("Poor.", "Good.", "model_b"), [PREFERRED]),
    ("arena", arena("Good.", "Poor.", "tie"), [TIED]),
    ("arena", arena("Good.", "Poor.", "tie (bothbad)"), BOTH_BAD),
    ("arena", arena("Good.", "Poor.", "both_bad"), BOTH_BAD),
    (
        "arena",
        {
            "winner": "model_b",
            "conversation_a": [turn("user", part("Why?")), turn("assistant", part("Poor."))],
            "conversation_b": [turn("user", part("Why?")), turn("assistant", part("Good."))],
            "evaluation_session_id": "s",
            "evaluation_order": 2,
        },
        [PREFERRED],
    ),
    ("arena-55k", arena55("Good.", "Poor.", "model_a"), [PREFERRED]),
    ("arena-55k", arena55("Poor.", "Good.", "model_b"), [PREFERRED]),
    ("arena-55k", arena55("Good.", "Poor.", "tie"), [TIED]),
    ("label-studio", label_studio(result("pairwise", {"selected": "left"})), [PREFERRED]),
    ("label-studio", label_studio(result("pairwise", {"selected": "right"}, "answer2,answer1")), [PREFERRED]),
    ("label-studio", label_studio(result("choices", {"choices": ["Tie"]})), [TIED]),
    ("label-studio", label_studio(result("choices", {"choices": ["both bad"]})), BOTH_BAD),
    ("label-studio", label_studio(result("choices", {"choices": ["answer1"]})), [PREFERRED]),
    (
        "label-studio",
        label_studio(result("choices", {"choices": ["Bad"]}), prompt="Why?", answer="Poor."),
        [LabelledCompletion((Q,), (POOR,), False, PLACE)],
    ),
    (
        "label-studio",
        label_studio(
            result("rating", {"rating": 4}),
            {**result("rating", {"rating": 1}), "from_name": "clarity"},
            prompt="Why?",
            answer="Good.",
        ),
        [RatedCompletion((Q,), (GOOD,), {"verdict": 4.0, "clarity": 1.0}, PLACE)],
    ),
    (
        "label-studio",
        label_studio(
            result("ranker", {"ranker": {"rank": ["b", "a"], "_": []}}),
            prompt="Why?",
            items=[{"id": "a", "title": "A", "body": "Poor."}, {"id": "b", "title": "B", "body": "Good."}],
        ),
        [Ranking((Q,), ((POOR,), (GOOD,)), (1, 0), PLACE)],
    ),
    (
        "argilla",
        argilla(
            "order",
            [{"value": "response1", "rank": 1}, {"value": "response2", "rank": 2}],
            ["response1", "response2"],
        ),
        [RANKING_PAIR, RANKING_PAIR],
    ),
    ("argilla", argilla("order", [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 1}]), [TIED]),
    ("argilla", argilla("better", "response1"), [PREFERRED]),
    (
        "argilla",
        argilla("quality", 4, prompt="Why?", response="Good."),
        [RatedCompletion((Q,), (GOOD,), {"quality": 4.0}, PLACE)],
    ),
    ("argilla", argilla("correction", "Good.", prompt="Why?", response="Poor."), [Demonstration((Q,), (GOOD,), PLACE)]),
    (
        "argilla-flat",  # the fields chosen and rejected are what was shown, not what was said
        argilla_flat("better", "rejected", prompt="Why?", chosen="Poor.", rejected="Good."),
        [PREFERRED],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "records"), CASES)
def test_rows_become_records(name: str, row: dict[str, Any], records: list[Record]) -> None:
    assert name in matching_formats(row)
    assert read_row(row, PLACE) == records


def test_the_users_choice_decides_between_two_preferences() -> None:
    """The first response is better, the second safer: read without a choice, or as the other one, the sign is lost."""
    row = pku("Good.", "Poor.", better=0, safer=1)
    assert read_row(row, PLACE, "pku-better") == [PREFERRED]
    assert read_row(row, PLACE, "pku-safer") == [PreferencePair((Q,), (POOR,), (GOOD,), None, PLACE)]
    with pytest.raises(RowError, match=r"pku-better or pku-safer, which may disagree(.|\n)*DATA#pku-better"):
        read_row(row, PLACE)


def test_the_format_is_named_after_the_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(pku("Good.", "Poor.", 0, 1)) + "\n" for _ in range(2)))
    pairs = load(f"{path}#pku-safer", "preferences").records
    assert [pair.chosen for pair in pairs if isinstance(pair, PreferencePair)] == [(POOR,), (POOR,)]
    with pytest.raises(UnknownNameError, match="Did you mean 'pku-safer'"):
        load(f"{path}#pku-safe", "preferences")
    with pytest.raises(RowError, match="does not fit the format 'shp'"):
        load(f"{path}#shp", "preferences")
    with pytest.raises(RowError, match="2 of 2 rows"):
        load(str(path), "preferences")
    odd = tmp_path / "a#shp"
    odd.touch()
    assert split_format(str(odd)) == (str(odd), None)


def left_out(row: dict[str, Any], name: str | None = None) -> tuple[list[Record], list[str]]:
    problems: list[Problem] = []
    records = read_row(row, PLACE, name, problems.append)
    assert {problem.rule for problem in problems} <= {"left-out"}
    return records, [problem.what for problem in problems]


def test_close_votes_are_left_out_only_on_request() -> None:
    assert left_out(shp("Good.", "Poor.", 1, 1.5), "shp-clear") == ([], ["The score ratio 1.5 is under 2."])
    assert left_out(shp("Good.", "Poor.", 1, 2.0), "shp-clear") == ([PREFERRED], [])
    with pytest.raises(RowError, match="ratio"):  # who does not say what to do with it is told
        read_row(shp("Good.", "Poor.", 1, 1.5), PLACE, "shp-clear")


def test_an_overall_ten_that_the_aspects_deny_is_not_believed() -> None:
    rows = [completion("Poor.", ("1", "2", "1", "2"), 10), completion("Good.", ("5",) * 4, 9)]
    rows.append(completion("?", ("N/A",) * 4, 2))
    records, whats = left_out({"instruction": "Why?", "completions": rows})
    assert whats == ["Completion 1 has an overall score of 10, but its aspects only 1.5 of 5."]
    assert [type(record).__name__ for record in records] == ["RatedCompletion"] * 3 + ["Ranking"]
    assert isinstance(records[0], RatedCompletion)
    assert "overall" not in records[0].ratings
    assert records[3] == Ranking((Q,), ((GOOD,), (Message("assistant", "?"),)), (0, 1), PLACE)


LEFT_OUT: list[tuple[dict[str, Any], str]] = [
    (arena55("Good.", None, "model_a"), "A turn is null."),  # type: ignore[arg-type]
    (
        {"winner": "tie", "conversation_a": [turn("user", [{"type": "image", "image": "x"}])], "conversation_b": []},
        "A message holds something other than text.",
    ),
    (label_studio(result("pairwise", {"selected": "left"}), cancelled=True), "An annotation was cancelled."),
    (label_studio(result("textarea", {"text": ["Hm."]})), "A result is of the type 'textarea'."),
    (label_studio(result("choices", {"choices": ["Perhaps"]})), "What 'Perhaps' says of 2 answers is unknown."),
    (label_studio(result("rating", {"rating": 4})), "Which of 2 answers the rating verdict is of is unknown."),
    (label_studio() | {"annotations": []}, "The task has no annotation."),
    (argilla("better", "response1", status="discarded"), "A response to 'better' is a discarded, not submitted."),
    (argilla("better"), "The record has no response."),
]


@pytest.mark.parametrize(("row", "what"), LEFT_OUT)
def test_what_is_left_out_is_said(row: dict[str, Any], what: str) -> None:
    assert left_out(row) == ([], [what])


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    (webgpt("Good.", "Poor.", 1.5), None, "'score_0' must be a number from -1 to 1"),
    (shp("Good.", "Poor.", 2), None, "'labels' must be 1"),
    (helpsteer3("Good.", "Poor.", -4), None, "from -3 to 3, not -4"),
    (helpsteer2("Good.", "Poor.", None), None, "from -3 to 3, not None"),  # type: ignore[arg-type]
    (pku("Good.", "Poor.", -1, 0), "pku-better", "'better_response_id' must be 0 or 1"),
    (summary(POST | {"article": "too"}, "batch3", 0), None, "a post or an article"),
    (summary(POST, "cnndm2", 0), None, "a post or an article"),
    (summary(NEWS, "batch3", 0), None, "a post or an article"),
    (summary(POST, "batch3", 0) | {"summaries": []}, None, "two summaries"),
    (binarized(4.0, 5.0), None, "the rejected one 5"),
    (arena("Good.", "Poor.", "model_c"), None, "Unknown winner 'model_c'"),
    (arena55("Good.", "Poor.", "nobody"), None, "Exactly one of"),
    (arena55("Good.", "Poor.", "tie") | {"prompt": "Why?"}, None, "'prompt' must be a JSON list"),
    (arena55("Good.", "Poor.", "tie") | {"prompt": '["Why?", "And?"]'}, None, "2 prompts, but 1 and 1"),
    ({"prompt": "p", "completion": "c", "ratings": {}}, None, "no rating"),
    ({"prompt": "p", "completion": "c", "ratings": 3}, None, "must be an object"),
    ({"instruction": "Why?", "completions": ["Good."]}, None, "Completion 1 must be an object"),
    (label_studio(result("pairwise", {"selected": "left"}), text="Why?"), None, "of the fields text is the prompt"),
    (label_studio(result("ranker", {"ranker": {"x": ["a"], "y": ["b"]}})), None, "one bucket"),
    (label_studio() | {"data": "x"}, None, "'data' must be an object"),
    (label_studio() | {"annotations": [{"answer": "x"}]}, None, "a list `result`"),
    (argilla("order", ["response1"]), None, "names response1, but the answers are response1, response2"),
    (argilla("order", [1, 2]), None, "must be a list of names"),
    ({"message_tree_id": "t", "prompt": {"role": "prompter"}}, None, "must have a text"),
    ({"tree_id": "t", "root": None}, None, "must have a text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "message"), REFUSED)
def test_a_row_that_breaks_its_format_is_refused_with_its_place(
    row: dict[str, Any], name: str | None, message: str
) -> None:
    with pytest.raises(RowError, match=message) as caught:
        read_row(row, PLACE, name)
    assert caught.value.where == "rows.jsonl:7"
    assert caught.value.fix


@pytest.mark.parametrize("row", [row for _, row, _ in CASES])
def test_a_spoilt_row_is_refused_or_read_never_a_crash(row: dict[str, Any], spoilt_rows: Any) -> None:
    for odd in spoilt_rows(row):
        problems: list[Problem] = []
        for _, _, records in read_units([(PLACE, odd)], None, problems.append):
            for record in records:
                json.dumps(canonical(record), allow_nan=False, ensure_ascii=False).encode()
        assert all(problem.what and problem.fix for problem in problems)


def test_every_public_format_is_exercised() -> None:
    here = {"oasst-tree", "oasst-root", "oasst-messages", "pku-better", "pku-safer", "shp-clear"}
    here |= {name for name, _, _ in CASES}
    modules = ("trl", "hh", "instructions", "rankings", "requirements", "programs")  # they have tests of their own
    assert here == {name for name in FORMATS if not FORMATS[name].read.__module__.endswith(modules)}


def test_leaving_out_is_not_a_record() -> None:
    assert not isinstance(LeftOut("x"), Record)
