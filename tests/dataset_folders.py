"""The same six annotated images as dataset folders of every layout."""

import json

from PIL import Image

NAMES = ["red cell", "white cell"]
BOXES = {
    name: [(i % 2, 5.0 + i, 4.0, 20.0, 10.0)]
    for i, name in enumerate(["a", "b", "c", "d", "e", "f"])
}
"""image -> [(class, left, top, width, height)], in images of 60x40 pixels."""

SPLITS = {"train": "abc", "val": "de", "test": "f"}


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), (10 * ord(path.stem[0]) % 256, 80, 120)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def coco(names, *, roboflow=False) -> str:
    first = 1 if roboflow else 5
    group = [{"id": 0, "name": "cells", "supercategory": "none"}] if roboflow else []
    group += [{"id": first + i, "name": n, "supercategory": "cells"} for i, n in enumerate(NAMES)]
    images = [
        {"id": 7 + i, "file_name": f"{n}.jpg", "width": 60, "height": 40}
        for i, n in enumerate(names)
    ]
    annotations = [
        {"image_id": 7 + i, "category_id": first + c, "bbox": box, "area": 200.0, "iscrowd": 0}
        for i, n in enumerate(names)
        for c, *box in BOXES[n]
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    return json.dumps({"categories": group, "images": images, "annotations": annotations})


def yolo_lines(name) -> str:
    return "\n".join(
        f"{c} {(x + w / 2) / 60!r} {(y + h / 2) / 40!r} {w / 60!r} {h / 40!r}"
        for c, x, y, w, h in BOXES[name]
    )


def xml(name, first_pixel=1) -> str:
    objects = "".join(
        f"<object><name>{NAMES[c]}</name><bndbox><xmin>{x + first_pixel:g}</xmin><ymin>"
        f"{y + first_pixel:g}</ymin><xmax>{x + w:g}</xmax><ymax>{y + h:g}</ymax></bndbox></object>"
        for c, x, y, w, h in BOXES[name]
    )
    size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"


def roboflow_coco(root):
    for split, names in SPLITS.items():
        folder = root / {"val": "valid"}.get(split, split)
        text(folder / "_annotations.coco.json", coco(names, roboflow=True))
        for name in names:
            image(folder / f"{name}.jpg")


def own_coco(root):
    for split, names in SPLITS.items():
        for prefix in ("instances", "captions", "person_keypoints"):
            text(root / f"annotations/{prefix}_{split}2017.json", coco(names))
        for name in names:
            image(root / f"{split}2017" / f"{name}.jpg")


def coco_of_one_image_folder(root):
    for split, names in SPLITS.items():
        text(root / f"annotations/{split}.json", coco(names))
        for name in names:
            image(root / "images" / f"{name}.jpg")


def yolo_of_ultralytics(root):
    for split, names in SPLITS.items():
        for name in names:
            image(root / "images" / split / f"{name}.jpg")
            text(root / "labels" / split / f"{name}.txt", yolo_lines(name))
    paths = "".join(f"{split}: images/{split}\n" for split in SPLITS)
    text(root / "data.yaml", f"path: ../datasets/cells\n{paths}names: {dict(enumerate(NAMES))}\n")


def yolo_of_roboflow(root):
    paths = ""
    for split, names in SPLITS.items():
        folder = {"val": "valid"}.get(split, split)
        paths += f"{split}: ../{folder}/images\n"
        for name in names:
            image(root / folder / "images" / f"{name}.jpg")
            text(root / folder / "labels" / f"{name}.txt", yolo_lines(name))
    text(root / "data.yaml", f"\ufeff{paths}\nnc: 2\nnames: {NAMES}\n".replace("\n", "\r\n"))


def yolo_with_lists(root):
    for split, names in SPLITS.items():
        text(root / f"{split}.txt", "".join(f"./images/{name}.jpg\n" for name in names))
        for name in names:
            image(root / "images" / f"{name}.jpg")
            text(root / "labels" / f"{name}.txt", yolo_lines(name))
    paths = "".join(f"{split}: {split}.txt\n" for split in SPLITS)
    text(root / "data.yaml", f"{paths}names: {NAMES}\n")


def voc2007(root):
    for split, names in SPLITS.items():
        lists = root / "VOCdevkit/VOC2007/ImageSets/Main"
        text(lists / f"{split}.txt", "".join(f"{name}\n" for name in names))
        text(lists / f"cat_{split}.txt", "".join(f"{name} -1\n" for name in names))
        for name in names:
            image(root / f"VOCdevkit/VOC2007/JPEGImages/{name}.jpg")
            text(root / f"VOCdevkit/VOC2007/Annotations/{name}.xml", xml(name))


def roboflow_voc(root):
    for split, names in SPLITS.items():
        folder = root / {"val": "valid"}.get(split, split)
        for name in names:
            image(folder / f"{name}.jpg")
            text(folder / f"{name}.xml", xml(name))


WITH_SPLITS = (
    roboflow_coco,
    own_coco,
    coco_of_one_image_folder,
    yolo_of_ultralytics,
    yolo_of_roboflow,
    yolo_with_lists,
    voc2007,
    roboflow_voc,
)


def kangaroo(root):
    for name in BOXES:
        image(root / "images" / f"{name}.jpg")
        text(root / "annots" / f"{name}.xml", xml(name))


def labelimg_voc(root):
    for name in BOXES:
        image(root / f"{name}.jpg")
        text(root / f"{name}.xml", xml(name))


def labelimg_yolo(root):
    text(root / "classes.txt", "\n".join(NAMES))
    for name in BOXES:
        image(root / f"{name}.jpg")
        text(root / f"{name}.txt", yolo_lines(name))


def yolo_without_val(root):
    for name in BOXES:
        image(root / "train/images" / f"{name}.jpg")
        text(root / "train/labels" / f"{name}.txt", yolo_lines(name))
    text(root / "data.yaml", f"train: train\nnames: {NAMES}\n")


def one_coco_file(root):
    content = coco(BOXES).replace('"a.jpg', r'"images\\a.jpg')  # written on Windows
    text(root / "result.json", content)
    for name in BOXES:
        image(root / "images" / f"{name}.jpg")


WITHOUT_SPLITS = (kangaroo, labelimg_voc, labelimg_yolo, yolo_without_val, one_coco_file)
