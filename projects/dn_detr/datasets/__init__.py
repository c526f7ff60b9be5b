"""The synthetic dataset. Needs numpy and Pillow only."""
