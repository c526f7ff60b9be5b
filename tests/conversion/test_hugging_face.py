"""Hugging Face's Conditional and DAB DETR: their files convert, and their predictions are ours."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_target

from dn_detr.build import build_model
from dn_detr.conversion.convert_weights import convert
from dn_detr.conversion.safe_load import read_parameters
from dn_detr.methods import make_config

transformers = pytest.importorskip("transformers", reason="compared only where it is installed")
pytest.importorskip("timm", reason="the backbone of their models needs it")

NUMBERS = dict(
    num_classes=7,
    num_queries=11,
    channels=256,
    feed_forward_dim=64,
    encoder_layers=2,
    decoder_layers=3,
)
LARGEST = 1e-4


def their_model(name, *, has_auxiliary):
    """A small one with random weights everywhere."""
    config = getattr(transformers, f"{name}Config")(
        use_timm_backbone=True,
        use_pretrained_backbone=False,
        backbone="resnet50",
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=11,
        num_labels=7,
        auxiliary_loss=has_auxiliary,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "backbone" not in parameter_name:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model


@torch.no_grad()
def run_both(method, config, theirs, folder):
    """Their output and our predictions for the same images, one of them padded, by weights that the
    converter took from the file that they write."""
    features = []
    theirs.model.input_projection.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    padding = torch.zeros(2, 128, 160, dtype=torch.bool)
    padding[1, 96:], padding[1, :, 128:] = True, True
    targets = [tiny_target(count, key=count) for count in (3, 2)]
    labels = [{"class_labels": t.labels, "boxes": t.boxes.float()} for t in targets]
    images = torch.randn(2, 3, 128, 160)
    output = theirs(images, pixel_mask=(~padding).long(), labels=labels)
    theirs.save_pretrained(folder)
    state, table = convert(read_parameters(folder / "model.safetensors"), method)
    assert "Hugging Face" in table.source
    ours = build_model(method, make_config(method, **config), in_channels=[2048], strides=[32])
    ours.load_state_dict(
        {n.removeprefix("core."): t for n, t in state.items() if n.startswith("core.")}
    )
    return output, ours.eval()(features, padding)


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_dab_detr_has_the_same_predictions_in_all_layers(tmp_path):
    theirs = their_model("DabDetr", has_auxiliary=True)
    output, ours = run_both("dab_detr", NUMBERS, theirs, tmp_path)
    for layer, predicted in enumerate([*output.auxiliary_outputs, output]):
        assert difference(ours.logits[layer], predicted["logits"]) < LARGEST
        assert difference(ours.boxes[layer], predicted["pred_boxes"]) < LARGEST


def test_conditional_detr_has_the_same_predictions_in_all_layers(tmp_path):
    """Without their auxiliary outputs: these feed each layer's norm into the next layer."""
    theirs = their_model("ConditionalDetr", has_auxiliary=False)
    logits = []

    def classify(_layer, _inputs, content):
        content = content if torch.is_tensor(content) else content[0]
        normed = theirs.model.decoder.layernorm(content)
        logits.append(theirs.class_labels_classifier(normed))

    for layer in theirs.model.decoder.layers:
        layer.register_forward_hook(classify)
    config = {**NUMBERS, "epsilon": 1e-5}
    output, ours = run_both("conditional_detr", config, theirs, tmp_path)
    assert difference(ours.logits, torch.stack(logits)) < LARGEST
    assert difference(ours.logits[-1], output.logits) < LARGEST
    assert difference(ours.boxes[-1], output.pred_boxes) < LARGEST
