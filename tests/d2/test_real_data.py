"""Real images, where a checkout has some beside it: they go through everything without a fault."""

import json

import pytest
from coco_files import forget


@pytest.fixture(autouse=True)
def clean_catalogs():
    yield
    forget("real_train", "real_val")


def few(json_file, target, num_images: int):
    """The first images of a dataset, as a dataset of its own."""
    content = json.loads(json_file.read_text())
    content["images"] = content["images"][:num_images]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    target.write_text(json.dumps(content))
    return target


def test_coco_trains_and_is_evaluated_with_its_own_sparse_category_ids(run, real_data, tmp_path):
    coco = real_data / "coco128"
    annotations = coco / "annotations"
    val = few(annotations / "instances_val2017.json", tmp_path / "val.json", 6)
    entries = [
        ["real_train", str(annotations / "instances_train2017.json"), str(coco / "train2017")],
        ["real_val", str(val), str(coco / "val2017")],
    ]
    run(
        *("DATASETS.COCO_FORMAT", str(entries)),
        *("DATASETS.TRAIN", "('real_train',)", "DATASETS.TEST", "('real_val',)"),
        *("SOLVER.MAX_ITER", 1, "INPUT.CROP.ENABLED", True),
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert lines[0]["total_loss"] > 0 and "bbox/AP" in lines[-1]
    report = (tmp_path / "run" / "log.txt").read_text()
    assert "images     128" in report and "boxes      929" in report
    found = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    content = json.loads(val.read_text())
    assert {entry["image_id"] for entry in found} == {image["id"] for image in content["images"]}
    assert {entry["category_id"] for entry in found} <= {c["id"] for c in content["categories"]}


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_boxes_of_bccd_without_size_are_dropped_and_named(run, real_data, tmp_path, split):
    bccd = real_data / "bccd"
    json_file = bccd / "annotations" / f"instances_{split}.json"
    content = json.loads(json_file.read_text())
    (faulty,) = [a for a in content["annotations"] if min(a["bbox"][2:]) <= 0]
    run(
        *("DATASETS.COCO_FORMAT", str([["real_train", str(json_file), str(bccd / "images")]])),
        *("DATASETS.TRAIN", "('real_train',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1),
    )
    report = (tmp_path / "run" / "log.txt").read_text()
    assert f"boxes      {len(content['annotations']) - 1}," in report
    (line,) = [text for text in report.splitlines() if "boxes without size" in text]
    (name,) = [i["file_name"] for i in content["images"] if i["id"] == faulty["image_id"]]
    assert ": 1 (" in line and name in line
