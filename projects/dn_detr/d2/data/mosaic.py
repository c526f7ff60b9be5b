"""Mosaics: 2 x 2 images in one, then a random affine transform (DEIM, 2412.04234)."""

from __future__ import annotations

import math

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from PIL import Image

from dn_detr.d2.data.mapper import ResizeShortestEdge, make_instances, read_image
from dn_detr.errors import InputError

SMALLEST_SIDE = 1.0
"""Shortest side of an object in the result, in pixels; smaller objects are dropped."""


class AffineTransform(T.Transform):
    """Map a point p of an image to matrix @ (p, 1), keeping the size of the image.

    Args:
        matrix: [2, 3], in pixels.
        fill: Colour of pixels from outside the old image, which are in no mask.
    """

    def __init__(self, matrix, fill):
        super().__init__()
        self.matrix = np.asarray(matrix, np.float64)
        self.fill = tuple(fill)

    def apply_coords(self, coords):
        return coords @ self.matrix[:, :2].T + self.matrix[:, 2]

    def apply_image(self, img):
        return self._resample(img, Image.Resampling.BILINEAR, self.fill)

    def apply_segmentation(self, segmentation):
        return self._resample(segmentation, Image.Resampling.NEAREST, 0)

    def _resample(self, pixels, resample, fill):
        inverse = np.linalg.inv(np.vstack((self.matrix, [0, 0, 1])))[:2]  # new to old, as in PIL
        image = Image.fromarray(pixels)
        kind = Image.Transform.AFFINE
        return np.asarray(
            image.transform(image.size, kind, inverse.ravel(), resample, fillcolor=fill)
        )


class RandomAffine(T.Augmentation):
    """Rotate and scale about the centre, then translate.

    Args:
        rotation: Largest angle in degrees, in either direction.
        translation: Largest shift as a fraction of each side.
        scale: Smallest and largest factor.
        fill: Colour of pixels from outside the image.
    """

    def __init__(self, *, rotation, translation, scale, fill):
        super().__init__()
        self.rotation = rotation
        self.translation = translation
        self.scale = scale
        self.fill = fill

    def get_transform(self, image):
        height, width = image.shape[:2]
        angle = math.radians(self._rand_range(-self.rotation, self.rotation))
        shift_x, shift_y = (self._rand_range(-self.translation, self.translation) for _ in "xy")
        factor = self._rand_range(*self.scale)
        cos, sin = factor * math.cos(angle), factor * math.sin(angle)
        rotation = np.array([[cos, -sin], [sin, cos]])
        centre = np.array([width / 2, height / 2])
        shift = centre + [shift_x * width, shift_y * height] - rotation @ centre
        return AffineTransform(np.column_stack((rotation, shift)), self.fill)


class Mosaic:
    """Map four dataset records to one sample of the form that `DetrMapper` returns.

    Each image is placed in the upper left corner of its quarter. "image_id" names all four. With
    masks, boxes enclose the visible masks; without, the rotated boxes. Random numbers come from
    numpy's global generator.

    Args:
        size: Shorter side of each image in pixels; the longer side is at most twice that.
        min_visible: Least fraction of a box's area inside the result; other objects are dropped.
        fill: Colour of empty pixels.
        augmentations: Detectron2's augmentations of the mosaic.
        image_format: "RGB" or "BGR".
        with_masks: Whether instances have gt_masks.
        with_teacher: Whether samples have "teacher_instances".
    """

    def __init__(
        self,
        *,
        size,
        min_visible,
        fill,
        augmentations,
        image_format,
        with_masks=False,
        with_teacher=False,
    ):
        self.resize = ResizeShortestEdge(size, 2 * size)
        self.min_visible = min_visible
        self.fill = tuple(fill)
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.with_masks = with_masks
        self.with_teacher = with_teacher

    def __call__(self, records: list[dict]) -> dict:
        images = [read_image(dict(record), self.image_format) for record in records]
        resizes = [self.resize.get_transform(image) for image in images]
        height = max(resize.new_h for resize in resizes)
        width = max(resize.new_w for resize in resizes)
        canvas = np.full((2 * height, 2 * width, 3), self.fill, np.uint8)
        placed = []
        corners = ((0, 0), (width, 0), (0, height), (width, height))
        for image, resize, (x, y) in zip(images, resizes, corners, strict=True):
            right, below = x + resize.new_w, y + resize.new_h
            canvas[y:below, x:right] = resize.apply_image(image)
            place = T.PadTransform(x, y, 2 * width - right, 2 * height - below)
            placed.append(T.TransformList([resize, place]))

        aug_input = T.AugInput(canvas)
        augmented = self.augmentations(aug_input)
        pixels = np.ascontiguousarray(aug_input.image.transpose(2, 0, 1))
        parts = [
            make_instances(
                record["annotations"],
                transforms + augmented,
                size=pixels.shape[1:],
                with_masks=self.with_masks,
                with_teacher=self.with_teacher,
                min_visible=self.min_visible,
            )
            for record, transforms in zip(records, placed, strict=True)
        ]
        merged = {key: Instances.cat([part[key] for part in parts]) for key in parts[0]}
        if self.with_masks:
            instances = merged["instances"]
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        large = {
            key: instances[instances.gt_boxes.nonempty(threshold=SMALLEST_SIDE)]
            for key, instances in merged.items()
        }
        return {
            "file_name": records[0]["file_name"],
            "image_id": "+".join(str(record["image_id"]) for record in records),
            "height": 2 * height,
            "width": 2 * width,
            "image": torch.from_numpy(pixels),
            **large,
        }


def check_mosaic(node) -> None:
    """Raise an InputError if a value of INPUT.MOSAIC is invalid."""
    low, high = node.SCALE
    if not 0 < low <= high:
        raise InputError(f"INPUT.MOSAIC.SCALE must be two increasing factors, got {node.SCALE}.")
    if node.SIZE < 1 or node.ROTATION < 0 or node.TRANSLATION < 0:
        raise InputError(
            "INPUT.MOSAIC needs a positive SIZE and no negative ROTATION or TRANSLATION, got "
            f"{node.SIZE}, {node.ROTATION:g} and {node.TRANSLATION:g}."
        )
    if not 0 <= node.MIN_VISIBLE < 1:
        raise InputError(f"INPUT.MOSAIC.MIN_VISIBLE must be in [0, 1), got {node.MIN_VISIBLE:g}.")
