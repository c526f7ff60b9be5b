"""Group DETR and hybrid matching: what their losses are made of."""

from __future__ import annotations

import pytest
import torch
from tiny import key_of, tiny_features, tiny_losses, tiny_model, tiny_padding, tiny_targets

from dn_detr.build import HybridMatching
from dn_detr.methods import METHODS
from dn_detr.structures import Target, pad_targets

SIZES = [(96, 128), (64, 96)]
TWO_STAGE = ("deformable_detr_two_stage", "dino", "h_deformable", "mask_dino")


def losses_of(method, model, targets, num_objects):
    predictions = model(tiny_features(2), tiny_padding(SIZES), targets)
    return tiny_losses(method, predictions, targets, num_objects)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_mean_over_groups_that_are_trained_alone(method):
    targets = tiny_targets(2, 3)
    model = tiny_model(method, num_groups=3)
    auxiliary = model.auxiliary[0]
    together = losses_of(method, model, targets, 5.0)
    del model.auxiliary[0]
    own = model.query_design.learned
    alone = []
    for learned in (own, *auxiliary.learned):
        model.query_design.learned = learned
        alone.append(losses_of(method, model, targets, 5.0))
    for key, value in alone[0].items():
        mean = together[key] + together[key_of(key, "group")]
        expected = torch.stack([one[key] for one in alone]).mean()
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together[key], value / 3, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in TWO_STAGE])
def test_the_one_to_many_loss_is_that_of_repeated_objects(method):
    model = tiny_model(method, hybrid=HybridMatching(num_queries=9, matches_per_object=2))
    targets = tiny_targets(2, 3)
    together = losses_of(method, model, targets, 5.0)
    model.query_design.learned = model.auxiliary[0].learned
    del model.auxiliary[0]
    repeated = pad_targets(
        [
            Target(
                targets.labels[i, :n].repeat(2),
                targets.boxes[i, :n].repeat(2, 1),
                masks=targets.masks[i].repeat(2, 1, 1),
                noise_seed=int(targets.noise_seeds[i]),
            )
            for i, n in enumerate(targets.counts)
        ]
    )
    alone = losses_of(method, model, repeated, 10.0)
    for key, value in alone.items():
        hybrid = together[key_of(key, "hybrid")]
        torch.testing.assert_close(hybrid, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", TWO_STAGE)
def test_the_one_to_many_queries_are_the_next_best_proposals(method):
    model = tiny_model(method, hybrid=HybridMatching(num_queries=5, matches_per_object=2))
    inputs = tiny_features(2), tiny_padding(SIZES)
    split = model(*inputs, tiny_targets(2, 3))
    model.query_design.learned.num_queries = 12
    if model.query_design.learned.content is not None:
        model.query_design.learned.content.data = torch.zeros(12, 32, dtype=torch.float64)
    first = model(*inputs).references[0]
    assert torch.equal(split.references[0], first)


def test_groups_and_hybrid_matching_are_refused_together():
    with pytest.raises(ValueError, match="exclude each other"):
        tiny_model("dab_deformable", num_groups=2, hybrid=HybridMatching())


@pytest.mark.parametrize(
    "wrong", [{"num_groups": 0}, {"hybrid": HybridMatching(matches_per_object=0)}]
)
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        tiny_model("dab_deformable", **wrong)
