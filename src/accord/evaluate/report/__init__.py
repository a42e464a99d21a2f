"""The report of a trained model against its own baseline: `report.html`, `report.json`, `report.md` from one record."""

from __future__ import annotations

import json
from pathlib import Path

from accord.evaluate.report.html import render_html, render_ratings_html, render_reward_html
from accord.evaluate.report.markdown import render_markdown
from accord.evaluate.report.record import RatingsPage, Report, RewardPage, as_json
from accord.files import write_text

__all__ = ["RatingsPage", "Report", "RewardPage", "write_report", "write_reward_page"]


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


def write_reward_page(run_dir: Path, page: RewardPage | RatingsPage) -> None:
    """Write reward.json and report.html into `run_dir`, each atomically.

    Raises:
        ResourceError: the disk is full or the directory cannot be written.
    """
    text = json.dumps(page.as_json(), ensure_ascii=False, indent=1, allow_nan=False)
    write_text(run_dir / "reward.json", text + "\n")
    html = render_reward_html(page) if isinstance(page, RewardPage) else render_ratings_html(page)
    write_text(run_dir / "report.html", html)
