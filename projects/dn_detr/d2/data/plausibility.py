"""Data that can be read but are probably wrong: warnings, and a table of objects by size."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

SIZES = (32**2, 96**2)
"""Areas in square pixels below which an object is small, and medium, in COCO's evaluation."""

_MIXERS = np.random.default_rng(0).integers(2**63, size=6, dtype=np.uint64) * 2 + 1
_FEWEST = 3  # boxes, without which nothing is concluded about their format
_SHARE = 0.1  # of boxes that leave their image, as nearly no true xywh boxes do
_NUM_NAMES = 5  # most examples in a warning


def box_warnings(
    boxes_xywh: np.ndarray,
    labels: np.ndarray,
    image_index: np.ndarray,
    image_sizes: np.ndarray,
    file_names: list[str],
) -> list[str]:
    """Look for boxes in another format than [x, y, width, height] in pixels, and for doubled ones.

    Args:
        boxes_xywh: [N, 4] as annotated, not clipped.
        labels: [N] int, classes.
        image_index: [N] int in [0, M), the image of each box.
        image_sizes: [M, 2], width and height in pixels.
        file_names: Of the M images.

    Returns:
        A sentence for each suspicion.
    """
    found = []
    boxes, sizes = np.asarray(boxes_xywh, np.float64).reshape(-1, 4), image_sizes[image_index]
    if len(boxes) >= _FEWEST and (boxes <= 1).all() and (boxes >= 0).all() and (sizes > 2).all():
        found.append(
            "all boxes lie between 0 and 1, as if divided by the image size: COCO's are in pixels"
        )
    corners = boxes[:, :2] + boxes[:, 2:]
    leaves = (corners > sizes + 1).any(axis=1)
    fits_as_corners = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1)).all()
    if len(boxes) >= _FEWEST and fits_as_corners and leaves.mean() >= _SHARE:
        found.append(
            f"{leaves.sum()} of {len(boxes)} boxes leave their image, but none would as [left, "
            "top, right, bottom]: COCO's boxes are [x, y, width, height]"
        )
    rows = np.column_stack((image_index, labels, boxes + 0.0))
    hashes = rows.view(np.uint64) @ _MIXERS  # sorting them is faster than sorting rows
    rows = rows[np.argsort(hashes, kind="stable")]
    repeats = rows[1:][(rows[1:] == rows[:-1]).all(1)]
    if len(repeats):
        images = dict.fromkeys(file_names[i] for i in np.unique(repeats[:, 0]).astype(int))
        found.append(
            f"{len(repeats)} boxes repeat another of the same class in the same image: "
            f"{_few(images)}"
        )
    return found


def name_warnings(class_names: list[str]) -> list[str]:
    """Return a sentence if classes differ only in upper case and blanks, or not at all."""
    plain = [" ".join(name.split()).casefold() for name in class_names]
    counts = Counter(plain)
    same = [repr(name) for name, key in zip(class_names, plain, strict=True) if counts[key] > 1]
    return [f"several classes have the same name: {_few(same)}"] if same else []


def file_warnings(files: dict[str, list[str]], groups: list[list[int]]) -> list[str]:
    """Return a sentence for each dataset with equal images, and each pair that shares some.

    Args:
        files: Dataset -> file names of its images.
        groups: Equal files as indices into all file names, dataset by dataset; see
            `image_check.equal_files`.
    """
    owners = [(name, file) for name, names in files.items() for file in names]
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group in groups:
        first: dict[str, str] = {}  # dataset -> its first file of this content
        for name, file in (owners[i] for i in group):
            for other in first:
                found[other, name].append(f"{file} = {first[other]}")
            first.setdefault(name, file)
    return [
        f"dataset {name}: {len(pairs)} images are equal to {'others' if one == name else 'images'} "
        f"of {'it' if one == name else one}: {_few(pairs)}"
        for (one, name), pairs in found.items()
    ]


def size_table(boxes_xywh: np.ndarray, labels: np.ndarray, class_names: list[str]) -> str:
    """Count objects by class and by COCO's sizes, here of the boxes' areas.

    Args:
        boxes_xywh: [N, 4] in pixels.
        labels: [N] int in [0, K).
        class_names: K names.
    """
    counts = np.zeros((len(class_names) + 1, len(SIZES) + 1), np.int64)
    areas = np.asarray(boxes_xywh, np.float64).reshape(-1, 4)[:, 2:].prod(axis=1)
    np.add.at(counts, (labels, np.digitize(areas, SIZES)), 1)
    counts[-1] = counts.sum(axis=0)
    names = [*class_names, "all"]
    width = max(map(len, ("class", *names)))
    lines = [f"  {'class':{width}} {'objects':>9} {'small':>9} {'medium':>9} {'large':>9}"]
    for name, row in zip(names, counts.tolist(), strict=True):
        lines.append(f"  {name:{width}} " + " ".join(f"{n:>9}" for n in (sum(row), *row)))
    return "\n".join(lines)


def _few(names) -> str:
    """List the first few names."""
    names = list(names)
    return ", ".join(names[:_NUM_NAMES]) + (", ..." if len(names) > _NUM_NAMES else "")
