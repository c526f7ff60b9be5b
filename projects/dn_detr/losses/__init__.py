"""Matching and losses: readers of `Predictions` that know no model."""
