"""DETR, Conditional DETR, SMCA and Anchor DETR against their authors' code."""

from __future__ import annotations

from argparse import Namespace

import torch
from compare import Pair, compare, compare_losses, losses_of
from peers import GivenFeatures, objects, randomize
from tiny import config_of

from dn_detr.build import build_model
from dn_detr.losses.matcher import Costs

ARGS = Namespace(
    hidden_dim=256,
    dropout=0.0,
    nheads=8,
    num_queries=11,
    dim_feedforward=64,
    enc_layers=2,
    dec_layers=3,
    pre_norm=False,
    position_embedding="sine",
    smooth=8,
    dynamic_scale="type3",
    num_feature_levels=1,
    num_query_position=11,
    num_query_pattern=3,
    spatial_prior="learned",
    attention_type="RCDA",
)


def our_model(method, **numbers):
    sizes = {
        "num_classes": 91,
        "num_queries": 11,
        "feed_forward_dim": 64,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "epsilon": 1e-5,
    }
    return build_model(
        method,
        config_of(method, **{**sizes, **numbers}),
        in_channels=[24],
        strides=[32],
        denoising=None,
    )


def backbone_of(load, features, padding):
    nested = load("util.misc").NestedTensor
    position = load("models.position_encoding").build_position_encoding(ARGS)
    return GivenFeatures(nested, features[-1:], padding, position), nested(
        padding[:, None].float(), padding
    )


def test_conditional_detr_equals_the_authors(authors, inputs):
    features, padding = inputs
    load = authors("ConditionalDETR")
    backbone, samples = backbone_of(load, features, padding)
    module = load("models.conditional_detr")
    transformer = load("models.transformer").build_transformer(ARGS)
    theirs = module.ConditionalDETR(backbone, transformer, 91, 11, aux_loss=True)
    randomize(theirs)
    output = theirs(samples)
    pair = Pair("conditional_detr", "conditional_detr", our_model("conditional_detr"), theirs)
    predictions = compare(pair, output, features, padding)
    their_targets, targets = objects(3, 5)
    matcher = load("models.matcher").HungarianMatcher(2, 5, 2)
    criterion = module.SetCriterion(91, matcher, {}, 0.25, ["labels", "boxes"])
    losses = criterion(output, their_targets)
    compare_losses(pair, losses_of(predictions, targets), losses, {"match": "{}"})


def test_detr_equals_the_authors(authors, inputs):
    features, padding = inputs
    load = authors("detr")
    backbone, samples = backbone_of(load, features, padding)
    module = load("models.detr")
    transformer = load("models.transformer").build_transformer(ARGS)
    theirs = module.DETR(backbone, transformer, 91, 11, aux_loss=True)
    randomize(theirs)
    output = theirs(samples)
    ours = our_model("detr", has_no_object=True)
    pair = Pair("detr", "detr", ours, theirs)
    predictions = compare(pair, output, features, padding)
    their_targets, targets = objects(3, 5)
    matcher = load("models.matcher").HungarianMatcher(1, 5, 2)
    criterion = module.SetCriterion(91, matcher, {}, 0.1, ["labels", "boxes"])
    costs = Costs(class_cost=1, kind="softmax")
    found = losses_of(predictions, targets, costs=costs, kind="softmax")
    compare_losses(pair, found, criterion(output, their_targets), {"match": "{}"})


def test_smca_equals_the_authors(authors, inputs):
    """With sides that are multiples of the stride: theirs counts pixels over 32, ours cells."""
    features, padding = inputs
    load = authors("SMCA-DETR")
    backbone, samples = backbone_of(load, features, padding)
    module = load("models.detr")
    transformer = load("models.transformer").build_transformer(ARGS)
    theirs = module.DETR(backbone, transformer, 91, 11, aux_loss=True)
    randomize(theirs)
    their_targets, targets = objects(3, 5)
    sizes = [{"size": torch.tensor(size)} for size in ((160, 192), (96, 128))]
    output = theirs([samples, sizes])
    # Their heads have a column more than there are classes, which no object ever has.
    ours = our_model("smca", num_classes=92)
    pair = Pair("smca", "smca", ours, theirs)
    predictions = compare(pair, output, features, padding)
    matcher = load("models.matcher").HungarianMatcher(2, 5, 2)
    criterion = module.SetCriterion(91, matcher, {}, 0.1, ["labels", "boxes"])
    losses = criterion(output, their_targets)
    compare_losses(pair, losses_of(predictions, targets), losses, {"match": "{}"})


def test_anchor_detr_equals_the_authors(authors, inputs):
    features, padding = inputs
    load = authors("AnchorDETR")
    nested = load("util.misc").NestedTensor
    module = load("models.anchor_detr")
    backbone = GivenFeatures(nested, features[-1:], padding, None)
    backbone.num_channels = [24]
    transformer = load("models.transformer").build_transformer(ARGS)
    theirs = module.AnchorDETR(backbone, transformer, 1, aux_loss=True)
    randomize(theirs)
    output = theirs(nested(padding[:, None].float(), padding))
    ours = our_model("anchor_detr", num_patterns=3, as_published=True)
    pair = Pair("anchor_detr", "anchor_detr", ours, theirs, {"backbone": "backbone.body"})
    predictions = compare(pair, output, features, padding)
    their_targets, targets = objects(3, 5)
    matcher = load("models.matcher").HungarianMatcher(2, 5, 2)
    criterion = module.SetCriterion(91, matcher, {}, ["labels", "boxes"], focal_alpha=0.25)
    losses = criterion(output, their_targets)
    compare_losses(pair, losses_of(predictions, targets), losses, {"match": "{}"})
