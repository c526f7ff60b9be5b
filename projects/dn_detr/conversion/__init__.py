"""Conversion of checkpoints of other projects: safe loading, and tables of parameter names.

Needs only torch and numpy. The entry point is `convert_weights.convert`; `tables/` has one file per
method.
"""
