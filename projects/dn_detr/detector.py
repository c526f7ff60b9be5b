"""Detectors in Python: training, inference, evaluation::

    import dn_detr

    detector = dn_detr.train("dn_deformable", data="cells/", epochs=50)
    detector = dn_detr.Detector("output/model_best.pth")
    found = detector("street.jpg")
    for box, score, name in zip(found.boxes_xyxy_px, found.scores, found.class_names):
        ...
    found.save("found.jpg")
    found = detector("street.jpg", prompts=BoxPrompts([[10, 20, 90, 150]], ["dog"]))
    print(detector.evaluate("cells/")["bbox"]["AP"])

Requires Detectron2; `dn_detr.Detector` explains how to install it.
"""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_mask

from dn_detr.d2.config.defaults import merge_opts, read_config
from dn_detr.d2.config.files import find_config
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.mapper import ResizeShortestEdge, in_order
from dn_detr.d2.engine import launch
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.d2.inference.visualization import draw_found
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
    image_size: (height, width) in pixels, or None if unknown.
    source: the image as it was given to the detector, for `draw`; or None.
    channel_order: of `source`, if that is an array.
    """

    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    masks: np.ndarray | None = None
    image_size: tuple[int, int] | None = None
    source: object = None
    channel_order: str | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        counts = Counter(self.class_names).most_common()
        listed = ", ".join(f"{count} {name}" for name, count in counts) or "nothing"
        best = f", scores {self.scores.min():.2f} to {self.scores.max():.2f}" if len(self) else ""
        return f"DetectedObjects({listed}{best})"

    def draw(self) -> np.ndarray:
        """Return the image with boxes, masks, names and scores, uint8 RGB [height, width, 3].

        Small images are enlarged. Raises an InputError without `source`.
        """
        if self.source is None:
            raise InputError("these detections do not know their image, so they cannot be drawn.")
        return draw_found(to_pixels(self.source, "RGB", self.channel_order), self)

    def to_json(self) -> list[dict]:
        """Return COCO results: category_id (label + 1), bbox as xywh pixels, score, class name.

        Masks become "segmentation" with compressed run lengths.
        """
        boxes = self.boxes_xyxy_px.astype(float)
        boxes = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).round(2)
        results = [
            {"category_id": label + 1, "bbox": box, "score": score, "category": name}
            for label, box, score, name in zip(
                self.labels.tolist(),
                boxes.tolist(),
                self.scores.astype(float).round(5).tolist(),
                self.class_names,
                strict=True,
            )
        ]
        for result, mask in zip(results, () if self.masks is None else self.masks, strict=False):
            encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            result["segmentation"] = {**encoded, "counts": encoded["counts"].decode()}
        return results

    def to_yolo(self) -> str:
        """Return YOLO's text: class, center x, y, width, height in parts of the image, score."""
        if self.image_size is None:
            raise InputError("these detections do not know the size of their image.")
        height, width = self.image_size
        boxes = self.boxes_xyxy_px.reshape(-1, 2, 2).astype(float) / (width, height)
        values = np.concatenate((boxes.mean(1), boxes[:, 1] - boxes[:, 0]), axis=1)
        return "".join(
            f"{label} {' '.join(f'{x:.6f}' for x in box)} {score:.4f}\n"
            for label, box, score in zip(self.labels, values, self.scores, strict=True)
        )

    def to_supervision(self):
        """Return `supervision.Detections`; raises an InputError if supervision is missing."""
        try:
            import supervision
        except ImportError as error:
            raise InputError(
                "to_supervision needs supervision: pip install supervision."
            ) from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy_px,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.class_names, dtype=object)},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a picture (see `draw`), or with these suffixes .json `to_json`, .txt `to_yolo`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_json()), encoding="utf-8")
        elif path.suffix == ".txt":
            path.write_text(self.to_yolo(), encoding="utf-8")
        elif (
            isinstance(self.source, (str, os.PathLike))
            and path.exists()
            and path.samefile(self.source)
        ):
            raise InputError(f"{path} is the image itself: name another file.")
        else:
            Image.fromarray(self.draw()).save(path)


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
        model: path of a checkpoint ("@ema" behind it: the moving average of the weights), which
            brings along what follows from `config_file` on; or a module in evaluation mode that
            takes a list of dicts in Detectron2 format, with class_names to max_size.
        class_names: of all K classes, in the order of the model; default: those in the checkpoint,
            or of the training dataset.
        input_format: channel order of the model input, "RGB" or "BGR".
        min_size, max_size: shorter and longer side after resizing, in pixels.
        threshold: minimum score of detections.
        config_file: name or path of a configuration, for checkpoints without one, such as
            converted ones.
        opts: KEY, VALUE, ... to override the configuration.
        device: default: a GPU if available.
    """

    def __init__(
        self,
        model: str | os.PathLike | torch.nn.Module,
        *,
        class_names: Sequence[str] = (),
        input_format: str = "RGB",
        min_size: int = 800,
        max_size: int = 1333,
        threshold: float = 0.3,
        config_file: str | os.PathLike | None = None,
        opts: Sequence = (),
        device: str | None = None,
    ):
        self.threshold = _checked(threshold)
        self.cfg, self.weights = None, ""
        if not isinstance(model, torch.nn.Module):
            self.weights = os.fspath(model)
            saved = load_detector(
                self.weights,
                config_file=None if config_file is None else os.fspath(config_file),
                opts=list(opts),
                names=list(class_names),
                device=device,
            )
            model, class_names, self.cfg = saved.model, saved.class_names, saved.cfg
            inputs = saved.cfg.INPUT
            input_format, min_size, max_size = (
                inputs.FORMAT,
                inputs.MIN_SIZE_TEST,
                inputs.MAX_SIZE_TEST,
            )
        self.model = model
        self.class_names = list(class_names)
        self.input_format = input_format
        self.resize = ResizeShortestEdge(min_size, max_size)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, **more) -> Detector:
        """Load a detector from a checkpoint; the arguments are those of the class."""
        return cls(path, **more)

    def __repr__(self) -> str:
        names = self.class_names
        listed = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        method = "" if self.cfg is None else f"{self.cfg.MODEL.DN_DETR.METHOD}, "
        return (
            f"Detector({self.weights!r}: {method}{len(names)} classes: {listed}; threshold "
            f"{self.threshold:g}, on {next(self.model.parameters()).device})"
        )

    def evaluate(self, data: str | os.PathLike = "", *, output: str = "", **overrides) -> dict:
        """Compute AP on a dataset.

        Args:
            data: dataset folder, of which val, else test, is used; "": the test dataset of the
                configuration.
            output: folder for results; "": none are kept.
            **overrides: keys of the configuration, as in `train`.

        Returns:
            Metrics as Detectron2's: {"bbox": {"AP": ..., "AP50": ..., ...}}.
        """
        if self.cfg is None:
            raise InputError("only detectors that were loaded from a checkpoint can be evaluated.")
        cfg = self.cfg.clone()
        cfg.defrost()
        merge_opts(cfg, keys_of(overrides))
        cfg.MODEL.DN_DETR.CLASS_NAMES = self.class_names
        cfg.DATASETS.FOLDER = os.fspath(data)
        prepare(cfg, eval_only=True)
        with tempfile.TemporaryDirectory() as folder:
            cfg.OUTPUT_DIR = output or folder
            cfg.freeze()
            return Trainer.test(cfg, self.model)

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
                source = images[i] if is_many else images
                found[i] = replace(
                    self._named(output["instances"], threshold),
                    image_size=pixels[i].shape[:2],
                    source=source,
                    channel_order=channel_order,
                )
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
        return replace(
            others,
            boxes_xyxy_px=np.concatenate((prompts.boxes_xyxy_px, others.boxes_xyxy_px)),
            scores=np.concatenate((np.array(scores, np.float32), others.scores)),
            labels=np.concatenate((np.array(labels, np.int64), others.labels)),
            class_names=[self.class_names[label] for label in labels] + others.class_names,
            masks=None,
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


def keys_of(overrides: Mapping[str, object]) -> list:
    """Return KEY, VALUE, ... of Python's keyword arguments, in which "__" stands for a dot."""
    return [x for key, value in overrides.items() for x in (key.replace("__", "."), value)]


def train(
    config: str | os.PathLike,
    *,
    data: str | os.PathLike = "",
    epochs: float | None = None,
    weights: str | os.PathLike = "",
    output: str | os.PathLike = "",
    recipe: str = "",
    num_gpus: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **overrides,
) -> Detector:
    """Train a detector, like `dn-detr train`.

    Args:
        config: name or path of a configuration.
        data: dataset folder; "": the datasets of the configuration.
        epochs: length; None: as configured.
        weights: detector or backbone to start from; "": as configured.
        output: folder; "": as configured.
        recipe: "auto" chooses sizes, queries, batch and epochs by the data.
        num_gpus: None: what there is; 0: the CPU.
        resume: whether to continue the training in `output`.
        overwrite: whether to discard an earlier training in `output`.
        **overrides: keys of the configuration, "__" for a dot: SOLVER__BASE_LR=1e-4, SEED=3.

    Returns:
        The detector with the best weights of all evaluations, else the last ones.

    Raises:
        InputError: for what the user can mend.
    """
    given = {
        "DATASETS.FOLDER": data,
        "SOLVER.EPOCHS": epochs,
        "MODEL.WEIGHTS": weights,
        "OUTPUT_DIR": output,
    }
    opts = keys_of({key: value for key, value in given.items() if value not in ("", None)})
    opts = [os.fspath(x) if isinstance(x, os.PathLike) else x for x in opts] + keys_of(overrides)
    config_file = find_config(os.fspath(config))
    launch.run(
        Namespace(
            program="dn_detr.train",
            config_file=config_file,
            opts=opts,
            recipe=recipe,
            adapts=True,
            eval_only=False,
            resume=resume,
            overwrite=overwrite,
            num_gpus=num_gpus,
            num_machines=1,
            machine_rank=0,
            dist_url="auto",
        )
    )
    return Detector(launch.best_weights(read_config(config_file, opts).OUTPUT_DIR))
