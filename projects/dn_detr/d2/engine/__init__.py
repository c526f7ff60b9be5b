"""Training: trainer, training step, hooks and checkpoints."""
