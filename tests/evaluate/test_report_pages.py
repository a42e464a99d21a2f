"""The report: hostile text stays text, nothing is fetched, *simulated* is said, and all three files tell the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from accord.evaluate.compare import PairedOutcome, compare
from accord.evaluate.report import Report, write_report
from accord.evaluate.report.record import random_sample, sorted_outcomes
from accord.evaluate.reward import evaluate_rewards
from accord.feedback.quality import agreement
from accord.types import Judgement

HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7 * 7 }} `|` </style>\n# no"


class Page(HTMLParser):
    """Collects what a browser would see: elements, attributes, and text outside style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def outcomes(text: str = "An answer.") -> list[PairedOutcome]:
    """40 prompts with two requirements: 24 improve, 4 regress, 12 stay."""
    rows = []
    for number in range(40):
        before, after = (False, True) if number < 24 else (True, False) if number < 28 else (True, True)
        row = PairedOutcome(
            prompt_id=f"p-{number:02d}",
            prompt=f"{text} {number}",
            requirements=("max_words", "json"),
            met_before=(before, number % 2 == 0),
            met_after=(after, number % 2 == 0),
            text_before=text,
            text_after=text,
            tokens_before=20 + number % 7,
            tokens_after=10 + number % 5,
            reward_before=number / 40,
            reward_after=1 + number / 30,
            kl=number / 10,
            phrases=(text, "JSON"),
        )
        rows.append(row)
    return rows


def report(text: str = "An answer.", *, simulated: bool = True) -> Report:
    rows = [{"step": float(step), "loss": 1 / step, "accuracy": step / 20} for step in range(1, 20)]
    names = ["ann-a", "ann-b", f"ann-c {text}"]
    ranks = [(0, 1), (1, 0), (0, 1)]
    panel = [
        Judgement(f"p-{number}", name, "simulated", ranks[(number * place) % 3])
        for number in range(6)
        for place, name in enumerate(names)
    ]
    return Report(
        title=f"Round one {text}",
        simulated=simulated,
        baseline=f"starter {text}",
        candidate="runs/x/model",
        comparison=compare(outcomes(text)),
        reward=evaluate_rewards([1.0, 2.0, 0.0], [0.0, 0.5, 1.0]),
        panel=agreement(panel),
        training={f"DPO {text}": rows},
        stage_seconds={f"Sampling {text}": 70.0},
        peak_memory=4_800_000_000,
        not_measured={f"Harm {text}": f"no classifier {text}"},
        provenance={f"seed {text}": f"0 {text}"},
        next_commands=(f"accord chat {text}",),
    )


def pages(tmp_path: Path, written: Report) -> tuple[str, str, dict[str, object]]:
    write_report(tmp_path, written)
    return (
        (tmp_path / "report.html").read_text(),
        (tmp_path / "report.md").read_text(),
        json.loads((tmp_path / "report.json").read_text()),
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    html, markdown, _ = pages(tmp_path, report(HOSTILE))
    harmless, _, _ = pages(tmp_path, report())
    page = Page(html)
    assert page.tags == Page(harmless).tags  # hostile text adds no element at all
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert HOSTILE.split("\n")[0] in page.text
    assert page.text.count("{{ 7 * 7 }}") > 40
    prose = re.sub(r"`[^`]*`", "", "\n".join(line for line in markdown.splitlines() if not line.startswith("    ")))
    assert not re.search(r"<\S", prose)
    assert "&lt;script" in prose
    assert "\n# no" not in prose


def test_nothing_is_fetched(tmp_path: Path) -> None:
    html, _, _ = pages(tmp_path, report())
    assert "//" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    links = [value for name, value in Page(html).attributes if name in ("href", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "default-src 'none'" in html


def test_ids_are_unique_and_links_lead_somewhere(tmp_path: Path) -> None:
    html, _, _ = pages(tmp_path, report())
    attributes = Page(html).attributes
    ids = [value for name, value in attributes if name == "id"]
    targets = {value[1:] for name, value in attributes if name in ("href", "xlink:href")}
    targets |= {value for name, value in attributes if name == "for"} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)


def test_simulated_is_said_at_the_top_and_at_the_panel(tmp_path: Path) -> None:
    html, markdown, data = pages(tmp_path, report())
    page = Page(html)
    assert page.text.index("simulated") < page.text.index("Differences")
    assert "Simulated panelCompared" in page.text
    assert "simulated" in markdown.splitlines()[0]
    assert "| Simulated panel: agreement |" in markdown
    assert next(iter(data)) == "simulated"
    assert data["simulated"] is True


def test_real_preferences_are_not_called_simulated(tmp_path: Path) -> None:
    html, markdown, data = pages(tmp_path, report(simulated=False))
    assert "imulated" not in Page(html.split("</style>")[1]).text
    assert "imulated" not in markdown
    assert data["simulated"] is False


def test_three_files_tell_the_same(tmp_path: Path) -> None:
    """24 of 40 prompts improve on max_words and 4 regress: 16/40 → 36/40 = +50 points on that kind."""
    html, markdown, data = pages(tmp_path, report())
    kinds = {kind["kind"]: kind for kind in data["comparison"]["kinds"]}  # type: ignore[index]
    assert kinds["max_words"]["before"] == 0.4
    assert kinds["max_words"]["difference"] == pytest.approx(0.5)
    assert set(kinds["max_words"]["interval"]) == {"low", "high"}
    assert "40 %" in markdown
    assert "+50.0 points" in markdown
    assert "+50.0" in Page(html).text
    assert data["summary"] in markdown
    assert data["summary"] in Page(html).text
    calibration = data["reward"]["calibration"]  # type: ignore[index]
    assert f"Calibration error {100 * calibration['error']:.1f} %; of a calibrated model" in markdown


def test_regressions_are_as_easy_to_find_as_gains() -> None:
    """Sorted by the size of the change whatever its direction; of equal ones the 4 regressions come first."""
    comparison = compare(outcomes())
    ordered = sorted_outcomes(comparison)
    changes = [row.change for row in ordered]
    assert [abs(change) for change in changes] == sorted((abs(change) for change in changes), reverse=True)
    assert changes == [-0.5] * 4 + [0.5] * 24 + [0.0] * 12


def test_random_sample_does_not_depend_on_the_answers() -> None:
    rows = outcomes()
    better = [replace(row, met_after=(True, True), text_after="!") for row in reversed(rows)]
    assert random_sample(compare(rows)) == random_sample(compare(better))
    assert len(random_sample(compare(rows))) == 10


def test_what_is_missing_is_named_with_its_reason(tmp_path: Path) -> None:
    bare = [replace(row, reward_before=None, reward_after=None, kl=None) for row in outcomes()]
    small = Report("T", False, "a", "b", compare(bare), not_measured={"reward": "no reward model was given"})
    html, markdown, data = pages(tmp_path, small)
    text = Page(html).text
    assert text.count("Not measured") >= 2
    assert "no reward model was given" in text
    assert "no data for it in this run" in text
    assert "| Reward | no reward model was given |" in markdown
    assert data["comparison"]["verdicts"]["reward"] == "Not measured"  # type: ignore[index]


def test_smallest_report(tmp_path: Path) -> None:
    """One prompt without requirements: every section copes."""
    row = PairedOutcome("p", "Q", (), (), (), "", "", 0, 0)
    html, markdown, _ = pages(tmp_path, Report("T", False, "a", "b", compare([row])))
    assert "No headline metric was measured." in html
    assert "No headline metric was measured." in markdown
    assert "(empty)" in html
