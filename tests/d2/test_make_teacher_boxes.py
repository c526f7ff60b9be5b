"""tools/make_teacher_boxes.py: from detectors and their results to one file for a training."""

import json

import numpy as np
import pytest
from coco_files import forget, make_content, write
from detectron2.data import MetadataCatalog
from test_teaching import result

from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.catalog import register_coco_format
from dn_detr.d2.data.teacher_boxes import TeacherBoxes, load_teacher_boxes


@pytest.fixture
def make(tool, tmp_path, monkeypatch):
    """Runs the tool for the images of `coco_files`; returns what it wrote."""
    module = tool("make_teacher_boxes")
    monkeypatch.setattr(module, "setup_logger", lambda: None)
    output = tmp_path / "made" / "boxes.json"

    def make(*teachers: list[dict], options=()) -> list[dict]:
        data = write(tmp_path, make_content())
        number = len(list(tmp_path.glob("teacher*")))  # a file is read once
        files = [tmp_path / f"teacher{number + i}.json" for i in range(len(teachers))]
        for file, results in zip(files, teachers, strict=True):
            file.write_text(json.dumps(results))
        names = ["--results", *map(str, files)] if files else []
        module.main(["--coco", *data, *names, "--output", str(output), *map(str, options)])
        return json.loads(output.read_text())

    yield make
    forget(str(output))


def test_boxes_of_several_teachers_are_merged_by_hand(make):
    one = [
        result(10, 3, (0, 0, 20, 10), 0.5),
        result(10, 7, (0, 0, 20, 10), 0.4),  # the same box, but of another class
        result(12, 3, (5, 5, 10, 10), 0.3),
    ]
    other = [
        result(10, 3, (1, 0, 20, 10), 0.75),  # IoU 190 / (400 - 190) = 0.9 with the first
        result(10, 3, (16, 0, 20, 10), 0.0625),  # IoU 50 / (400 - 50) = 0.14 with the one above
        result(13, 3, (0, 0, 20, 10), 0.04),  # not sure enough
        result(12, 3, (5.25, 5.5, 10, 10), 0.25),
    ]
    assert make(one, other) == [other[0], one[1], other[1], one[2]]


def test_options_say_what_is_kept(make):
    teacher = [
        result(10, 3, (0, 0, 10, 10), 0.9),
        result(10, 3, (4, 0, 10, 10), 0.8),  # IoU 60 / 140 = 0.43 with the first
        result(10, 3, (30, 0, 10, 10), 0.7),
        result(12, 7, (0, 0, 10, 10), 0.05),
    ]
    assert make(teacher) == [teacher[0], teacher[2], teacher[3]]
    assert make(teacher, options=("--iou", 0.5)) == teacher
    assert make(teacher, options=("--iou", 0.5, "--most", 2)) == [*teacher[:2], teacher[3]]
    assert make(teacher, options=("--threshold", 0.75)) == [teacher[0]]


def test_the_report_says_how_many_and_how_good(make, capsys):
    """The two sound boxes of image 10, and the one of image 12 that leaves it: AP is 1."""
    seen = [
        result(10, 3, (5, 5, 20, 10), 0.9),
        result(10, 7, (30, 10, 20, 20), 0.8),
        result(12, 3, (50, 30, 10, 10), 0.7),
    ]
    make(seen)
    printed = capsys.readouterr().out
    assert "teacher0.json\n  read       3 boxes\n" in printed
    assert "boxes.json: 3 boxes in 2 of 4 images; per image: median 0.5, most 2" in printed
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ]" in printed


def test_without_a_teacher_or_without_a_box_nothing_is_written(make, tmp_path):
    with pytest.raises(SystemExit, match="pass at least one teacher"):
        make()
    with pytest.raises(SystemExit, match="no teacher has a box with a score of 0.95 or more"):
        make([result(10)], options=("--threshold", 0.95))
    with pytest.raises(SystemExit, match="score in .0, 1., got 2"):
        make([result(10, score=2)])
    assert not (tmp_path / "made" / "boxes.json").exists()


def test_merging_agrees_with_a_loop_over_pairs(tool):
    rng = np.random.default_rng(0)
    teachers = []
    for _ in range(3):
        images = rng.integers(4, size=60)
        corners = rng.random((60, 2)) * 40
        boxes = np.concatenate((corners, corners + 5 + 20 * rng.random((60, 2))), 1)
        fields = boxes.astype(np.float32), rng.integers(3, size=60), rng.random(60, np.float32)
        teachers.append(TeacherBoxes.sort(images, *fields, num_images=5))
    merged = tool("make_teacher_boxes").merge(teachers, iou=0.3, most=12)
    for image in range(5):
        left = sorted((a for t in teachers for a in t.of(image)), key=lambda a: -a["score"])
        expected = []
        while left:
            best = left.pop(0)
            expected.append(best)
            left = [
                other
                for other in left
                if other["category_id"] != best["category_id"]
                or overlap(best["bbox"], other["bbox"]) <= 0.3
            ]
        assert merged.of(image) == expected[:12]
    assert merged.counts.tolist() == [12, 12, 12, 12, 0]


def overlap(one, other) -> float:
    """IoU of two xyxy boxes."""
    sides = [
        max(0.0, min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]))
        for axis in (0, 1)
    ]
    both = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def test_a_detector_of_this_project_teaches(tool, trained, tiny_data, tmp_path, monkeypatch):
    """What it makes is what a training takes."""
    module = tool("make_teacher_boxes")
    monkeypatch.setattr(module, "setup_logger", lambda: None)
    entries = json.loads(tiny_data[1].replace("'", '"'))
    register_coco_format(entries)
    name, output = entries[0][0], tmp_path / "boxes.json"
    module.main(
        [
            *("--dataset", name, "--weights", str(trained / "model_final.pth")),
            *("--output", str(output), "--threshold", "0", "--most", "7"),
            *("--opts", "MODEL.DEVICE", "cpu"),
        ]
    )
    teacher = load_teacher_boxes(dataset_dicts.load(name), str(output))
    assert 0 < teacher.boxes.counts.max() <= 7
    ids = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    written = json.loads(output.read_text())
    assert {entry["category_id"] for entry in written} <= set(ids)
    assert len(written) == teacher.num_read == teacher.boxes.counts.sum()
    assert teacher.num_unknown == teacher.findings[2].count == 0
