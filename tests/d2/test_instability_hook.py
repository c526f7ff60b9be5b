"""The instruments of DN-DETR during a training."""

import copy
import json

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from samples import sample

from dn_detr.d2.engine.instability_hook import MatchingInstruments, build_instruments
from dn_detr.losses.matching_costs import list_objects

SAMPLES = [sample(0, 3), sample(1, 0), sample(2, 5)]


class OneEvaluation:
    """What a hook needs of a trainer."""

    def __init__(self, storage):
        self.storage = storage


def instruments(cfg, *, samples=SAMPLES) -> MatchingInstruments:
    torch.manual_seed(0)
    model = build_model(cfg)
    for parameter in model.core.query_design.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.5)
    return MatchingInstruments(model, [(i, [one]) for i, one in enumerate(samples)])


def scalars(hook) -> dict[str, float]:
    with EventStorage() as storage:
        hook.trainer = OneEvaluation(storage)
        hook.after_evaluation()
        return {name: value for name, (value, _) in storage.latest().items()}


def brute_force(hook, image) -> tuple[list[int], float]:
    """Object of each query by the matching cost alone, by hand for one image; summed distance."""
    from scipy.optimize import linear_sum_assignment

    model = hook.model.eval()
    with torch.no_grad():
        found = model.predict(model.make_batch([image]))
        targets = model.make_batch([image], with_targets=True).targets
        cost = model.costs(found.of("match"), list_objects(targets))[-1]  # [objects, queries]
    model.train()
    rows, columns = linear_sum_assignment(cost.numpy())
    object_of = [-1] * found.logits.shape[2]
    distance = 0.0
    for row, column in zip(rows, columns, strict=True):
        object_of[column] = int(row)
        if found.references[0] is None:
            continue
        anchor, box = found.references[0][0, column], targets.boxes[0, row]
        distance += (anchor - box[: len(anchor)]).abs().sum().item()
    return object_of, distance


@pytest.mark.parametrize(
    ("method", "has_distance"),
    [("dab_deformable", True), ("deformable_detr", True), ("detr", False)],
)
@pytest.mark.parametrize("is_denoised", [True, False])
def test_the_instruments_are_those_of_the_paper(tiny_config, method, has_distance, is_denoised):
    cfg = tiny_config(
        *("MODEL.DN_DETR.METHOD", method, "MODEL.DN_DETR.DENOISING.ENABLED", is_denoised)
    )
    hook = instruments(cfg)
    before = [brute_force(hook, one) for one in SAMPLES]
    first = scalars(hook)
    assert "matching/instability" not in first
    assert ("matching/anchor_distance" in first) == has_distance
    if has_distance:
        mean = sum(distance for _, distance in before) / 8  # 3 + 0 + 5 objects
        assert first["matching/anchor_distance"] == pytest.approx(mean, rel=1e-5)
        assert first["matching/anchor_distance_100"] == pytest.approx(mean, rel=1e-5)
    assert scalars(hook)["matching/instability"] == 0
    for table in hook.model.core.query_design.learned.parameters():
        table.data = table.data.flip(0)
    after = [brute_force(hook, one) for one in SAMPLES]
    changed = sum(
        one != other
        for (was, _), (now, _) in zip(before, after, strict=True)
        for one, other in zip(was, now, strict=True)
    )
    assert changed > 0
    assert scalars(hook)["matching/instability"] == pytest.approx(changed / 3)


def test_queries_that_are_proposals_have_no_identity_but_a_distance(tiny_config):
    hook = instruments(tiny_config("MODEL.DN_DETR.METHOD", "dino"))
    scalars(hook)
    assert set(scalars(hook)) == {"matching/anchor_distance", "matching/anchor_distance_100"}


def test_measuring_leaves_the_model_in_training_and_its_statistics_alone(tiny_config):
    hook = instruments(tiny_config())
    before = copy.deepcopy(hook.model.state_dict())
    hook.model.train()
    scalars(hook)
    assert hook.model.training
    assert all(torch.equal(value, before[name]) for name, value in hook.model.state_dict().items())


def test_matches_of_other_images_are_not_compared(tiny_config, caplog):
    hook = instruments(tiny_config())
    hook.load_state_dict({"matches": torch.zeros(7, 12, dtype=torch.int64)})
    assert "matching/instability" not in scalars(hook)
    assert "no matching instability this time" in caplog.text


def test_images_are_spread_evenly_over_the_first_test_set(tiny_config):
    cfg = tiny_config("TEST.INSTABILITY.ENABLED", True, "TEST.INSTABILITY.NUM_IMAGES", 2)
    hook = build_instruments(cfg, None)
    seen = list(hook.loader)
    assert [index for index, _ in seen] == [0, 3]  # of the four
    assert all(len(samples[0]["instances"]) for _, samples in seen)


def test_a_training_logs_them_from_the_second_evaluation_on(run, tmp_path):
    run("TEST.INSTABILITY.ENABLED", True, "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 2)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.json").read_text().splitlines()]
    seen = ["matching/instability" in line for line in lines if "matching/anchor_distance" in line]
    assert seen == [False, True, True]
    saved = torch.load(tmp_path / "run" / "model_0000001.pth")["trainer"]
    assert saved["hooks"]["MatchingInstruments"]["matches"].shape == (4, 12)
    assert torch.load(tmp_path / "run" / "model_final.pth")["trainer"]["iteration"] == 2
