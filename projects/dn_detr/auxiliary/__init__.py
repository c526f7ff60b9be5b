"""Auxiliary queries, used in training only: modules (queries, source, targets) -> queries."""
