"""The data doctor: reads everything that `--data` names and reports what would spoil a training run, with places.

A rule is one small object (`rules.Rule`): it sees every row once, in order, and says at the end what only all rows
together show. Texts are remembered as 8-byte digests, so a million rows fit in memory.
"""

from accord.data.check.doctor import check
from accord.data.check.report import CheckReport, Finding
from accord.data.check.rules import RULES

__all__ = ["RULES", "CheckReport", "Finding", "check"]
