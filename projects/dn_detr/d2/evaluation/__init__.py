"""COCO evaluation and its report."""
