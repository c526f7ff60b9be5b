"""Teach-DETR through Detectron2: from result files to losses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import forget, make_content, write
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from samples import sample, with_teacher
from test_accumulation import FROZEN, check_equal, gradients_and_losses, unequal_batch
from tiny import key_of

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.loader import build_train_loader
from dn_detr.d2.data.summary import check_datasets
from dn_detr.d2.data.teacher_boxes import load_teacher_boxes
from dn_detr.d2.modeling.batch import batch_stats
from dn_detr.errors import InputError

TEACH = ("MODEL.DN_DETR.TEACH.ENABLED", True)


@pytest.fixture(autouse=True)
def clean_catalogs():
    yield
    forget("taught")


def result(image_id, category_id=3, bbox=(5, 5, 20, 10), score=0.5, **more):
    box = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score, **more}


def config(folder, results, **changes):
    """A training on the four images of `coco_files`, taught by these results."""
    file = folder / "teacher.json"
    if results is not None:
        file.write_text(results if isinstance(results, str) else json.dumps(results))
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.DATASETS.COCO_FORMAT = [["taught", *write(folder, make_content())]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("taught",), ()
    cfg.DATASETS.TEACHER_BOXES = [["taught", str(file)]]
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0, False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (40,), "none"
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DN_DETR.TEACH.ENABLED = True
    cfg.merge_from_list([part for pair in changes.items() for part in pair])
    return cfg


def taught_by(cfg) -> dict:
    """image_id -> what the training is taught about it."""
    prepare(cfg)
    batch = next(iter(build_train_loader(cfg)))
    return {sample["image_id"]: sample["teacher_instances"] for sample in batch}


# ------------------------------------------------------------------------------------------ files


def test_a_training_gets_the_boxes_of_the_file_beside_the_ground_truth(tmp_path):
    results = [
        result(12, 7, (10, 10, 30, 20), 0.25, segmentation={"size": [40, 60], "counts": "x"}),
        result(10, 3, (5, 5, 20, 10), 1.0),
        result(12, 3, (0, 0, 60, 40), 0.75),
        result(10, 7, (50, 30, 20, 20), 1),  # leaves the image
    ]
    cfg = config(tmp_path, results)
    taught = taught_by(cfg)
    assert {i: taught[i].gt_boxes.tensor.tolist() for i in taught} == {
        10: [[5, 5, 25, 15], [50, 30, 60, 40]],
        11: [],
        12: [[10, 10, 40, 30], [0, 0, 60, 40]],
        13: [],
    }
    assert taught[12].gt_classes.tolist() == [1, 0] and taught[12].scores.tolist() == [0.25, 0.75]
    assert taught[10].gt_classes.tolist() == [0, 1] and taught[10].scores.tolist() == [1, 1]
    truth = {
        sample["image_id"]: sample["instances"] for sample in next(iter(build_train_loader(cfg)))
    }
    assert [len(truth[i]) for i in (10, 11, 12, 13)] == [2, 0, 1, 0]
    assert not truth[10].has("scores")


def test_the_report_says_what_was_left_out(tmp_path, caplog):
    results = [
        *(result(10), result(10, score=0.75), result(12)),
        *(result(12, bbox=(50, 30, 20, 20)), result(13, score=0)),
        *(result(12, bbox=(1, 2, 0, 4)), result(10, bbox=(70, 0, 5, 5))),
        *(result(9), result("10")),
    ]
    cfg = config(tmp_path, results)
    prepare(cfg)
    with caplog.at_level("INFO", logger="dn_detr"):
        check_datasets(cfg)
    text = "\n".join(caplog.messages)
    for part in (
        "read       9 boxes",
        "4 boxes in 2 of 4 images; per image: median 1, most 2",
        "boxes without size: 1 (",
        "12.png [1, 2, 0, 4])",
        "outside their image: 1 (",
        "10.png [70, 0, 5, 5])",
        "at the border of their image: 1 (",
        "boxes with the score 0: 1",
        "not in the dataset: 2 (image_id 9, '10', ...)",
    ):
        assert part in text


WRONG = {
    "no list": ({"annotations": [result(10)]}, "expected array, got object"),
    "one result": (result(10), "expected array, got object"),
    "nothing": ([], "must hold a list of at least one result"),
    "cut off": (json.dumps([result(10)])[:-9], "not valid JSON: "),
    "no object": ([result(10), [10, 3]], r"\[1\] .*: expected object, got array"),
    "no score": (
        [{"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4]}],
        r"\[0\] .* required field score",
    ),
    "high score": ([result(10), result(10, score=1.5)], r"result 1 .* score in \[0, 1\], got 1.5"),
    "negative": ([result(10, score=-0.5)], r"score in \[0, 1\], got -0.5"),
    "nan": ([result(10, score=float("nan"))], "NaN and Infinity are no numbers"),
    "three numbers": (
        [result(10, bbox=(1, 2, 3))],
        r"\[0\].bbox .*: expected array of length 4",
    ),
    "class": ([result(10, 4)], "result 0 has the category_id 4, which is not in .*a.json"),
    "id": ([result([10])], r"\[0\].image_id .*: expected int . str, got array"),
    "other dataset": (
        [result(1), result(2)],
        "no image_id in .*, e.g. 1, is in the dataset 'taught'",
    ),
    "shares": (
        [result(10, bbox=(300, 2, 3, 3)), result(10, bbox=(0, 0, 0, 0))],
        "2 of the 2 boxes",
    ),
    "no file": (
        None,
        "there is no file of teacher boxes .*teacher.json: make them by tools/make_teach",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, what):
    results, sentence = WRONG[what]
    cfg = config(tmp_path, results)
    prepare(cfg)
    with pytest.raises(InputError, match=sentence) as caught:
        check_datasets(cfg)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_every_training_dataset_needs_a_file(tmp_path):
    for entries, sentence in (
        ([], "names none for 'taught'"),
        ([["other", "a.json"]], "names none for 'taught'"),
        ([["taught", "a.json"], ["taught", "b.json"]], "two files for 'taught', a.json and b.json"),
        ([["taught"]], r"must be a list of \[dataset, json file\]"),
    ):
        cfg = config(tmp_path, [result(10)])
        cfg.DATASETS.TEACHER_BOXES = entries
        prepare(cfg)
        with pytest.raises(InputError, match=sentence):
            check_datasets(cfg)
        cfg.MODEL.DN_DETR.TEACH.ENABLED = False
        check_datasets(cfg)


def test_a_single_file_needs_no_list_around_it(tmp_path):
    cfg = config(tmp_path, [result(10)])
    (cfg.DATASETS.TEACHER_BOXES,) = cfg.DATASETS.TEACHER_BOXES
    assert len(taught_by(cfg)[10]) == 1


def test_images_that_are_left_out_do_not_shift_the_boxes(tmp_path):
    cfg = config(tmp_path, [result(i, bbox=(i, 0, 5, 5)) for i in (10, 11, 12, 13)])
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    taught = taught_by(cfg)
    assert {i: boxes.gt_boxes.tensor[0, 0].item() for i, boxes in taught.items()} == {
        10: 10,
        12: 12,
    }


def test_millions_of_boxes_are_numbers_in_arrays_and_nothing_else(tmp_path):
    """24 bytes a box, in memory that the workers of a loader share with the process that has it."""
    cfg = config(tmp_path, [result(10 + i % 4, score=0.25) for i in range(4000)])
    prepare(cfg)
    loaded = load_teacher_boxes(dataset_dicts.load("taught"), cfg.DATASETS.TEACHER_BOXES[0][1])
    arrays = vars(loaded.boxes).values()
    assert sum(array.nbytes for array in arrays) == 4000 * (16 + 4 + 4) + 5 * 8
    assert loaded.boxes.counts.tolist() == [1000] * 4
    assert all(array.dtype != np.object_ for array in arrays)


# ----------------------------------------------------------------------------------------- losses


def taught_batch() -> list[dict]:
    """The unequal batch, of which one image has no teacher's box, and another no object."""
    return [with_teacher(s, n) for s, n in zip(unequal_batch(), (3, 4, 0, 1), strict=True)]


@pytest.fixture
def model_of(tiny_config):
    def model_of(*opts):
        torch.manual_seed(0)
        return build_model(tiny_config(*opts))

    return model_of


def test_a_teacher_adds_losses_and_nothing_else(model_of):
    plain, taught = model_of(), model_of(*TEACH)
    assert plain.state_dict().keys() == taught.state_dict().keys()
    expected, found = plain(unequal_batch()), taught(taught_batch())
    own = {key: value for key, value in found.items() if "teacher" not in key}
    assert list(own) == list(expected)
    assert all(torch.equal(own[key], expected[key]) for key in expected)
    added = found.keys() - own.keys()
    assert added == {key_of(key, "teacher") for key in own if "dn" not in key}
    assert all(found[key] > 0 for key in added)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_finite_losses_and_gradients(model_of, precision):
    model = model_of(*TEACH)
    with torch.autocast("cpu", dtype=precision):
        losses = model(taught_batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(value for key, value in losses.items() if "teacher" in key).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_losses_are_divided_by_the_number_of_teacher_boxes(model_of):
    model, batch = model_of(*TEACH), taught_batch()[:3]
    whole = batch_stats(batch, torch.device("cpu"))
    assert (whole.num_objects, whole.num_teacher_boxes) == (6, 7)
    losses = model(batch, whole, iteration=0)
    halved = model(batch, replace(whole, num_teacher_boxes=14.0), iteration=0)
    for key, value in losses.items():
        expected = value / 2 if "teacher" in key else value
        torch.testing.assert_close(halved[key], expected)


def test_a_box_teaches_as_much_as_its_score_says(model_of):
    model, batch = model_of(*TEACH), taught_batch()
    losses = model(batch, iteration=0)
    for one in batch:
        one["teacher_instances"].scores *= 0.5
    doubtful = model(batch, iteration=0)
    for name in ("bbox", "giou", "bbox_0", "giou_0"):
        torch.testing.assert_close(
            doubtful[key_of(f"loss_{name}", "teacher")],
            losses[key_of(f"loss_{name}", "teacher")] / 2,
        )
    assert doubtful["loss_ce_teacher"] != losses["loss_ce_teacher"]


def test_there_is_a_normaliser_where_no_teacher_has_a_box():
    assert batch_stats(unequal_batch(), torch.device("cpu")).num_teacher_boxes == 1
    assert batch_stats([with_teacher(sample(1, 3), 0)], torch.device("cpu")).num_teacher_boxes == 1


def test_parts_have_the_losses_and_gradients_of_the_whole(tiny_config):
    cfg = tiny_config(*FROZEN, *TEACH)
    whole, losses = gradients_and_losses(cfg, 1, taught_batch())
    assert losses["loss_giou_teacher"] > 0
    parts, losses_of_parts = gradients_and_losses(cfg, 4, taught_batch())
    check_equal(parts, losses_of_parts, whole, losses)


# -------------------------------------------------------------------------------------- trainings


def test_a_taught_training_resumes_bit_for_bit(run, tiny_data, tmp_path):
    """Six iterations at once are three and three."""
    (name, json_file, _), _ = json.loads(tiny_data[1].replace("'", '"'))
    content = json.loads(Path(json_file).read_text())
    results = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.5}
        for a in content["annotations"][::2]
    ]
    (tmp_path / "teacher.json").write_text(json.dumps(results))
    options = (
        *(*TEACH, "DATASETS.TEACHER_BOXES", str([[name, str(tmp_path / "teacher.json")]])),
        *("SOLVER.STEPS", "(5,)", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 3),
    )
    run(*options, "SOLVER.MAX_ITER", 6, output="once")
    run(*options, "SOLVER.MAX_ITER", 3)
    run(*options, "SOLVER.MAX_ITER", 6, flags=["--resume"])
    once, twice = (
        [json.loads(line) for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("once", "run")
    )
    assert len(once) == 6 and once[-1]["loss_bbox_teacher"] > 0
    for one, other in zip(once, twice, strict=True):
        losses = {key for key in one if key.startswith("loss_")}
        assert {key: one[key] for key in losses} == {key: other[key] for key in losses}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{len(results)} boxes in " in log
