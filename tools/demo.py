#!/usr/bin/env python
"""Draw detections in images, videos or frames of a webcam.

    python tools/demo.py --input street.jpg --output found.jpg --opts MODEL.WEIGHTS model.pth
    python tools/demo.py --input pictures/ --output found/ --opts MODEL.WEIGHTS model.pth
    python tools/demo.py --input "a/*.png" drive.mp4 --output found/ --opts MODEL.WEIGHTS model.pth
    python tools/demo.py --input webcam --output found.mp4 --opts MODEL.WEIGHTS model.pth

Needs no display. A class has the same colour in every image and frame. The webcam (webcam:1 is the
second one) is recorded until Ctrl-C. Checkpoints without a configuration need --config-file.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from dn_detr import Detector
from dn_detr.d2.inference.saved_detector import weights_named
from dn_detr.d2.inference.visualization import draw_found
from dn_detr.detector import to_pixels
from dn_detr.errors import InputError

CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
"""Codecs that OpenCV's wheels bring along, by the suffix of a video to write."""

VIDEOS = (*CODECS, ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
WEBCAM = "webcam"
FRAMES_PER_SECOND = 25.0  # if the source has none


def find_inputs(names: list[str]) -> list[Path]:
    """Expand file names, folders (their images and videos) and glob patterns."""
    suffixes = {*Image.registered_extensions(), *VIDEOS}
    found = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            if not inside:
                raise InputError(f"the folder {name!r} contains no images and no videos.")
            found += inside
        elif path.exists():
            found.append(path)
        elif glob.has_magic(name):
            matching = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            if not matching:
                raise InputError(f"no file matches {name!r}.")
            found += [p for p in matching if not p.is_dir()]
        else:
            raise InputError(f"the input {name!r} does not exist.")
    return found


def output_files(inputs: list[Path], output: Path) -> list[Path]:
    """Return the output file of each input: `output` itself, or a file of that name inside it."""
    if len(inputs) == 1 and output.suffix and not output.is_dir():
        return [output]
    if output.is_file():
        raise InputError(f"the output {str(output)!r} must be a folder for {len(inputs)} inputs.")
    names = [p.name if not is_video(p) else p.with_suffix(".mp4").name for p in inputs]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise InputError(
            f"several inputs would be written to {output / min(repeated)}: process them one by one."
        )
    return [output / name for name in names]


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def draw_picture(detector: Detector, source: Path, target: Path) -> int:
    """Write the image with its detections; return their number."""
    pixels = to_pixels(source, "RGB")
    found = detector(pixels, channel_order="RGB")
    try:
        Image.fromarray(draw_found(pixels, found)).save(target)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(target)!r} cannot be written: {error}.") from error
    return len(found)


def frames_of(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Yield BGR frames to the end, or until Ctrl-C."""
    try:
        while True:
            is_there, frame = capture.read()
            if not is_there:
                return
            yield frame
    except KeyboardInterrupt:
        return


def draw_video(detector: Detector, source: Path | int, target: Path) -> int:
    """Write the video of a file or webcam number with detections; return the number of frames."""
    name = f"the webcam {source}" if isinstance(source, int) else f"the video {str(source)!r}"
    codec = CODECS.get(target.suffix.lower())
    if codec is None:
        raise InputError(f"videos are written as {', '.join(CODECS)}, not as {str(target)!r}.")
    if isinstance(source, Path) and not source.is_file():  # a FIFO would wait for ever
        raise InputError(f"{name} is not a regular file.")
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not capture.isOpened():
        raise InputError(f"{name} cannot be opened.")
    rate = capture.get(cv2.CAP_PROP_FPS) or FRAMES_PER_SECOND
    total = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    writer, count = None, 0
    try:
        for frame in tqdm(frames_of(capture), total=total, unit="frame", disable=None):
            found = detector(frame, channel_order="BGR")
            drawn = draw_found(frame[:, :, ::-1], found, enlarges=False)
            if writer is None:
                size = (drawn.shape[1], drawn.shape[0])
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*codec), rate, size)
                if not writer.isOpened():
                    raise InputError(f"the video {str(target)!r} cannot be written.")
            writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
            count += 1
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not count:
        raise InputError(f"{name} has no frames.")
    return count


def run(detector: Detector, names: list[str], output: Path) -> list[str]:
    """Draw all inputs; return a message for each that could not be read."""
    if any(name.startswith(WEBCAM) and not os.path.exists(name) for name in names):
        if len(names) > 1:
            raise InputError("a webcam must be the only input.")
        number = names[0].removeprefix(WEBCAM).removeprefix(":") or "0"
        if not number.isdecimal():
            raise InputError(f"a webcam is 'webcam' or 'webcam:1', got {names[0]!r}.")
        output.parent.mkdir(parents=True, exist_ok=True)
        frames = draw_video(detector, int(number), output)
        print(f"{names[0]} -> {output}: {frames} frames")
        return []
    inputs = find_inputs(names)
    faults = []
    for source, target in zip(inputs, output_files(inputs, output), strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if is_video(source):
                what = f"{draw_video(detector, source, target)} frames"
            else:
                what = f"{draw_picture(detector, source, target)} objects"
        except InputError as error:
            faults.append(str(error))
        else:
            print(f"{source} -> {target}: {what}")
    return faults


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", help="for checkpoints without a configuration")
    parser.add_argument(
        "--input", nargs="+", required=True, help="images, videos, folders, patterns, or webcam"
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder, or one file")
    parser.add_argument("--confidence-threshold", type=float, default=0.3)
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs, including MODEL.WEIGHTS",
    )
    args = parser.parse_args(arguments)
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold must be in [0, 1], got {args.confidence_threshold:g}")
    try:
        detector = Detector.from_checkpoint(
            weights_named(args.config_file, args.opts),
            config_file=args.config_file,
            opts=args.opts,
            threshold=args.confidence_threshold,
        )
        faults = run(detector, args.input, args.output)
    except InputError as error:
        sys.exit(f"demo.py: {error}")
    if faults:
        sys.exit("\n".join(f"demo.py: {fault}" for fault in faults))


if __name__ == "__main__":
    main()
