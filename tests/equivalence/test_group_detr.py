"""Group DETR against branch GroupDETR of Atten4Vis/ConditionalDETR, as a checkout "GroupDETR"."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest
from compare import load as load_weights
from multiscale import compare_all_losses, losses_of
from peers import GivenFeatures, difference, layers_of, objects, randomize
from tiny import key_of

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


def our_model(theirs):
    """The first group is the model's own, the others are the auxiliary's."""
    first, *others = theirs.query_embed.weight.detach().split(11)
    state = {**theirs.state_dict(), "query_embed.weight": first}
    sizes = {"in_channels": [24], "strides": [32]}
    plain = build_model("conditional_detr", NUMBERS, **sizes)
    load_weights("conditional_detr", plain, SimpleNamespace(state_dict=lambda: state))
    ours = build_model("conditional_detr", NUMBERS, **sizes, num_groups=3)
    rows = {f"auxiliary.0.learned.{i}.position": group for i, group in enumerate(others)}
    ours.load_state_dict({**plain.state_dict(), **rows})
    return ours


@pytest.mark.parametrize("counts", [(3, 5), (0, 2)])
def test_group_detr_equals_the_authors(authors, inputs, counts):
    features, padding = inputs
    theirs, criterion, samples = their_model(authors("GroupDETR"), features, padding)
    output = theirs(samples)
    their_targets, targets = objects(*counts)
    predictions = our_model(theirs)(features, padding, targets)
    for ours, name in ((predictions.logits, "pred_logits"), (predictions.boxes, "pred_boxes")):
        assert difference(ours, layers_of(output, name)) < 1e-4
    ours = losses_of(predictions, targets)
    together = {
        name: value + ours[key_of(name, "group")]
        for name, value in ours.items()
        if "_group" not in name
    }
    compare_all_losses(together, criterion(output, their_targets), {"match": "{}"})
