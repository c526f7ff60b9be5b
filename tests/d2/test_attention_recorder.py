"""What is recorded of the decoder is what it computes with."""

import pytest
import torch
from tiny import tiny_features, tiny_model, tiny_padding

from dn_detr.d2.inference.attention_recorder import record_attention
from dn_detr.layers.deformable_module import DeformableAttention
from dn_detr.methods import METHODS
from dn_detr.ops import ms_deform_attn_pytorch

SIZES = [(96, 128), (64, 72)]
DEFORMABLE = ("dab_deformable", "deformable_detr_refine", "dino", "deformable_detr")


def recorded(model):
    with torch.no_grad(), record_attention(model) as layers:
        predictions = model(tiny_features(2), tiny_padding(SIZES))
    return predictions, layers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_shows_where_each_of_its_layers_looks(method):
    model = tiny_model(method).eval()
    with torch.no_grad():
        expected = model(tiny_features(2), tiny_padding(SIZES))
    predictions, layers = recorded(model)
    assert torch.equal(predictions.logits, expected.logits)  # looking changes nothing
    assert len(layers) == len(model.decoder.layers)
    for layer in layers:
        assert layer.samples or layer.maps
        for samples in layer.samples:
            total = samples.weights.sum((-2, -1))
            torch.testing.assert_close(total, torch.ones_like(total))
            assert samples.locations.shape[:2] == (2, predictions.logits.shape[2])
        levels = [attention.level for attention in layer.maps]
        assert len(set(levels)) == len(levels)
        for attention in layer.maps:
            assert attention.weights.shape[-2:] == layer.memory.shapes[attention.level]
            total = attention.weights.sum((-2, -1))
            torch.testing.assert_close(total, torch.ones_like(total))
            width, height = attention.valid_sizes[1].long().tolist()
            assert attention.weights[1, :, height:].sum() < 1e-9  # the padding
            assert attention.weights[1, :, :, width:].sum() < 1e-9
    with torch.no_grad():
        model(tiny_features(2), tiny_padding(SIZES))
    assert len(layers) == len(model.decoder.layers)  # nothing is recorded any more


@pytest.mark.parametrize("method", [m for m in DEFORMABLE if m in METHODS])
def test_sampling_the_recorded_points_gives_the_layers_output(method):
    model, outputs, inputs = tiny_model(method).eval(), [], []
    attentions = [
        module
        for layer in model.decoder.layers
        for module in layer.modules()
        if isinstance(module, DeformableAttention)
    ]

    def keep(_module, arguments, output) -> None:
        inputs.append(arguments)
        outputs.append(output)

    for attention in attentions:
        attention.register_forward_hook(keep)
    _, layers = recorded(model)
    assert len(outputs) == len(layers)
    for attention, (_, _, memory), output, layer in zip(
        attentions, inputs, outputs, layers, strict=True
    ):
        (samples,) = layer.samples
        value = attention.value_proj(memory.tokens).masked_fill(memory.padding[..., None], 0)
        value = value.unflatten(-1, (attention.num_heads, -1))
        canvas = torch.tensor([(w, h) for h, w in memory.shapes]).to(value)
        share = memory.valid_sizes.to(value)[:, None, None, :, None] / canvas[:, None]
        with torch.no_grad():
            again = attention.output_proj(
                ms_deform_attn_pytorch(
                    value, memory.shapes, samples.locations * share, samples.weights
                )
            )
        torch.testing.assert_close(again, output)
