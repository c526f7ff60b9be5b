"""Export a detector to ONNX or torch.export as one graph of standard operators.

The graph runs any batch and image size, H and W being multiples of `graphs.side_step`. See `graphs`
for its inputs and outputs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dn_detr import __version__
from dn_detr.d2.export.graphs import detections_of, graph_of, side_step
from dn_detr.d2.modeling.faster_rcnn import DenoisingRCNN
from dn_detr.errors import InputError
from dn_detr.ops import pytorch_operators

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}

SMALLEST_SIDE = 96
"""Smallest H and W; below, the coarsest level of a multi-scale model is one cell wide, which
`torch.export` would trace differently."""

OPSET = 18
"""ONNX opset. TensorRT gives wrong results for GridSample of opset 20 (NVIDIA/TensorRT#4646)."""

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "masks")
"""Output names; "masks" only of detectors with masks."""

TRACED = (2, 4, 5)
"""Batch size, and height and width in multiples of `side_step`, for tracing."""

CHECKED = ((1, 6, 3), (3, 5, 8))
"""Sizes of the same form for the comparison with the model, all different from TRACED."""

TOLERANCE = 1e-3
"""Largest accepted difference of scores, coordinates in [0, 1] and mask probabilities."""

MASKS = "logits over the canvas: enlarge bilinearly, cut to the image; above 0 is the object"
"""Description of the output of masks, for metadata."""

METADATA = "dn_detr"
"""Key of the `metadata` in a file, as JSON."""


def trace(model: nn.Module) -> ExportedProgram:
    """Trace the inference of a detector for any batch and size."""
    batch, height, width = Dim("batch"), Dim("height"), Dim("width")
    step = side_step(model)
    images = {0: batch, 2: step * height, 3: step * width}
    inputs = example(*in_pixels(TRACED, step), device=model.device)
    return torch.export.export(graph_of(model), inputs, dynamic_shapes=(images, {0: batch}))


def in_pixels(size: tuple[int, int, int], step: int) -> tuple[int, int, int]:
    """Convert height and width in an entry of TRACED or CHECKED to pixels."""
    batch, height, width = size
    return batch, step * height, step * width


def example(
    batch: int, height: int, width: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Make a deterministic batch of blobs with noise, in which each image is smaller than the last.

    Returns:
        Images [B, 3, H, W] float32 in 0..255, and sizes [B, 2] int64 (height, width).
    """
    generator = torch.Generator().manual_seed(height * width + batch)
    coarse = torch.rand(batch, 3, 6, 8, generator=generator)
    blobs = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    noise = torch.rand(batch, 3, height, width, generator=generator)
    steps = torch.arange(batch)
    sizes = torch.stack((height - 9 * steps, width - 13 * steps), dim=1)
    return (200 * blobs + 55 * noise).to(device), sizes.to(device)


# ----------------------------------------------------------------------------------------- files


def metadata(cfg, class_names: list[str], model: nn.Module) -> dict:
    """Return what a program needs to prepare inputs and interpret outputs of the graph."""
    is_detr = cfg.MODEL.META_ARCHITECTURE == "DenoisingDETR"
    return {
        "class_names": list(class_names),
        "channel_order": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "is_normalised_inside": True,
        "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "interpolation": "bilinear",
        "side_step": side_step(model),
        "smallest_side": SMALLEST_SIDE,
        "boxes": "xyxy in [0, 1] of the image",
        "masks": MASKS if cfg.MODEL.MASK_ON else None,
        "method": cfg.MODEL.DN_DETR.METHOD if is_detr else "faster_rcnn",
        "made_with": f"dn_detr {__version__}, torch {torch.__version__}",
    }


def write(model: nn.Module, path: Path, kind: str, about: dict) -> None:
    """Trace a model and write the graph and its metadata; see `export`."""
    if kind == "torch-export":
        with pytorch_operators():
            program = trace(model)
        torch.export.save(program, path, extra_files={METADATA: json.dumps(about)})
        return
    from dn_detr.d2.export.onnx_operators import simplify, translations

    program = trace(model)
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=INPUTS,
        output_names=OUTPUTS[: len(program.graph_signature.user_outputs)],
        custom_translation_table=translations(),
        optimize=False,  # takes minutes
        verbose=False,
    )
    simplify(onnx_program.model)
    onnx_program.model.metadata_props[METADATA] = json.dumps(about)
    onnx_program.save(path)


def load(path: Path, kind: str):
    """Load an exported graph on the CPU as a function with the inputs and outputs in `graphs`."""
    if kind == "torch-export":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=True)}
        return tuple(torch.from_numpy(x) for x in session.run(None, feed))

    return run


def need_onnx() -> None:
    """Raise an InputError unless the packages that write and run ONNX files are installed."""
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
    """Largest differences between an exported graph and the model on one batch.

    Args:
        size: (batch, height, width).
        scores: Difference of scores.
        boxes: Difference of coordinates in [0, 1].
        masks: Difference of mask probabilities; None without masks.
        num_compared: Number of compared detections.
    """

    size: tuple[int, int, int]
    scores: float
    boxes: float
    masks: float | None
    num_compared: int

    @property
    def worst(self) -> float:
        """Largest of the three differences; NaN if one is."""
        values = (self.scores, self.boxes, 0.0 if self.masks is None else self.masks)
        return torch.tensor(values).max().item()

    def __str__(self) -> str:
        batch, height, width = self.size
        masks = "" if self.masks is None else f", masks by {self.masks:.1e}"
        return (
            f"{batch} x {height}x{width}: scores differ by at most {self.scores:.1e}, boxes by "
            f"{self.boxes:.1e} of the image{masks}, over {self.num_compared} detections"
        )


@torch.no_grad()
def compare(model: nn.Module, exported, inputs: tuple[Tensor, Tensor]) -> Difference:
    """Compare the detections of an exported graph with those of the model on one batch.

    Scores are compared rank by rank. Detections with almost equal scores may change places, so the
    box and mask of a detection are compared with the nearest of the same label and almost the same
    score. Detections with almost the lowest score are skipped: the graph may lack them.

    Args:
        model: The detector.
        exported: Function with the inputs and outputs in `graphs`.
        inputs: Images [B, 3, H, W] and sizes [B, 2].

    Raises:
        InputError: If the shapes of outputs differ.
    """
    boxes, scores, labels, *masks = detections_of(model, *inputs)
    their_boxes, their_scores, their_labels, *their_masks = exported(*inputs)
    for one, other in zip((boxes, *masks), (their_boxes, *their_masks), strict=True):
        if other.shape != one.shape:
            raise InputError(
                f"the exported model gives {list(other.shape)} instead of {list(one.shape)} boxes "
                "or masks."
            )
    of_boxes = (boxes[:, :, None] - their_boxes[:, None]).abs().amax(-1)  # [B, k, k]
    of_masks = torch.zeros_like(of_boxes)
    for one, other in zip(masks, their_masks, strict=True):
        flat = (logits.sigmoid().flatten(2) for logits in (one, other))
        of_masks = torch.cdist(*flat, p=torch.inf)
    is_close = (scores[:, :, None] - their_scores[:, None]).abs() <= TOLERANCE
    is_alike = is_close & (labels[:, :, None] == their_labels[:, None])
    distance = torch.where(is_alike, torch.maximum(of_boxes, of_masks), torch.inf)
    nearest = distance.argmin(-1, keepdim=True)
    counts = scores > scores[:, -1:] + TOLERANCE

    def largest(distance: Tensor) -> float:
        found = torch.where(is_alike, distance, torch.inf).gather(-1, nearest)[counts]
        return found.max().item() if counts.any() else 0.0

    batch, _, height, width = inputs[0].shape
    return Difference(
        size=(batch, height, width),
        scores=(scores - their_scores).abs().max().item(),
        boxes=largest(of_boxes),
        masks=largest(of_masks) if masks else None,
        num_compared=int(counts.sum()),
    )


def check(model: nn.Module, exported) -> list[Difference]:
    """Compare on the sizes of CHECKED; InputError if a difference exceeds TOLERANCE."""
    differences = []
    for size in CHECKED:
        inputs = example(*in_pixels(size, side_step(model)))
        difference = compare(model, exported, inputs)
        if not difference.worst <= TOLERANCE:
            raise InputError(
                f"the exported model differs from the model by more than {TOLERANCE:g} and is not "
                f"kept: {difference}."
            )
        differences.append(difference)
    return differences


def export(model: nn.Module, path: Path, kind: str, about: dict) -> list[Difference]:
    """Write a graph, load it and compare it with the model.

    Args:
        model: The detector.
        path: File to write.
        kind: One of FORMATS.
        about: See `metadata`.

    Returns:
        The differences on the sizes of CHECKED.

    Raises:
        InputError: If the model cannot be exported or the graph differs; no file is kept then.
    """
    if kind == "torch-export" and isinstance(model, DenoisingRCNN):
        raise InputError(
            "a Faster R-CNN cannot be exported to torch-export, whose graph would require at least "
            "two detections: use --format onnx."
        )
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
