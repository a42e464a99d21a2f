"""Measure a trained model against its baseline, and a reward model against people; write the report."""
