"""Denoising in the models of transformers: they stay what they are, and nothing leaks."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the example trains its models")
pytest.importorskip("timm", reason="the backbone of their models needs it")

ROOT = Path(__file__).parents[2]
KINDS = ["conditional", "deformable"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(
        "denoise_hugging_face", ROOT / "examples" / "denoise_hugging_face.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=KINDS)
def wrapped(request, example):
    """(model before, the same model wrapped), in float64 and trained mode, without randomness."""
    torch.manual_seed(0)
    model = example.make_model(request.param, 3, None).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    before = copy.deepcopy(model)
    return before, example.Denoised(model, example.Denoising(num_groups=3)).double()


def batch(num_images: int = 2):
    torch.manual_seed(1)
    pixels = torch.rand(num_images, 3, 96, 128, dtype=torch.float64)
    mask = torch.ones(num_images, 96, 128, dtype=torch.int64)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.2, 0.3, 0.1, 0.1], [0.7, 0.6, 0.3, 0.3]])
    labels = [
        {"class_labels": torch.tensor([0, 2, 1][: 2 + i]), "boxes": boxes[: 2 + i].double()}
        for i in range(num_images)
    ]
    return pixels, mask, labels


def run(denoised, *, step=1, num_images=2):
    output = denoised(*batch(num_images), step)
    return output, denoised._predict()


def test_inference_is_that_of_the_model_bit_for_bit(wrapped):
    before, denoised = wrapped
    pixels, mask, _ = batch()
    with torch.no_grad():
        for model in (before, denoised.model):
            model.eval()
        expected, found = before(pixels, mask), denoised.model(pixels, mask)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.pred_boxes, expected.pred_boxes)
    assert list(denoised.model.state_dict()) == list(before.state_dict())


def test_matched_queries_do_not_see_denoising_queries(wrapped):
    before, denoised = wrapped
    output, _ = run(denoised)
    alone = before(*batch()[:2], labels=batch()[2])
    torch.testing.assert_close(output.logits, alone.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.pred_boxes, alone.pred_boxes, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.loss_dict["loss_ce"], alone.loss_dict["loss_ce"])
    found = torch.autograd.grad(
        output.logits.sum() + output.pred_boxes.sum(),
        denoised.content.weight,
        allow_unused=True,
    )
    assert found[0] is None or not found[0].any()


def test_groups_do_not_see_each_other(wrapped, monkeypatch):
    _, denoised = wrapped
    _, (logits, boxes) = run(denoised)
    noise = denoised.queries.noise

    def moved(*args, **kwargs):
        noised, mask = noise(*args, **kwargs)
        noised.boxes[:, : noised.boxes.shape[1] // 3] *= 0.9  # the first of three groups
        return noised, mask

    monkeypatch.setattr(denoised.queries, "noise", moved)
    _, (other_logits, other_boxes) = run(denoised)
    first = logits.shape[2] // 3
    assert not torch.allclose(boxes[:, :, :first], other_boxes[:, :, :first], atol=1e-4)
    torch.testing.assert_close(logits[:, :, first:], other_logits[:, :, first:], rtol=0, atol=1e-10)
    torch.testing.assert_close(boxes[:, :, first:], other_boxes[:, :, first:], rtol=0, atol=1e-10)


def test_an_image_is_denoised_alone_as_in_a_batch(wrapped):
    """The first image has two objects, the second three: its empty queries have no influence."""
    _, denoised = wrapped
    _, (logits, boxes) = run(denoised, step=0)
    _, (alone_logits, alone_boxes) = run(denoised, step=0, num_images=1)
    for together, alone in ((logits, alone_logits), (boxes, alone_boxes)):
        together = together[:, 0].unflatten(1, (3, 3))[:, :, :2].flatten(1, 2)
        torch.testing.assert_close(together, alone[:, 0], rtol=0, atol=1e-10)
