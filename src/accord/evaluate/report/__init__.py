"""The report of a trained model against its own baseline: `report.html`, `report.json`, `report.md` from one record."""

from __future__ import annotations

import json
from pathlib import Path

from accord.evaluate.report.html import render_html
from accord.evaluate.report.markdown import render_markdown
from accord.evaluate.report.record import Report, as_json
from accord.files import write_text

__all__ = ["Report", "write_report"]


def write_report(run_dir: Path, report: Report) -> None:
    """Write the three files into `run_dir`, each atomically.

    Raises:
        ResourceError: the disk is full or the directory cannot be written.
    """
    pages = {
        "report.json": json.dumps(as_json(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report),
    }
    for name, page in pages.items():
        write_text(run_dir / name, page)
