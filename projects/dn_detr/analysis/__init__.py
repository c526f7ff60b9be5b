"""Training diagnostics; they do not affect training."""
