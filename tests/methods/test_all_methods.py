"""What every method promises."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    AUXILIARY,
    METHODS_WITH_MASKS,
    METHODS_WITHOUT_BOXES,
    levels_of_features,
    outputs_of,
    tiny_features,
    tiny_losses,
    tiny_model,
    tiny_padding,
    tiny_targets,
    without_group_norm,
)

from dn_detr.methods import METHODS

SIZES = [(96, 128), (64, 96)]
TRAINING_ONLY = ("auxiliary.", "label_embedding.", "box_embedding.")
pytestmark = pytest.mark.parametrize("method", METHODS)


def losses_of(method, model, targets):
    predictions = model(tiny_features(2), tiny_padding(SIZES), targets)
    return tiny_losses(method, predictions, targets)


def test_predictions_have_a_layer_axis_and_boxes_inside_the_image(method):
    predictions = tiny_model(method)(tiny_features(2), tiny_padding(SIZES))
    layers = 4 if method in METHODS_WITH_MASKS else 3  # there, also one before the first layer
    assert predictions.logits.shape == (layers, 2, 7, 5)
    assert predictions.logits.isfinite().all()
    assert (predictions.boxes is None) == (method in METHODS_WITHOUT_BOXES)
    if predictions.boxes is not None:
        assert predictions.boxes.shape == (layers, 2, 7, 4)
        assert (predictions.boxes > 0).all() and (predictions.boxes < 1).all()
    assert (predictions.mask_features is not None) == (method in METHODS_WITH_MASKS)
    if predictions.mask_features is not None:
        assert predictions.mask_features.features.shape == (2, 32, 12, 16)
        assert predictions.mask_features.valid_sizes.tolist() == [[16, 12], [12, 8]]
        assert predictions.mask_embeddings.shape == (layers, 2, 7, 32)


@pytest.mark.parametrize("auxiliary", [None, *AUXILIARY])
@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0)])
def test_every_parameter_gets_a_finite_gradient(method, auxiliary, counts):
    """Also without any object: a parameter without gradient would stop distributed training."""
    model = tiny_model(method, **AUXILIARY.get(auxiliary, {}))
    sum(losses_of(method, model, tiny_targets(*counts)).values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("auxiliary", [None, *AUXILIARY])
def test_loss_names_do_not_depend_on_the_objects(method, auxiliary):
    model = tiny_model(method, **AUXILIARY.get(auxiliary, {}))
    names = [list(losses_of(method, model, tiny_targets(*counts))) for counts in [(2, 3), (0, 0)]]
    assert names[0] == names[1]


def test_values_in_the_padding_change_nothing(method):
    model = without_group_norm(tiny_model(method, num_levels=levels_of_features(method)))
    features, padding = tiny_features(2), tiny_padding(SIZES)
    changed = [feature.clone() for feature in features]
    for stride, feature in zip((8, 16, 32), changed, strict=True):
        feature[1, :, 64 // stride :] = 100.0
        feature[1, :, :, 96 // stride :] = -100.0
    before, after = model(features, padding), model(changed, padding)
    assert outputs_of(before).keys() == outputs_of(after).keys()
    for name, value in outputs_of(before).items():
        torch.testing.assert_close(value, outputs_of(after)[name], rtol=1e-10, atol=1e-10)
    if before.mask_features is not None:
        inside = (slice(1, 2), slice(None), slice(8), slice(12))
        was, now = before.mask_features.features, after.mask_features.features
        torch.testing.assert_close(was[0], now[0])
        torch.testing.assert_close(was[inside], now[inside], rtol=1e-10, atol=1e-10)


def test_permuted_queries_give_permuted_predictions(method):
    model = tiny_model(method)
    if hasattr(model.query_design.learned, "head"):
        pytest.skip("queries are ranked proposals: their order has a meaning")
    features, padding = tiny_features(2), tiny_padding(SIZES)
    before = model(features, padding)
    order = torch.randperm(7)
    for table in model.query_design.learned.parameters():
        table.data = table.data[order]
    after = model(features, padding)
    for name, value in outputs_of(before).items():
        torch.testing.assert_close(value[:, :, order], outputs_of(after)[name])


@pytest.mark.parametrize("auxiliary", AUXILIARY)
def test_a_checkpoint_with_auxiliary_queries_loads_into_the_plain_model(method, auxiliary):
    assisted = tiny_model(method, **AUXILIARY[auxiliary])
    content = getattr(assisted.query_design.learned, "content", None)
    if assisted.query_design.content.has_indicator and content is not None:
        content.data[:, -1] = 0  # starts so and is never trained; tiny models are random everywhere
    plain = tiny_model(method, seed=5)
    missing, unexpected = plain.load_state_dict(assisted.state_dict(), strict=False)
    assert not missing
    assert all(any(part in name for part in TRAINING_ONLY) for name in unexpected)
    features, padding = tiny_features(2), tiny_padding(SIZES)
    before, after = (outputs_of(model(features, padding)) for model in (assisted, plain))
    for name, value in before.items():
        torch.testing.assert_close(value, after[name], rtol=1e-12, atol=1e-12)
