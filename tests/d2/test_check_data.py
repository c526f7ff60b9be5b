"""`dn-detr check` and `dn-detr convert`, and what a cleaned annotation file holds."""

import json
from pathlib import Path

import numpy as np
import pytest
from coco_files import forget, make_content, write
from PIL import Image

from dn_detr.cli.main import main
from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.catalog import register_coco_format
from dn_detr.datasets.yolo import from_yolo
from dn_detr.errors import InputError


@pytest.fixture
def check_data():
    return lambda words: main(["check", *words])


def loaded_boxes(json_file, images) -> list:
    """The boxes of every image as a training sees them."""
    register_coco_format([["cleaned", str(json_file), str(images)]])
    try:
        found = dataset_dicts.load("cleaned")
    finally:
        forget("cleaned")
    if json_file.name == "clean.json":
        assert not len(found.truth.faults)
    return [[(a["category_id"], *a["bbox"]) for a in r["annotations"]] for r in found.records]


def test_the_report_of_any_file_is_printed(check_data, tmp_path, capsys):
    json_file, images = write(tmp_path, make_content())
    check_data(["--coco", json_file, images])
    printed = capsys.readouterr().out
    assert "images     4, 2 without objects" in printed
    assert "boxes      3, plus 1 crowd regions" in printed
    assert "queries" not in printed and "training" not in printed  # no model was named
    assert "boxes without size: 2" in printed and "clipped" in printed
    forget(json_file)


def test_a_configuration_gives_names_and_numbers(check_data, tmp_path, capsys):
    json_file, images = write(tmp_path, make_content())
    config = tmp_path / "a.yaml"
    config.write_text(
        f"DATASETS: {{TRAIN: [pets], TEST: [], COCO_FORMAT: [[pets, {json_file}, {images}]]}}\n"
        "MODEL: {DN_DETR: {NUM_QUERIES: 1}}"
    )
    check_data(["--config", str(config)])
    printed = capsys.readouterr().out
    assert "dataset pets (training)" in printed and "1 queries can find only 1 of them" in printed
    forget("pets")


def test_the_cleaned_file_is_what_a_training_sees(check_data, tmp_path, capsys):
    json_file, images = write(tmp_path, make_content())
    target = tmp_path / "new" / "clean.json"
    check_data(["--coco", json_file, images, "--write-cleaned", str(target)])
    assert "3 boxes dropped, 1 clipped" in capsys.readouterr().out
    content = json.loads(target.read_text())
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 5]
    assert content["annotations"][3]["bbox"] == [50, 30, 10, 10]
    assert content["annotations"][3]["area"] == 100
    assert content["images"] == make_content()["images"]
    assert loaded_boxes(target, images) == loaded_boxes(Path(json_file), images)
    forget(json_file)


def test_bccd_is_cleaned_of_its_box_without_size(check_data, real_data, tmp_path, capsys):
    json_file, images = real_data / "bccd/annotations/instances_val.json", real_data / "bccd/images"
    target = tmp_path / "clean.json"
    check_data(["--coco", str(json_file), str(images), "--write-cleaned", str(target)])
    forget(str(json_file))
    assert "1 boxes dropped, 0 clipped" in capsys.readouterr().out
    for ours, theirs in zip(
        loaded_boxes(tmp_path / "clean.json", images), loaded_boxes(json_file, images), strict=True
    ):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_mistakes_are_said_in_one_sentence(check_data, tmp_path):
    json_file, images = write(tmp_path, make_content())
    for arguments, words in [
        ([], "name a folder or a dataset"),
        (["none"], "there is no dataset 'none'"),
        (["--coco", "none.json", images], "there is no annotation file none.json"),
        (["--coco", json_file, "none"], "4 of 4 images cannot be used: .* does not exist"),
        (["a", "b", "--write-cleaned", "c"], "--write-cleaned is for one dataset, got 2"),
    ]:
        with pytest.raises(SystemExit, match=f"dn-detr check: .*{words}"):
            check_data(arguments)
    text = json.dumps(make_content() | {"info": 0}).replace('"info": 0', f'"info": {"9" * 5000}')
    forget(json_file)
    Path(json_file).write_text(text)  # where nothing is read but to write it again
    with pytest.raises(SystemExit, match="dn-detr check: .*nteger value out of range"):
        check_data(["--coco", json_file, images, "--write-cleaned", str(tmp_path / "b.json")])
    forget(json_file, "none.json")


def test_a_file_whose_annotations_are_null_can_be_checked_and_cleaned(check_data, tmp_path):
    json_file, images = write(tmp_path, {**make_content(), "annotations": None})
    check_data(["--coco", json_file, images, "--write-cleaned", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["annotations"] == []
    forget(json_file)


@pytest.mark.usefixtures("check_data")
def test_a_converted_folder_is_a_dataset(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "images/a.png")
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "names.txt").write_text("cat")

    def convert(words):
        main(["convert", *words])

    common = ["yolo", str(tmp_path / "images"), "--output", str(tmp_path / "a.json"), "--names"]
    convert([*common, str(tmp_path / "names.txt")])
    assert "1 images, 1 objects, 1 classes" in capsys.readouterr().out
    assert loaded_boxes(tmp_path / "a.json", tmp_path / "images") == [[(0, 10, 5, 30, 15)]]
    with pytest.raises(SystemExit, match="dn-detr convert: .*must contain the folders"):
        convert(["voc", str(tmp_path), "--output", str(tmp_path / "b.json")])
    with pytest.raises(InputError, match="class names must be unique and not empty"):
        (tmp_path / "names.txt").write_text("cat\ncat")
        from_yolo(tmp_path / "images", ["cat", "cat"])
