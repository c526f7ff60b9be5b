"""DAB-DETR and DN-DETR against IDEA-Research/DAB-DETR and IDEA-Research/DN-DETR."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from compare import Pair, compare, compare_losses, losses_of
from peers import GivenFeatures, layers_of, objects, randomize
from tiny import config_of
from torch import nn

from dn_detr.build import Denoising, build_model

ARGS = Namespace(
    hidden_dim=256,
    dropout=0.0,
    nheads=8,
    num_queries=11,
    dim_feedforward=64,
    enc_layers=2,
    dec_layers=3,
    pre_norm=False,
    transformer_activation="prelu",
    num_patterns=0,
    position_embedding="sine",
    pe_temperatureH=20,
    pe_temperatureW=20,
)
NUMBERS = {
    "num_classes": 91,
    "num_queries": 11,
    "feed_forward_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
}


def their_model(load, package, features, padding, num_patterns, **extra):
    nested = load("util.misc").NestedTensor
    args = Namespace(**{**vars(ARGS), "num_patterns": num_patterns})
    position = load(f"models.{package}.position_encoding").build_position_encoding(args)
    model = load(f"models.{package}.DABDETR").DABDETR(
        GivenFeatures(nested, features, padding, position),
        load(f"models.{package}.transformer").build_transformer(args),
        num_classes=91,
        num_queries=11,
        aux_loss=True,
        **extra,
    )
    randomize(model)
    return model, nested


def their_losses(load, package, *arguments):
    matcher = load(f"models.{package}.matcher").HungarianMatcher(2, 5, 2, 0.25)
    criterion = load(f"models.{package}.DABDETR").SetCriterion(
        91, matcher, {}, 0.25, ["labels", "boxes", "cardinality"]
    )
    return criterion(*arguments)


@pytest.mark.parametrize("num_patterns", [0, 3])
def test_dab_detr_equals_the_authors(authors, inputs, num_patterns):
    features, padding = inputs
    load = authors("DAB-DETR")
    theirs, nested = their_model(
        load, "DAB_DETR", features[-1:], padding, num_patterns, num_dec_layers=3
    )
    output = theirs(nested(padding[:, None].float(), padding))
    ours = build_model(
        "dab_detr",
        config_of("dab_detr", **NUMBERS, num_patterns=num_patterns),
        in_channels=[24],
        strides=[32],
    )
    their_targets, targets = objects(3, 5)
    pair = Pair("dab_detr", "dab_detr", ours, theirs)
    predictions = compare(pair, output, features, padding)
    losses = their_losses(load, "DAB_DETR", output, their_targets)
    compare_losses(pair, losses_of(predictions, targets), losses, {"match": "{}"})


@pytest.mark.parametrize("num_patterns", [0, 3])
@pytest.mark.parametrize("counts", [(4, 4), (2, 5), (0, 3)])
def test_dn_detr_equals_the_authors(authors, inputs, num_patterns, counts):
    """Without noise, and with empty slots visible as in their code."""
    features, padding = inputs
    load = authors("DN-DETR")
    theirs, nested = their_model(load, "DN_DAB_DETR", features[-1:], padding, num_patterns)
    their_targets, targets = objects(*counts)
    noise = (their_targets, 3, 0.0, 0.0, num_patterns)
    output, denoised = theirs.train()(nested(padding[:, None].float(), padding), noise)
    ours = build_model(
        "dab_detr",
        config_of(
            "dab_detr", **NUMBERS, num_patterns=num_patterns, shares_content=True, as_published=True
        ),
        in_channels=[24],
        strides=[32],
        denoising=Denoising(num_groups=3, box_noise=0, label_noise=0),
    )
    pair = Pair("dn_detr", "dab_detr", ours, theirs)
    predictions = compare(pair, output, features, padding, targets)
    their_boxes = denoised["output_known_lbs_bboxes"][1]
    is_real = ~predictions.segment("dn").is_empty
    boxes = predictions.of("dn").boxes
    torch.testing.assert_close(boxes[:, is_real], their_boxes[:, is_real], rtol=1e-4, atol=1e-5)
    losses = their_losses(load, "DN_DAB_DETR", output, their_targets, denoised)
    patterns = {"match": "{}", "dn": "tgt_{}"}
    compare_losses(pair, losses_of(predictions, targets), losses, patterns)
    assert layers_of(output, "pred_boxes").shape[2] == 11 * max(1, num_patterns)


class LastFeature(nn.Module):
    """In place of Detectron2's backbone."""

    def __init__(self, feature):
        super().__init__()
        self.feature = feature

    def forward(self, _images):
        return {"res5": self.feature}


def test_dn_detr_of_detrex_has_the_same_predictions(authors, inputs):
    """In evaluation and without padding, which theirs then ignores."""
    features, padding = inputs
    padding = torch.zeros_like(padding)
    authors("detrex")
    load = authors("detrex/projects/dn_detr")
    layers, modeling = load("detrex.layers"), load("modeling")
    sizes = {"embed_dim": 256, "num_heads": 8, "feedforward_dim": 64, "activation": nn.PReLU()}
    theirs = modeling.DNDETR(
        backbone=LastFeature(features[-1]),
        in_features=["res5"],
        in_channels=24,
        position_embedding=layers.PositionEmbeddingSine(128, temperature=20, normalize=True),
        transformer=modeling.DNDetrTransformer(
            modeling.DNDetrTransformerEncoder(**sizes, num_layers=2),
            modeling.DNDetrTransformerDecoder(**sizes, num_layers=3),
        ),
        embed_dim=256,
        num_classes=91,
        num_queries=11,
        criterion=None,
        freeze_anchor_box_centers=False,
        device="cpu",
    )
    randomize(theirs)
    decoded = []
    theirs.dn_post_process = lambda *found: decoded.append(found[:2]) or found[:2]
    theirs.eval()([{"image": torch.zeros(3, 160, 192)}] * 2)
    logits, boxes = decoded[0]
    output = {
        "aux_outputs": [
            {"pred_logits": logits_of, "pred_boxes": boxes_of}
            for logits_of, boxes_of in zip(logits[:-1], boxes[:-1], strict=True)
        ],
        "pred_logits": logits[-1],
        "pred_boxes": boxes[-1],
    }
    ours = build_model(
        "dab_detr",
        config_of("dab_detr", **NUMBERS, shares_content=True),
        in_channels=[24],
        strides=[32],
        denoising=Denoising(),
    )
    pair = Pair("dn_detr, detrex", "dab_detr", ours, theirs, {"backbone": None})
    compare(pair, output, features, padding)
