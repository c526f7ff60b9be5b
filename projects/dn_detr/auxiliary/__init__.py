"""Training-only segments: an assist is a module (queries, source, targets) -> queries."""
