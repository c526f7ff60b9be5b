"""What is plausible but wrong is said, and sound data are not accused."""

import numpy as np
import pytest

from dn_detr.d2.data.plausibility import (
    box_warnings,
    file_warnings,
    name_warnings,
    size_table,
)

SIZE = (640, 480)


def boxes_of(seed=0, count=50):
    """Sound boxes xywh inside 640x480."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * SIZE
    return np.column_stack((corners[:, 0], corners[:, 1] - corners[:, 0]))


def warnings_on(boxes, labels=None, image_index=None):
    count = len(boxes)
    return box_warnings(
        np.array(boxes, float).reshape(-1, 4),
        np.zeros(count, int) if labels is None else np.array(labels),
        np.arange(count) % 3 if image_index is None else np.array(image_index),
        np.array([SIZE] * 3, float),
        ["a.png", "b.png", "c.png"],
    )


@pytest.mark.parametrize("seed", range(20))
def test_sound_boxes_give_no_warning(seed):
    assert warnings_on(boxes_of(seed)) == []
    assert warnings_on(boxes_of(seed, count=3)) == []
    assert warnings_on([]) == []


def test_boxes_that_were_divided_by_the_image_size_are_said():
    (said,) = warnings_on(boxes_of() / [*SIZE, *SIZE])
    assert "between 0 and 1" in said


@pytest.mark.parametrize("seed", range(20))
def test_corners_taken_for_sizes_are_said(seed):
    boxes = boxes_of(seed)
    boxes[:, 2:] += boxes[:, :2]
    (said,) = warnings_on(boxes)
    assert "of 50 boxes leave their image, but none would as [left, top, right, bottom]" in said


def test_a_few_boxes_over_the_border_are_not_taken_for_corners():
    boxes = boxes_of()
    boxes[:5, 2:] = SIZE
    assert warnings_on(boxes) == []


def test_doubled_boxes_are_counted_and_their_images_named():
    boxes = boxes_of(count=6)
    again = np.concatenate((boxes, boxes[[1, 1, 2]], boxes[[3, 4]]))
    labels, images = [0] * 9 + [1, 0], [0, 1, 2, 0, 1, 2, 1, 1, 2, 0, 0]
    # The last two repeat a box with another class, and one in another image.
    (said,) = warnings_on(again, labels, images)
    assert said == "3 boxes repeat another of the same class in the same image: b.png, c.png"


def test_classes_of_one_name_are_said():
    assert name_warnings(["dog", "cat", "dogs"]) == []
    (said,) = name_warnings(["dog", "cat", "Dog ", "cat"])
    assert said == "several classes have the same name: 'dog', 'cat', 'Dog ', 'cat'"


def test_equal_files_are_said_once_for_a_dataset_and_once_for_a_pair():
    files = {"train": ["a", "b", "c"], "val": ["d", "e"]}
    assert file_warnings(files, []) == []
    within, between = file_warnings(files, [[0, 1, 4], [2, 3]])
    assert within == "dataset train: 1 images are equal to others of it: b = a"
    assert between == "dataset val: 2 images are equal to images of train: e = a, d = c"
    (_, between, _) = file_warnings(files, [[0, 1, 3, 4]])  # every one of them is named
    assert between == "dataset val: 2 images are equal to images of train: d = a, e = a"


def test_objects_are_counted_by_class_and_size():
    boxes = [[0, 0, 31, 33], [0, 0, 32, 32], [0, 0, 95, 97], [0, 0, 96, 96], [0, 0, 9, 9]]
    rows = [
        line.split()
        for line in size_table(boxes, np.array([0, 0, 1, 1, 1]), ["cat", "dog", "emu"]).split("\n")
    ]
    assert rows == [
        ["class", "objects", "small", "medium", "large"],
        ["cat", "2", "1", "1", "0"],
        ["dog", "3", "1", "1", "1"],
        ["emu", "0", "0", "0", "0"],
        ["all", "5", "2", "2", "1"],
    ]
