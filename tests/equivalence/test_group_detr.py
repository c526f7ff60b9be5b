"""Group DETR against branch GroupDETR of Atten4Vis/ConditionalDETR, as a checkout "GroupDETR"."""

from __future__ import annotations

from argparse import Namespace

import pytest
from compare import Pair, check, compare_losses, losses_of
from peers import GivenFeatures, difference, layers_of, objects, randomize

from dn_detr.build import build_model
from dn_detr.methods import make_config

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
    group_detr=3,
)
NUMBERS = make_config(
    "conditional_detr",
    num_classes=91,
    num_queries=11,
    feed_forward_dim=64,
    encoder_layers=2,
    decoder_layers=3,
    epsilon=1e-5,
)


def their_model(load, features, padding):
    nested = load("util.misc").NestedTensor
    position = load("models.position_encoding").build_position_encoding(ARGS)
    detr = load("models.conditional_detr")
    model = detr.ConditionalDETR(
        GivenFeatures(nested, features[-1:], padding, position),
        load("models.transformer").build_transformer(ARGS),
        91,
        11,
        aux_loss=True,
        group_detr=3,
    )
    randomize(model)
    matcher = load("models.matcher").HungarianMatcher(2, 5, 2)
    criterion = detr.SetCriterion(91, matcher, {}, 0.25, ["labels", "boxes"], group_detr=3)
    return model.train(), criterion.train(), nested(padding[:, None].float(), padding)


def groups_of_queries(state):
    """The first group is the model's own, the others are the auxiliary's."""
    first, *others = state["query_embed.weight"].split(11)
    rows = {f"auxiliary.0.learned.{i}.position": group for i, group in enumerate(others)}
    return {**state, "query_embed.weight": first}, rows


@pytest.mark.parametrize("counts", [(3, 5), (0, 2)])
def test_group_detr_equals_the_authors(authors, inputs, counts):
    features, padding = inputs
    theirs, criterion, samples = their_model(authors("GroupDETR"), features, padding)
    output = theirs(samples)
    their_targets, targets = objects(*counts)
    ours = build_model("conditional_detr", NUMBERS, in_channels=[24], strides=[32], num_groups=3)
    row = "group_conditional_detr"
    pair = Pair(row, "conditional_detr", ours, theirs, split=groups_of_queries)
    pair.load()
    predictions = ours(features, padding, targets)
    check(row, "outputs", {
        name: difference(getattr(predictions, name), layers_of(output, f"pred_{name}"))
        for name in ("logits", "boxes")
    })  # fmt: skip
    losses = criterion(output, their_targets)
    patterns = {"match": "{}", "group": "{}"}
    compare_losses(pair, losses_of(predictions, targets), losses, patterns)
