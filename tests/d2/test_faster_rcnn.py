"""Faster R-CNN with denoising beside Detectron2's own."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from samples import losses_in, sample

from dn_detr import Detector
from dn_detr.d2.engine.checkpoint import Checkpointer
from dn_detr.d2.modeling.faster_rcnn import regions_of
from dn_detr.d2.modeling.meta_arch import core_of
from dn_detr.errors import InputError
from dn_detr.structures import NoisedObjects

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quick"
SMALL = (
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
)
DENOISED = {"config_file": QUICK / "dn_faster_rcnn_fpn.yaml"}
PLAIN = {"config_file": QUICK / "faster_rcnn_fpn.yaml"}
BATCH = [sample(0, 3), sample(1, 1), sample(2, 0)]


@pytest.fixture
def model_of(tiny_config):
    def model_of(*opts, seed=0, **file):
        torch.manual_seed(seed)
        return build_model(tiny_config(*SMALL, *opts, **file))

    return model_of


@pytest.fixture
def detectron2s_own(tiny_config):
    cfg = tiny_config(*SMALL, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", **PLAIN)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    torch.manual_seed(0)
    return build_model(cfg)


def losses_of(model, batch=BATCH, *, iteration=0):
    torch.manual_seed(5)  # which proposals are sampled
    with EventStorage():  # Detectron2's heads write there
        return model(batch, **({"iteration": iteration} if hasattr(model, "denoise") else {}))


# -------------------------------------------------------------------------------------- alignment


def test_each_region_is_to_be_moved_onto_its_own_object(model_of):
    """In an image of 200 x 100 pixels: [110, 20, 170, 50] was made from [100, 10, 180, 50], though
    it overlaps the other object as well, and [180, 80, 200, 100], cut at the border, from the
    other."""
    objects = Instances((100, 200))
    objects.gt_boxes = Boxes(torch.tensor([[120.0, 20, 160, 60], [100, 10, 180, 50]]))
    objects.gt_classes = torch.tensor([4, 2])
    noised = NoisedObjects(
        labels=torch.zeros(1, 3, dtype=torch.int64),
        boxes=torch.tensor([[[0.70, 0.35, 0.30, 0.30], [0.5] * 4, [0.95, 0.95, 0.10, 0.30]]]),
        assignment=torch.tensor([[1, -1, 0]]),
        is_empty=torch.tensor([[False, True, False]]),
        num_groups=1,
    )
    regions = regions_of(noised, 0, objects)
    corners = [[110.0, 20, 170, 50], [180, 80, 200, 100]]
    torch.testing.assert_close(regions.proposal_boxes.tensor, torch.tensor(corners))
    assert regions.gt_classes.tolist() == [2, 4]
    # 10 (difference of centres) / size, 5 log(ratio of sizes): the weights of MODEL.ROI_BOX_HEAD.
    deltas = [
        [10 * 0 / 60, 10 * -5 / 30, 5 * math.log(80 / 60), 5 * math.log(40 / 30)],
        [10 * -50 / 20, 10 * -50 / 20, 5 * math.log(40 / 20), 5 * math.log(40 / 20)],
    ]

    model = model_of(**DENOISED)
    for parameter in model.roi_heads.box_predictor.bbox_pred.parameters():
        parameter.data.zero_()  # nothing is moved: the loss is what should have been
    features = {f"p{level}": torch.randn(1, 16, 32, 64) for level in range(2, 6)}
    loss = model.denoising_loss(features, [regions], num_sampled=50)
    assert float(loss.detach()) == pytest.approx(
        sum(abs(d) for row in deltas for d in row) / 50, rel=1e-5
    )


def test_there_is_a_region_for_every_object_and_group(model_of):
    model = model_of("MODEL.DN_DETR.DENOISING.NUM_GROUPS", 10, **DENOISED)
    objects = [one["instances"] for one in BATCH]
    regions = model.noised_regions(BATCH, objects, 0)
    assert [len(one) for one in regions] == [30, 10, 0]
    truth = objects[0].gt_boxes.tensor
    assert torch.equal(regions[0].gt_boxes.tensor, truth.repeat(10, 1))
    moved = regions[0].proposal_boxes.tensor - regions[0].gt_boxes.tensor
    width, height = (truth[:, 2:] - truth[:, :2]).repeat(10, 1).unbind(1)
    most = 0.4 * torch.stack((width, height) * 2, dim=1)  # half of it the centre, half the size
    assert (moved.abs() <= most + 1e-4).all() and moved.abs().max() > 1
    assert len({tuple(row) for row in moved[::3].tolist()}) == 10  # noise is that of a group


def test_noise_follows_from_image_and_iteration_alone(model_of):
    model = model_of(**DENOISED)

    def boxes(*images, iteration=3):
        batch = [sample(image, count) for image, count in images]
        found = model.noised_regions(batch, [one["instances"] for one in batch], iteration)
        return [one.proposal_boxes.tensor for one in found]

    alone = boxes((7, 2))[0]
    assert torch.equal(alone, boxes((8, 5), (7, 2))[1])
    assert not torch.equal(alone, boxes((7, 2), iteration=4)[0])


def test_regions_of_the_smallest_objects_have_an_area(model_of):
    model = model_of("MODEL.DN_DETR.DENOISING.BOX_NOISE", 1.0, **DENOISED)
    tiny = sample(0, 1)
    tiny["instances"].gt_boxes = Boxes(torch.tensor([[95.9999, 63.9999, 96, 64]]))
    assert losses_of(model, [tiny])["loss_box_reg_dn"].isfinite()


# --------------------------------------------------------------------- what denoising leaves alone


def test_without_denoising_it_is_detectron2s_own_and_with_it_all_other_losses_are_equal(
    model_of, detectron2s_own
):
    theirs = losses_of(detectron2s_own)
    names = ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"]
    plain, denoised = (losses_of(model_of(**file)) for file in (PLAIN, DENOISED))
    ours = names
    assert list(plain) == ours and list(denoised) == [*ours, "loss_box_reg_dn"]
    for name, their_name in zip(ours, names, strict=True):
        assert torch.equal(plain[name], theirs[their_name]), name
        assert torch.equal(denoised[name], theirs[their_name]), name
    assert denoised["loss_box_reg_dn"] > 0


def test_inference_is_detectron2s_own_to_the_last_bit(model_of, detectron2s_own):
    model = model_of(seed=1, **DENOISED)
    model.load_state_dict(detectron2s_own.state_dict(), strict=True)
    model.denoise = None  # nobody may ask for it
    images = [sample(0, 0), sample(1, 0, height=80)]
    with torch.no_grad():
        pairs = zip(model.eval()(images), detectron2s_own.eval()(images), strict=True)
    for ours, theirs in ((one["instances"], other["instances"]) for one, other in pairs):
        assert len(ours) == 10
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)


def test_denoising_trains_boxes_and_features_but_neither_classes_nor_proposals(model_of):
    model = model_of(**DENOISED)
    losses_of(model)["loss_box_reg_dn"].backward()
    heads = model.roi_heads
    trained = [heads.box_head.fc1.weight, heads.box_predictor.bbox_pred.weight]
    trained += [model.backbone.fpn_output2.weight, model.backbone.bottom_up.res2[0].conv1.weight]
    assert all(weight.grad.abs().sum() > 0 for weight in trained)
    not_trained = [heads.box_predictor.cls_score, model.proposal_generator]
    for module in not_trained:
        for parameter in module.parameters():
            assert parameter.grad is None or not parameter.grad.any()


# ------------------------------------------------------------------------------------- empty images


def test_images_without_objects_have_no_regions_and_the_same_losses_by_name(model_of):
    model = model_of(**DENOISED)
    losses = [losses_of(model, batch) for batch in (BATCH, BATCH[2:])]
    assert list(losses[0]) == list(losses[1])
    assert losses[1]["loss_box_reg_dn"] == 0 and losses[1]["loss_cls"] > 0
    sum(losses[1].values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_finite_losses_and_gradients(model_of, precision):
    model = model_of(**DENOISED)
    with torch.autocast("cpu", dtype=precision):
        losses = losses_of(model)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# -------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_detectron2_is_this_model(model_of, detectron2s_own, tmp_path):
    DetectionCheckpointer(detectron2s_own, str(tmp_path)).save("zoo")
    model = model_of(seed=1, **DENOISED)
    Checkpointer(model).load(str(tmp_path / "zoo.pth"), checkpointables=[])
    for name, value in detectron2s_own.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_with_other_classes_only_the_last_layers_start_anew(model_of, detectron2s_own, tmp_path):
    for module in detectron2s_own.roi_heads.box_predictor.children():
        module.bias.data.fill_(3.0)
    DetectionCheckpointer(detectron2s_own, str(tmp_path)).save("zoo")
    path = str(tmp_path / "zoo.pth")
    model = model_of(seed=1, **PLAIN)
    about = {"class_names": ["a", "b", "c", "d", "e", "f"]}
    checkpoint = torch.load(path)
    torch.save({**checkpoint, "detector": {"class_names": ["six", "others"]}}, path)
    Checkpointer(model, is_for_training=True, detector=about).load(path, checkpointables=[])
    for name, value in detectron2s_own.state_dict().items():
        is_kept = torch.equal(model.state_dict()[name], value)
        assert is_kept == ("box_predictor" not in name), name


def test_it_starts_from_the_backbone_of_another_detector(
    model_of, tiny_config, tool, tmp_path, monkeypatch
):
    """Which stands inside its feature pyramid, and so under another name."""
    torch.manual_seed(2)
    source, model = build_model(tiny_config()), model_of(**DENOISED)
    Checkpointer(source, str(tmp_path)).save("detr")
    monkeypatch.syspath_prepend(str(QUICK.parents[1] / "tools"))
    path = tool("train_all_quick").save_backbone(tmp_path / "detr.pth", tmp_path / "backbone.pth")
    Checkpointer(model, is_for_training=True).load(str(path), checkpointables=[])
    found = model.backbone.bottom_up.state_dict()
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(found[name], value), name


# ------------------------------------------------------------------------------- trainer and tools


@pytest.mark.parametrize(
    ("key", "value", "available"),
    [
        ("FPN", ["res2", "res9"], "res2.*res5"),
        ("RPN", ["p2", "p9"], "p2.*p6"),
        ("ROI_HEADS", ["p2", "p9"], "p2.*p6"),
    ],
)
def test_a_feature_that_the_backbone_lacks_is_refused_by_its_key(model_of, key, value, available):
    """It was a KeyError of its name alone."""
    key = f"MODEL.{key}.IN_FEATURES"
    sentence = rf"{key} has '{value[1]}', but the features of the backbone are \['{available}'\]"
    with pytest.raises(ValueError, match=sentence):
        model_of(key, value, **PLAIN)


def test_it_trains_resumes_and_detects(run, tmp_path):
    """Resumed, it has the losses that it had without interruption, bit for bit."""
    options = (*SMALL, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    run(*options, **DENOISED)
    losses = losses_in(tmp_path / "run")
    (tmp_path / "run/last_checkpoint").write_text("model_0000001.pth")
    run(*options, flags=["--resume"], **DENOISED)
    assert [line["iteration"] for line in losses] == [0, 1, 2, 3]
    assert losses_in(tmp_path / "run") == losses and losses[3]["loss_dn"] > 0
    results = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert {"bbox", "score", "category_id", "image_id"} <= set(results[0])
    assert "groups hold all" in (tmp_path / "run/log.txt").read_text()

    detector = Detector.from_checkpoint(tmp_path / "run/model_final.pth", threshold=0, device="cpu")
    found = detector(Image.fromarray(np.full((60, 90, 3), 127, np.uint8)))
    assert len(found) > 0 and found.boxes_xyxy_px.max() <= 90


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.DN_DETR.COMPILE", "eager"),
        ("MODEL.DN_DETR.RECOMPUTE", "['encoder']"),
        ("SOLVER.ACCUMULATE", 2),
        ("TEST.INSTABILITY.ENABLED", True),
    ],
    ids=lambda options: options[0],
)
def test_what_needs_a_decoder_is_refused_in_one_sentence(run, options):
    with pytest.raises(
        SystemExit, match=f"{options[0].removesuffix('.ENABLED')}.* works with DenoisingDETR"
    ):
        run(*SMALL, *options, **DENOISED)


def test_the_backbone_can_be_computed_again(run):
    run(*SMALL, "MODEL.DN_DETR.RECOMPUTE", "['backbone']", "SOLVER.MAX_ITER", 1, **DENOISED)


@pytest.mark.parametrize("options", [("LABEL_NOISE", 0.2), ("CONTRASTIVE", True)])
def test_only_boxes_are_noised(run, options):
    with pytest.raises(SystemExit, match="DenoisingRCNN noises boxes alone"):
        run(*SMALL, f"MODEL.DN_DETR.DENOISING.{options[0]}", options[1], **DENOISED)


def test_its_layers_are_not_drawn(model_of):
    with pytest.raises(InputError, match="this model is a DenoisingRCNN and has no encoder"):
        core_of(model_of(**PLAIN), "visualize.py")
