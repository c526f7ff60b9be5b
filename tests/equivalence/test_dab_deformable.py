"""DAB-Deformable-DETR and DN-Deformable-DETR against IDEA-Research/DAB-DETR and DN-DETR."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from compare import Pair, compare, compare_losses, losses_of
from multiscale import ARGS, GivenPyramid, our_model, use_fallback
from peers import objects, randomize
from torch import nn

from dn_detr.build import Denoising


def their_model(load, package, features, padding, monkeypatch):
    use_fallback(load, f"models.{package}.ops", monkeypatch)
    nested = load("util.misc").NestedTensor
    position = load(f"models.{package}.position_encoding").build_position_encoding(ARGS)
    detr = load(f"models.{package}.dab_deformable_detr")
    model = detr.DABDeformableDETR(
        GivenPyramid(nested, features, padding, position),
        load(f"models.{package}.deformable_transformer").build_deforamble_transformer(ARGS),
        num_classes=91,
        num_queries=11,
        num_feature_levels=4,
        use_dab=True,
    )
    randomize(model)
    matcher = load(f"models.{package}.matcher").HungarianMatcher(2, 5, 2)
    criterion = detr.SetCriterion(91, matcher, {}, ["labels", "boxes", "cardinality"])
    return model, criterion, nested(padding[:, None].float(), padding)


def their_encoder_only(load, features, padding, monkeypatch, num_patterns):
    package = "models.dn_dab_deformable_detr_deformable_encoder_only"
    use_fallback(load, f"{package}.ops", monkeypatch)
    nested = load("util.misc").NestedTensor
    args = {**vars(ARGS), "num_patterns": num_patterns}
    args = Namespace(**args, pre_norm=False, transformer_activation="relu")
    detr = load(f"{package}.dabdeformabledetrv0")
    position = load(f"{package}.position_encoding").build_position_encoding(args)
    model = detr.DABDeformableDETRv0(
        GivenPyramid(nested, features, padding, position),
        load(f"{package}.transformer").build_transformer(args),
        num_classes=91,
        num_queries=11,
        aux_loss=True,
        num_feature_levels=4,
    )
    randomize(model)
    matcher = load(f"{package}.matcher").HungarianMatcher(2, 5, 2, 0.25)
    losses = ["labels", "boxes", "cardinality"]
    criterion = detr.SetCriterion(91, matcher, {}, 0.25, losses)
    return model, criterion, nested(padding[:, None].float(), padding)


@pytest.mark.parametrize("num_patterns", [0, 3])
@pytest.mark.parametrize("counts", [(4, 4), (2, 5), (0, 3)])
def test_dn_deformable_encoder_only_equals_the_authors(
    authors, inputs, monkeypatch, num_patterns, counts
):
    """Without noise, and with empty slots visible as in their code."""
    features, padding = inputs
    theirs, criterion, samples = their_encoder_only(
        authors("DN-DETR"), features, padding, monkeypatch, num_patterns
    )
    their_targets, targets = objects(*counts)
    output, denoised = theirs.train()(samples, (their_targets, 3, 0.0, 0.0, num_patterns))
    ours = our_model(
        "dab_deformable_encoder_only",
        {"num_patterns": num_patterns, "shares_content": True, "as_published": True},
        denoising=Denoising(num_groups=3, box_noise=0, label_noise=0),
    )
    pair = Pair("dn_deformable_encoder_only", "dab_deformable_encoder_only", ours, theirs)
    predictions = compare(pair, output, features, padding, targets)
    losses = criterion(output, their_targets, denoised)
    patterns = {"match": "{}", "dn": "tgt_{}"}
    compare_losses(pair, losses_of(predictions, targets), losses, patterns)


def test_dab_deformable_equals_the_authors(authors, inputs, monkeypatch):
    features, padding = inputs
    theirs, criterion, samples = their_model(
        authors("DAB-DETR"), "dab_deformable_detr", features, padding, monkeypatch
    )
    output = theirs(samples)
    ours = our_model("dab_deformable", {"as_published": True})
    pair = Pair("dab_deformable", "dab_deformable", ours, theirs)
    predictions = compare(pair, output, features, padding)
    their_targets, targets = objects(3, 5)
    losses = criterion(output, their_targets)
    compare_losses(pair, losses_of(predictions, targets), losses, {"match": "{}"})


@pytest.mark.parametrize("counts", [(4, 4), (2, 5), (0, 3)])
def test_dn_deformable_equals_the_authors(authors, inputs, monkeypatch, counts):
    """Without noise, and with empty slots visible as in their code."""
    features, padding = inputs
    theirs, criterion, samples = their_model(
        authors("DN-DETR"), "dn_dab_deformable_detr", features, padding, monkeypatch
    )
    their_targets, targets = objects(*counts)
    output, denoised = theirs.train()(samples, (their_targets, 3, 0.0, 0.0, 0))
    ours = our_model(
        "dab_deformable",
        {"as_published": True},
        denoising=Denoising(num_groups=3, box_noise=0, label_noise=0),
    )
    pair = Pair("dn_deformable", "dab_deformable", ours, theirs)
    predictions = compare(pair, output, features, padding, targets)
    losses = criterion(output, their_targets, denoised)
    patterns = {"match": "{}", "dn": "tgt_{}"}
    compare_losses(pair, losses_of(predictions, targets), losses, patterns)


class ThreeFeatures(nn.Module):
    """In place of Detectron2's backbone."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, _images):
        return dict(zip(("res3", "res4", "res5"), self.features, strict=True))


def test_dn_deformable_of_detrex_has_the_same_predictions(authors, inputs):
    """In evaluation and without padding, which theirs then ignores."""
    features, padding = inputs
    padding = torch.zeros_like(padding)
    load = authors("detrex")
    layers, modeling = load("detrex.layers"), load("projects.dn_deformable_detr.modeling")
    shapes = zip(("res3", "res4", "res5"), (8, 16, 24), strict=True)
    sizes = {"feedforward_dim": 64, "attn_dropout": 0.0, "ffn_dropout": 0.0}
    theirs = modeling.DNDeformableDETR(
        backbone=ThreeFeatures(features),
        position_embedding=layers.PositionEmbeddingSine(128, normalize=True, offset=-0.5),
        neck=load("detrex.modeling.neck").ChannelMapper(
            input_shapes={name: Namespace(channels=channels) for name, channels in shapes},
            in_features=["res3", "res4", "res5"],
            out_channels=256,
            num_outs=4,
            kernel_size=1,
            norm_layer=nn.GroupNorm(32, 256),
        ),
        transformer=modeling.DNDeformableDetrTransformer(
            encoder=modeling.DNDeformableDetrTransformerEncoder(**sizes, num_layers=2),
            decoder=modeling.DNDeformableDetrTransformerDecoder(**sizes, num_layers=6),
        ),
        embed_dim=256,
        num_classes=91,
        num_queries=11,
        criterion=None,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
        as_two_stage=False,
        with_indicator=True,
        device="cpu",
    )
    randomize(theirs)
    decoded = []
    theirs.dn_post_process = lambda *found: decoded.append(found[:2]) or found[:2]
    theirs.eval()([{"image": torch.zeros(3, 160, 192)}] * 2)
    logits, boxes = decoded[0]
    aux = zip(logits[:-1], boxes[:-1], strict=True)
    output = {
        "aux_outputs": [{"pred_logits": one, "pred_boxes": two} for one, two in aux],
        "pred_logits": logits[-1],
        "pred_boxes": boxes[-1],
    }
    ours = our_model("dab_deformable", denoising=Denoising())
    pair = Pair("dn_deformable, detrex", "dab_deformable", ours, theirs, {"backbone": None})
    compare(pair, output, features, padding)
