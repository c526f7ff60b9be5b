"""Trained detectors: loading, drawing, attention."""
