"""Datasets, checks, augmentation, loaders."""
