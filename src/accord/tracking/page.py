"""The page of samples that a run leaves: prompts, and texts about them side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from accord.files import write_text

__all__ = ["Sample", "write_samples"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and the texts that stand beside each other under it, each with its heading.

    Example: ``Sample("Name a colour.", (("Demonstration", "Blue."), ("Before", "A colour"), ("After", "Blue.")))``
    """

    prompt: str
    texts: tuple[tuple[str, str], ...]


def write_samples(path: Path, samples: Iterable[Sample], title: str, note: str = "") -> None:
    """Write the samples as one self-contained HTML page, atomically. Text is escaped: it can do nothing to the page."""
    items = "\n".join(
        f"<article><pre class=prompt>{escape(sample.prompt)}</pre><div>"
        + "".join(
            f"<section><h2>{escape(heading)}</h2><pre>{escape(text)}</pre></section>" for heading, text in sample.texts
        )
        + "</div></article>"
        for sample in samples
    )
    write_text(path, _PAGE.format(title=escape(title), note=escape(note), items=items or "<p>No samples.</p>"))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: .8rem; font-weight: 500; opacity: .7; margin: .5rem .75rem 0; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; padding: .25rem .75rem; }}
article {{ margin: 2.5rem 0; }}
article > div {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }}
pre.prompt {{ opacity: .7; border-left: 3px solid currentColor; }}
</style>
<h1>{title}</h1>
<p>{note}</p>
{items}
</html>
"""
