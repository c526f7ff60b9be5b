"""Dataset mapper with DETR's augmentation: one dataset record to one model input."""

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, polygons_to_bitmask
from detectron2.utils.file_io import PathManager
from pycocotools import mask as coco_mask

from dn_detr.datasets.image_files import check_size, read_rgb
from dn_detr.errors import InputError

ROUNDING = 0.1  # boxes that leave the image by up to this many pixels do not count as cut


class EitherOr(T.Augmentation):
    """Apply one of two lists of augmentations, with equal probability."""

    def __init__(self, either, other):
        self.either = T.AugmentationList(either)
        self.other = T.AugmentationList(other)

    def __call__(self, aug_input):
        chosen = self.either if self._rand_range() < 0.5 else self.other
        return chosen(aug_input)

    def __repr__(self):
        return f"EitherOr({self.either}, {self.other})"


def train_augmentations(*, min_sizes, max_size, sample_style, flip, crop=None, jitter=None):
    """Build DETR's training augmentations: flip, crop and resize.

    Args:
        min_sizes: Shorter sides to resize to, in pixels.
        max_size: Limit of the longer side, in pixels.
        sample_style: "choice" or "range" of min_sizes.
        flip: "horizontal", "vertical" or "none"; applied with probability 0.5.
        crop: (shorter sides before the crop, crop type, crop size), applied to every second image.
            DETR uses (400, 500, 600), "absolute_range", (384, 600) (2005.12872, appendix A.4).
        jitter: (smallest factor, largest factor, size, whether to pad with grey) of large scale
            jitter (2012.07177, sec. 3), which replaces resizing.

    Returns:
        A list of Detectron2's augmentations.
    """
    augmentations = []
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if jitter is not None:
        low, high, size, pads = jitter
        scale = ResizeScale(low, high, target_height=size, target_width=size)
        crop = T.FixedSizeCrop((size, size), pad=pads, seg_pad_value=0)
        return [*augmentations, scale, crop]
    resize = ResizeShortestEdge(min_sizes, max_size, sample_style)
    if crop is None:
        return [*augmentations, resize]
    sizes_before, crop_type, crop_size = crop
    cropped = [
        ResizeShortestEdge(sizes_before, sample_style="choice"),
        T.RandomCrop(crop_type, crop_size),
        resize,
    ]
    return [*augmentations, EitherOr([resize], cropped)]


def read_image(record, image_format):
    """Read the image of a record; see `dn_detr.datasets.image_files`.

    Args:
        record: Dataset dict; missing "width" and "height" are filled in.
        image_format: "RGB" or "BGR".

    Returns:
        The image, uint8 [height, width, 3].

    Raises:
        BadImage: If the file cannot be read, or its size differs from the annotations.
    """
    name = record["file_name"]
    image = read_rgb(local_path(name), name)
    record.setdefault("height", image.shape[0])
    record.setdefault("width", image.shape[1])
    check_size(name, image, (record["width"], record["height"]))
    return in_order(image, image_format)


def local_path(name):
    """Return where a file is, which Detectron2's PathManager may have to download first."""
    return PathManager.get_local_path(name) if "://" in name else name


def in_order(image, image_format):
    """Return an RGB image [height, width, 3] in the channel order of INPUT.FORMAT."""
    if image_format not in ("RGB", "BGR"):
        raise InputError(f"INPUT.FORMAT must be 'RGB' or 'BGR', got {image_format!r}.")
    return image if image_format == "RGB" else image[:, :, ::-1]


class _KeepsPixels:
    """Leave every side at least one pixel; Detectron2 rounds that of a 3000x1 image to 0."""

    def get_transform(self, image):
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class ResizeShortestEdge(_KeepsPixels, T.ResizeShortestEdge):
    """Detectron2's `ResizeShortestEdge` to at least one pixel."""


class ResizeScale(_KeepsPixels, T.ResizeScale):
    """Detectron2's `ResizeScale` to at least one pixel."""


def _bitmask(segmentation, transforms, size):
    """Return a transformed mask [height, width] bool from polygons or a run-length code."""
    if isinstance(segmentation, dict):
        return transforms.apply_segmentation(coco_mask.decode(segmentation))
    polygons = (np.array(polygon, np.float64).reshape(-1, 2) for polygon in segmentation)
    return polygons_to_bitmask([transforms.apply_coords(p).flatten() for p in polygons], *size)


def make_instances(annotations, transforms, *, size, with_masks, with_teacher, min_visible=0.0):
    """Transform the annotations of an image to the instances of a sample.

    Crowd regions are left out.

    Args:
        annotations: Annotations of a dataset dict; those with a "score" are teacher boxes.
        transforms: Detectron2's transforms of the image.
        size: (height, width) of the image after the transforms.
        with_masks: Whether to make gt_masks.
        with_teacher: Whether to make "teacher_instances".
        min_visible: Least fraction of a box's area inside the image; other boxes are dropped.

    Returns:
        "instances" and, with a teacher, "teacher_instances".
    """
    annotations = [a for a in annotations if not a.get("iscrowd", 0)]
    objects = [a for a in annotations if "score" not in a]
    instances, is_cut, is_kept = _boxes(objects, transforms, size, min_visible)
    if with_masks:
        masks = np.zeros((len(objects), *size), bool)
        for i, annotation in enumerate(objects):
            masks[i] = _bitmask(annotation["segmentation"], transforms, size)
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
        visible = instances.gt_masks[is_cut].get_bounding_boxes().tensor
        instances.gt_boxes.tensor[is_cut] = visible
        is_kept = is_kept & instances.gt_masks.nonempty()
    result = {"instances": instances[is_kept & instances.gt_boxes.nonempty(threshold=1e-5)]}
    if with_teacher:
        detections = [a for a in annotations if "score" in a]
        instances, _, is_kept = _boxes(detections, transforms, size, min_visible)
        instances.scores = torch.tensor([a["score"] for a in detections], dtype=torch.float32)
        is_kept &= instances.gt_boxes.nonempty(threshold=1e-5)
        result["teacher_instances"] = instances[is_kept]
    return result


def _boxes(annotations, transforms, size, min_visible):
    """Return instances with clipped boxes and classes, and [N] bool: which were cut, which stay."""
    height, width = size
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    boxes = transforms.apply_box(np.array(boxes, np.float64).reshape(-1, 4))
    inside = boxes.clip(0, [width, height, width, height])
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(inside)
    instances.gt_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    is_cut = np.abs(inside - boxes).max(axis=1, initial=0) > ROUNDING
    return instances, is_cut, torch.from_numpy(_area(inside) >= min_visible * _area(boxes))


def _area(boxes_xyxy):
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)


class DetrMapper:
    """Map a dataset record to a sample: read the image, augment it, and convert its annotations.

    A sample has "image" (uint8 [3, h, w]), "height" and "width" (of the file), "file_name" and
    "image_id". "instances" have gt_boxes (xyxy pixels of "image"), gt_classes and gt_masks;
    "teacher_instances" have scores instead of masks. Crowd annotations and objects that a crop
    removed are left out, and an image may have none. With masks, the box of a cut object encloses
    its visible mask. The record is not changed. Random numbers come from numpy's global generator.

    Args:
        augmentations: Detectron2's augmentations, in order.
        image_format: "RGB" or "BGR".
        with_instances: Whether samples have "instances".
        with_masks: Whether instances have gt_masks.
        with_teacher: Whether samples have "teacher_instances", from annotations with a "score".
    """

    @configurable
    def __init__(
        self, *, augmentations, image_format, with_instances, with_masks=False, with_teacher=False
    ):
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.with_instances = with_instances
        self.with_masks = with_masks
        self.with_teacher = with_teacher

    @classmethod
    def from_config(cls, cfg, is_train=True):
        """Return the arguments of the constructor for a configuration."""
        if is_train:
            crop, jitter = cfg.INPUT.CROP, cfg.INPUT.SCALE_JITTER
            if crop.ENABLED and jitter.ENABLED:
                raise InputError("INPUT.CROP and INPUT.SCALE_JITTER exclude each other.")
            augmentations = train_augmentations(
                min_sizes=cfg.INPUT.MIN_SIZE_TRAIN,
                max_size=cfg.INPUT.MAX_SIZE_TRAIN,
                sample_style=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
                flip=cfg.INPUT.RANDOM_FLIP,
                crop=(crop.MIN_SIZE_BEFORE, crop.TYPE, crop.SIZE) if crop.ENABLED else None,
                jitter=(*jitter.RANGE, jitter.SIZE, cfg.MODEL.DN_DETR.AS_PUBLISHED)
                if jitter.ENABLED
                else None,
            )
        else:
            augmentations = [
                ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")
            ]
        return {
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "with_instances": is_train,
            "with_masks": cfg.MODEL.MASK_ON,
            "with_teacher": is_train and cfg.MODEL.DN_DETR.TEACH.ENABLED,
        }

    def __call__(self, record):
        sample = {key: value for key, value in record.items() if key != "annotations"}
        aug_input = T.AugInput(read_image(sample, self.image_format))
        transforms = self.augmentations(aug_input)
        image = np.ascontiguousarray(aug_input.image.transpose(2, 0, 1))
        sample["image"] = torch.from_numpy(image)
        if self.with_instances:
            sample |= make_instances(
                record["annotations"],
                transforms,
                size=image.shape[1:],
                with_masks=self.with_masks,
                with_teacher=self.with_teacher,
            )
        return sample
