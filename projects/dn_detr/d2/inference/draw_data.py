"""Draw training data: annotations, augmented batches, denoising queries, teachers' boxes, schedule.

Batches and noise are those of a training with this configuration, on one process. Denoising: a
picture per image with a panel per group; objects white, positives solid, negatives dashed, in the
colour of their label; a flipped label is written as "was -> is". Teachers: boxes dashed, with their
scores, objects white. Schedule: the share of images that are mosaics or mixed (INPUT.SCHEDULE).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dn_detr.auxiliary.denoising import DenoisingQueries
from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.catalog import class_names, prepare
from dn_detr.d2.data.loader import TrainLoader
from dn_detr.d2.data.mapper import read_image
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.inference.plot_text import class_label
from dn_detr.d2.inference.visualization import class_color, draw_boxes, draw_record, draw_styled
from dn_detr.d2.modeling.meta_arch import core_of
from dn_detr.errors import BadImage, InputError
from dn_detr.layers.box_ops import cxcywh_to_xyxy
from dn_detr.structures import NoisedObjects, Targets

logger = logging.getLogger(__name__)

MOST_GROUPS = 6  # panels of a picture
MOST_ITERATIONS = 5000  # of a schedule that are counted, evenly spread

Pictures = Iterator[tuple[str, np.ndarray]]
"""Names and images, uint8 RGB."""


def annotations(cfg: CfgNode) -> Pictures:
    """Draw ground truth after cleaning."""
    for name in cfg.DATASETS.TRAIN:
        loaded = dataset_dicts.load(name, with_masks=cfg.MODEL.MASK_ON)
        for record in loaded.records:
            try:
                image = read_image(dict(record), "RGB")
            except BadImage as error:
                logger.warning(str(error))
                continue
            yield Path(record["file_name"]).stem, draw_record(image, record, loaded.class_names)


def drawn_names(cfg: CfgNode) -> list[str]:
    """Return the class names of the training data as they can be drawn."""
    return [class_label(name, i) for i, name in enumerate(class_names(cfg.DATASETS.TRAIN[0]))]


def batches(cfg: CfgNode, iteration: int) -> Iterator[tuple[int, list[dict]]]:
    """Yield (number, batch) of the training from an iteration on."""
    loader = Trainer.build_train_loader(cfg)
    loader.set_start_iteration(iteration)
    yield from enumerate(loader, iteration)


def augmented(cfg: CfgNode, iteration: int) -> Pictures:
    """Draw augmented images before normalization."""
    names = drawn_names(cfg)
    for number, batch in batches(cfg, iteration):
        for sample in batch:
            instances = sample["instances"]
            labels = instances.gt_classes.tolist()
            drawn = draw_boxes(
                rgb_of(sample, cfg),
                instances.gt_boxes.tensor.numpy(),
                [names[label] for label in labels],
                [class_color(label) for label in labels],
                masks=instances.gt_masks.tensor.numpy() if instances.has("gt_masks") else None,
            )
            yield f"{number}_{Path(sample['file_name']).stem}", drawn


def denoised(cfg: CfgNode, iteration: int) -> Pictures:
    """Draw the denoising queries of every image, by group."""
    names = drawn_names(cfg)
    model = Trainer.build_model(cfg)
    core = core_of(model, "visualize denoising")
    queries = next((a for a in core.auxiliary if isinstance(a, DenoisingQueries)), None)
    if queries is None:
        raise InputError("this configuration trains without denoising (DENOISING.ENABLED).")
    for number, batch in batches(cfg, iteration):
        targets = model.make_batch(batch, iteration=number, with_targets=True).targets.to("cpu")
        noised, _ = queries.noise(targets, num_matched=1, mask_dtype=torch.float32)
        for i, sample in enumerate(batch):
            image = rgb_of(sample, cfg)
            yield (
                f"{number}_{Path(sample['file_name']).stem}",
                draw_groups(image, targets, noised, i, names),
            )


def taught(cfg: CfgNode, iteration: int) -> Pictures:
    """Draw teachers' boxes and objects of every augmented image."""
    if not cfg.MODEL.DN_DETR.TEACH.ENABLED:
        raise InputError("this configuration trains without teachers (TEACH.ENABLED).")
    names = drawn_names(cfg)
    for number, batch in batches(cfg, iteration):
        for sample in batch:
            objects, found = sample["instances"], sample["teacher_instances"]
            labels, count = found.gt_classes.tolist(), len(objects)
            captions = [
                f"{names[label]} {score:.0%}"
                for label, score in zip(labels, found.scores.tolist(), strict=True)
            ]
            drawn = draw_styled(
                rgb_of(sample, cfg),
                torch.cat((objects.gt_boxes.tensor, found.gt_boxes.tensor)).numpy(),
                captions=[""] * count + captions,
                colors=["white"] * count + [class_color(label) for label in labels],
                line_styles=["-"] * count + ["--"] * len(found),
            )
            yield f"{number}_{Path(sample['file_name']).stem}", drawn


def draw_groups(
    image: np.ndarray, targets: Targets, noised: NoisedObjects, i: int, names: list[str]
) -> np.ndarray:
    """Draw the noised objects of image i of a batch, a panel for each of the first groups."""
    height, width = image.shape[:2]
    scale = torch.tensor([width, height, width, height])
    truth = (cxcywh_to_xyxy(targets.boxes[i]) * scale)[targets.is_object[i]].tolist()
    shown = min(noised.num_groups, MOST_GROUPS)
    columns = min(3, shown)
    rows = -(-shown // columns)
    figure = Figure(figsize=(5 * columns, 5.4 * rows * height / width), dpi=110)
    size = noised.labels.shape[1] // noised.num_groups
    for group, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.axis("off")
        if group >= shown:
            continue
        count = len(truth)
        boxes, captions, colors, styles = (
            list(truth),
            [""] * count,
            ["white"] * count,
            ["-"] * count,
        )
        positives = negatives = 0
        for index in range(group * size, (group + 1) * size):
            if noised.is_empty[i, index]:
                continue
            label, source = int(noised.labels[i, index]), int(noised.assignment[i, index])
            boxes.append((cxcywh_to_xyxy(noised.boxes[i, index]) * scale).tolist())
            colors.append(class_color(label))
            styles.append("-" if source >= 0 else "--")
            was = int(targets.labels[i, source]) if source >= 0 else label
            captions.append(names[label] if was == label else f"{names[was]} -> {names[label]}")
            positives, negatives = positives + (source >= 0), negatives + (source < 0)
        drawn = draw_styled(
            image, np.array(boxes), captions=captions, colors=colors, line_styles=styles
        )
        axis.imshow(drawn)
        counts = f"{positives} positives" + (f", {negatives} negatives" if negatives else "")
        axis.set_title(f"group {group + 1} of {noised.num_groups}: {counts}", fontsize=9)
    return rgb_of_figure(figure)


def scheduled(cfg: CfgNode) -> Pictures:
    """Plot and print the share of images that are mosaics or mixed, over the iterations."""
    loader = Trainer.build_train_loader(cfg)
    if loader.dense is None:
        raise InputError("this configuration has no INPUT.SCHEDULE, INPUT.MOSAIC or INPUT.MIXUP.")
    total = cfg.SOLVER.MAX_ITER
    iterations = np.linspace(0, total, min(total, MOST_ITERATIONS), endpoint=False, dtype=int)
    shares = dense_shares(loader, iterations)
    print(loader.dense.describe(total))
    print(f"counted in {len(iterations)} of {total} iterations, one process:")
    figure = Figure(figsize=(7, 3), dpi=110)
    axis = figure.subplots()
    for name, share in shares.items():
        print(f"  {name}: {share.mean():.1%} of all images")
        windows = np.array_split(np.arange(len(share)), min(len(share), 50))
        middle = [iterations[window].mean() for window in windows]
        axis.plot(middle, [share[window].mean() for window in windows], label=name)
    axis.set(xlabel="iteration", ylabel="share of images", ylim=(0, 1))
    axis.legend()
    yield "shares", rgb_of_figure(figure)


def dense_shares(loader: TrainLoader, iterations: np.ndarray) -> dict[str, np.ndarray]:
    """Return the shares of each iteration, sampled as in the training."""
    dense, seed, size, num_images = (
        loader.dense,
        loader.seed,
        loader.batch_size,
        len(loader.dataset),
    )
    mosaic, mixed = np.zeros(len(iterations)), np.zeros(len(iterations), bool)
    for i, iteration in enumerate(iterations.tolist()):
        first = iteration * size
        drawn = [
            dense.partners(iteration, num_images, seed=seed, position=position)
            for position in range(first, first + size)
        ]
        mosaic[i] = sum(partners is not None for partners in drawn) / size
        mixed[i] = dense.share(iteration, seed=seed, first_position=first) is not None
    either = np.where(mixed, 1, mosaic)
    return {"mosaics": mosaic, "mixed": mixed, "mosaics or mixed": either}


def rgb_of(sample: dict, cfg: CfgNode) -> np.ndarray:
    """Return the image of a training sample as uint8 RGB [height, width, 3]."""
    image = sample["image"].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1])


def rgb_of_figure(figure: Figure) -> np.ndarray:
    """Render a figure as uint8 RGB."""
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


SOURCES = {
    "annotations": lambda cfg, _iteration: annotations(cfg),
    "batches": augmented,
    "denoising": denoised,
    "schedule": lambda cfg, _iteration: scheduled(cfg),
    "teacher": taught,
}
"""What can be drawn -> (configuration, iteration) -> pictures."""


def draw_data(
    source: str, cfg: CfgNode, folder: Path, *, num_images: int = 8, iteration: int = 0
) -> Iterator[Path]:
    """Write pictures of a source, and yield each file when it is written.

    Args:
        source: Of `SOURCES`.
        cfg: Not frozen; changed in place.
        folder: Where pictures are written.
        num_images: Most pictures.
        iteration: Training iteration of the first batch.
    """
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
    cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = False
    prepare(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in islice(SOURCES[source](cfg, iteration), num_images):
        path = folder / f"{source}_{name}.png"
        Image.fromarray(picture).save(path)
        yield path
