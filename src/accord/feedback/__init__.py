"""From completions to judgements: who judges, how far judges agree, and the ranking they add up to."""

from accord.feedback.panel import ANNOTATORS, Annotator, Panel, utility
from accord.feedback.quality import PanelAgreement, agreement
from accord.feedback.ranking import majority_ranking, rank, ranked_pairs

__all__ = [
    "ANNOTATORS",
    "Annotator",
    "Panel",
    "PanelAgreement",
    "agreement",
    "majority_ranking",
    "rank",
    "ranked_pairs",
    "utility",
]
