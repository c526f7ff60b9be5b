import json
import multiprocessing
from collections import Counter

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from dn_detr.datasets import shape_drawing, shapes
from dn_detr.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes.generate(tmp_path_factory.mktemp("datasets"), "train", 100, 0)


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "annotations.json").read_text())


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(folder, tmp_path):
    again = shapes.generate(tmp_path / "again", "train", 100, 0)
    for path in ("annotations.json", "images/000001.jpg", "images/000100.jpg"):
        assert (again / path).read_bytes() == (folder / path).read_bytes()
    other = shapes.generate(tmp_path / "other", "train", 3, 1)
    assert (other / "images/000001.jpg").read_bytes() != (folder / "images/000001.jpg").read_bytes()


@pytest.mark.usefixtures("folder")
def test_longer_dataset_begins_with_the_shorter_one_and_splits_differ(content, tmp_path):
    short = shapes.generate(tmp_path, "train", 5, 0)
    annotations = json.loads((short / "annotations.json").read_text())["annotations"]
    assert len(annotations) > 0
    assert annotations == content["annotations"][: len(annotations)]
    val = shapes.generate(tmp_path, "val", 1, 0)
    assert (val / "images/000001.jpg").read_bytes() != (short / "images/000001.jpg").read_bytes()


def test_boxes_are_tight_and_areas_right_by_the_masks_of_pycocotools(content):
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        fine = [8 * value for value in annotation["segmentation"][0]]  # else sharp tips are lost
        rle = coco_mask.frPyObjects([fine], 8 * height, 8 * width)[0]
        x, y, w, h = annotation["bbox"]
        np.testing.assert_allclose(coco_mask.toBbox(rle) / 8, [x, y, w, h], atol=0.75)
        assert annotation["area"] == pytest.approx(coco_mask.area(rle) / 64, rel=0.03)


def test_objects_are_varied_and_lie_inside_their_picture(content):
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    per_image = Counter(annotation["image_id"] for annotation in content["annotations"])
    assert {annotation["category_id"] for annotation in content["annotations"]} == set(range(1, 7))
    assert max(per_image.values()) <= 12
    assert 0 < sum(image not in per_image for image in sizes) < 20
    assert len(set(sizes.values())) == len(shape_drawing.PICTURE_SIZES)
    longer = [max(annotation["bbox"][2:]) for annotation in content["annotations"]]
    assert min(longer) < 14 and max(longer) > 60
    for annotation in content["annotations"]:
        (height, width), (x, y, w, h) = sizes[annotation["image_id"]], annotation["bbox"]
        assert x >= 0 and y >= 0 and w > 3 and h > 3
        assert x + w <= width + 0.01 and y + h <= height + 0.01
        assert annotation["iscrowd"] == 0


def test_coverage_is_the_share_of_points_inside_the_polygon():
    polygon = np.array([[2.3, 1.6], [9.1, 3.2], [6.5, 10.4], [1.2, 7.9]])  # convex
    offsets = (np.arange(20) + 0.5) / 20
    expected = np.zeros((12, 11))
    for row in range(12):
        for column in range(11):
            x, y = np.meshgrid(column + offsets, row + offsets)
            inside = np.ones_like(x, bool)
            for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
                inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0
            expected[row, column] = inside.mean()
    got = shape_drawing.coverage(polygon, 12, 11)
    assert np.abs(got - expected).max() < 0.4  # the border may grow by half a subpixel
    assert got.sum() == pytest.approx(expected.sum(), rel=0.1)


def test_clipping_a_polygon_keeps_what_is_inside():
    square = np.array([[-5.0, 2.0], [5.0, 2.0], [5.0, 12.0], [-5.0, 12.0]])
    clipped = shape_drawing.clip(square, height=10, width=20)
    assert shape_drawing.polygon_box(clipped) == (0, 2, 5, 10)
    assert shape_drawing.polygon_area(clipped) == 40
    assert len(shape_drawing.clip(square - 100, height=10, width=20)) == 0


def test_processes_that_start_at_once_get_one_complete_dataset(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=shapes.generate, args=(tmp_path, "val", 20, 0)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes_val"]
    assert len(list((tmp_path / "shapes_val" / "images").iterdir())) == 20


def test_an_interrupted_generation_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_rng):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_picture", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path, "train", 2, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_settings_is_refused(folder, monkeypatch):
    assert shapes.generate(folder.parent, "train") == folder
    with pytest.raises(InputError, match="delete that folder"):
        shapes.generate(folder.parent, "train", 50)
    with pytest.raises(InputError, match="delete that folder"):
        shapes.generate(folder.parent, "train", 100, 1)
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    with pytest.raises(InputError, match="delete that folder"):
        shapes.generate(folder.parent, "train")
