"""A detector as one graph of standard operators, for any batch and image size: ONNX, torch.export.

    images [B, 3, H, W] float32 in 0..255, each at the top left of its canvas;
    sizes  [B, 2] int64: (height, width) of each image on its canvas
    -> boxes [B, k, 4] xyxy in [0, 1] of the image, scores [B, k], labels [B, k] int64, best first

Normalisation and the choice of the k best are part of the graph. What stands outside of the images
does not matter. H and W are multiples of `SIDE_STEP`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dn_detr import __version__
from dn_detr.d2.meta_arch import DenoisingDETR
from dn_detr.errors import InputError
from dn_detr.models.postprocess import best_detections
from dn_detr.ops import plain_operators

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}

SIDE_STEP = 32
"""Canvases have sides of a multiple of this, the coarsest stride of common backbones. With other
sizes `torch.export` would freeze whether a side is odd behind each strided layer."""

SMALLEST_SIDE = 96
"""Below this the coarsest level of a multi-scale model is one cell wide, which is another graph."""

OPSET = 18
"""Of ONNX. TensorRT gives wrong results for GridSample of opset 20 (NVIDIA/TensorRT#4646)."""

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels")

TRACED = (2, 4 * SIDE_STEP, 5 * SIDE_STEP)
"""Batch, height and width that a graph is traced with."""

CHECKED = ((1, 6 * SIDE_STEP, 3 * SIDE_STEP), (3, 5 * SIDE_STEP, 8 * SIDE_STEP))
"""Batches and sizes that it is compared on. None was traced."""

TOLERANCE = 1e-3
"""Most by which a score, or a coordinate in [0, 1], may differ from that of the model."""

METADATA = "dn_detr"
"""Name under which a file holds its `metadata`, as JSON."""


class Detect(nn.Module):
    """The inference of a detector as a function of tensors; see the top of this file."""

    def __init__(self, model: DenoisingDETR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        height, width = sizes[:, :, None, None].unbind(1)  # [B, 1, 1] each
        padding = (y[:, None] >= height) | (x >= width)
        normalised = (images - model.pixel_mean) / model.pixel_std
        features = model.backbone(torch.where(padding[:, None], 0.0, normalised))
        predictions = model.core([features[name] for name in model.in_features], padding)
        return best_detections(predictions, model.top_k, has_no_object=model.has_no_object)


def trace(model: DenoisingDETR) -> ExportedProgram:
    """The inference of `model` as a graph, for any batch and size. InputError if it has masks."""
    if model.has_masks:
        raise InputError("detectors with masks cannot be exported: the graph has no masks.")
    batch, height, width = Dim("batch"), Dim("height"), Dim("width")
    images = {0: batch, 2: SIDE_STEP * height, 3: SIDE_STEP * width}
    detect = Detect(model).eval().requires_grad_(False)
    inputs = example(*TRACED, device=model.device)
    return torch.export.export(detect, inputs, dynamic_shapes=(images, {0: batch}))


def example(
    batch: int, height: int, width: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Images and sizes on a canvas: blobs and noise that follow from the arguments, the first image
    filling the canvas, each further one somewhat smaller."""
    generator = torch.Generator().manual_seed(height * width + batch)
    coarse = torch.rand(batch, 3, 6, 8, generator=generator)
    blobs = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    noise = torch.rand(batch, 3, height, width, generator=generator)
    steps = torch.arange(batch)
    sizes = torch.stack((height - 9 * steps, width - 13 * steps), dim=1)
    return (200 * blobs + 55 * noise).to(device), sizes.to(device)


# ----------------------------------------------------------------------------------------- files


def metadata(cfg, class_names: list[str]) -> dict:
    """What a program needs to know to feed the graph and to name what it finds."""
    return {
        "class_names": list(class_names),
        "channel_order": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "is_normalised_inside": True,
        "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "interpolation": "bilinear",
        "side_step": SIDE_STEP,
        "smallest_side": SMALLEST_SIDE,
        "boxes": "xyxy in [0, 1] of the image",
        "method": cfg.MODEL.DN_DETR.METHOD,
        "made_with": f"dn_detr {__version__}, torch {torch.__version__}",
    }


def write(model: DenoisingDETR, path: Path, kind: str, about: dict) -> None:
    """Trace a model and write the graph and its metadata. kind: one of FORMATS."""
    if kind == "torch-export":
        with plain_operators():
            program = trace(model)
        torch.export.save(program, path, extra_files={METADATA: json.dumps(about)})
        return
    from dn_detr.d2.onnx_operators import simplify, translations

    onnx_program = torch.onnx.export(
        trace(model),
        dynamo=True,
        opset_version=OPSET,
        input_names=INPUTS,
        output_names=OUTPUTS,
        custom_translation_table=translations(),
        optimize=False,  # takes minutes
        verbose=False,
    )
    simplify(onnx_program.model)
    onnx_program.model.metadata_props[METADATA] = json.dumps(about)
    onnx_program.save(path)


def load(path: Path, kind: str):
    """The function (images, sizes) -> (boxes, scores, labels) in a file, on the CPU."""
    if kind == "torch-export":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=True)}
        return tuple(torch.from_numpy(x) for x in session.run(OUTPUTS, feed))

    return run


def need_onnx() -> None:
    """InputError unless the packages that write and run ONNX files are installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the format onnx needs {error.name}: pip install onnx onnxruntime onnxscript."
        ) from error


# ------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Difference:
    """Largest difference of scores and of box coordinates in [0, 1], and the number of detections
    that were compared."""

    scores: float
    boxes: float
    num_compared: int


@torch.no_grad()
def compare(model: DenoisingDETR, exported, inputs: tuple[Tensor, Tensor]) -> Difference:
    """How far the detections of an exported graph are from those of the model on one batch.

    Scores are compared rank by rank. Of detections whose scores are almost equal the order is
    chance, so the box of a detection is compared with the nearest one of the same label among those;
    and those that almost equal the last may have found no place, so they are left out.
    """
    boxes, scores, labels = Detect(model).eval()(*inputs)
    their_boxes, their_scores, their_labels = exported(*inputs)
    if their_boxes.shape != boxes.shape:
        raise InputError(
            f"the exported model gives boxes {list(their_boxes.shape)} instead of "
            f"{list(boxes.shape)}."
        )
    distance = (boxes[:, :, None] - their_boxes[:, None]).abs().amax(-1)  # [B, k, k]
    is_close = (scores[:, :, None] - their_scores[:, None]).abs() <= TOLERANCE
    is_alike = is_close & (labels[:, :, None] == their_labels[:, None])
    nearest = torch.where(is_alike, distance, torch.inf).amin(-1)
    counts = scores > scores[:, -1:] + TOLERANCE
    return Difference(
        scores=(scores - their_scores).abs().max().item(),
        boxes=nearest[counts].max().item() if counts.any() else 0.0,
        num_compared=int(counts.sum()),
    )


def check(model: DenoisingDETR, exported) -> list[Difference]:
    """The differences on CHECKED; InputError where one is larger than TOLERANCE."""
    differences = []
    for batch, height, width in CHECKED:
        difference = compare(model, exported, example(batch, height, width))
        if not (difference.scores <= TOLERANCE and difference.boxes <= TOLERANCE):
            raise InputError(
                f"the exported model differs from the model on {batch} images of {height}x{width}: "
                f"scores by {difference.scores:.1e}, boxes by {difference.boxes:.1e} of the image, "
                f"more than {TOLERANCE:g}; the file is not kept."
            )
        differences.append(difference)
    return differences


def export(model: DenoisingDETR, path: Path, kind: str, about: dict) -> list[Difference]:
    """Write, read again and compare; the file is kept only where nothing differs."""
    if model.has_masks:
        raise InputError("a detector of masks cannot be exported: the file would give boxes alone.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unchecked = path.with_suffix(f".unchecked{path.suffix}")
    write(model, unchecked, kind, about)
    try:
        differences = check(model, load(unchecked, kind))
    except InputError:
        unchecked.unlink()
        raise
    unchecked.rename(path)
    return differences
