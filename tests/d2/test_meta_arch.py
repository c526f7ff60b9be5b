"""The detector as Detectron2 sees it, and one training step of it."""

import contextlib
import copy

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from samples import sample

import dn_detr.losses.matcher
from dn_detr.d2.data.loader import build_test_loader
from dn_detr.d2.engine.checkpoint import Checkpointer
from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.modeling.batch import batch_stats
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError
from dn_detr.losses.matcher import Costs


@pytest.fixture
def model_of(tiny_config):
    def model_of(*opts):
        torch.manual_seed(0)
        return build_model(tiny_config(*opts))

    return model_of


RESNET = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    *("MODEL.RESNETS.NORM", "FrozenBN"),
)


# ------------------------------------------------------------------------------------ training


def test_a_feature_that_the_backbone_lacks_is_refused_by_its_key(tiny_config):
    """It was a KeyError of its name alone."""
    cfg = tiny_config("MODEL.RESNETS.OUT_FEATURES", "['res5']")
    sentence = (
        r"MODEL.DN_DETR.IN_FEATURES has '\w+', but the features of the backbone are \['res5'\]"
    )
    with pytest.raises(ValueError, match=sentence):
        build_model(cfg)


def test_losses_have_the_same_keys_with_and_without_objects(model_of):
    model = model_of()
    batches = [[sample(0, 3), sample(1, 1)], [sample(0, 3), sample(2, 0)], [sample(2, 0)]]
    losses = [model(batch) for batch in batches]
    assert list(losses[0]) == list(losses[1]) == list(losses[2])
    assert all(loss.isfinite() for part in losses for loss in part.values())
    assert losses[2]["loss_ce_dn"] == 0 and losses[2]["loss_bbox"] == 0
    assert losses[2]["loss_ce"] > 0  # queries must say nothing


def test_noise_of_an_image_does_not_depend_on_its_batch(model_of):
    model = model_of().eval()
    batches = [[sample(7, 2), sample(8, 5)], [sample(9, 1), sample(7, 2)], [sample(7, 2)]]
    keys = [
        model.make_batch(batch, iteration=3, with_targets=True).targets.noise_seeds
        for batch in batches
    ]
    assert keys[0][0] == keys[1][1] == keys[2][0]
    assert len({int(key) for part in keys for key in part}) == 3
    assert (
        model.make_batch(batches[0], iteration=4, with_targets=True).targets.noise_seeds[0]
        != keys[0][0]
    )


def test_noise_of_images_without_id_differs_between_positions_and_ranks(model_of, monkeypatch):
    model = model_of()
    batch = [sample(0, 2), sample(0, 2)]
    for one in batch:
        del one["image_id"]
    seeds = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        seeds += model.make_batch(
            batch, iteration=3, with_targets=True
        ).targets.noise_seeds.tolist()
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("has_storage", [False, True])
def test_in_anybodys_own_loop_the_noise_changes_from_step_to_step(model_of, has_storage):
    """It came from Detectron2's EventStorage, and without one was the same in every step."""

    def losses(model, **options) -> list[float]:
        steps = (model([sample(0, 3)], **options)["loss_bbox_dn"].item() for _ in range(3))
        return list(steps)

    with EventStorage(7) if has_storage else contextlib.nullcontext():
        counted = losses(model_of())
        assert len(set(counted)) == 3
        assert losses(model_of()) == counted  # the same seed gives the same noise
        model = model_of()
        told = [model([sample(0, 3)], iteration=i)["loss_bbox_dn"].item() for i in range(3)]
        assert told == counted
        assert len(set(losses(model, iteration=1))) == 1


def test_the_normaliser_counts_the_objects_of_the_batch(model_of):
    """Twice the same image: sums over slots double, and so does what they are divided by."""
    model = model_of("MODEL.DN_DETR.DENOISING.ENABLED", False)
    model.backbone.eval()  # batch norm would tell the batches apart
    one, two = model([sample(0, 3)]), model([sample(0, 3), sample(0, 3)])
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=name)


def test_the_normaliser_is_at_least_one():
    counts = [[3, 0, 2], [0, 0]]
    batches = [[sample(i, n) for i, n in enumerate(batch)] for batch in counts]
    wholes = [batch_stats(batch, torch.device("cpu"), [1.0]) for batch in batches]
    assert wholes[0].requests is None  # nothing to ask of others: no copy to the device
    assert [whole.num_objects for whole in wholes] == [5, 1]
    assert [whole.most_objects for whole in wholes] == [3, 1]


def test_images_are_normalised_and_padding_is_what_lies_beyond_them(model_of):
    model = model_of("MODEL.PIXEL_MEAN", [10, 20, 30], "MODEL.PIXEL_STD", [2, 4, 8])
    batch = [sample(0, 1), sample(1, 1, height=32, width=64)]
    made = model.make_batch(batch)
    images, padding = made.images, made.padding
    assert images.shape == (2, 3, 64, 96) and padding.shape == (2, 64, 96)
    assert not padding[0].any() and not padding[1, :32, :64].any()
    assert padding[1].sum() == 64 * 96 - 32 * 64
    assert (images[1, :, padding[1]] == 0).all()
    mean, std = (torch.tensor(x)[:, None, None] for x in ([10, 20, 30], [2, 4, 8]))
    expected = (batch[1]["image"] - mean) / std
    torch.testing.assert_close(images[1, :, :32, :64], expected)


def test_costs_and_losses_have_the_weights_of_the_configuration(model_of):
    weights = {"CLASS": 3.0, "L1": 4.0, "GIOU": 6.0}
    opts = [(f"MODEL.DN_DETR.LOSS.COST_{name}", value) for name, value in weights.items()]
    opts += [(f"MODEL.DN_DETR.LOSS.{name}_WEIGHT", 10 * value) for name, value in weights.items()]
    opts += [("MODEL.DN_DETR.LOSS.FOCAL_ALPHA", 0.3), ("MODEL.DN_DETR.LOSS.FOCAL_GAMMA", 1.7)]
    model = model_of(*(part for pair in opts for part in pair))
    assert model.costs == Costs(class_cost=3.0, l1=4.0, giou=6.0, alpha=0.3, gamma=1.7)
    terms = model.criterion.terms
    assert {name: weight for name, (_, weight) in terms.items()} == {
        "ce": 30.0,
        "bbox": 40.0,
        "giou": 60.0,
    }
    assert (terms["ce"][0].alpha, terms["ce"][0].gamma) == (0.3, 1.7)


def test_frozen_stages_and_norms_do_not_move(model_of, tiny_config):
    opts = (*RESNET, "MODEL.BACKBONE.FREEZE_AT", 2, "SOLVER.BASE_LR", 0.1)
    model = model_of(*opts)
    before = copy.deepcopy(model.backbone.state_dict())
    norms = [module for module in model.backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert norms and not any(True for norm in norms for _ in norm.parameters())
    optimizer = build_optimizer(tiny_config(*opts), model)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model([sample(0, 3)]).values()).backward()
        optimizer.step()
    for name, value in model.backbone.state_dict().items():
        is_frozen = name.startswith(("stem", "res2")) or "norm" in name
        assert torch.equal(value, before[name]) == is_frozen, name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_gives_finite_losses_and_gradients(model_of, precision):
    model = model_of()
    with torch.autocast("cpu", dtype=getattr(torch, precision)):
        losses = model([sample(0, 3), sample(1, 0)])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------- a training step


def step_of(model, cfg, batches, precision=None) -> TrainStep:
    return TrainStep(model, batches, build_optimizer(cfg, model), precision=precision, seed=0)


def test_a_loss_that_is_not_finite_names_iteration_images_and_losses(model_of, tiny_config):
    step = step_of(model_of(), tiny_config(), [[sample(11, 2), sample(12, 1)]])
    weights = copy.deepcopy(step.model.state_dict())
    values = torch.tensor([1.0, torch.nan])[:, None].expand(-1, 2)  # both segments, last layer
    step.model.criterion.terms["giou"] = (lambda *_: values, 2.0)
    step.iter = 5
    with EventStorage(start_iter=5), pytest.raises(FloatingPointError) as caught:
        step.run_step()
    message = str(caught.value)
    assert "not finite: loss_giou_dn, loss_giou, in iteration 5" in message
    assert "from the images [11, 12]" in message and "'loss_bbox': " in message
    for name, parameter in step.model.named_parameters():  # nothing was learned from it
        assert torch.equal(parameter, weights[name]), name


def test_predictions_that_are_not_finite_name_iteration_and_images(model_of, tiny_config):
    step = step_of(model_of(), tiny_config(), [[sample(11, 2), sample(12, 1)]])
    step.model.core.decoder.predictor.heads.class_heads[0].bias.data.fill_(torch.nan)
    with EventStorage(), pytest.raises(FloatingPointError) as caught:
        step.run_step()
    assert "logits" in str(caught.value) and "in iteration 0" in str(caught.value)
    assert "images [11, 12] of rank 0" in str(caught.value)


def test_a_bad_matching_that_only_the_losses_tell_of_names_segment_layer_and_image(
    model_of, tiny_config, monkeypatch
):
    """As on a GPU, where the matcher itself raises nothing."""
    monkeypatch.setattr(dn_detr.losses.matcher, "find_nonfinite", lambda _assignments: "")
    step = step_of(model_of(), tiny_config(), [[sample(11, 2), sample(12, 1)]])
    step.model.core.decoder.predictor.heads.class_heads[0].bias.data.fill_(torch.nan)
    with EventStorage(), pytest.raises(FloatingPointError) as caught:
        step.run_step()
    assert "segment 'match', layer 0, image 0 of the batch" in str(caught.value)
    assert "in iteration 0, from the images [11, 12] of rank 0" in str(caught.value)


def test_float16_scales_its_gradients_and_skips_steps_that_overflow(model_of, tiny_config):
    step = step_of(model_of(), tiny_config(), [[sample(1, 2)]] * 2, "float16")
    weights = copy.deepcopy(step.model.state_dict())
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with EventStorage():
        step.run_step()
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert step.grad_scaler.get_scale() == 2.0**119
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with EventStorage():
        step.run_step()
    assert any(not torch.equal(p, weights[name]) for name, p in step.model.named_parameters())


def test_an_unknown_precision_is_refused(model_of, tiny_config):
    with pytest.raises(InputError, match="'bfloat16', 'float16'.*got 'half'"):
        step_of(model_of(), tiny_config(), [], "half")


def test_dropout_depends_on_seed_and_iteration_only(model_of, tiny_config):
    """So that it is the same after a resume, whatever was drawn before."""
    options = ("MODEL.DN_DETR.DROPOUT", 0.3, "MODEL.DN_DETR.DENOISING.ENABLED", False)
    cfg = tiny_config(*options)
    totals = []
    for iteration, drawn in ((3, 0), (3, 5), (4, 0)):
        step = step_of(model_of(*options), cfg, [[sample(1, 2)]])
        step.iter = iteration
        torch.rand(drawn)
        with EventStorage() as storage:
            step.run_step()
        totals.append(storage.latest()["total_loss"][0])
    assert totals[0] == totals[1] != totals[2]


# -------------------------------------------------------------------------------- what users call


def test_detectron2s_predictor_gives_boxes_in_pixels_of_the_given_image(tiny_config, tmp_path):
    cfg = tiny_config()
    torch.manual_seed(0)
    model = build_model(cfg)
    Checkpointer(model, str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    image = torch.randint(256, (90, 200, 3), generator=torch.Generator().manual_seed(0))
    found = DefaultPredictor(cfg)(image.to(torch.uint8).numpy())["instances"]
    assert found.image_size == (90, 200) and len(found) == 10
    boxes = found.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes[:, 2] <= 200).all() and (boxes[:, 3] <= 90).all()
    assert (found.scores.diff() <= 0).all()
    assert found.scores.min() >= 0 and found.scores.max() <= 1
    assert found.pred_classes.min() >= 0 and found.pred_classes.max() < 6


class Oracle(torch.nn.Module):
    """Answers with the ground truth of the dataset, in Detectron2's form."""

    def __init__(self, name):
        super().__init__()
        self.records = {record["image_id"]: record for record in DatasetCatalog.get(name)}

    def forward(self, batch):
        return [{"instances": self.answer(sample)} for sample in batch]

    def answer(self, sample):
        objects = self.records[sample["image_id"]]["annotations"]
        found = Instances((sample["height"], sample["width"]))
        corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        found.pred_boxes = Boxes(torch.tensor(corners).reshape(-1, 4))
        found.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        found.scores = torch.ones(len(objects))
        return found


def test_the_evaluator_gives_full_marks_to_the_ground_truth(tiny_config, tmp_path):
    cfg = tiny_config()
    loader = build_test_loader(cfg, "tiny_val")
    evaluator = COCOEvaluator("tiny_val", output_dir=str(tmp_path))
    results = inference_on_dataset(Oracle("tiny_val"), loader, evaluator)
    assert results["bbox"]["AP"] == pytest.approx(100)
