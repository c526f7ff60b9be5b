"""Mosaics: boxes and masks stay on their objects, whatever is done to them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from PIL import Image
from test_mapper import make_record

from dn_detr.d2.data.mosaic import AffineTransform, Mosaic, RandomAffine

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
FILL = (124, 116, 104)
SIZES = [(60, 90), (120, 70), (100, 100), (45, 120)]
BOXES = [  # xywh, in each of the images
    [(10, 10, 30, 25), (60, 30, 20, 25)],
    [(5, 70, 60, 40)],
    [(0, 0, 50, 50), (60, 60, 40, 40)],
    [(30, 5, 80, 30)],
]


def make_records(folder, *, polygons=False):
    """Four images, with six coloured rectangles in all; their label is the colour's number."""
    records, label = [], 0
    for number, (size, boxes) in enumerate(zip(SIZES, BOXES, strict=True)):
        (folder / str(number)).mkdir()
        labels = list(range(label, label + len(boxes)))
        label += len(boxes)
        colours = [COLOURS[k] for k in labels]
        record = make_record(folder / str(number), *size, boxes, labels, colours)
        record["image_id"] = number
        if polygons:
            for annotation, (x, y, w, h) in zip(record["annotations"], boxes, strict=True):
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        records.append(record)
    return records


def make_mosaic(augmentations=(), **changes):
    options = {"size": 64, "min_visible": 0.1, "fill": FILL, "image_format": "RGB"}
    options |= {"with_masks": False, "augmentations": augmentations, **changes}
    return Mosaic(**options)


def published():
    """The augmentations behind the mosaic, as in training."""
    affine = RandomAffine(rotation=10, translation=0.1, scale=(0.5, 1.5), fill=FILL)
    return [affine, T.RandomFlip(), T.ResizeShortestEdge([160, 200], 400, "choice")]


def shows(image, label):
    """[h, w] bool: where `image` has the colour of `label`."""
    difference = image.permute(1, 2, 0).float() - torch.tensor(COLOURS[label]).float()
    return difference.abs().amax(-1) < 100


def box_around(is_there):
    rows, columns = (is_there.any(axis).nonzero()[:, 0] for axis in (1, 0))
    return torch.stack((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)).float()


def grown(mask):
    """A mask [h, w] and all within three pixels of it: edges are as wide when resized twice."""
    return F.max_pool2d(mask[None].float(), 7, stride=1, padding=3)[0] > 0


def test_four_images_stand_two_by_two_with_their_boxes(tmp_path):
    sample = make_mosaic()(make_records(tmp_path))
    # Shorter sides become 64, but no longer side more than 128: 64x96, 110x64, 64x64, 48x128.
    assert sample["image"].shape == (3, 2 * 110, 2 * 128)
    assert (sample["height"], sample["width"]) == (220, 256)
    assert sample["image_id"] == "0+1+2+3"
    expected = {
        0: (10 * 64 / 60, 10 * 64 / 60, 40 * 64 / 60, 35 * 64 / 60),
        2: (128 + 5 * 64 / 70, 70 * 110 / 120, 128 + 65 * 64 / 70, 110 * 110 / 120),
        4: (60 * 0.64, 110 + 60 * 0.64, 100 * 0.64, 110 + 100 * 0.64),
        5: (128 + 30 * 128 / 120, 110 + 5 * 48 / 45, 128 + 110 * 128 / 120, 110 + 35 * 48 / 45),
    }
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == list(range(6))
    for label, box in expected.items():
        assert instances.gt_boxes.tensor[label].tolist() == pytest.approx(box, abs=1e-3)
    for label, box in enumerate(instances.gt_boxes.tensor):
        torch.testing.assert_close(box_around(shows(sample["image"], label)), box, atol=1.1, rtol=0)
    assert sample["image"][:, 109, 127].tolist() == list(FILL)  # nothing of the first image


@pytest.mark.parametrize("with_masks", [False, True])
def test_boxes_and_masks_stay_on_their_objects_when_turned_moved_and_scaled(tmp_path, with_masks):
    records = make_records(tmp_path, polygons=with_masks)
    mosaic = make_mosaic(published(), with_masks=with_masks)
    num_whole = num_cut = 0
    for seed in range(25):
        np.random.seed(seed)
        sample = mosaic(records)
        instances, (height, width) = sample["instances"], sample["image"].shape[1:]
        assert instances.image_size == (height, width)
        for i, label in enumerate(instances.gt_classes.tolist()):
            box, is_there = instances.gt_boxes.tensor[i], shows(sample["image"], label)
            around = box_around(is_there)
            is_cut = bool(
                (box[:2] <= 0.1).any() or (box[2:] >= box.new_tensor([width, height]) - 0.1).any()
            )
            if with_masks or not is_cut:
                torch.testing.assert_close(box, around, atol=2.6, rtol=0)
            else:  # around what is visible of the turned rectangle's own box
                assert bool((box[:2] <= around[:2] + 2.6).all())
                assert bool((box[2:] >= around[2:] - 2.6).all())
            if with_masks:
                mask = instances.gt_masks.tensor[i]
                assert not (is_there & ~grown(mask)).any()
                assert not (~is_there & ~grown(~mask)).any()
            num_cut, num_whole = num_cut + is_cut, num_whole + (not is_cut)
    assert num_whole > 60 and num_cut > 5


def test_a_teacher_who_sees_the_ground_truth_still_does_so_on_mosaics(tmp_path):
    records = make_records(tmp_path)
    for record in records:
        seen = [{**a, "score": 0.125 * (1 + a["category_id"])} for a in record["annotations"]]
        record["annotations"] = seen[::-1] + record["annotations"]
    mosaic = make_mosaic(published(), with_teacher=True)
    counts = set()
    for seed in range(8):
        np.random.seed(seed)
        sample = mosaic(records)
        truth, taught = sample["instances"], sample["teacher_instances"]
        order = taught.gt_classes.argsort()
        assert torch.equal(taught.gt_classes[order], truth.gt_classes)
        assert torch.equal(taught.gt_boxes.tensor[order], truth.gt_boxes.tensor)
        assert torch.equal(taught.scores, 0.125 * (1 + taught.gt_classes))
        assert taught.image_size == truth.image_size and not truth.has("scores")
        counts.add(len(truth))
    assert len(counts) > 1
    np.random.seed(0)
    assert "teacher_instances" not in make_mosaic(published())(records)


def test_with_masks_the_box_of_a_turned_object_is_that_of_its_mask(tmp_path):
    """A corner of the turned box is empty where a triangle has none."""
    records = make_records(tmp_path, polygons=True)
    records[1]["annotations"][0]["segmentation"] = [[5, 70, 65, 70, 5, 110]]
    cos = np.sqrt(0.5)
    turned = AffineTransform([[cos, -cos, 100], [cos, cos, -60]], FILL)
    loose, tight = (
        make_mosaic([turned], with_masks=with_masks)(records)["instances"]
        for with_masks in (False, True)
    )
    assert torch.equal(tight.gt_boxes.tensor, tight.gt_masks.get_bounding_boxes().tensor)
    heights = [
        (i.gt_boxes.tensor[:, 3] - i.gt_boxes.tensor[:, 1])[i.gt_classes == 2].item()
        for i in (loose, tight)
    ]
    # Sides of 60 x 64 / 70 and 40 x 110 / 120 pixels: the box needs both, the triangle the longer.
    assert heights[0] == pytest.approx((54.86 + 36.67) * cos, abs=0.1)
    assert heights[1] == pytest.approx(54.86 * cos, abs=2.0)


def test_an_affine_transform_moves_points_as_it_moves_pixels():
    image = np.zeros((50, 70, 3), np.uint8)
    image[20:31, 40:51] = 200  # centre (45.5, 25.5)
    transform = AffineTransform([[0.6, -0.3, 8.0], [0.2, 0.9, -6.0]], fill=(1, 2, 3))
    moved = transform.apply_image(image).astype(float)
    # Where matrix x centre says, and with the area times the determinant, 0.6 x 0.9 + 0.3 x 0.2.
    (point,) = transform.apply_coords(np.array([[45.5, 25.5]]))
    assert point == pytest.approx([27.65, 26.05])
    weight = moved[..., 0] * (moved[..., 0] > 5)
    rows, columns = np.mgrid[:50, :70] + 0.5
    assert (weight * columns).sum() / weight.sum() == pytest.approx(27.65, abs=0.05)
    assert (weight * rows).sum() / weight.sum() == pytest.approx(26.05, abs=0.05)
    assert weight.sum() / 200 == pytest.approx(121 * 0.6, rel=0.02)
    assert moved[49, 0].tolist() == [1, 2, 3]
    mask = transform.apply_segmentation((image[..., 0] > 0).astype(np.uint8))
    assert mask.max() == 1 and mask[49, 0] == 0
    assert mask.sum() == pytest.approx(121 * 0.6, rel=0.1)


def test_random_affine_stays_within_its_bounds():
    affine = RandomAffine(rotation=10, translation=0.1, scale=(0.5, 1.5), fill=FILL)
    np.random.seed(0)
    angles, scales, moves = [], [], []
    for _ in range(300):
        matrix = affine.get_transform(np.zeros((50, 80, 3), np.uint8)).matrix
        scales.append(np.sqrt(np.linalg.det(matrix[:, :2])))
        angles.append(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
        moves.append((matrix @ [40, 25, 1] - [40, 25]) / [80, 50])
    for values, low, high in ((angles, -10, 10), (scales, 0.5, 1.5), (np.ravel(moves), -0.1, 0.1)):
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


@pytest.mark.parametrize(("min_visible", "kept"), [(0.0, 6), (0.1, 5), (0.3, 4)])
def test_objects_of_which_little_is_left_are_dropped(tmp_path, min_visible, kept):
    """Moved by 40 pixels, the first box, 32 pixels wide from x = 10.67, keeps 2.67 of them (8%),
    that of the third image, 48 pixels from 0, 8 (17%), all others more than half."""
    moved = AffineTransform([[1, 0, -40], [0, 1, 0]], FILL)
    records = make_records(tmp_path)
    records[2]["annotations"][0]["bbox"] = [0, 0, 75, 50]
    mosaic = make_mosaic([moved], min_visible=min_visible)
    assert len(mosaic(records)["instances"]) == kept


def test_leftovers_thinner_than_a_pixel_are_dropped(tmp_path):
    flatter = AffineTransform([[1, 0, 0], [0, 0.03, 0]], FILL)
    instances = make_mosaic([flatter])(make_records(tmp_path))["instances"]
    # That of the second image is 40 x 110 / 120 = 36.7 pixels high, the others at most 32.
    assert instances.gt_classes.tolist() == [2]


def test_crowd_regions_and_empty_images_give_no_objects(tmp_path):
    records = make_records(tmp_path, polygons=True)
    records[0]["annotations"][0]["iscrowd"] = 1
    for record in records[1:]:
        record["annotations"] = []
    before = repr(records)
    mosaic = make_mosaic(published(), with_masks=True)
    np.random.seed(1)
    assert mosaic(records)["instances"].gt_classes.tolist() in ([], [1])
    assert repr(records) == before
    records[0]["annotations"] = []
    sample = mosaic(records)
    assert len(sample["instances"]) == 0
    assert sample["instances"].gt_masks.tensor.shape == (0, *sample["image"].shape[1:])
    assert sample["image"].float().std() > 10  # the pictures are there


def test_boxes_of_a_teacher_move_with_those_of_the_ground_truth(tmp_path):
    records = make_records(tmp_path)
    mosaic = make_mosaic(published(), with_teacher=True)
    score = 0.0
    for record in records:
        for annotation in list(record["annotations"]):
            score += 0.1
            record["annotations"].append({**annotation, "score": score})
    for seed in range(5):
        np.random.seed(seed)
        sample = mosaic(records)
        truth, taught = sample["instances"], sample["teacher_instances"]
        assert torch.equal(taught.gt_boxes.tensor, truth.gt_boxes.tensor)
        torch.testing.assert_close(taught.scores, (taught.gt_classes + 1) * 0.1)
        assert not truth.has("scores") and 3 < len(truth) <= 6


def test_the_channel_order_of_the_configuration_is_kept(tmp_path):
    records = make_records(tmp_path)
    rgb, bgr = (
        make_mosaic(image_format=order, fill=(9, 9, 9))(records) for order in ("RGB", "BGR")
    )
    assert torch.equal(rgb["image"], bgr["image"].flip(0))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    records = make_records(tmp_path)
    Image.new("RGB", (5, 5)).save(records[3]["file_name"])
    with pytest.raises(Exception, match=r"3/a.png' has 5x5 pixels"):
        make_mosaic()(records)
