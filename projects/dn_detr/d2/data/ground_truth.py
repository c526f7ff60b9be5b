"""The one reader of ground truth and results: checked arrays from a COCO file or from dicts.

Training, the report before it, teachers and the evaluation all take what is read here. A file is
parsed once; its arrays are kept in a cache folder by content, and all processes and workers map
them into memory.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from dn_detr.d2.data.array_cache import content_key, kept
from dn_detr.d2.data.plausibility import box_warnings
from dn_detr.errors import InputError, on_one_line, quoted

_SALT = sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Part of the key in the cache: other checks must not find old arrays."""

ROUNDING = 0.1
"""Boxes that leave their image by up to this many pixels are not reported, nor changed."""

SMALLEST_SIDE = 1e-3
"""Boxes with a shorter side, in pixels, have no size; single precision would lose them later."""

FAULTS = (
    "dropped    boxes without size",
    "dropped    boxes outside their image",
    "clipped    boxes at the border of their image",
)
"""What can be wrong with a box; the first two are no objects."""

NO_SIZE, OUTSIDE, CLIPPED, SOUND = range(4)

_NUM_EXAMPLES = 3
_LARGEST = 1e9

# --------------------------------------------------------------------------- what a file may hold

Id = int | str
_Number = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
_Box = tuple[_Number, _Number, _Number, _Number]
Side = Annotated[float, msgspec.Meta(ge=1, le=1e6, multiple_of=1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
_Flag = Annotated[int, msgspec.Meta(ge=0, le=1)] | bool | None
_Area = Annotated[float, msgspec.Meta(ge=0, le=_LARGEST**2)] | None
_NOTHING = (b"null", b"[]", b"{}", b'""')


class Image(msgspec.Struct, gc=False):
    """An image of a COCO file."""

    id: Id
    file_name: Name
    width: Side
    height: Side


class Category(msgspec.Struct):
    """A class of a COCO file."""

    id: Id
    name: str
    supercategory: Any = None


class Annotation(msgspec.Struct, gc=False):
    """A box of a COCO file; its outline stays as it is written."""

    image_id: Id
    category_id: Id
    bbox: _Box
    id: Id | None = None
    area: _Area = None
    iscrowd: _Flag = None
    ignore: _Flag = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


class CocoFile(msgspec.Struct):
    """What is read of a COCO file; a hidden test set has no annotations."""

    images: list[Image]
    categories: list[Category]
    annotations: list[Annotation] | None = None


class _Result(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: _Box
    score: _Number


class _Rle(msgspec.Struct):
    size: tuple[int, int]
    counts: str | list[Annotated[int, msgspec.Meta(ge=0, le=10**12)]]


_Outline = _Rle | list[list[_Number]]


_decoder = cache(msgspec.json.Decoder)


def decode(data: bytes, kind: Any, source: str) -> Any:
    """Parse JSON into a type of msgspec; InputError with one sentence about `source` if not."""
    try:
        return _decoder(kind).decode(data.removeprefix(b"\xef\xbb\xbf"))
    except msgspec.ValidationError as error:
        text, _, place = str(error).replace("`", "").partition(" - at $")
        place = place.strip(".") or "the file"
        reason = f"{place} is not as in COCO format: {text[:1].lower()}{text[1:]}"
    except RecursionError:
        reason = "its values are nested too deeply"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except msgspec.DecodeError as error:
        reason = f"it is not valid JSON: {error}"
        if found := re.search(r"byte (\d+)", reason):
            at = int(found[1])
            near = data[max(at - 30, 0) : at + 30].decode(errors="replace")
            reason += f", near {quoted(near)}"
            if b"NaN" in data[at : at + 4] or b"Infinity" in data[at : at + 10]:
                reason += "; NaN and Infinity are no numbers"
    raise InputError(f"{source}: {reason}.")


@contextlib.contextmanager
def _readable(file_name: str, what: str, hint: str = "") -> Iterator[None]:
    """Raise InputError for what may happen on opening a file; `what` names its role."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"there is no {what} {file_name}{hint}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"the {what} {file_name} cannot be read: {error}.") from None


def _regular(file_name: str) -> Path:
    """Return the local path of a file; OSError if reading it might never end."""
    path = Path(PathManager.get_local_path(file_name))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path


# ------------------------------------------------------------------------------------------ arrays


@dataclass(frozen=True, eq=False)
class Texts:
    """Byte strings in one buffer.

    Args:
        data: [bytes] uint8.
        ends: [N] int64, where each string ends.
    """

    data: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: list) -> Texts:
        """Join buffers of bytes."""
        sizes = np.fromiter((memoryview(text).nbytes for text in texts), np.int64, len(texts))
        return cls(np.frombuffer(bytearray().join(texts), np.uint8), sizes.cumsum())

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()


@dataclass
class Finding:
    """Boxes with the same fault: their number, and the first few as text."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


def find_faults(
    faults: np.ndarray, boxes: np.ndarray, name_of: Callable[[int], str]
) -> list[Finding]:
    """Count the boxes of each of FAULTS.

    Args:
        faults: [N] int, NO_SIZE to SOUND.
        boxes: [N, 4], xywh pixels as given.
        name_of: Index of a box -> file name of its image.
    """
    found = []
    for fault in range(len(FAULTS)):
        which = np.flatnonzero(faults == fault)
        examples = [
            f"{name_of(i)} [{', '.join(f'{v:g}' for v in boxes[i])}]" for i in which[:_NUM_EXAMPLES]
        ]
        found.append(Finding(len(which), examples))
    return found


def describe(found: list[Finding]) -> list[str]:
    """Return one line for every kind of fault that occurred."""
    return [
        f"{text}: {finding.count} ({on_one_line(', '.join(finding.examples))}"
        f"{', ...' if finding.count > len(finding.examples) else ''})"
        for text, finding in zip(FAULTS, found, strict=True)
        if finding.count
    ]


def fit_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Judge boxes and clip those that leave their image.

    Args:
        boxes: [N, 4] float64, xywh pixels, finite.
        sizes: [N, 2] float64, (width, height) of each box's image; inf if unknown.

    Returns:
        Boxes [N, 4] float64 xywh, changed only where they were clipped; faults [N] uint8.
    """
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    inside = corners.clip(0, np.tile(sizes, 2))
    faults = np.full(len(boxes), SOUND, np.uint8)
    faults[(np.abs(inside - corners) > ROUNDING).any(1)] = CLIPPED
    faults[(inside[:, 2:] - inside[:, :2] < SMALLEST_SIDE).any(1)] = OUTSIDE
    faults[(corners[:, 2:] - corners[:, :2] < SMALLEST_SIDE).any(1)] = NO_SIZE
    clipped = np.concatenate((inside[:, :2], inside[:, 2:] - inside[:, :2]), axis=1)
    return np.where((faults == CLIPPED)[:, None], clipped, boxes), faults


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Checked annotations of I images and N boxes of K classes. All boxes are inside their image.

    Boxes are sorted by image and keep their order within one.

    Args:
        source: Name of the file or dataset, for messages.
        class_names: [K].
        category_ids: [K], the user's ids.
        has_annotations: False for a test set whose annotations are not public.
        images: [I] texts, JSON objects with file_name, image_id and, if known, height and width.
        sizes: [I, 2] float64, (width, height) in pixels, inf if unknown.
        starts: [I + 1] int64; image i has the boxes starts[i]:starts[i + 1].
        boxes: [N, 4] float64, xywh pixels, as given unless clipped visibly.
        labels: [N] int64 in [0, K).
        is_crowd: [N] bool.
        given_areas: [N] float64, NaN where none is given.
        entries: [N] int64, index in the file's list of annotations.
        outlines: [N] texts, JSON as in the file, unchecked; see `check_outlines`.
        faulty_boxes: [F, 4] float64, xywh pixels of dropped and clipped boxes, as given.
        faulty_images: [F] int64, their images.
        faults: [F] uint8, what is wrong with them.
        warnings: Sentences on what looks wrong.
        group: Class without boxes that only groups all others, as Roboflow writes; else None.
        key: Of the file in the cache; None for dicts.
    """

    source: str
    class_names: list[str]
    category_ids: list[int | str]
    has_annotations: bool
    images: Texts
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    given_areas: np.ndarray
    entries: np.ndarray
    outlines: Texts
    faulty_boxes: np.ndarray
    faulty_images: np.ndarray
    faults: np.ndarray
    warnings: list[str]
    group: int | None = None
    key: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> dict:
        """Return file_name (as given), image_id and, if known, height and width of an image."""
        return msgspec.json.decode(self.images[i])

    @cached_property
    def image_of_box(self) -> np.ndarray:
        """Index of each box's image, [N] int64."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    @cached_property
    def index_of_id(self) -> dict[int | str, int]:
        """The user's image id -> index of the image."""
        index = {self.image(i)["image_id"]: i for i in range(len(self))}
        if len(index) < len(self):
            raise InputError(f"{self.source}: an image id is used twice, so ids name no image.")
        return index

    def index(self, image_id, where: str) -> int:
        """Return the index of the image with the user's id; InputError about `where` if none."""
        if image_id not in self.index_of_id:
            raise InputError(
                f"{where} has the image_id {quoted(image_id)}, which is not in {self.source}."
            )
        return self.index_of_id[image_id]

    def without_group(self) -> GroundTruth:
        """Return the same without the class `group`."""
        names, ids, k = list(self.class_names), list(self.category_ids), self.group
        said = f"the super-category {quoted(names.pop(k))} has no objects and is no class"
        del ids[k]
        return replace(
            self,
            class_names=names,
            category_ids=ids,
            labels=self.labels - (self.labels > k),
            warnings=[*self.warnings, said],
            group=None,
        )

    def findings(self) -> list[Finding]:
        """Count dropped and clipped boxes; see `find_faults`."""
        return find_faults(
            self.faults,
            self.faulty_boxes,
            lambda i: self.image(self.faulty_images[i])["file_name"],
        )

    def corners(self, i: int) -> np.ndarray:
        """Return the boxes of an image, [n, 4] float64 xyxy pixels inside it."""
        boxes = self.boxes[self.starts[i] : self.starts[i + 1]]
        corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
        return corners.clip(0, np.tile(self.sizes[i], 2))

    @property
    def areas(self) -> np.ndarray:
        """Areas for the evaluation, [N] float64: as given, else of the box."""
        return np.where(np.isnan(self.given_areas), self.boxes[:, 2:].prod(1), self.given_areas)

    def outline(self, i: int) -> list | dict:
        """Return the outline of a box: its polygons, or a compressed run-length code."""
        value = msgspec.json.decode(self.outlines[i])
        if not value:  # only crowd regions may have none
            x, y, w, h = self.boxes[i].tolist()
            return [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if isinstance(value, list):
            return [polygon for polygon in value if len(polygon) >= 6]
        if isinstance(value["counts"], list):
            return coco_mask.frPyObjects(value, *value["size"])
        return {"size": value["size"], "counts": value["counts"]}

    def to_coco(self, *, with_masks: bool = False) -> COCO:
        """Make pycocotools' ground truth in memory, with numbers of our own instead of ids.

        Image, box and class with the index i have the id i + 1, so that any ids of the user work.
        """
        numbers = (
            self.image_of_box + 1,
            self.labels + 1,
            self.boxes,
            self.areas,
            self.is_crowd * 1,
        )
        names = ("image_id", "category_id", "bbox", "area", "iscrowd")
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{**self.image(i), "id": i + 1} for i in range(len(self))],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(self.class_names)],
            "annotations": [
                {"id": i, **dict(zip(names, values, strict=True))}
                for i, values in enumerate(zip(*(n.tolist() for n in numbers), strict=True), 1)
            ],
        }
        if with_masks:
            for i, annotation in enumerate(coco.dataset["annotations"]):
                annotation["segmentation"] = self.outline(i)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


# ---------------------------------------------------------------------------------------- checking


def _first_repeated(ids: Iterable) -> Any:
    seen: set = set()
    return next((value for value in ids if value in seen or seen.add(value)), None)


def judge(file: CocoFile, source: str) -> GroundTruth:
    """Check a parsed file and turn it into arrays."""
    if not file.images or not file.categories:
        raise InputError(f"{source} has no {'categories' if file.images else 'images'}.")
    annotations = file.annotations or []
    for kind, entries in (
        ("category", file.categories),
        ("image", file.images),
        ("annotation", [a for a in annotations if a.id is not None]),
    ):
        repeated = _first_repeated(entry.id for entry in entries)
        if repeated is not None:
            raise InputError(f"{source}: the {kind} id {quoted(repeated)} is used twice.")
    images = sorted(file.images, key=_by_id)  # as in Detectron2
    categories = sorted(file.categories, key=_by_id)
    image_of = {image.id: i for i, image in enumerate(images)}
    label_of = {category.id: k for k, category in enumerate(categories)}
    for i, a in enumerate(annotations):
        fault = ""
        if a.image_id not in image_of:
            fault = f"has image_id {quoted(a.image_id)}, which is not in 'images'"
        elif a.category_id not in label_of:
            fault = f"has category_id {quoted(a.category_id)}, which is not in 'categories'"
        elif a.ignore:
            fault = "has 'ignore', which is not supported: use 'iscrowd'"
        if fault:
            raise InputError(f"{source}: annotations[{i}] (id {quoted(a.id)}) {fault}.")
    num = len(annotations)
    image = np.fromiter((image_of[a.image_id] for a in annotations), np.int64, num)
    label = np.fromiter((label_of[a.category_id] for a in annotations), np.int64, num)
    given = np.array([a.bbox for a in annotations], np.float64).reshape(-1, 4)
    area = np.array([np.nan if a.area is None else a.area for a in annotations], np.float64)
    has_outline = np.fromiter((_has_outline(a) for a in annotations), bool, num)
    is_crowd = np.fromiter((bool(a.iscrowd) for a in annotations), bool, num)
    sizes = np.array([(image.width, image.height) for image in images], np.float64)
    objects = [array[~is_crowd] for array in (given, label, image)]
    boxes, faults = fit_boxes(given, sizes[image])
    area[(faults == CLIPPED) & ~has_outline] = np.nan  # of the whole box
    kept = np.flatnonzero(faults >= CLIPPED)
    kept = kept[np.argsort(image[kept], kind="stable")]
    faulty = np.flatnonzero(faults != SOUND)
    return GroundTruth(
        source=source,
        class_names=[category.name for category in categories],
        category_ids=[category.id for category in categories],
        has_annotations=file.annotations is not None,
        images=Texts.of([image_text(image, image.id) for image in images]),
        sizes=sizes,
        starts=np.searchsorted(image[kept], np.arange(len(images) + 1)),
        boxes=boxes[kept],
        labels=label[kept],
        is_crowd=is_crowd[kept],
        given_areas=area[kept],
        entries=kept,
        outlines=Texts.of([annotations[i].segmentation if has_outline[i] else b"[]" for i in kept]),
        faulty_boxes=given[faulty],
        faulty_images=image[faulty],
        faults=faults[faulty],
        warnings=box_warnings(*objects, sizes, [image.file_name for image in images]),
        group=_group(categories, label),
    )


def _group(categories: list[Category], labels: np.ndarray) -> int | None:
    """Return the class without boxes that is the supercategory of all others, None if none is."""
    for parent in (category.supercategory for category in categories[:2]):  # one of them is another
        odd = [k for k, category in enumerate(categories) if category.supercategory != parent]
        if len(odd) == 1 and categories[odd[0]].name == parent and odd[0] not in labels:
            return odd[0]
    return None


def _by_id(entry) -> tuple[bool, int | str]:
    return isinstance(entry.id, str), entry.id


def _has_outline(annotation: Annotation) -> bool:
    raw = annotation.segmentation
    return memoryview(raw).nbytes > 9 or b"".join(bytes(raw).split()) not in _NOTHING


def image_text(image: Image, image_id: Id) -> bytes:
    """Return an entry of `GroundTruth.images`."""
    known = {"file_name": image.file_name, "image_id": image_id}
    if np.isfinite(image.width):
        known |= {"height": int(image.height), "width": int(image.width)}
    return msgspec.json.encode(known)


def check_outlines(truth: GroundTruth) -> np.ndarray:
    """Check the outlines of all boxes; return areas [N] float64, missing ones from the outlines.

    Polygons need three points near their image, run-length codes the size of their image. A polygon
    of fewer points is left out where its box has another one.

    Raises:
        InputError: If an object has no outline, or an invalid one.
    """
    areas = truth.given_areas.copy()
    if len(areas) and not np.isfinite(truth.sizes).all():
        raise InputError(f"{truth.source}: MODEL.MASK_ON needs width and height of every image.")
    for i, image in enumerate(truth.image_of_box.tolist()):
        text = truth.outlines[i]
        if text == b"[]" and truth.is_crowd[i]:  # is its box
            continue
        where = f"{truth.source}: annotations[{truth.entries[i]}].segmentation"
        fault = "is missing, but MODEL.MASK_ON needs one for every box"
        if text != b"[]":
            fault = _outline_fault(decode(text, _Outline, where), *truth.sizes[image].tolist())
        if fault:
            name = quoted(truth.image(image)["file_name"])
            raise InputError(f"{where} (of a box in {name}) {fault}.")
        if np.isnan(areas[i]):
            outline = truth.outline(i)
            if isinstance(outline, list):
                width, height = truth.sizes[image].astype(int).tolist()
                outline = coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
            areas[i] = coco_mask.area(outline)
    return areas


def _outline_fault(outline: _Rle | list[list[float]], width: float, height: float) -> str:
    """Return what is wrong with an outline, as the end of a sentence, or ""."""
    if isinstance(outline, list):
        if all(len(polygon) < 6 for polygon in outline):
            return "must have a polygon of at least 3 points"
        side = max(width, height)
        for polygon in outline:
            if len(polygon) % 2:
                return f"has a polygon with an odd number of coordinates, {len(polygon)}"
            if len(polygon) >= 6 and not -side <= min(polygon) <= max(polygon) <= 2 * side:
                return f"has points far outside its image of {width:g}x{height:g} pixels"
        return ""
    if outline.size != (height, width):
        return (
            f"is for {outline.size[1]}x{outline.size[0]} pixels, its image has {width:g}x{height:g}"
        )
    runs = outline.counts if isinstance(outline.counts, list) else _run_lengths(outline.counts)
    if sum(runs) != outline.size[0] * outline.size[1] or min(runs, default=-1) < 0:
        return "is no run-length code of all pixels of its image"
    return ""


def _run_lengths(code: str) -> list[int]:
    """Decode COCO's compressed run lengths; [-1] if the text is no such code."""
    digits = np.frombuffer(code.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    if not len(ends) or ends[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        return [-1]
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 9:
        return [-1]
    place = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    values = np.add.reduceat((digits & 31) << place, starts)
    values -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)  # the sign is the last digit's
    values[1::2] = np.cumsum(values[1::2])  # differences to the value before the last
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()


# ----------------------------------------------------------------------------------------- reading


def read_coco(json_file: str) -> GroundTruth:
    """Read and check an annotation file in COCO format, or take its arrays from the cache.

    Raises:
        InputError: If the file cannot be read or is not in COCO format.
    """
    hint = (
        f" (working directory {os.getcwd()}): for COCO (https://cocodataset.org/#download) "
        "`export DETECTRON2_DATASETS=FOLDER`, where FOLDER holds coco/; for custom data check the "
        "path; to try without any data use `--config-file configs/quick/dn_deformable.yaml`"
    )
    with _readable(json_file, "annotation file", hint):
        path = _regular(json_file)
        key = content_key(path, _SALT)

    def make() -> dict:
        with _readable(json_file, "annotation file"):
            data = path.read_bytes()
        if key is not None and not key.startswith(sha256(data).hexdigest()[:32]):
            raise InputError(f"{json_file} changes while it is read.")
        return _pack(vars(judge(decode(data, CocoFile, json_file), json_file)))

    return GroundTruth(**{**_unpack(kept(key, make)), "source": json_file, "key": key})


def _pack(values: dict) -> dict:
    """Turn arrays into tensors, which can be saved and mapped into memory."""
    packed = {}
    for name, value in values.items():
        if isinstance(value, Texts):
            packed[name] = [torch.from_numpy(value.data), torch.from_numpy(value.ends)]
        else:
            packed[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return packed


def _unpack(packed: dict) -> dict:
    values = {}
    for name, value in packed.items():
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            values[name] = Texts(*(tensor.numpy() for tensor in value))
        else:
            values[name] = value.numpy() if isinstance(value, torch.Tensor) else value
    return values


def with_outlines(truth: GroundTruth) -> GroundTruth:
    """Return ground truth whose outlines are checked; see `check_outlines`."""
    key = None if truth.key is None else f"{truth.key}-outlines"
    found = kept(key, lambda: {"areas": torch.from_numpy(check_outlines(truth))})
    return replace(truth, given_areas=found["areas"].numpy())


@dataclass(frozen=True, eq=False)
class Results:
    """Checked detections of a result file in COCO's format, N of them.

    Args:
        images: [N] int64, index of the image; -1 if it is not in the dataset.
        labels: [N] int64 in [0, K).
        boxes: [N, 4] float64, xywh pixels.
        scores: [N] float64.
        unknown_ids: Some of the user's image ids that are not in the dataset.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    unknown_ids: list[int | str]

    def to_coco(self) -> list[dict]:
        """Return results with the numbers of `GroundTruth.to_coco`."""
        names = ("image_id", "category_id", "bbox", "score")
        numbers = (self.images + 1, self.labels + 1, self.boxes, self.scores)
        rows = zip(*(n.tolist() for n in numbers), strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]


def read_results(
    file_name: str, truth: GroundTruth, *, what: str = "result file", hint: str = ""
) -> Results:
    """Read a list of image_id, category_id, bbox and score for a dataset.

    Args:
        file_name: A json file.
        truth: The dataset, for its ids.
        what: Role of the file, for messages.
        hint: What to do if there is none, for messages.

    Raises:
        InputError: If the file is not of this form or has a category of no class.
    """
    with _readable(file_name, what, hint):
        data = _regular(file_name).read_bytes()
    results = decode(data, list[_Result], file_name)
    if not results:
        raise InputError(f"{file_name} must hold a list of at least one result.")
    label_of = {category: k for k, category in enumerate(truth.category_ids)}
    image_of, num = truth.index_of_id, len(results)
    for i, result in enumerate(results):
        if result.category_id not in label_of:
            raise InputError(
                f"{file_name}: result {i} has the category_id {quoted(result.category_id)}, which "
                f"is not in {truth.source}."
            )
    images = np.fromiter((image_of.get(r.image_id, -1) for r in results), np.int64, num)
    return Results(
        images=images,
        labels=np.fromiter((label_of[r.category_id] for r in results), np.int64, num),
        boxes=np.array([r.bbox for r in results], np.float64),
        scores=np.fromiter((r.score for r in results), np.float64, num),
        unknown_ids=[results[i].image_id for i in np.flatnonzero(images < 0)[:_NUM_EXAMPLES]],
    )
