"""Intervals, paired comparisons and agreement: numpy and scipy only."""

from accord.stats.agreement import Agreement, cohen_kappa, krippendorff_alpha, pairwise_agreement
from accord.stats.intervals import Interval, bootstrap_mean, wilson
from accord.stats.paired import PairedBinary, PairedMean, minimum_detectable_effect, paired_binary, paired_mean

__all__ = [
    "Agreement",
    "Interval",
    "PairedBinary",
    "PairedMean",
    "bootstrap_mean",
    "cohen_kappa",
    "krippendorff_alpha",
    "minimum_detectable_effect",
    "paired_binary",
    "paired_mean",
    "pairwise_agreement",
    "wilson",
]
