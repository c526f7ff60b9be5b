"""The best checkpoint, and a training that ends when its metric stops rising."""

import json

import pytest
import torch

from dn_detr.d2.engine.trainer import Trainer


@pytest.fixture
def scored(run, tmp_path, monkeypatch):
    """Run a training whose evaluations, one for each iteration, give these values of bbox/AP."""

    def scored(values, *opts, **more):
        values = iter(values)

        def evaluate(_cfg, _model):
            return {"bbox": {"AP": next(values)}}

        monkeypatch.setattr(Trainer, "test", staticmethod(evaluate))
        run("TEST.EVAL_PERIOD", 1, *opts, **more)
        lines = [json.loads(x) for x in (tmp_path / "run/metrics.json").read_text().splitlines()]
        return [line["bbox/AP"] for line in lines if "bbox/AP" in line]

    return scored


def best(tmp_path) -> dict:
    return torch.load(tmp_path / "run" / "model_best.pth")


BEST = ("TEST.BEST.METRIC", "bbox/AP")
EARLY = ("TEST.EARLY_STOP.METRIC", "bbox/AP", "TEST.EARLY_STOP.PATIENCE", 2)


def test_the_best_checkpoint_is_kept(scored, tmp_path):
    scored([1.0, 3.0, 2.0, float("nan"), 2.5], *BEST, "SOLVER.MAX_ITER", 5)
    assert best(tmp_path)["iteration"] == 1
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"


def test_the_best_may_be_the_lowest(scored, tmp_path):
    scored([1.0, 3.0, 0.5], *BEST, "TEST.BEST.MODE", "min")
    assert best(tmp_path)["iteration"] == 3  # evaluated behind the last iteration


def test_a_resumed_training_knows_the_best_of_before(scored, tmp_path):
    period = ("SOLVER.CHECKPOINT_PERIOD", 1)
    scored([1.0, 3.0], *BEST, *period, "SOLVER.MAX_ITER", 2)
    before = best(tmp_path)
    scored([2.0, 2.5], *BEST, *period, "SOLVER.MAX_ITER", 4, flags=["--resume"])
    after = best(tmp_path)
    assert after["iteration"] == before["iteration"] == 2
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())
    scored([3.5], *BEST, *period, "SOLVER.MAX_ITER", 5, flags=["--resume"])
    assert best(tmp_path)["iteration"] == 5


def test_no_training_is_resumed_from_the_best(scored, tmp_path):
    scored([3.0, 1.0], *BEST, "SOLVER.MAX_ITER", 2)
    scored([2.0], *BEST, "SOLVER.MAX_ITER", 3, flags=["--resume"])
    assert "Starting training from iteration 2" in (tmp_path / "run" / "log.txt").read_text()


def test_a_training_ends_when_the_metric_has_not_risen_for_so_many_evaluations(scored, tmp_path):
    seen = scored([1.0, 2.0, 1.5, 2.0, 9.0], *EARLY, "SOLVER.MAX_ITER", 7)
    assert seen == [1.0, 2.0, 1.5, 2.0]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "stopped early: bbox/AP has not been better than 2 in the last 2 evaluations" in log
    assert "Traceback" not in log
    assert torch.load(tmp_path / "run" / "model_final.pth")["iteration"] == 3
    # Resuming it ends it again; with more patience it goes on.
    assert scored([], *EARLY, "SOLVER.MAX_ITER", 7, flags=["--resume"]) == seen
    patience = ("TEST.EARLY_STOP.PATIENCE", 4)
    assert scored([9.0] * 3, *EARLY, *patience, "SOLVER.MAX_ITER", 7, flags=["--resume"])[-1] == 9.0


def test_patience_is_counted_on_over_a_resume(scored):
    period = ("SOLVER.CHECKPOINT_PERIOD", 1)
    scored([2.0, 1.0], *EARLY, *period, "SOLVER.MAX_ITER", 2)
    seen = scored([1.5, 9.0], *EARLY, *period, "SOLVER.MAX_ITER", 6, flags=["--resume"])
    assert seen == [2.0, 1.0, 1.5]


@pytest.mark.parametrize("key", ["BEST", "EARLY_STOP"])
def test_a_wrong_name_is_refused_at_the_first_evaluation_with_all_names(scored, key):
    with pytest.raises(SystemExit) as caught:
        scored([1.0], f"TEST.{key}.METRIC", "box/AP")
    assert str(caught.value) == (
        f"train_net.py: TEST.{key}.METRIC must be a metric of this evaluation, perhaps 'bbox/AP', "
        "got 'box/AP'; available: bbox/AP."
    )


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ((*BEST, "TEST.BEST.MODE", "most"), "TEST.BEST.MODE 'max' or 'min'"),
        ((*EARLY, "TEST.EARLY_STOP.PATIENCE", 0), "PATIENCE must be at least 1, got 0"),
    ],
)
def test_modes_and_patience_are_checked_before_the_training(scored, opts, words):
    with pytest.raises(SystemExit, match=words):
        scored([], *opts)


def test_without_evaluations_there_is_nothing_to_watch(run):
    with pytest.raises(SystemExit, match="and a TEST.EVAL_PERIOD of at least 1, got 'max' and 0"):
        run(*EARLY, "TEST.EVAL_PERIOD", 0)
