"""Hugging Face's Deformable DETR: its files convert, and its predictions are ours."""

from __future__ import annotations

import pytest
import torch

from dn_detr.build import build_model
from dn_detr.conversion.convert_weights import convert
from dn_detr.conversion.safe_load import read_parameters
from dn_detr.methods import make_config

transformers = pytest.importorskip("transformers", reason="compared only where it is installed")
pytest.importorskip("timm", reason="the backbone of their models needs it")

LARGEST = 1e-4


def their_model(**variant):
    """A small one with random weights everywhere."""
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=True,
        use_pretrained_backbone=False,
        backbone="resnet50",
        encoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=11,
        two_stage_num_proposals=11,
        num_labels=7,
        dropout=0.0,
        auxiliary_loss=True,
        **variant,
    )
    torch.manual_seed(0)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    for name, parameter in model.named_parameters():
        if "backbone" not in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    "method, variant",
    [
        ("deformable_detr", {}),
        ("deformable_detr_refine", {"with_box_refine": True}),
        ("deformable_detr_two_stage", {"with_box_refine": True, "two_stage": True}),
    ],
)
@torch.no_grad()
def test_predictions_of_all_layers_are_the_same(tmp_path, method, variant):
    theirs = their_model(**variant)
    features = []
    for level in range(3):
        theirs.model.input_proj[level].register_forward_pre_hook(
            lambda _, inputs: features.append(inputs[0])
        )
    padding = torch.zeros(2, 128, 160, dtype=torch.bool)
    padding[1, 96:], padding[1, :, 128:] = True, True
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * 2
    output = theirs(torch.randn(2, 3, 128, 160), pixel_mask=(~padding).long(), labels=labels)

    theirs.save_pretrained(tmp_path)
    state = read_parameters(tmp_path / "model.safetensors")
    if method == "deformable_detr_refine":  # their class heads are one, which the file holds once
        for part in ("weight", "bias"):
            state |= {
                f"class_embed.{i}.{part}": state[f"class_embed.0.{part}"] for i in range(1, 6)
            }
    state, table = convert(state, method)
    assert "Hugging Face" in table.source
    config = make_config(
        method, num_classes=7, num_queries=11, feed_forward_dim=64, encoder_layers=1, epsilon=1e-5
    )
    ours = build_model(method, config, in_channels=[512, 1024, 2048], strides=[8, 16, 32])
    ours.load_state_dict(
        {n.removeprefix("core."): t for n, t in state.items() if n.startswith("core.")}
    )
    predictions = ours.eval()(features, padding)
    for layer, predicted in enumerate([*output.auxiliary_outputs, output]):
        assert difference(predictions.logits[layer], predicted["logits"]) < LARGEST
        assert difference(predictions.boxes[layer], predicted["pred_boxes"]) < LARGEST
