"""Intervals, paired comparisons, agreement and calibration: numpy and scipy only."""

from accord.stats.agreement import Agreement, cohen_kappa, krippendorff_alpha, pairwise_agreement
from accord.stats.calibration import Calibration, ReliabilityBin, calibrate, fit_temperature, randomise_sides
from accord.stats.intervals import Interval, bootstrap_mean, wilson
from accord.stats.paired import PairedBinary, PairedMean, minimum_detectable_effect, paired_binary, paired_mean

__all__ = [
    "Agreement",
    "Calibration",
    "Interval",
    "PairedBinary",
    "PairedMean",
    "ReliabilityBin",
    "bootstrap_mean",
    "calibrate",
    "cohen_kappa",
    "fit_temperature",
    "krippendorff_alpha",
    "minimum_detectable_effect",
    "paired_binary",
    "paired_mean",
    "pairwise_agreement",
    "randomise_sides",
    "wilson",
]
