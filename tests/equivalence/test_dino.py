"""DINO against IDEA-Research/DINO."""

from __future__ import annotations

import pytest
from compare import LARGEST, Pair, compare, compare_losses, losses_of
from multiscale import ARGS, GivenPyramid, our_model, use_fallback
from peers import difference, objects, randomize

from dn_detr.build import Denoising


def their_model(load, features, padding, monkeypatch, num_queries=11):
    use_fallback(load, "models.dino.ops", monkeypatch)
    nested = load("util.misc").NestedTensor
    position = load("models.dino.position_encoding").build_position_encoding(ARGS)
    transformer = load("models.dino.deformable_transformer").DeformableTransformer(
        d_model=256,
        nhead=8,
        num_queries=num_queries,
        num_encoder_layers=2,
        num_decoder_layers=6,
        dim_feedforward=64,
        return_intermediate_dec=True,
        deformable_encoder=True,
        deformable_decoder=True,
        num_feature_levels=4,
        learnable_tgt_init=True,
        two_stage_type="standard",
        decoder_sa_type="sa",
        module_seq=["sa", "ca", "ffn"],
        embed_init_tgt=True,
    )
    dino = load("models.dino.dino")
    model = dino.DINO(
        GivenPyramid(nested, features, padding, position),
        transformer,
        num_classes=91,
        num_queries=num_queries,
        aux_loss=True,
        iter_update=True,
        query_dim=4,
        num_feature_levels=4,
        two_stage_type="standard",
        two_stage_class_embed_share=False,
        two_stage_bbox_embed_share=False,
        dn_number=50,
        dn_box_noise_scale=0.0,
        dn_label_noise_ratio=0.0,
        dn_labelbook_size=91,
    )
    randomize(model)
    matcher = load("models.dino.matcher").HungarianMatcher(2, 5, 2, 0.25)
    criterion = dino.SetCriterion(91, matcher, {}, 0.25, ["labels", "boxes", "cardinality"])
    return model.train(), criterion.train(), nested(padding[:, None].float(), padding)


@pytest.mark.parametrize(
    ("counts", "num_queries"), [((4, 4), 11), ((2, 5), 11), ((0, 3), 11), ((2, 5), 200)]
)
def test_dino_equals_the_authors(authors, inputs, monkeypatch, counts, num_queries):
    """Without noise; empty slots are visible and negatives, and of 200 queries some are padding, as
    in their code."""
    features, padding = inputs
    theirs, criterion, samples = their_model(
        authors("DINO"), features, padding, monkeypatch, num_queries
    )
    their_targets, targets = objects(*counts)
    output = theirs(samples, their_targets)
    denoising = Denoising(
        num_groups=0, max_objects=50, box_noise=0, label_noise=0, contrastive=True
    )
    ours = our_model(
        "dino", {"as_published": True, "num_queries": num_queries}, denoising=denoising
    )
    pair = Pair("dino", "dino", ours, theirs)
    predictions = compare(pair, output, features, padding, targets)
    proposals = predictions.proposals
    if num_queries == 200:
        assert (proposals.boxes[0] == 1).any()
    assert difference(proposals.logits[0], output["interm_outputs"]["pred_logits"]) < LARGEST
    assert difference(proposals.boxes[0], output["interm_outputs"]["pred_boxes"]) < LARGEST
    losses = criterion(output, their_targets)
    compare_losses(
        pair,
        losses_of(predictions, targets),
        losses,
        {"match": "{}", "dn": "{}_dn", "enc": "{}_interm"},
    )
