"""The data doctor on the command line, and its page: complete, and deaf to what the data says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from accord.cli.check import check
from accord.errors import ConfigError

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \u202etxt"


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Page(HTMLParser):
    """The page's tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> Page:
    rows = [
        {"prompt": HOSTILE, "chosen": "same", "rejected": "same"},
        *({"prompt": f"q{k}", "chosen": "yes " * (k + 1), "rejected": "no"} for k in range(60)),
        *({"prompt": f"l{k}", "completion": "c", "label": k < 30} for k in range(60)),
        {HOSTILE: "a column"},
        {"prompt": "p", "completion": "x" * 5000 + "<|im_end|>"},
    ]
    assert check(write(tmp_path / "rows.jsonl", *rows), html=tmp_path / "page.html") == 1
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_hostile_text_is_shown_and_inert(page: Page) -> None:
    assert not {"script", "img", "iframe", "link"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \\u202etxt" in page.text


def test_the_page_has_findings_examples_lengths_and_labels(page: Page) -> None:
    for part in ("identical", "longer-wins", "label-runs", "template-tokens", "rows.jsonl:1", "median", "3,010 more"):
        assert part in page.text
    assert page.tags.count("polyline") == 6  # prompt, chosen, rejected, completion, good, bad
    assert page.tags.count("details") >= 4
    assert page.tags.count("rect") == 60  # 60 labels, one stretch each


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    check(write(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"}), html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert re.findall(r"(?:https?:)?//\w|url\(", text) == []
    assert "No problem found." in text


def test_the_page_of_a_file_that_breaks_off(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"prompt": "p", "completion": ""}, {')
    assert check(str(tmp_path / "rows.json"), html=tmp_path / "page.html") == 1
    assert "damaged" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_only_a_page_is_overwritten(tmp_path: Path) -> None:
    spec = write(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(ConfigError, match=r"something\.html"):
        check(spec, html=Path(spec))


def test_what_fix_did_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    spec = write(tmp_path / "rows.jsonl", {"prompt": "p", "completion": ""}, {"prompt": "p", "completion": "c"})
    assert check(spec, fix=tmp_path / "new.jsonl") == 1
    out = capsys.readouterr().out
    assert f"{tmp_path / 'new.jsonl'}: 1 rows kept, 1 dropped; {tmp_path / 'new.jsonl.changes'} says" in out
