import json
import logging
import re

import numpy as np
import pytest
import torch
from coco_files import forget, make_content, write
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.loader import build_test_loader, build_train_loader
from dn_detr.d2.data.summary import check_datasets
from dn_detr.errors import InputError


@pytest.fixture(autouse=True)
def clean_catalogs():
    yield
    forget("made_up", "made_up_val")


def config_for(paths, name="made_up"):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.DATASETS.COCO_FORMAT = [[name, *paths]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def sentence_for(paths):
    """The one sentence that the whole start of a run answers to bad input."""
    cfg = config_for(paths)
    with pytest.raises(InputError) as caught:
        prepare(cfg)
        check_datasets(cfg)
        build_train_loader(cfg)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and ". " not in sentence
    return sentence


def test_report_counts_what_is_in_the_dataset(tmp_path):
    cfg = config_for(write(tmp_path, make_content()))
    prepare(cfg)
    (report,) = check_datasets(cfg)
    assert (report.num_images, report.num_empty, report.num_boxes, report.num_crowd) == (4, 2, 3, 1)
    assert (report.median_boxes, report.most_boxes) == (0.5, 2)
    assert report.fullest_image.endswith("10.png")
    no_size, outside, clipped = report.findings
    assert (no_size.count, outside.count, clipped.count) == (2, 1, 1)
    assert no_size.examples[0] == "12.png [8, 9, 0, 12]"
    assert clipped.examples[0] == "12.png [50, 30, 20, 20]"
    assert outside.examples[0] == "13.png [100, 100, 5, 5]"
    assert (report.category_ids, report.num_classes, report.unused_classes) == ([3, 7], 2, [])
    text = str(report)
    for part in ("4, 2 without objects (trained on as negatives)", "ids 3, 7", "all have boxes"):
        assert part in text
    assert "300 queries; 5 denoising groups hold all" in text
    assert len(text.splitlines()) < 12


def test_cleaned_boxes_are_what_training_sees(tmp_path):
    cfg = config_for(write(tmp_path, make_content()))
    prepare(cfg)
    batch = next(iter(build_train_loader(cfg)))
    found = {sample["image_id"]: sample["instances"] for sample in batch}
    assert sorted(found) == [10, 11, 12, 13]
    assert [len(found[i]) for i in (10, 11, 12, 13)] == [2, 0, 1, 0]
    assert sorted(found[10].gt_classes.tolist()) == [0, 1]
    corners = found[12].gt_boxes.tensor[0].tolist()
    assert corners in ([50, 30, 60, 40], [0, 30, 10, 40])  # clipped, perhaps flipped
    assert [sample[0]["image_id"] for sample in build_test_loader(cfg, "made_up")] == [
        10,
        11,
        12,
        13,
    ]


def test_empty_images_can_be_left_out(tmp_path):
    cfg = config_for(write(tmp_path, make_content()))
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    prepare(cfg)
    (report,) = check_datasets(cfg)
    assert "2 without objects (left out" in str(report)
    batch = next(iter(build_train_loader(cfg)))
    assert sorted(sample["image_id"] for sample in batch) == [10, 10, 12, 12]


def test_report_sets_boxes_against_queries_and_denoising(tmp_path):
    content = make_content()
    content["annotations"] += [
        {**content["annotations"][0], "id": 100 + i, "image_id": 11} for i in range(40)
    ]
    cfg = config_for(write(tmp_path, content))
    cfg.MODEL.DN_DETR.NUM_QUERIES = 30
    cfg.MODEL.DN_DETR.DENOISING.MAX_OBJECTS = 100
    prepare(cfg)
    (report,) = check_datasets(cfg)
    assert "30 queries can find only 30 of them; 5 denoising groups hold 20 at random" in str(
        report
    )
    cfg.MODEL.DN_DETR.DENOISING.NUM_GROUPS = 0
    assert "2 denoising groups hold all" in str(check_datasets(cfg)[0])
    cfg.MODEL.DN_DETR.DENOISING.ENABLED = False
    assert "denoising" not in str(check_datasets(cfg)[0])


def test_classes_without_boxes_are_named(tmp_path):
    content = make_content()
    content["categories"] += [{"id": 20 + i, "name": f"rare{i}"} for i in range(12)]
    cfg = config_for(write(tmp_path, content))
    prepare(cfg)
    text = str(check_datasets(cfg)[0])
    assert "14, category ids 3 to 31; without boxes: rare0, " in text
    assert "rare9 and 2 more" in text


def test_check_off_cleans_all_the_same_and_says_so(tmp_path, caplog):
    paths = write(tmp_path, make_content())
    (tmp_path / "images" / "11.png").unlink()
    cfg = config_for(paths)
    cfg.DATASETS.CHECK = "off"
    prepare(cfg)
    assert check_datasets(cfg) == []
    with caplog.at_level(logging.WARNING):
        build_train_loader(cfg)
    lines = [line for line in caplog.messages if line.startswith("dataset made_up")]
    assert len(lines) == 3 and "boxes without size: 2 (" in lines[0]
    cfg.DATASETS.CHECK = "on"
    with pytest.raises(InputError, match="'full' or 'off', got 'on'"):
        build_train_loader(cfg)


def _without(key):
    return lambda content: content.pop(key)


def _set(key, number, field, value):
    def change(content):
        content[key][number][field] = value

    return change


def _delete(key, number, field):
    return lambda content: content[key][number].pop(field)


@pytest.mark.parametrize(
    "change, expected",
    [
        (_without("images"), "a.json: the file is not as in COCO format: .* field images"),
        (_without("categories"), "the file is not as in COCO format: .* field categories"),
        (_without("annotations"), "has no boxes"),
        (lambda content: content["annotations"].clear(), "has no boxes"),
        (lambda content: content["images"].clear(), "a.json has no images"),
        (lambda content: content["categories"].clear(), "a.json has no categories"),
        (_delete("images", 1, "file_name"), r"a.json: images\[1\] .* required field file_name"),
        (_set("images", 1, "width", 0), r"images\[1\].width .*: expected float >= 1"),
        (_set("images", 1, "width", "60"), r"images\[1\].width .*: expected float, got str"),
        (_set("images", 1, "id", 10), "the image id 10 is used twice"),
        (_set("categories", 1, "id", 7), "the category id 7 is used twice"),
        (_set("annotations", 1, "id", 1), "the annotation id 1 is used twice"),
        (
            _set("annotations", 1, "category_id", 4),
            r"annotations\[1\] \(id 2\) has category_id 4, which",
        ),
        (
            _set("annotations", 1, "image_id", 99),
            r"annotations\[1\] \(id 2\) has image_id 99, which",
        ),
        (_delete("annotations", 1, "bbox"), r"annotations\[1\] .* required field bbox"),
        (_set("annotations", 1, "bbox", [1, 2, 3]), r"annotations\[1\].bbox .* length 4"),
        (_set("annotations", 1, "bbox", [1, 2, 3, "4"]), r"bbox\[3\] .*: expected float, got str"),
        (_set("annotations", 1, "bbox", [1, 2, 3, None]), r"bbox\[3\] .*, got null"),
        (_set("annotations", 1, "ignore", 1), "has 'ignore', which is not supported"),
        (_set("images", 1, "file_name", "b.png"), "1 of the 4 images .*/b.png' does not exist"),
        (_set("images", 1, "width", 61), r"11.png' has 60x40 pixels, .* say 61x40"),
    ],
)
def test_bad_annotations_are_answered_in_one_sentence(tmp_path, change, expected):
    content = make_content()
    paths = write(tmp_path, content)
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert re.search(expected, sentence_for(paths))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "a.json: it is not valid JSON: Input data was truncated"),
        (
            json.dumps(make_content())[:200],
            "a.json: it is not valid JSON: Input data was truncated",
        ),
        ("[1, 2]", "a.json: the file is not as in COCO format: expected object, got array"),
        ("3", "got int"),
    ],
)
def test_broken_files_are_answered_in_one_sentence(tmp_path, text, expected):
    assert re.search(expected, sentence_for(write(tmp_path, make_content(), text)))


def test_missing_files_are_answered_in_one_sentence(tmp_path):
    json_file, image_root = write(tmp_path, make_content())
    assert "there is no annotation file" in sentence_for((str(tmp_path / "b.json"), image_root))
    forget("made_up")
    sentence = sentence_for((json_file, str(tmp_path / "elsewhere")))
    assert "4 of the 4 images of the dataset 'made_up' cannot be used" in sentence
    assert "elsewhere/10.png' does not exist" in sentence


def test_broken_images_are_found_before_training(tmp_path):
    paths = write(tmp_path, make_content())
    (tmp_path / "images" / "12.png").write_bytes(b"not an image")
    sentence = sentence_for(paths)
    assert "12.png' cannot be read (unknown image format)" in sentence


def test_turned_images_have_the_size_that_is_seen(tmp_path):
    paths = write(tmp_path, make_content())
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(tmp_path / "images" / "12.png", exif=exif)
    cfg = config_for(paths)
    prepare(cfg)
    assert len(check_datasets(cfg)) == 1


def test_an_annotation_file_without_annotations_can_be_evaluated_on(tmp_path):
    content = make_content()
    del content["annotations"]
    cfg = config_for(write(tmp_path, content))
    prepare(cfg, eval_only=True)
    (report,) = check_datasets(cfg, eval_only=True)
    assert (report.num_boxes, report.num_empty, report.is_for_training) == (0, 4, False)
    assert "made_up (evaluation)" in str(report)


def test_a_dataset_is_loaded_once(tmp_path):
    cfg = config_for(write(tmp_path, make_content()))
    prepare(cfg)
    check_datasets(cfg)
    assert dataset_dicts.load("made_up") is dataset_dicts.load("made_up")
    forget("made_up")
    prepare(cfg)
    assert dataset_dicts.load("made_up").num_objects.tolist() == [2, 0, 1, 0]


def own(*records):
    """Register dicts of a function, without any json file, and load them."""
    forget("made_up")
    DatasetCatalog.register("made_up", lambda: list(records))
    MetadataCatalog.get("made_up").thing_classes = ["x"]
    return dataset_dicts.load_annotations("made_up")


def test_datasets_of_the_user_s_own_pass_the_same_gate():
    record = {"file_name": "a.png", "image_id": "a", "width": 10, "height": 10, "mine": {1}}
    box = {"bbox": [2, 3, 15, 8], "bbox_mode": 0, "category_id": 0, "segmentation": [[0] * 6]}
    gone = {**box, "bbox": np.array([1.0, 1, 0, 4]), "bbox_mode": 1}
    kept = {**box, "bbox": (1, 2, 3, 4), "bbox_mode": 1, "tag": "b", "keypoints": [1, 1, 2]}
    loaded = own({**record, "annotations": [box, gone, kept]})
    first, second = loaded.records[0]["annotations"]
    assert first["bbox"] == [2, 3, 10, 8] and "segmentation" not in first
    assert second["bbox"] == [1, 2, 4, 6] and second["tag"] == "b" and "keypoints" in second
    assert loaded.records[0]["mine"] == {1} and loaded.records[0]["image_id"] == "a"
    assert [finding.count for finding in loaded.truth.findings()] == [1, 0, 1]
    assert box["bbox"] == [2, 3, 15, 8]  # not changed
    nameless = [{"file_name": "a.png"}, {"file_name": "b.png"}]
    assert [record["image_id"] for record in own(*nameless).records] == [0, 1]


def test_what_a_function_returns_is_a_list_of_dicts_that_can_be_pickled():
    record = {"file_name": "a.png", "annotations": []}
    for given in ([record], (record,), iter([record])):
        forget("made_up")
        DatasetCatalog.register("made_up", lambda given=given: given)
        MetadataCatalog.get("made_up").thing_classes = ["x"]
        assert dataset_dicts.load("made_up").records[0]["file_name"] == "a.png"
    for given, words in [
        (5, "must be a list of dicts, got 5"),
        (None, "must be a list of dicts, got None"),
        ({"a": record}, "dict 0 must be a dict, got 'a'"),
        ([{**record, "mine": lambda: 0}], "cannot be pickled"),
        ([{**record, "height": np.longdouble(3)}], "not usable"),
        ([{**record, "annotations": torch.ones(2)}], "not usable"),
    ]:
        forget("made_up")
        DatasetCatalog.register("made_up", lambda given=given: given)
        MetadataCatalog.get("made_up").thing_classes = ["x"]
        with pytest.raises(InputError, match=words):
            dataset_dicts.load("made_up")
    for classes in ([1, 2], "ab", ["a", None]):
        forget("made_up")
        DatasetCatalog.register("made_up", lambda: [record])
        MetadataCatalog.get("made_up").thing_classes = classes
        with pytest.raises(InputError, match="thing_classes of the dataset 'made_up' must be a"):
            dataset_dicts.load("made_up")
    forget("made_up")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"category_id": 3}, "dict 0 .'a.png'. .* class 3, but there are 1 class names"),
        ({"bbox": [1, 2, 3, np.nan]}, "a bbox must be 4 finite numbers, got"),
        ({"bbox": ["1", 2, 3, 4]}, "a bbox must be 4 finite numbers, got"),
        ({"bbox": [1e300, 2, 3, 4]}, r"annotations\[0\].bbox\[0\] .*: expected float <="),
        ({"bbox_mode": 4}, "bbox_mode must be XYXY_ABS or XYWH_ABS"),
        ({"bbox_mode": "xyxy"}, "not usable"),
        ({"iscrowd": "no"}, "iscrowd .*, got str"),
    ],
)
def test_faulty_dicts_are_answered_in_one_sentence(changed, words):
    box = {"bbox": [2, 3, 5, 8], "bbox_mode": 0, "category_id": 0}
    with pytest.raises(InputError, match=words):
        own({"file_name": "a.png", "annotations": [{**box, **changed}]})
    for record in (3, {"file_name": None}, {"file_name": "a", "annotations": 3}):
        with pytest.raises(InputError, match="dict 0"):
            own(record)


def test_real_datasets_pass(real_data):
    cfg = config_for(
        (str(real_data / "bccd/annotations/instances_train.json"), str(real_data / "bccd/images"))
    )
    val = real_data / "coco128"
    cfg.DATASETS.COCO_FORMAT += [
        ["made_up_val", str(val / "annotations/instances_val2017.json"), str(val / "val2017")]
    ]
    cfg.DATASETS.TEST = ()
    prepare(cfg)
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 3
    (report,) = check_datasets(cfg)
    assert (report.num_images, report.num_boxes, report.findings[0].count) == (205, 2804, 1)
    cfg.DATASETS.TRAIN, cfg.MODEL.DN_DETR.NUM_CLASSES = ("made_up_val",), 0
    prepare(cfg)
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 80
    (report,) = check_datasets(cfg)
    assert (report.num_images, report.num_boxes) == (128, 898)
    for sample in next(iter(build_train_loader(cfg))):
        boxes = sample["instances"].gt_boxes.tensor
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
