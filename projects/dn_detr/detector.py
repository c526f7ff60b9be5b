"""Inference with trained detectors: from images to boxes, scores and class names::

    from dn_detr import Detector

    detector = Detector.from_checkpoint("output/model_final.pth")
    found = detector("street.jpg")
    for box, score, name in zip(found.boxes_xyxy_px, found.scores, found.class_names):
        ...
    found = detector("street.jpg", prompts=BoxPrompts([[10, 20, 90, 150]], ["dog"]))

Requires Detectron2; `dn_detr.Detector` explains how to install it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from dn_detr.d2.data.mapper import ResizeShortestEdge, in_order
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.d2.modeling.meta_arch import check_promptable
from dn_detr.datasets.image_files import read_rgb, rgb_of
from dn_detr.errors import InputError

CHANNEL_ORDERS = ("RGB", "BGR")


@dataclass(frozen=True, eq=False)
class DetectedObjects:
    """Detections of one image, sorted by score.

    boxes_xyxy_px: float32 [N, 4], left, top, right, bottom in pixels of the image.
    scores: float32 [N] in [0, 1].
    labels: int64 [N].
    class_names: names of the N labels.
    masks: bool [N, height, width], or None if the detector predicts no masks.
    """

    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class BoxPrompts:
    """Known objects of an image, which the detector does not need to find.

    boxes_xyxy_px: [N, 4], as in `DetectedObjects`.
    class_names: names of the N objects, None if unknown; None if all are unknown.
    """

    boxes_xyxy_px: np.ndarray | Sequence[Sequence[float]]
    class_names: Sequence[str | None] | None = None

    def __post_init__(self):
        boxes = np.asarray(self.boxes_xyxy_px, np.float32)
        boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise InputError(
                f"box prompts must be [N, 4], left, top, right, bottom, got {list(boxes.shape)}."
            )
        if not (np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
            raise InputError("box prompts must have left < right and top < bottom.")
        names = [None] * len(boxes) if self.class_names is None else list(self.class_names)
        if len(names) != len(boxes):
            raise InputError(f"there are {len(boxes)} box prompts, but {len(names)} class names.")
        object.__setattr__(self, "boxes_xyxy_px", boxes)
        object.__setattr__(self, "class_names", names)


class Detector:
    """A trained detector: images -> `DetectedObjects`.

    Args:
        model: in evaluation mode, takes a list of dicts in Detectron2 format.
        class_names: of all K classes, in the order of the model.
        input_format: channel order of the model input, "RGB" or "BGR".
        min_size, max_size: shorter and longer side after resizing, in pixels.
        threshold: minimum score of detections.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        class_names: list[str],
        input_format: str,
        min_size: int,
        max_size: int,
        threshold: float = 0.3,
    ):
        self.model = model
        self.class_names = class_names
        self.input_format = input_format
        self.resize = ResizeShortestEdge(min_size, max_size)
        self.threshold = _checked(threshold)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        config_file: str | os.PathLike | None = None,
        class_names: Sequence[str] = (),
        opts: Sequence = (),
        threshold: float = 0.3,
        device: str | None = None,
    ) -> Detector:
        """Load a detector from a checkpoint.

        Args:
            path: checkpoint, or a name that `dn-detr weights` lists; append "@ema" to load the
                moving average of the weights.
            config_file: configuration. Checkpoints of `train_net.py` contain it; others, such as
                converted ones, need it.
            class_names: default: those in the checkpoint, or of the training dataset.
            opts: KEY, VALUE, ... to override the configuration, as for `train_net.py`.
            threshold: minimum score of detections.
            device: default: a GPU if available.
        """
        saved = load_detector(
            os.fspath(path),
            config_file=None if config_file is None else os.fspath(config_file),
            opts=list(opts),
            names=list(class_names),
            device=device,
        )
        inputs = saved.cfg.INPUT
        return cls(
            saved.model,
            class_names=saved.class_names,
            input_format=inputs.FORMAT,
            min_size=inputs.MIN_SIZE_TEST,
            max_size=inputs.MAX_SIZE_TEST,
            threshold=threshold,
        )

    def __call__(
        self,
        images,
        *,
        threshold: float | None = None,
        channel_order: str | None = None,
        batch_size: int = 8,
        prompts: BoxPrompts | Sequence[BoxPrompts | None] | None = None,
    ) -> DetectedObjects | list[DetectedObjects]:
        """Detect objects in one image, or in each image of a list or tuple.

        Args:
            images: paths, PIL images or uint8 arrays [height, width, 3].
            threshold: minimum score (default: that of the detector).
            channel_order: of arrays, which need it: "RGB", or "BGR" as in OpenCV.
            batch_size: most images in a batch. Only images of equal size after resizing are
                batched, without padding, so that results do not depend on the other images, up to
                rounding.
            prompts: known objects of the image, or of each image. They come first in the result,
                with the given boxes and names and a score of 1; unknown names are predicted, with
                their score.
        """
        is_many = isinstance(images, (list, tuple))
        threshold = self.threshold if threshold is None else _checked(threshold)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        pixels = [
            to_pixels(image, self.input_format, channel_order)
            for image in (images if is_many else [images])
        ]
        given = self._checked_prompts(prompts, len(pixels))
        transforms = [self.resize.get_transform(image) for image in pixels]
        found: list[DetectedObjects | None] = [None] * len(pixels)
        for batch in _batches([(t.new_h, t.new_w) for t in transforms], batch_size):
            samples = [_sample(pixels[i], transforms[i].apply_image(pixels[i])) for i in batch]
            for i, sample in zip(batch, samples, strict=True):
                if given[i] is not None:
                    sample["prompts"] = self._prompt(given[i], transforms[i])
            with torch.inference_mode():
                outputs = self.model(samples)
            for i, output in zip(batch, outputs, strict=True):
                found[i] = self._named(output["instances"], threshold)
                if given[i] is not None:
                    found[i] = self._with_prompts(given[i], output["prompts"].to("cpu"), found[i])
        return found if is_many else found[0]

    def _checked_prompts(
        self, prompts: BoxPrompts | Sequence[BoxPrompts | None] | None, num_images: int
    ) -> list[BoxPrompts | None]:
        """Return the prompts of each image; raise InputError if this detector cannot use them."""
        prompts = [None] * num_images if prompts is None else prompts
        prompts = [prompts] if isinstance(prompts, BoxPrompts) else list(prompts)
        if len(prompts) != num_images:
            raise InputError(f"there are {num_images} images, but box prompts for {len(prompts)}.")
        given = [one for one in prompts if one is not None]
        names = {name for one in given for name in one.class_names}
        if given:
            check_promptable(self.model, asks_names=None in names)
        if unknown := names - {None, *self.class_names}:
            unknown = ", ".join(sorted(unknown))
            raise InputError(
                f"box prompts have classes this detector was not trained on: {unknown}."
            )
        return prompts

    def _prompt(self, prompts: BoxPrompts, transform) -> Instances:
        """Scale prompts to the resized image; see `d2.modeling.prompts.prompts_from`."""
        prompt = Instances((transform.new_h, transform.new_w))
        boxes = (
            transform.apply_box(prompts.boxes_xyxy_px)
            if len(prompts.boxes_xyxy_px)
            else np.zeros((0, 4))
        )
        prompt.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        prompt.gt_boxes.clip(prompt.image_size)
        if not prompt.gt_boxes.nonempty().all():
            raise InputError("box prompts must lie in the image.")
        names = [*self.class_names, None]
        labels = [names.index(name) for name in prompts.class_names]
        prompt.gt_classes = torch.tensor(labels, dtype=torch.int64)
        return prompt

    def _with_prompts(
        self, prompts: BoxPrompts, prompted: Instances, others: DetectedObjects
    ) -> DetectedObjects:
        """Join the prompts, with predictions `prompted` for unknown names, and other detections."""
        labels, scores = prompted.pred_classes.tolist(), prompted.scores.tolist()
        for i, name in enumerate(prompts.class_names):
            if name is not None:
                labels[i], scores[i] = self.class_names.index(name), 1.0
        return DetectedObjects(
            boxes_xyxy_px=np.concatenate((prompts.boxes_xyxy_px, others.boxes_xyxy_px)),
            scores=np.concatenate((np.array(scores, np.float32), others.scores)),
            labels=np.concatenate((np.array(labels, np.int64), others.labels)),
            class_names=[self.class_names[label] for label in labels] + others.class_names,
        )

    def _named(self, instances, threshold: float) -> DetectedObjects:
        kept = instances[instances.scores >= threshold].to("cpu")
        labels = kept.pred_classes.numpy()
        return DetectedObjects(
            boxes_xyxy_px=kept.pred_boxes.tensor.float().numpy(),
            scores=kept.scores.float().numpy(),
            labels=labels,
            class_names=[self.class_names[label] for label in labels],
            masks=kept.pred_masks.numpy() if kept.has("pred_masks") else None,
        )


def to_pixels(image, wanted: str, channel_order: str | None = None) -> np.ndarray:
    """Convert an image to uint8 [height, width, 3].

    Args:
        image: a path or PIL image, read as `dn_detr.datasets.image_files` says, or a uint8
            array [height, width, 3].
        wanted: channel order of the result, "RGB" or "BGR".
        channel_order: of an array, which needs it.

    Raises:
        BadImage: if a file is not a readable image.
        ValueError: if `image` has another type, dtype or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        return in_order(read_rgb(image), wanted)
    if isinstance(image, Image.Image):
        return in_order(rgb_of(image), wanted)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"an image must be a path, a PIL image or a numpy array, got {type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            "an image array must be uint8 [height, width, 3], got "
            f"{image.dtype} {list(image.shape)}"
        )
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(
            "image arrays need their channel order: channel_order='RGB', or 'BGR' for images from "
            f"OpenCV; got {channel_order!r}"
        )
    return image if channel_order == wanted else image[:, :, ::-1]


def _sample(original: np.ndarray, resized: np.ndarray) -> dict:
    """Make the model input of Detectron2; detections are scaled to the original size."""
    tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
    return {"image": tensor, "height": original.shape[0], "width": original.shape[1]}


def _batches(sizes: list[tuple[int, int]], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of equal sizes in batches of at most `batch_size`."""
    positions: dict[tuple[int, int], list[int]] = {}
    for position, size in enumerate(sizes):
        positions.setdefault(size, []).append(position)
    for same in positions.values():
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))


def _checked(threshold: float) -> float:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    return threshold
