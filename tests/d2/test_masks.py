"""Detectors with masks, from annotations to detections, as Detectron2 sees them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import BoxMode, polygons_to_bitmask
from samples import sample

from dn_detr import Detector
from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.d2.data.loader import build_test_loader
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.inference.visualization import draw_found, draw_record
from dn_detr.d2.modeling.instances import to_instances
from dn_detr.errors import InputError
from dn_detr.models.mask_postprocess import boxes_around, postprocess_masks
from dn_detr.structures import MaskFeatures, Predictions, Segment

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quick"
CONFIGS = {name: QUICK / f"{name}.yaml" for name in ("dn_mask2former", "mask_dino")}
FEW_POINTS = ("MODEL.DN_DETR.LOSS.MASK_POINTS", 40)
both = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def model_of(tiny_config):
    def model_of(name, *opts):
        torch.manual_seed(0)
        return build_model(tiny_config(*FEW_POINTS, *opts, config_file=CONFIGS[name]))

    return model_of


# ------------------------------------------------------------------------------------ training


@both
def test_losses_have_the_same_keys_with_and_without_objects(name, model_of):
    model = model_of(name)
    batches = [[sample(0, 3), sample(1, 1)], [sample(0, 3), sample(2, 0)], [sample(2, 0)]]
    losses = [model(batch) for batch in batches]
    assert list(losses[0]) == list(losses[1]) == list(losses[2])
    assert all(loss.isfinite() for part in losses for loss in part.values())
    assert losses[0]["loss_mask_dn"] > 0 and losses[0]["loss_dice_0"] > 0
    assert losses[2]["loss_dice_dn"] == 0 and losses[2]["loss_mask"] == 0


def test_training_as_published_needs_images_without_padding(model_of):
    """The authors' are all of 1024 x 1024: boxes relative to a larger canvas would mean another."""
    model = model_of("mask_dino", "MODEL.DN_DETR.AS_PUBLISHED", True)
    samples = [sample(0, 3), sample(1, 1)]
    assert all(loss.isfinite() for loss in model(samples).values())
    samples[1]["image"] = samples[1]["image"][:, :-1]
    with pytest.raises(InputError, match="AS_PUBLISHED with masks needs images of one size"):
        model(samples)


@both
def test_mixed_precision_gives_finite_losses_and_gradients(name, model_of):
    model = model_of(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([sample(0, 3), sample(1, 0)])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@both
def test_losses_of_an_iteration_are_the_same_again_and_others_in_the_next(name, model_of):
    """Random points included: every draw follows from seed, iteration and image."""
    model = model_of(name)
    model.backbone.eval()
    totals = []
    for iteration in (3, 3, 4):
        losses = model([sample(0, 3)], iteration=iteration)
        totals.append({k: float(v.detach()) for k, v in losses.items()})
        torch.rand(7)
    assert totals[0] == totals[1]
    assert totals[0]["loss_mask"] != totals[2]["loss_mask"]


# ---------------------------------------------------------------------------------- evaluation


@both
def test_training_ends_with_the_ap_of_boxes_and_masks(name, run, tmp_path):
    run(*FEW_POINTS, "SOLVER.MAX_ITER", 2, "TEST.REPORT", True, config_file=CONFIGS[name])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert "bbox/AP" in lines[-1] and "segm/AP" in lines[-1]
    found = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert len(found) == 40 and all("segmentation" in entry for entry in found)
    folder = tmp_path / "run/inference/report_tiny_val"
    report = json.loads((folder / "report.json").read_text())
    assert report["mask_metrics"]["AP"] == pytest.approx(lines[-1]["segm/AP"])
    assert report["metrics"]["AP"] == pytest.approx(lines[-1]["bbox/AP"])
    assert "<td>masks</td>" in (folder / "report.html").read_text()


def test_real_images_train_and_are_evaluated_with_polygons_and_codes(run, real_data, tmp_path):
    coco = real_data / "coco128"
    entries = []
    for split in ("train", "val"):
        source = json.loads((coco / f"annotations/instances_masks_{split}2017.json").read_text())
        source["images"] = source["images"][:6]
        kept = {image["id"] for image in source["images"]}
        source["annotations"] = [a for a in source["annotations"] if a["image_id"] in kept]
        (tmp_path / f"{split}.json").write_text(json.dumps(source))
        names = f"real_masks_{split}", str(tmp_path / f"{split}.json"), str(coco / f"{split}2017")
        entries.append(list(names))
    run(
        *FEW_POINTS,
        *("DATASETS.COCO_FORMAT", str(entries)),
        *("DATASETS.TRAIN", "('real_masks_train',)", "DATASETS.TEST", "('real_masks_val',)"),
        *("SOLVER.MAX_ITER", 2, "INPUT.SCALE_JITTER.ENABLED", True, "INPUT.SCALE_JITTER.SIZE", 96),
        config_file=CONFIGS["dn_mask2former"],
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert "segm/AP" in lines[-1]


class Oracle(torch.nn.Module):
    """Predictions that are the ground truth: a channel of the mask features for every object."""

    def __init__(self, name, num_classes):
        super().__init__()
        records = load_annotations(name, with_masks=True).records
        self.records = {record["image_id"]: record for record in records}
        self.num_classes = num_classes

    def forward(self, batch):
        return [{"instances": self.answer(sample)} for sample in batch]

    def answer(self, sample):
        size = height, width = sample["height"], sample["width"]
        objects = self.records[sample["image_id"]]["annotations"]
        count = len(objects)
        masks = [polygons_to_bitmask(a["segmentation"], height, width) for a in objects]
        features = torch.from_numpy(np.array(masks, np.float32)) * 20 - 10
        features = features.reshape(1, count, height, width)
        logits = torch.full((1, 1, count, self.num_classes), -20.0)
        logits[0, 0, range(count), [a["category_id"] for a in objects]] = 9.0
        predictions = Predictions(
            logits=logits,
            boxes=None,
            references=(None,),
            segments=(Segment("match", count),),
            mask_embeddings=torch.eye(count)[None, None],
            mask_features=MaskFeatures(features, torch.tensor([[width, height]]).float()),
        )
        options = {"canvas": size, "output_sizes": [size], "has_no_object": False}
        (found,) = postprocess_masks(predictions, [size], top_k=count, **options)
        return to_instances(found, size)


def test_the_evaluator_gives_full_marks_to_the_ground_truth(tiny_config):
    cfg = tiny_config(config_file=CONFIGS["mask_dino"])
    loader = build_test_loader(cfg, "tiny_val")
    oracle = Oracle("tiny_val", cfg.MODEL.DN_DETR.NUM_CLASSES)
    results = inference_on_dataset(oracle, loader, Trainer.build_evaluator(cfg, "tiny_val"))
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] > 60  # the boxes of the masks, in whole pixels


def test_scores_are_those_of_the_class_times_the_mean_probability_in_the_mask():
    features = torch.full((1, 1, 4, 6), -3.0)
    features[0, 0, 1, 2:4] = torch.tensor([1.0, 2.0])
    predictions = Predictions(
        logits=torch.tensor([[[[2.0, 1.0, 0.0], [0.5, 3.0, 1.0]]]]),
        boxes=None,
        references=(None,),
        segments=(Segment("match", 2),),
        mask_embeddings=torch.tensor([[[[1.0], [-1.0]]]]),
        mask_features=MaskFeatures(features, torch.tensor([[6.0, 4.0]])),
    )
    (found,) = postprocess_masks(
        predictions,
        [(4, 6)],
        canvas=(4, 6),
        output_sizes=[(4, 6)],
        top_k=3,
        has_no_object=True,
    )
    classes = predictions.logits[0, 0].softmax(-1)
    inside = torch.tensor([1.0, 2.0]).sigmoid().mean(), torch.tensor(3.0).sigmoid()
    expected = [classes[1, 1] * inside[1], classes[0, 0] * inside[0], classes[0, 1] * inside[0]]
    torch.testing.assert_close(found.scores, torch.stack(expected))
    assert found.labels.tolist() == [1, 0, 1]
    assert found.boxes_xyxy_px.tolist() == [[0, 0, 6, 4], [2, 1, 4, 2], [2, 1, 4, 2]]
    assert found.masks.sum((1, 2)).tolist() == [22, 2, 2]


def test_an_empty_mask_has_an_empty_box():
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[1, 3, 1:5] = True
    assert boxes_around(masks).tolist() == [[0, 0, 0, 0], [1, 3, 5, 4]]


def test_masks_are_those_of_the_given_image_in_its_size(model_of):
    model = model_of("mask_dino").eval()
    with torch.no_grad():
        (found,) = model([{**sample(0, 0), "height": 90, "width": 200}])
    found = found["instances"]
    assert found.pred_masks.shape == (10, 90, 200) and found.pred_masks.dtype == torch.bool
    assert found.pred_masks.any() and not found.pred_masks.all()
    assert (found.scores.diff() <= 0).all() and found.image_size == (90, 200)


def test_a_detector_gives_masks_of_the_image_and_they_are_drawn(model_of):
    detector = Detector(
        model_of("dn_mask2former").eval(),
        class_names=list("abcdef"),
        input_format="RGB",
        min_size=64,
        max_size=96,
        threshold=0,
    )
    image = np.random.default_rng(0).integers(256, size=(480, 500, 3), dtype=np.uint8)
    found = detector(image, channel_order="RGB")
    assert found.masks.shape == (len(found), 480, 500) and found.masks.dtype == bool
    for (x0, y0, x1, y1), mask in zip(found.boxes_xyxy_px, found.masks, strict=True):
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        if mask.any():
            assert [x0, x1] == [columns[0], columns[-1] + 1]
            assert [y0, y1] == [rows[0], rows[-1] + 1]
    with_masks, without = draw_found(image, found), draw_found(image, replace(found, masks=None))
    assert with_masks.shape == without.shape and (with_masks != without).mean() > 0.01


def test_polygons_of_the_ground_truth_are_drawn():
    image = np.zeros((480, 480, 3), np.uint8)
    box = {"bbox": [100, 100, 300, 300], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    polygon = [100, 100, 300, 100, 300, 300, 100, 300]
    plain = draw_record(image, {"annotations": [box]}, ["a"])
    drawn = draw_record(image, {"annotations": [{**box, "segmentation": [polygon]}]}, ["a"])
    assert plain[250, 250].max() == 0 and drawn[250, 250].max() > 0


# ---------------------------------------------------------------------------------- what is refused


def test_a_method_and_mask_on_must_fit(tiny_config):
    cfg = tiny_config("MODEL.MASK_ON", False, config_file=CONFIGS["mask_dino"])
    with pytest.raises(InputError, match="MODEL.MASK_ON is False, but mask_dino predicts masks"):
        Trainer.build_model(cfg)
    with pytest.raises(InputError, match="MODEL.MASK_ON is True, but .* predicts no masks"):
        Trainer.build_model(tiny_config("MODEL.MASK_ON", True))


def test_crop_and_scale_jitter_exclude_each_other(tiny_config):
    cfg = tiny_config("INPUT.CROP.ENABLED", True, "INPUT.SCALE_JITTER.ENABLED", True)
    with pytest.raises(InputError, match="exclude each other"):
        Trainer.build_train_loader(cfg)
