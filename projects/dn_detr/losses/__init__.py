"""Matching and losses, computed from `Predictions` independently of the model."""
