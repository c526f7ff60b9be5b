"""Mask2Former against facebookresearch/Mask2Former, Mask DINO against IDEA-Research/MaskDINO.

Images without padding, which their code does not know, and the same random points on both sides,
none within half a cell of the border, where theirs fades to zero.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import Pair, check, compare_losses, losses_of
from multiscale import use_fallback
from peers import NUM_POINTS, difference, layers_of, objects, randomize
from tiny import config_of

from dn_detr.build import Denoising, LossConfig, build_model
from dn_detr.losses.mask_costs import MaskCosts
from dn_detr.losses.matcher import Costs
from dn_detr.models.mask_head import mask_logits

WIDTHS, STRIDES = [8, 8, 16, 24], [4, 8, 16, 32]
HEIGHT, WIDTH = 128, 160
NUM_CLASSES = 7
LAYERS = 4
NUMBERS = {
    "num_classes": NUM_CLASSES,
    "num_queries": 11,
    "encoder_layers": 2,
    "decoder_layers": LAYERS,
    "feed_forward_dim": 96,
    "encoder_feed_forward_dim": 64,
}
MASK_TERMS = LossConfig(mask_weight=1, dice_weight=1, mask_points=NUM_POINTS).mask_terms()


@pytest.fixture
def features(float64):  # noqa: ARG001
    torch.manual_seed(1)
    shapes = zip(WIDTHS, STRIDES, strict=True)
    return [torch.randn(2, c, HEIGHT // s, WIDTH // s) for c, s in shapes]


def with_masks(*counts):
    """Targets with masks in their form and in ours."""
    theirs, ours = objects(*counts, num_classes=NUM_CLASSES)
    masks = []
    for key, target in enumerate(theirs):
        generator = torch.Generator().manual_seed(20 + key)
        coarse = torch.rand(len(target["labels"]), 1, 8, 10, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
        masks.append(fine[:, 0] > 0.5)
        target["masks"] = masks[-1]
    return theirs, replace(ours, masks=tuple(masks))


def shapes():
    from detectron2.layers import ShapeSpec

    names = ("res2", "res3", "res4", "res5")
    return {
        name: ShapeSpec(channels=c, stride=s)
        for name, c, s in zip(names, WIDTHS, STRIDES, strict=True)
    }


class Head(torch.nn.Module):
    """Their pixel decoder and predictor below the names that their checkpoints have."""

    def __init__(self, pixel_decoder, predictor):
        super().__init__()
        self.sem_seg_head = torch.nn.Module()
        self.sem_seg_head.pixel_decoder = pixel_decoder
        self.sem_seg_head.predictor = predictor
        self.criterion = torch.nn.Module()
        self.criterion.empty_weight = torch.nn.Parameter(torch.ones(NUM_CLASSES + 1))


def with_our_model(method, config, theirs, **auxiliary):
    ours = build_model(
        method,
        config_of(method, **{**NUMBERS, **config}),
        in_channels=WIDTHS,
        strides=STRIDES,
        **auxiliary,
    )
    pair = Pair(method, method, ours, theirs, {"backbone": None})
    pair.load()
    return pair


def compare_masks(part, theirs):
    ours = torch.stack(
        [mask_logits(layer, part.mask_features.features) for layer in part.mask_embeddings]
    )
    return difference(ours, theirs)


@pytest.mark.parametrize("counts", [(3, 2), (2, 0)])
@pytest.mark.usefixtures("fixed_points")
def test_mask2former_equals_the_authors(authors, features, monkeypatch, counts):
    load_theirs = authors("Mask2Former")
    package = "mask2former.modeling"
    use_fallback(load_theirs, f"{package}.pixel_decoder.ops", monkeypatch)
    decoder = load_theirs(f"{package}.pixel_decoder.msdeformattn").MSDeformAttnPixelDecoder
    pixel_decoder = decoder(
        shapes(),
        transformer_dropout=0.0,
        transformer_nheads=8,
        transformer_dim_feedforward=64,
        transformer_enc_layers=2,
        conv_dim=256,
        mask_dim=256,
        norm="GN",
        transformer_in_features=["res3", "res4", "res5"],
        common_stride=4,
    )
    name = f"{package}.transformer_decoder.mask2former_transformer_decoder"
    predictor = load_theirs(name).MultiScaleMaskedTransformerDecoder(
        256,
        num_classes=NUM_CLASSES,
        hidden_dim=256,
        num_queries=11,
        nheads=8,
        dim_feedforward=96,
        dec_layers=LAYERS,
        pre_norm=False,
        mask_dim=256,
        enforce_input_project=False,
    )
    theirs = Head(pixel_decoder, predictor).eval()
    randomize(theirs)
    given = dict(zip(shapes(), features, strict=True))
    maps, _, scales = pixel_decoder.forward_features(given)
    output = predictor(scales, maps)

    pair = with_our_model("mask2former", {"num_levels": 3, "has_no_object": True}, theirs)
    their_targets, targets = with_masks(*counts)
    padding = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    predictions = pair.ours(features, padding, targets)
    check(pair.row, "outputs", {
        "map": difference(predictions.mask_features.features, maps),
        "logits": difference(predictions.logits, layers_of(output, "pred_logits")),
        "masks": compare_masks(predictions, layers_of(output, "pred_masks")),
    })  # fmt: skip

    matcher = load_theirs(f"{package}.matcher").HungarianMatcher(2.0, 5.0, 5.0, NUM_POINTS)
    criterion = load_theirs(f"{package}.criterion").SetCriterion(
        NUM_CLASSES, matcher, {}, 0.1, ["labels", "masks"], NUM_POINTS, 3.0, 0.75
    )
    losses = criterion(output, their_targets)
    costs = Costs(class_cost=2.0, l1=0, giou=0, kind="softmax")
    compare_losses(
        pair,
        losses_of(
            predictions,
            targets,
            costs=MaskCosts(others=costs, num_points=NUM_POINTS),
            masks=MASK_TERMS,
            kind="softmax",
            l1_weight=0,
            giou_weight=0,
        ),
        losses,
        {"match": "{}"},
    )


@pytest.mark.parametrize("counts", [(3, 3), (2, 4)])
@pytest.mark.usefixtures("fixed_points")
def test_mask_dino_equals_the_authors(authors, features, monkeypatch, counts):
    """With denoising but without noise; empty slots are visible and negative, as in their code."""
    load_theirs = authors("MaskDINO")
    package = "maskdino.modeling"
    use_fallback(load_theirs, f"{package}.pixel_decoder.ops", monkeypatch)
    encoder = load_theirs(f"{package}.pixel_decoder.maskdino_encoder").MaskDINOEncoder
    pixel_decoder = encoder(
        shapes(),
        transformer_dropout=0.0,
        transformer_nheads=8,
        transformer_dim_feedforward=64,
        transformer_enc_layers=2,
        conv_dim=256,
        mask_dim=256,
        norm="GN",
        transformer_in_features=["res3", "res4", "res5"],
        common_stride=4,
        num_feature_levels=3,
        total_num_feature_levels=4,
        feature_order="low2high",
    )
    predictor = load_theirs(f"{package}.transformer_decoder.maskdino_decoder").MaskDINODecoder(
        256,
        num_classes=NUM_CLASSES,
        hidden_dim=256,
        num_queries=11,
        nheads=8,
        dim_feedforward=96,
        dec_layers=LAYERS,
        mask_dim=256,
        enforce_input_project=False,
        two_stage=True,
        dn="seg",
        noise_scale=0.0,
        dn_num=12,
        initialize_box_type="mask2box",
        initial_pred=True,
        learn_tgt=False,
        total_num_feature_levels=4,
    )
    theirs = Head(pixel_decoder, predictor).train()
    randomize(theirs)
    pixel_decoder.mask_features.bias.data -= 3  # some of the first masks are then empty
    given = dict(zip(shapes(), features, strict=True))
    their_targets, targets = with_masks(*counts)
    maps, _, scales = pixel_decoder.forward_features(given, None)
    output, denoised = predictor(scales, maps, None, targets=their_targets)

    pair = with_our_model(
        "mask_dino",
        {"epsilon": 1e-5, "as_published": True},
        theirs,
        denoising=Denoising(num_groups=0, max_objects=12, box_noise=0, label_noise=0),
    )
    padding = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    predictions = pair.ours(features, padding, targets)
    proposals, found = predictions.proposals, {}
    for name, part, their_output in (
        ("match", predictions.of("match"), output),
        ("dn", predictions.of("dn"), denoised["output_known_lbs_bboxes"]),
    ):
        found[f"{name} logits"] = difference(part.logits, layers_of(their_output, "pred_logits"))
        found[f"{name} boxes"] = difference(part.boxes, layers_of(their_output, "pred_boxes"))
        found[f"{name} masks"] = compare_masks(part, layers_of(their_output, "pred_masks"))
    first = output["interm_outputs"]
    is_empty = (first["pred_masks"] <= 0).all(dim=(2, 3))
    assert is_empty.any() and not is_empty.all()  # their boxes are in a corner
    found["proposed logits"] = difference(proposals.logits[0], first["pred_logits"])
    found["proposed boxes"] = difference(proposals.boxes[0], first["pred_boxes"])
    found["proposed masks"] = compare_masks(proposals, first["pred_masks"][None])
    check(pair.row, "outputs", found)

    matcher = load_theirs(f"{package}.matcher").HungarianMatcher(
        cost_class=4.0, cost_mask=5.0, cost_dice=5.0, num_points=NUM_POINTS, cost_box=5.0,
        cost_giou=2.0,
    )  # fmt: skip
    criterion = load_theirs(f"{package}.criterion").SetCriterion(
        NUM_CLASSES, matcher, {}, 0.1, ["labels", "masks", "boxes"], NUM_POINTS, 3.0, 0.75,
        dn="seg", dn_losses=["labels", "masks", "boxes"],
    )  # fmt: skip
    losses = criterion(output, their_targets, denoised)
    compare_losses(
        pair,
        losses_of(
            predictions,
            targets,
            costs=MaskCosts(others=Costs(class_cost=4.0), num_points=NUM_POINTS),
            masks=MASK_TERMS,
        ),
        losses,
        {"match": "{}", "dn": "{}_dn", "enc": "{}_interm"},
    )
