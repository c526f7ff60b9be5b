"""Synthetic dataset, and conversion of VOC and YOLO datasets to COCO format."""
