"""Synthetic dataset `shapes_train` / `shapes_val` in COCO format, generated on first use.

It needs no download: six classes of outlines, 0 to 12 objects per picture, see `shape_drawing`. A
picture depends only on (seed, split, index), so a larger dataset starts with the pictures of a
smaller one. Each split is a folder in DETECTRON2_DATASETS:

    shapes_train/annotations.json
    shapes_train/images/000001.jpg

Boxes tightly enclose the outline clipped to the picture, including occluded parts.

    python -m dn_detr.datasets.shapes --root datasets --num-train 2000 --num-val 200
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dn_detr.datasets.shape_drawing import CLASSES, draw_picture, polygon_area, polygon_box
from dn_detr.errors import InputError

VERSION = 1  # increase when drawing changes the pictures of a seed
NUM_IMAGES = {"train": 2000, "val": 200}
_SPLITS = ("train", "val")


def _annotation(shape, image_id, annotation_id):
    polygon = shape.polygon.round(2)
    x0, y0, x1, y1 = (float(value) for value in polygon_box(polygon))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": shape.kind + 1,
        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        "area": round(polygon_area(polygon), 2),
        "iscrowd": 0,
        "segmentation": [polygon.ravel().tolist()],
    }


def _draw_split(folder, split, num_images, seed):
    """Write the pictures and annotations.json of one split to an existing folder."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        rng = np.random.default_rng([seed, _SPLITS.index(split), image_id])
        picture, shapes = draw_picture(rng)
        name = f"{image_id:06d}.jpg"
        Image.fromarray(picture).save(folder / "images" / name, quality=92)
        height, width = picture.shape[:2]
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for shape in shapes:
            annotations.append(_annotation(shape, image_id, len(annotations) + 1))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {
        "info": {"version": VERSION, "seed": seed, "num_images": num_images},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / "annotations.json").write_text(json.dumps(content))


def generate(root, split, num_images=None, seed=None):
    """Generate `shapes_<split>` in `root` if it does not exist.

    The folder is created atomically, even if several processes start at once: each draws into its
    own folder, and the first to finish renames it.

    Args:
        num_images: None accepts any existing dataset of this VERSION, or draws NUM_IMAGES[split].
        seed: None accepts any existing dataset of this VERSION, or uses 0.

    Returns:
        Path of the folder.

    Raises:
        InputError: if the folder contains anything else.
    """
    folder = Path(root) / f"shapes_{split}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"shapes_{split}.", dir=folder.parent))
        try:
            _draw_split(draft, split, num_images or NUM_IMAGES[split], seed or 0)
            draft.chmod(0o755)  # mkdtemp creates a private folder
            draft.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    _check_settings(folder, num_images=num_images, seed=seed)
    return folder


def _check_settings(folder, **wanted):
    """Raise InputError unless the dataset in `folder` has the wanted settings that are not None."""
    wanted = {key: value for key, value in wanted.items() if value is not None}
    wanted["version"] = VERSION
    try:
        found = json.loads((folder / "annotations.json").read_text())["info"]
    except (OSError, ValueError, KeyError):
        found = {}
    if any(found.get(key) != value for key, value in wanted.items()):
        raise InputError(
            f"{folder} contains {found or 'no shapes dataset'} instead of {wanted}: "
            "delete that folder, or choose another root."
        )


def main():
    """Generate both splits from the command line."""
    parser = argparse.ArgumentParser(description="Draw the synthetic shapes dataset.")
    parser.add_argument("--root", default=os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("--num-train", type=int, default=NUM_IMAGES["train"])
    parser.add_argument("--num-val", type=int, default=NUM_IMAGES["val"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, num_images in (("train", args.num_train), ("val", args.num_val)):
        try:
            print(generate(args.root, split, num_images, args.seed))
        except InputError as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
