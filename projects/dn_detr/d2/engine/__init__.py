"""Training: trainer, step, hooks, checkpoints."""
