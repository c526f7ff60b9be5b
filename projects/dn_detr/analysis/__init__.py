"""Instruments that explain training; they never take part in it."""
