"""Times of training steps, inference, data loading and exported files.

Weights are random and images are noise, which does not affect times.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.loader import build_train_loader
from dn_detr.d2.engine.activation_checkpointing import recompute
from dn_detr.d2.engine.compile import compile_core
from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.export import exporter
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError

TASKS = ("train", "eval", "data", "export")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured: images and iterations.

    Args:
        batch: Images at a time.
        size: Their height and width.
        objects: Objects in an image; COCO's mean is 7.
        warmup: Iterations before those that count.
        iterations: Iterations that count.
    """

    batch: int = 1
    size: tuple[int, int] = (800, 1066)
    objects: int = 7
    warmup: int = 5
    iterations: int = 20


def sample(index: int, num_objects: int, num_classes: int, size: tuple[int, int]) -> dict:
    """Make an image of noise with boxes, as a Detectron2 sample."""
    height, width = size
    generator = torch.Generator().manual_seed(index)
    corners = torch.rand(num_objects, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    instances = Instances(size)
    corners = corners * torch.tensor([width - 2, height - 2] * 2) + torch.tensor([0, 0, 2, 2])
    instances.gt_boxes = Boxes(corners)  # of at least two pixels
    instances.gt_classes = torch.randint(num_classes, (num_objects,), generator=generator)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "image_id": index}


def train_task(cfg, load: Workload) -> Callable[[], None]:
    """A training step: forward, matching, losses, backward, optimizer."""
    batch = [
        sample(index, load.objects, cfg.MODEL.DN_DETR.NUM_CLASSES, load.size)
        for index in range(load.batch)
    ]
    model = build_model(cfg).train()
    recompute(model, cfg.MODEL.DN_DETR.RECOMPUTE)
    if cfg.MODEL.DN_DETR.COMPILE:
        compile_core(model.core, cfg.MODEL.DN_DETR.COMPILE)
    step = TrainStep(
        model,
        [batch] * (load.warmup + load.iterations),
        build_optimizer(cfg, model),
        precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
        seed=0,
    )
    return step.run_step


def eval_task(cfg, load: Workload) -> Callable[[], None]:
    """Inference, from images on the host to detections."""
    model = build_model(cfg).eval()
    batch = [sample(index, 0, 1, load.size) for index in range(load.batch)]
    precision = {"bfloat16": torch.bfloat16, "float16": torch.float16}[cfg.SOLVER.AMP.PRECISION]

    @torch.inference_mode()
    def run() -> None:
        with torch.autocast(model.device.type, precision, enabled=cfg.SOLVER.AMP.ENABLED):
            model(batch)

    return run


def data_task(cfg, load: Workload) -> Callable[[], None]:
    """A batch of the training data, read and augmented."""
    prepare(cfg)
    cfg.SOLVER.IMS_PER_BATCH = load.batch
    batches = iter(build_train_loader(cfg))
    return lambda: next(batches)


def export_task(exported: str | Path | None, load: Workload) -> Callable[[], None]:
    """A file of `exporter`, on the CPU."""
    kinds = {suffix: kind for kind, suffix in exporter.FORMATS.items()}
    suffix = Path(exported or "").suffix
    if suffix not in kinds:
        raise InputError(f"--task export needs --exported, a file ending in {' or '.join(kinds)}.")
    run = torch.inference_mode()(exporter.load(Path(exported), kinds[suffix]))
    inputs = exporter.example(load.batch, *load.size)
    return lambda: run(*inputs)


def measure(run: Callable[[], None], *, warmup: int, iterations: int, is_cuda: bool) -> list[float]:
    """Return the seconds of each iteration after the warm-up."""
    seconds = []
    with EventStorage():
        for _ in range(warmup + iterations):
            start = time.perf_counter()
            run()
            if is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def benchmark(
    task: str,
    load: Workload,
    *,
    config: str | None = None,
    opts: Sequence[str] = (),
    exported: str | Path | None = None,
) -> dict:
    """Measure a task.

    Args:
        task: Of `TASKS`; only "data" reads the dataset of the configuration.
        load: Images and iterations.
        config: Configuration, for all tasks but "export".
        opts: KEY, VALUE, ... on top of it.
        exported: A file, for "export".

    Returns:
        Times in ms and what was measured, by name.
    """
    is_cuda = task in ("train", "eval") and torch.cuda.is_available()
    if task == "export":
        run = export_task(exported, load)
    else:
        cfg = read_config(config or "", list(opts))
        cfg.MODEL.DEVICE = "cuda" if is_cuda else "cpu"
        cfg.MODEL.WEIGHTS, cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = "", False
        if task != "data":
            cfg.MODEL.DN_DETR.NUM_CLASSES = cfg.MODEL.DN_DETR.NUM_CLASSES or 80
        run = {"train": train_task, "eval": eval_task, "data": data_task}[task](cfg, load)
    seconds = measure(run, warmup=load.warmup, iterations=load.iterations, is_cuda=is_cuda)
    median = statistics.median(seconds)
    ordered = sorted(seconds)
    result = {
        "task": task,
        "of": config or str(exported),
        "batch": load.batch,
        "size": None if task == "data" else "x".join(map(str, load.size)),
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "iterations": len(seconds),
        "median_ms": 1000 * median,
        "fastest_ms": 1000 * ordered[0],
        "slowest_tenth_ms": 1000 * ordered[int(0.9 * len(ordered))],
        "images_per_second": load.batch / median,
    }
    if is_cuda:
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return result
