"""Small COCO-format datasets on disk, for the tests of the data side."""

import json

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image


def make_content():
    """Two classes with ids 3 and 7 over four images of 60x40 pixels.

    Image 10 has two sound boxes and a crowd region, image 11 has nothing, image 12 a box without
    width and one that leaves the image, image 13 one far outside and one of negative height.
    """
    boxes = [
        (10, 3, [5.0, 5.0, 20.0, 10.0], 0),
        (10, 7, [30.0, 10.0, 20.0, 20.0], 0),
        (10, 7, [0.0, 0.0, 50.0, 30.0], 1),
        (12, 3, [8.0, 9.0, 0.0, 12.0], 0),
        (12, 3, [50.0, 30.0, 20.0, 20.0], 0),
        (13, 7, [100.0, 100.0, 5.0, 5.0], 0),
        (13, 7, [1.0, 1.0, 5.0, -5.0], 0),
    ]
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (10, 11, 12, 13)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "iscrowd": crowd,
                "area": 1.0,
            }
            for number, (image, category, box, crowd) in enumerate(boxes, 1)
        ],
    }


def write(folder, content, text=None):
    """Write images and annotations; returns the paths of both as in DATASETS.COCO_FORMAT."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in content.get("images", []):
        pixels = np.zeros((40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{image['id']}.png")
    (folder / "a.json").write_text(json.dumps(content) if text is None else text)
    return str(folder / "a.json"), str(folder / "images")


def forget(*names):
    """Take datasets out of Detectron2's catalogs."""
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
