import random

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.data.mapper import DetrMapper, train_augmentations
from dn_detr.d2.data.mosaic import Mosaic
from dn_detr.errors import InputError

DETR_SIZES = {
    "min_sizes": tuple(range(480, 801, 32)),
    "max_size": 1333,
    "sample_style": "choice",
    "flip": "horizontal",
    "crop": ((400, 500, 600), "absolute_range", (384, 600)),
}


def make_record(folder, height, width, boxes, labels=None, colours=None):
    """A black image with bright rectangles, and its dataset record (boxes xywh)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, (x, y, w, h) in enumerate(boxes):
        pixels[y : y + h, x : x + w] = 255 if colours is None else colours[i]
    Image.fromarray(pixels).save(folder / "a.png")
    annotations = [
        {"bbox": [*box], "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": 0}
        for box, label in zip(boxes, labels or range(len(boxes)), strict=True)
    ]
    return {
        "file_name": str(folder / "a.png"),
        "height": height,
        "width": width,
        "image_id": 7,
        "annotations": annotations,
    }


def train_mapper(**changes):
    return DetrMapper(
        augmentations=train_augmentations(**{**DETR_SIZES, **changes}),
        image_format="RGB",
        with_instances=True,
    )


def seeded(mapper, record, seed):
    np.random.seed(seed)
    return mapper(record)


def box_of_bright_pixels(image, channel):
    bright = image[channel].numpy() > 127
    rows, columns = np.nonzero(bright.any(axis=1))[0], np.nonzero(bright.any(axis=0))[0]
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("size", [(480, 640), (700, 420), (90, 80)])
def test_boxes_stay_on_their_objects(tmp_path, size):
    height, width = size
    boxes = [
        (width // 10, height // 8, width // 4, height // 3),
        (width // 2, height // 2, width // 3, height // 4),
    ]
    record = make_record(tmp_path, height, width, boxes, [3, 5], [(255, 0, 0), (0, 255, 0)])
    mapper = train_mapper()
    num_objects = []
    for seed in range(24):
        sample = seeded(mapper, record, seed)
        instances = sample["instances"]
        num_objects.append(len(instances))
        assert instances.image_size == tuple(sample["image"].shape[1:])
        scale = max(sample["image"].shape[1] / height, sample["image"].shape[2] / width, 1)
        for box, label in zip(
            instances.gt_boxes.tensor, instances.gt_classes.tolist(), strict=True
        ):
            expected = box_of_bright_pixels(sample["image"], {3: 0, 5: 1}[label])
            np.testing.assert_allclose(box.numpy(), expected, atol=max(2, 0.5 * scale))
    assert 2 in num_objects


def test_sizes_follow_the_published_augmentation(tmp_path):
    record = make_record(tmp_path, 480, 640, [(10, 10, 100, 100)])
    mapper = train_mapper()
    aspects = []
    for seed in range(40):
        height, width = seeded(mapper, record, seed)["image"].shape[1:]
        assert min(height, width) in DETR_SIZES["min_sizes"] or max(height, width) == 1333
        assert max(height, width) <= 1333
        aspects.append(width / height)
    uncropped = sum(abs(aspect - 640 / 480) < 0.01 for aspect in aspects)
    assert 10 <= uncropped <= 30  # the crop is taken with probability 0.5
    assert min(aspects) > 384 / 600 * 0.99 and max(aspects) < 600 / 384 * 1.01


def test_crops_have_sides_between_384_and_600(tmp_path):
    record = make_record(tmp_path, 480, 640, [(10, 10, 100, 100)])
    mapper = train_mapper()
    crops, shorter_before = [], set()
    either_or = mapper.augmentations.augs[-1]
    either_or.either = either_or.other  # always crop
    for seed in range(40):
        np.random.seed(seed)
        transforms = mapper.augmentations(T.AugInput(np.zeros((480, 640, 3), np.uint8)))
        before, crop, _ = transforms.transforms[-3:]
        shorter_before.add(min(before.new_h, before.new_w))
        crops.append((crop.h, crop.w))
    assert shorter_before == {400, 500, 600}
    assert all(384 <= side <= 600 for crop in crops for side in crop)
    assert len(set(crops)) > 30
    assert len(record["annotations"]) == 1


def test_no_degenerate_boxes_come_out_and_an_empty_crop_is_a_negative(tmp_path):
    rng = np.random.default_rng(0)
    boxes = [(int(x), int(y), 2, 2) for x, y in rng.integers(0, 478, (6, 2))]
    record = make_record(tmp_path, 480, 480, boxes)
    mapper = train_mapper(crop=((600,), "absolute", (64, 64)), min_sizes=(64,))
    counts = []
    for seed in range(30):
        instances = seeded(mapper, record, seed)["instances"]
        boxes = instances.gt_boxes.tensor
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
        assert bool((boxes >= 0).all()) and bool((boxes <= 64).all())
        counts.append(len(instances))
    assert 0 in counts


def test_flip_happens_in_every_second_image_and_mirrors_boxes(tmp_path):
    record = make_record(tmp_path, 50, 100, [(10, 5, 20, 30)])
    mapper = train_mapper(min_sizes=(50,), crop=None)
    lefts = [
        seeded(mapper, record, seed)["instances"].gt_boxes.tensor[0, 0].item() for seed in range(40)
    ]
    assert set(lefts) == {10.0, 70.0}
    assert 10 <= lefts.count(10.0) <= 30
    unflipped = train_mapper(min_sizes=(50,), crop=None, flip="none")
    assert seeded(unflipped, record, 1)["instances"].gt_boxes.tensor[0, 0] == 10


def test_crowd_is_left_out_and_the_record_is_not_changed(tmp_path):
    record = make_record(tmp_path, 60, 60, [(0, 0, 10, 10), (20, 20, 30, 30)], [1, 2])
    record["annotations"][0]["iscrowd"] = 1
    before = repr(record)
    sample = seeded(train_mapper(), record, 0)
    assert sample["instances"].gt_classes.tolist() == [2]
    assert repr(record) == before
    assert "annotations" not in sample
    assert (sample["height"], sample["width"], sample["image_id"]) == (60, 60, 7)
    assert sample["image"].dtype == torch.uint8


RECTANGLE = [10, 20, 50, 20, 50, 80, 10, 80]
TRIANGLE = [60, 20, 95, 20, 60, 110]


def with_masks(record, polygons, as_code):
    """`record` with the polygons as segmentation, drawn in one channel each, or as their code."""
    for annotation, polygon in zip(record["annotations"], polygons, strict=True):
        annotation["segmentation"] = [polygon]
        if as_code:
            codes = coco_mask.frPyObjects([polygon], record["height"], record["width"])
            annotation["segmentation"] = coco_mask.merge(codes)
    return record


@pytest.mark.parametrize("as_code", [False, True])
def test_masks_stay_on_their_objects_through_flips_resizes_and_crops(tmp_path, as_code):
    """An image drawn from the masks themselves shows where they must be."""
    boxes = [(10, 20, 40, 60), (60, 20, 35, 90)]
    record = with_masks(make_record(tmp_path, 120, 100, boxes), [RECTANGLE, TRIANGLE], as_code)
    pixels = np.zeros((120, 100, 3), np.uint8)
    for channel, polygon in enumerate([RECTANGLE, TRIANGLE]):
        code = coco_mask.merge(coco_mask.frPyObjects([polygon], 120, 100))
        pixels[..., channel] = 255 * coco_mask.decode(code)
    Image.fromarray(pixels).save(record["file_name"])
    mapper = train_mapper(crop=((120,), "absolute", (90, 80)), min_sizes=(150,))
    mapper.with_masks = True
    num_cut = 0
    for seed in range(12):
        sample = seeded(mapper, record, seed)
        instances = sample["instances"]
        assert instances.gt_masks.tensor.shape[1:] == sample["image"].shape[1:]
        for i, label in enumerate(instances.gt_classes.tolist()):
            mask, drawn = instances.gt_masks.tensor[i], sample["image"][label] > 127
            assert (mask != drawn).float().mean() < 0.02
            box = instances.gt_masks[i].get_bounding_boxes().tensor[0]
            torch.testing.assert_close(instances.gt_boxes.tensor[i], box, atol=2.0, rtol=0)
            edges = box[[0, 1]] == 0, box[[2, 3]] == torch.tensor(mask.shape[::-1])
            num_cut += bool(edges[0].any() or edges[1].any())
    assert num_cut > 3


def test_polygons_are_drawn_in_the_size_of_the_augmented_image(tmp_path):
    """As in Detectron2: enlarged masks have smooth borders. The record keeps its polygons."""
    record = make_record(tmp_path, 120, 100, [(60, 20, 35, 90)])
    record = with_masks(record, [np.array(TRIANGLE, np.float64)], as_code=False)
    mapper = train_mapper(min_sizes=(400,), crop=None, flip="none")
    mapper.with_masks = True
    (mask,) = mapper(record)["instances"].gt_masks.tensor
    code = coco_mask.frPyObjects([[4 * x for x in TRIANGLE]], 480, 400)
    assert np.array_equal(mask.numpy(), coco_mask.decode(code)[..., 0].astype(bool))
    assert record["annotations"][0]["segmentation"][0].tolist() == TRIANGLE


@pytest.mark.parametrize("as_code", [False, True])
def test_large_scale_jitter_pads_with_grey_as_published(tmp_path, as_code):
    record = make_record(tmp_path, 120, 100, [(60, 20, 35, 90)], colours=[(255, 0, 0)])
    record = with_masks(record, [TRIANGLE], as_code)
    mapper = train_mapper(jitter=(0.5, 0.5, 200, True), flip="none")
    mapper.with_masks = True
    sample = mapper(record)
    assert sample["image"].shape == (3, 200, 200)
    assert bool((sample["image"][:, 100:] == 128).all())
    (mask,) = sample["instances"].gt_masks.tensor
    assert mask.shape == (200, 200) and mask.any() and not mask[100:].any()
    assert sample["instances"].image_size == (200, 200)


def test_the_box_of_a_cut_object_is_that_of_what_is_left_of_it(tmp_path):
    """A triangle whose wide side is cut off: its box shrinks more than the crop asks for."""
    record = make_record(tmp_path, 120, 100, [(60, 20, 35, 90)])
    mapper = DetrMapper(augmentations=[], image_format="RGB", with_instances=True, with_masks=True)
    mapper.augmentations = T.AugmentationList([T.CropTransform(0, 70, 100, 50)])
    sample = mapper(with_masks(record, [TRIANGLE], as_code=False))
    (box,) = sample["instances"].gt_boxes.tensor.tolist()
    # At y = 70 the slanted side from (95, 20) to (60, 110) is at x = 95 - 35 * 50 / 90 = 75.6.
    assert box == pytest.approx([60, 0, 75.6, 40], abs=1.5)


def test_an_object_whose_mask_is_not_visible_is_dropped(tmp_path):
    """The crop keeps a corner of the box in which there is nothing of the triangle."""
    record = make_record(tmp_path, 120, 100, [(60, 20, 35, 90), (0, 90, 20, 30)])
    mapper = DetrMapper(augmentations=[], image_format="RGB", with_instances=True, with_masks=True)
    mapper.augmentations = T.AugmentationList([T.CropTransform(85, 80, 15, 40)])
    polygons = [TRIANGLE, [0, 90, 20, 90, 20, 120, 0, 120]]
    instances = mapper(with_masks(record, polygons, as_code=False))["instances"]
    assert len(instances) == 0 and instances.gt_masks.tensor.shape == (0, 40, 15)
    mapper.with_masks = False
    assert mapper(record)["instances"].gt_classes.tolist() == [0]


def test_evaluation_only_resizes(tmp_path):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 100, 150
    cfg.INPUT.FORMAT = "RGB"
    record = make_record(tmp_path, 50, 60, [(0, 0, 30, 50)], colours=[(255, 0, 0)])
    mapper = DetrMapper(cfg, False)
    first, second = mapper(record), mapper(record)
    assert first["image"].shape == (3, 100, 120)
    assert torch.equal(first["image"], second["image"])
    assert first["image"][0, :, :50].min() == 255 and first["image"][1:].max() == 0
    assert "instances" not in first and "annotations" not in first
    assert (first["height"], first["width"]) == (50, 60)


def test_config_switches_crop_and_flip():
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (64,), "none"
    assert len(DetrMapper(cfg, True).augmentations.augs) == 1
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.RANDOM_FLIP = True, "vertical"
    flip, either_or = DetrMapper(cfg, True).augmentations.augs
    assert flip.vertical and not flip.horizontal
    assert either_or.other.augs[1].crop_size == (384, 600)


def test_only_numpy_gives_random_numbers(tmp_path):
    record = make_record(tmp_path, 60, 60, [(0, 0, 10, 10)])
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    seeded(train_mapper(), record, 0)
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)


AUGMENTATIONS = {
    "flip": {"crop": None, "flip": "vertical"},
    "resize": {"crop": None, "flip": "none", "min_sizes": (50, 64, 90)},
    "crop": {"crop": ((100, 140), "absolute_range", (40, 80)), "min_sizes": (70, 90)},
    "jitter": {"jitter": (0.4, 2.0, 96, False)},
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_teachers_boxes_move_with_the_objects(tmp_path, name):
    """A teacher who sees just the ground truth, in another order, and one thing more."""
    boxes = [(8, 10, 20, 30), (50, 40, 30, 44), (90, 6, 25, 20)]
    record = make_record(tmp_path, 100, 120, boxes)
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    seen = [(corners[2], 2, 0.5), ([0, 0, 120, 100], 7, 0.125), (corners[0], 0, 1.0)]
    record["annotations"] += [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "score": score}
        for box, label, score in (*seen, (corners[1], 1, 0.75))
    ]
    scores = {2: 0.5, 7: 0.125, 0: 1.0, 1: 0.75}
    mapper = train_mapper(**AUGMENTATIONS[name])
    assert "teacher_instances" not in seeded(mapper, record, 0)
    mapper.with_teacher = True
    counts = set()
    for seed in range(16):
        sample = seeded(mapper, record, seed)
        truth, taught = sample["instances"], sample["teacher_instances"]
        assert taught.image_size == truth.image_size == tuple(sample["image"].shape[1:])
        assert taught.scores.tolist() == [scores[label] for label in taught.gt_classes.tolist()]
        frame = taught[taught.gt_classes == 7].gt_boxes.tensor[0].tolist()
        assert frame == pytest.approx([0, 0, *sample["image"].shape[:0:-1]], abs=1e-4)
        same = taught[taught.gt_classes != 7]
        order = same.gt_classes.argsort()
        assert torch.equal(same.gt_classes[order], truth.gt_classes)
        assert torch.equal(same.gt_boxes.tensor[order], truth.gt_boxes.tensor)
        counts.add(len(truth))
    assert len(counts) > 1 or name in ("flip", "resize")


def test_a_teacher_who_sees_nothing_says_so(tmp_path):
    mapper = train_mapper()
    mapper.with_teacher = True
    taught = mapper(make_record(tmp_path, 60, 50, [(0, 0, 10, 10)]))["teacher_instances"]
    assert len(taught) == 0
    assert taught.gt_boxes.tensor.shape == (0, 4) and taught.scores.shape == (0,)


def test_unreadable_images_are_named_in_one_sentence(tmp_path):
    record = make_record(tmp_path, 60, 50, [(0, 0, 10, 10)])
    mapper = train_mapper()
    with pytest.raises(InputError, match=r"a.png' has 50x60 pixels, .* say 60x60"):
        mapper({**record, "width": 60})
    path = tmp_path / "a.png"
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(InputError, match=r"a.png' cannot be read"):
        mapper(record)
    path.unlink()
    with pytest.raises(InputError, match=r"a.png' does not exist"):
        mapper(record)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    record = {"file_name": str(tmp_path / "a.jpg"), "height": 60, "width": 40, "annotations": []}
    mapper = train_mapper(min_sizes=(40,), crop=None)
    assert mapper(record)["image"].shape == (3, 60, 40)


@pytest.mark.parametrize("size", [(3000, 1), (2, 2000), (1, 1)])
def test_no_side_is_resized_to_nothing(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 7, "annotations": []}
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    mappers = [DetrMapper(cfg, True), DetrMapper(cfg, False)]
    cfg.INPUT.SCALE_JITTER.ENABLED = True
    mappers.append(DetrMapper(cfg, True))
    for mapper in mappers:
        for seed in range(8):
            np.random.seed(seed)
            assert min(mapper(record)["image"].shape) >= 1
    mosaic = Mosaic(size=64, min_visible=0.1, fill=(0, 0, 0), augmentations=[], image_format="RGB")
    assert min(mosaic([record] * 4)["image"].shape) >= 1


def test_another_channel_order_is_refused_in_a_sentence(tmp_path):
    mapper = train_mapper()
    mapper.image_format = "YUV-BT.601"
    with pytest.raises(InputError, match=r"INPUT.FORMAT must be 'RGB' or 'BGR', got 'YUV"):
        mapper(make_record(tmp_path, 60, 50, []))
