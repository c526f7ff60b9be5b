"""Detection in pictures, videos and webcams; as drawings, COCO results, csv, YOLO's format."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from dn_detr.d2.inference.visualization import draw_found
from dn_detr.datasets.image_files import read_rgb
from dn_detr.errors import InputError

FORMATS = ("json", "csv", "yolo")
"""What is written beside pictures."""

CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
"""Codecs that OpenCV's wheels bring along, by the suffix of a video to write."""

VIDEOS = (*CODECS, ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
LISTS = (".txt", ".lst")
WEBCAM = "webcam"
FRAMES_PER_SECOND = 25.0  # if the source has none


@dataclass(frozen=True)
class Selection:
    """Which detections of an image count.

    Args:
        threshold: Minimum score.
        thresholds: That of single classes, by name.
        classes: Names of the classes that count; empty: all.
        top: Most detections in an image; 0: all.
    """

    threshold: float = 0.3
    thresholds: Mapping[str, float] = field(default_factory=dict)
    classes: Sequence[str] = ()
    top: int = 0

    @property
    def lowest(self) -> float:
        """The lowest threshold of all classes."""
        return min(self.threshold, *self.thresholds.values(), 1.0)

    def check(self, class_names: Sequence[str]) -> None:
        """Raise an InputError if a class is none of the detector's."""
        for name in (*self.thresholds, *self.classes):
            if name not in class_names:
                raise InputError(
                    f"there is no class {name!r}: the classes are {', '.join(class_names)}."
                )

    def of(self, found):
        """Return the `DetectedObjects` that count, sorted by score."""
        kept = [
            i
            for i, (name, score) in enumerate(zip(found.class_names, found.scores, strict=True))
            if score >= self.thresholds.get(name, self.threshold)
            and (not self.classes or name in self.classes)
        ]
        kept = kept[: self.top or None]
        return replace(
            found,
            boxes_xyxy_px=found.boxes_xyxy_px[kept],
            scores=found.scores[kept],
            labels=found.labels[kept],
            class_names=[found.class_names[i] for i in kept],
            masks=None if found.masks is None else found.masks[kept],
        )


# ------------------------------------------------------------------------------ inputs and outputs


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def find_inputs(names: Iterable[str], output: Path | None = None) -> list[tuple[Path, Path]]:
    """Find images and videos.

    Args:
        names: Files, folders (with all below them), glob patterns ("**" for any folders), and text
            files that list these, one on a line.
        output: A folder below one of these folders, which is left out.

    Returns:
        Files without repetition, each with its path relative to the folder that was named.
    """
    suffixes = {*Image.registered_extensions(), *VIDEOS}
    found: dict[Path, Path] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            real, skipped = path.resolve(), None
            if output is not None and real in output.resolve().parents:
                skipped = path / output.resolve().relative_to(real)
            inside = sorted(
                p
                for p in path.rglob("[!.]*")
                if p.suffix.lower() in suffixes and skipped not in p.parents
            )
            if not inside:
                raise InputError(f"the folder {name!r} contains no images and no videos.")
            added = {p: p.relative_to(path) for p in inside if not p.is_dir()}
        elif path.suffix.lower() in LISTS and path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            added = dict(find_inputs(filter(None, map(str.strip, lines)), output))
        elif path.exists():
            added = {path: Path(path.name)}
        elif glob.has_magic(name):
            matching = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            if not matching:
                raise InputError(f"no file matches {name!r}.")
            added = {p: Path(p.name) for p in matching if not p.is_dir()}
        else:
            raise InputError(f"the input {name!r} does not exist.")
        found = {**added, **found}
    return sorted(found.items())


class Outputs:
    """Names of output files: never those of an input, and never the same one twice.

    Args:
        inputs: All input files.
        output: Folder, or the file of a single input.
    """

    def __init__(self, inputs: Sequence[Path], output: Path):
        self.is_file = len(inputs) == 1 and output.suffix != "" and not output.is_dir()
        if output.is_file() and not self.is_file:
            raise InputError(
                f"the output {str(output)!r} must be a folder for {len(inputs)} inputs."
            )
        self.output, self.claimed = output, set()
        self.inputs = {_identity(path) for path in inputs}

    def claim(self, relative: Path) -> Path:
        """Return the file for an input, whose name gets a number if it is already taken."""
        path = wanted = self.output if self.is_file else self.output / relative
        number = 2
        while path in self.claimed:
            path = wanted.with_stem(f"{wanted.stem}_{number}")
            number += 1
        if path.exists() and _identity(path) in self.inputs:
            raise InputError(
                f"{path} is an input and would be written over: name another --output."
            )
        self.claimed.add(path)
        return path


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def name_of_picture(relative: Path) -> Path:
    """Return the name of the drawing of an image or video: its own where that can be written."""
    if is_video(relative):
        return relative.with_suffix(".mp4")
    is_writable = Image.registered_extensions().get(relative.suffix.lower()) in Image.SAVE
    return relative if is_writable else relative.with_name(relative.name + ".png")


# ------------------------------------------------------------------------------------ annotations


class Records:
    """The detections of a run as files: COCO results, a table, YOLO's text files.

    Args:
        formats: Of `FORMATS`.
        folder: Where predictions.json, predictions.csv and labels/ are written.
    """

    def __init__(self, formats: Sequence[str], folder: Path):
        self.formats, self.folder = formats, folder
        self.results: list[dict] = []
        self.rows: list[list] = []
        self.num_images = 0

    def add(self, source: Path, found, label_file: Path | None) -> None:
        """Add the detections of an image; label_file is that of YOLO's format."""
        self.num_images += 1
        if "json" in self.formats:
            extra = {"image_id": self.num_images, "file_name": str(source)}
            self.results += [{**extra, **result} for result in found.to_json()]
        for box, score, name in zip(
            found.boxes_xyxy_px.tolist(), found.scores.tolist(), found.class_names, strict=True
        ):
            self.rows.append([source, name, f"{score:.4f}", *(f"{x:.2f}" for x in box)])
        if label_file is not None:
            label_file.parent.mkdir(parents=True, exist_ok=True)
            label_file.write_text(found.to_yolo())

    def write(self, class_names: Sequence[str]) -> list[Path]:
        """Write what holds all images; return the files."""
        written = []
        if self.formats:
            self.folder.mkdir(parents=True, exist_ok=True)
        if "json" in self.formats:
            written.append(self.folder / "predictions.json")
            written[-1].write_text(json.dumps(self.results), encoding="utf-8")
        if "csv" in self.formats:
            written.append(self.folder / "predictions.csv")
            with open(written[-1], "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(["file", "class", "score", "left", "top", "right", "bottom"])
                table.writerows(self.rows)
        if "yolo" in self.formats:
            written.append(self.folder / "labels" / "classes.txt")
            written[-1].parent.mkdir(exist_ok=True)
            written[-1].write_text("\n".join(class_names) + "\n", encoding="utf-8")
        return written


# ------------------------------------------------------------------------------------------ videos


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


def draw_video(
    detect: Callable[[list, str], list], source: Path | int, target: Path, batch_size: int
) -> int:
    """Write the video of a file or webcam number with detections; return the number of frames.

    Args:
        detect: (images, channel order) -> their `DetectedObjects`.
        source: A file, or the number of a webcam, which is recorded until Ctrl-C.
        target: File to write.
        batch_size: Frames at a time; of a webcam one.
    """
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
    frames = tqdm(frames_of(capture), total=total, unit="frame", disable=None)
    writer, count = None, 0
    try:
        for batch in _batches(frames, 1 if isinstance(source, int) else batch_size):
            for frame, found in zip(batch, detect(batch, "BGR"), strict=True):
                drawn = draw_found(frame[:, :, ::-1], found, enlarges=False)
                if writer is None:
                    size = (drawn.shape[1], drawn.shape[0])
                    kind = cv2.VideoWriter_fourcc(*codec)
                    writer = cv2.VideoWriter(str(target), kind, rate, size)
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


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------- all


def predict(
    detector,
    names: Sequence[str],
    output: str | os.PathLike,
    *,
    selection: Selection | None = None,
    save: Sequence[str] = (),
    draws: bool = True,
    batch_size: int = 8,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Detect in files and write what is found.

    Args:
        detector: A `Detector`.
        names: See `find_inputs`; or "webcam", "webcam:1" alone.
        output: Folder, or for one picture or video a file. Files keep their names and sub-folders.
        selection: Which detections count; default: those above the detector's threshold.
        save: Of `FORMATS`.
        draws: Whether pictures are written; videos always are.
        batch_size: Images that are read at a time; those of equal size are one batch.
        say: Gets a line for each file written.

    Returns:
        A sentence for each input that could not be used; all others have been.

    Raises:
        InputError: Before anything is written, if an output would be an input, and for names that
            do not exist.
    """
    output = Path(output).expanduser()
    selection = selection or Selection(detector.threshold)
    selection.check(detector.class_names)

    def detect(images: list, order: str) -> list:
        found = detector(images, channel_order=order, threshold=selection.lowest)
        return [selection.of(one) for one in found]

    if any(name.startswith(WEBCAM) and not os.path.exists(name) for name in names):
        _record_webcam(detect, names, output, say)
        return []
    inputs = find_inputs(names, output)
    outputs = Outputs([source for source, _ in inputs], output)
    folder = output.parent if outputs.is_file else output
    labels = Outputs([], folder / "labels")
    targets = {  # claimed before anything is written
        source: (
            outputs.claim(name_of_picture(relative)),
            labels.claim(relative.with_suffix(".txt"))
            if "yolo" in save and not is_video(source)
            else None,
        )
        for source, relative in inputs
    }
    records, faults = Records(save, folder), []

    def attempt(task: Callable, *arguments):
        try:
            return task(*arguments)
        except InputError as error:
            faults.append(str(error))
            return None

    for batch in _batches((s for s in targets if not is_video(s)), batch_size):
        pixels = {source: attempt(read_rgb, source) for source in batch}
        pixels = {source: image for source, image in pixels.items() if image is not None}
        for source, found in zip(pixels, detect([*pixels.values()], "RGB"), strict=True):
            picture, label_file = targets[source]
            records.add(source, found, label_file)
            if not draws:
                say(f"{source}: {len(found)} objects")
            elif attempt(_write_picture, pixels[source], found, picture):
                say(f"{source} -> {picture}: {len(found)} objects")
    for source in filter(is_video, targets):
        target = targets[source][0]
        target.parent.mkdir(parents=True, exist_ok=True)
        if frames := attempt(draw_video, detect, source, target, batch_size):
            say(f"{source} -> {target}: {frames} frames")
    for path in records.write(detector.class_names):
        say(f"wrote {path}")
    return faults


def _record_webcam(detect: Callable, names: Sequence[str], output: Path, say: Callable) -> None:
    if len(names) > 1:
        raise InputError("a webcam must be the only input.")
    number = names[0].removeprefix(WEBCAM).removeprefix(":") or "0"
    if not number.isdecimal():
        raise InputError(f"a webcam is 'webcam' or 'webcam:1', got {names[0]!r}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    say(f"{names[0]} -> {output}: {draw_video(detect, int(number), output, 1)} frames")


def _write_picture(pixels: np.ndarray, found, target: Path) -> bool:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_found(pixels, found)).save(target)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(target)!r} cannot be written: {error}.") from error
    return True
