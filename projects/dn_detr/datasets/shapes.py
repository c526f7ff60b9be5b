"""The synthetic dataset `shapes_train` / `shapes_val`: COCO format, drawn on first use.

It lets everything be tried without a download: six classes of outlines, 0 to 12 objects a picture,
see `drawing`. A picture depends on (seed, split, number) only, so a longer dataset begins
with the pictures of a shorter one. Each split is one folder under DETECTRON2_DATASETS:

    shapes_train/annotations.json
    shapes_train/images/000001.jpg

Boxes are tight to the full outline clipped to the picture, also where another object covers it.

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

VERSION = 1  # of the drawing: raise it when the same seed would give other pictures
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
    """Write the pictures and annotations.json of one split into an existing folder."""
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
    """Make sure that `shapes_<split>` lies under `root`; returns its folder.

    Without `num_images` and `seed` any finished dataset of this VERSION will do, otherwise
    NUM_IMAGES[split] pictures of seed 0 are drawn. The folder appears complete or not at all, also
    when several processes start at once: each draws into its own folder, the first to finish wins.
    Raises InputError where the folder holds something else than asked for.
    """
    folder = Path(root) / f"shapes_{split}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"shapes_{split}.", dir=folder.parent))
        try:
            _draw_split(draft, split, num_images or NUM_IMAGES[split], seed or 0)
            draft.chmod(0o755)  # mkdtemp makes it private
            draft.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    _check_settings(folder, num_images=num_images, seed=seed)
    return folder


def _check_settings(folder, **wanted):
    """Raise InputError unless the dataset in `folder` was made with the settings that are set."""
    wanted = {key: value for key, value in wanted.items() if value is not None}
    wanted["version"] = VERSION
    try:
        found = json.loads((folder / "annotations.json").read_text())["info"]
    except (OSError, ValueError, KeyError):
        found = {}
    if any(found.get(key) != value for key, value in wanted.items()):
        raise InputError(
            f"{folder} holds {found or 'no shapes dataset'}, but {wanted} is asked for: "
            "delete that folder, or choose another root."
        )


def main():
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
