"""Training-only segments: an auxiliary query module is a module (queries, source, targets) -> queries."""
