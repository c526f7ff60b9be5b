"""Every method in one graph: no synchronisation, no Python that depends on values."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    AUXILIARY,
    levels_of_features,
    outputs_of,
    tiny_features,
    tiny_model,
    tiny_padding,
    tiny_targets,
)

from dn_detr.build import BoxPrompting, HybridMatching
from dn_detr.methods import METHODS
from dn_detr.models.mask_head import mask_logits

SIZES = [(96, 128), (64, 96)]


class Outcome(torch.nn.Module):
    """The last layer's tensors of a model, which `torch.export` can return."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, padding):
        predictions = self.model(features, padding)
        outputs = outputs_of(predictions)
        if predictions.mask_features is not None:
            embeddings = predictions.mask_embeddings[-1]
            outputs["masks"] = mask_logits(embeddings, predictions.mask_features.features)
        return tuple(outputs.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_compiles_as_one_graph_with_assists(method):
    check_one_graph(tiny_model(method, **AUXILIARY["denoising and groups"], decoder_layers=2))


def test_known_objects_are_given_in_the_same_graph():
    further = HybridMatching(num_queries=5, matches_per_object=2)
    auxiliary = {
        **AUXILIARY["contrastive"],
        "prompts": BoxPrompting(probability=1.0),
        "hybrid": further,
    }
    check_one_graph(tiny_model("dino", **auxiliary, decoder_layers=2))


def check_one_graph(model):
    torch._dynamo.reset()
    inputs = tiny_features(2), tiny_padding(SIZES), tiny_targets(1, 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(*inputs)
    plain = model(*inputs)
    for name, value in outputs_of(compiled).items():
        torch.testing.assert_close(value, outputs_of(plain)[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_exports_with_any_batch_and_size(method):
    model = Outcome(tiny_model(method, decoder_layers=2, num_levels=levels_of_features(method)))
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    height, width = (torch.export.Dim(name, min=2, max=40) for name in ("height", "width"))
    sizes = [
        {0: batch, 2: height * (32 // stride), 3: width * (32 // stride)} for stride in (8, 16, 32)
    ]
    exported = torch.export.export(
        model,
        (tiny_features(2), tiny_padding(SIZES)),
        dynamic_shapes=(sizes, {0: batch, 1: height * 32, 2: width * 32}),
    )
    others = tiny_features(3, 160, 64), tiny_padding([(160, 64), (96, 64), (160, 32)], 160, 64)
    for got, wanted in zip(exported.module()(*others), model(*others), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
