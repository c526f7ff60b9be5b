"""How far back a layer's box sends its gradient: which box offsets, and the first reference.

A decoder layer predicts an offset; a box is the sum of a reference and one offset or more. What the
reference carries of earlier layers is the method's choice, which no forward pass shows.
"""

from __future__ import annotations

import pytest
import torch
from tiny import METHODS_WITHOUT_BOXES, tiny_features, tiny_model, tiny_padding

from dn_detr.methods import METHODS

LAYERS = 4

OWN, TWO, FIRST = "own offset", "own and last offset", "own offset from the first reference"
REACH = {
    "detr": OWN,  # 2005.12872: boxes without a reference
    "conditional_detr": FIRST,  # 2108.06152, sec. 3.3: offset from the learned point
    "anchor_detr": FIRST,  # 2109.07107: offset from the anchor point
    "smca": FIRST,  # 2101.07448: offset from the query's own centre
    "smca_multiscale": FIRST,
    "deformable_detr": FIRST,  # 2010.04159, sec. 4.1
    "deformable_detr_two_stage": OWN,  # 2010.04159, appendix A.4: references are detached
    "deformable_detr_refine": OWN,
    "dab_detr": TWO,  # code of 2201.12329: the reference keeps the gradient of one update
    "dab_deformable": OWN,  # code of 2201.12329, deformable: references are detached
    "dab_deformable_encoder_only": TWO,
    "dino": TWO,  # 2203.03605, sec. 3.5: look forward twice
    "h_deformable": TWO,  # 2207.13080, sec. 4.1: as DINO
    "mask_dino": TWO,  # 2206.02777: as DINO
}
"""Method -> what the box of a layer is made of, with gradient."""

PROPOSALS = ("deformable_detr_two_stage", "dino", "h_deformable", "mask_dino")
"""The first reference is an encoder proposal, detached in the authors' code; else it learns."""


def reach_of(method: str) -> tuple[list[set[int]], bool]:
    """For each layer, the layers whose offsets its box reaches; whether the first reference has a
    gradient."""
    model = tiny_model(method, decoder_layers=LAYERS)
    predictor = model.decoder.predictor
    heads, start, forward = predictor.heads, predictor.start, predictor.forward
    offsets: list[tuple[int, torch.Tensor]] = []
    first_has_gradient = []
    layer_now = []
    old_delta = heads.delta

    def delta(*arguments):
        value = old_delta(*arguments)
        if layer_now:
            offsets.append((layer_now[-1], value))
        return value

    def begin(content, reference):
        first_has_gradient.append(reference is not None and reference.requires_grad)
        return start(content, reference)

    def predict(layer, content, step):
        layer_now.append(layer)
        return forward(layer, content, step)

    heads.delta, predictor.start, predictor.forward = delta, begin, predict
    boxes = model(tiny_features(2), tiny_padding([(96, 128), (64, 96)])).boxes[-LAYERS:]
    inputs = [value for _, value in offsets]
    reaches = []
    for layer in range(LAYERS):
        grads = torch.autograd.grad(
            boxes[layer].sum(), inputs, retain_graph=True, allow_unused=True
        )
        hit = [grad is not None and bool(grad.ne(0).any()) for grad in grads]
        reaches.append({k for (k, _), is_hit in zip(offsets, hit, strict=True) if is_hit})
    return reaches, first_has_gradient[0]


@pytest.mark.parametrize("method", [m for m in METHODS if m not in METHODS_WITHOUT_BOXES])
def test_a_box_reaches_the_offsets_and_references_that_its_paper_says(method):
    reaches, first_has_gradient = reach_of(method)
    back = 1 if REACH[method] == TWO else 0
    assert reaches == [set(range(max(0, layer - back), layer + 1)) for layer in range(LAYERS)]
    assert first_has_gradient == (method not in (*PROPOSALS, "detr"))
