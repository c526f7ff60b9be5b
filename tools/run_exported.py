#!/usr/bin/env python
"""Detect objects with an exported ONNX file, without torch.

Needs this repository, onnxruntime, numpy and Pillow.

    python tools/run_exported.py detector.onnx street.jpg holiday/ --output drawn

Prints detections, and with --output draws them. The metadata of the file describe its inputs as
JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

sys.path.append(str(Path(__file__).resolve().parents[1] / "projects"))  # if it is not installed
from dn_detr.datasets.image_files import read_rgb
from dn_detr.errors import BadImage

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def load(path: Path) -> tuple[onnxruntime.InferenceSession, dict]:
    """Open a file; return session and metadata. Raises ValueError for other files."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    state = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except (state.InvalidProtobuf, state.InvalidGraph, state.Fail) as error:
        raise ValueError(f"{path} is not a file that onnxruntime can run") from error
    about = session.get_modelmeta().custom_metadata_map.get("dn_detr")
    if about is None:
        raise ValueError(f"{path} was not made by `dn-detr export`: it has no metadata")
    return session, json.loads(about)


def new_size(width: int, height: int, about: dict) -> tuple[int, int]:
    """Return width and height after resizing the shorter side, limited by the longest side."""
    scale = about["shorter_side"] / min(width, height)
    scale = min(scale, about["longest_side"] / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def prepare(image: Image.Image, about: dict) -> tuple[np.ndarray, np.ndarray]:
    """Convert an RGB image to model inputs: images [1, 3, H, W] and sizes [1, 2]."""
    width, height = new_size(*image.size, about)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    if about["channel_order"] == "BGR":
        pixels = pixels[:, :, ::-1]
    step, least = about["side_step"], about["smallest_side"]
    rows, columns = (-(-max(side, least) // step) * step for side in (height, width))
    canvas = np.zeros((1, 3, rows, columns), np.float32)
    canvas[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return canvas, np.array([[height, width]], np.int64)


class Found(NamedTuple):
    """A detection.

    The box is left, top, right, bottom in pixels of the image; mask: bool [height, width], or
    None if the model predicts only boxes.
    """

    name: str
    score: float
    box: list[float]
    mask: np.ndarray | None


def detect(session, about: dict, image: Image.Image, threshold: float) -> list[Found]:
    """Return detections in an RGB image with at least this score, best first.

    session: onnxruntime.InferenceSession of the exported file.
    """
    images, sizes = prepare(image, about)
    boxes, scores, labels, *masks = session.run(None, {"images": images, "sizes": sizes})
    pixels = boxes[0] * np.array([image.width, image.height] * 2, np.float32)
    found = []
    for index in np.flatnonzero((scores[0] >= threshold) & (scores[0] > 0)):  # 0: no detection
        name = about["class_names"][labels[0, index]]
        mask = None
        if masks:
            mask = enlarge(masks[0][0, index], sizes[0], images.shape[2:], image.size)
        found.append(Found(name, float(scores[0, index]), pixels[index].tolist(), mask))
    return found


def enlarge(
    logits: np.ndarray, size: np.ndarray, canvas: tuple[int, int], wanted: tuple[int, int]
) -> np.ndarray:
    """Resize mask logits [h, w] over the canvas to a bool mask of the original image.

    size, canvas: (height, width) of the resized image and of the canvas; wanted: (width, height).
    """
    rows, columns = (
        n * side / whole for n, side, whole in zip(logits.shape, size, canvas, strict=True)
    )
    resized = Image.fromarray(logits).resize(
        wanted, Image.Resampling.BILINEAR, box=(0, 0, columns, rows)
    )
    return np.asarray(resized) > 0


def draw(image: Image.Image, found: list[Found], class_names: list[str]) -> Image.Image:
    """Draw masks and boxes with names on an image, in a colour for each class, the best on top."""
    pen = ImageDraw.Draw(image)
    for name, score, box, mask in reversed(found):
        label = class_names.index(name)
        color = f"hsl({137 * label % 360}, 100%, 60%)"
        if mask is not None:
            image.paste(color, mask=Image.fromarray(np.uint8(mask) * 110))
        pen.rectangle(box, outline=color, width=2)
        name = name if max(name, default="") < "\u0100" else f"class {label}"  # Pillow's own font
        text, place = f"{name} {score:.2f}", (box[0] + 3, box[1] + 2)
        pen.rectangle(pen.textbbox(place, text), fill="black")
        pen.text(place, text, fill=color)
    return image


def files(paths: list[Path]) -> list[Path]:
    """Return the paths, with the images in folders."""
    found = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [file for file in inside if file == path or file.suffix.lower() in SUFFIXES]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="file made by `dn-detr export`")
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders of images")
    parser.add_argument("--output", type=Path, help="folder for images with drawn boxes")
    parser.add_argument("--confidence-threshold", type=float, default=0.3)
    args = parser.parse_args()
    if onnxruntime is None:
        parser.error("this needs onnxruntime: pip install onnxruntime")
    try:
        session, about = load(args.model)
    except ValueError as error:
        sys.exit(f"run_exported.py: {error}.")
    paths = files(args.images)
    if not paths:
        sys.exit(f"run_exported.py: no images in {', '.join(map(str, args.images))}.")
    faults = []
    for path in paths:
        try:
            image = Image.fromarray(read_rgb(path))
        except BadImage as error:
            faults.append(f"run_exported.py: {error}")
            continue
        found = detect(session, about, image, args.confidence_threshold)
        print(f"{path}: {len(found)} found")
        for name, score, box, _ in found:
            print(f"  {name} {score:.2f} at {' '.join(f'{side:.1f}' for side in box)}")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            draw(image, found, about["class_names"]).save(args.output / f"{path.stem}.png")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
