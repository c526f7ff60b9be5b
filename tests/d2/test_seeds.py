"""Same seed, same training."""

import json

import pytest
import torch

from dn_detr.d2.data.loader import TrainLoader
from dn_detr.errors import InputError


def losses(folder) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [{k: v for k, v in line.items() if "loss" in k} for line in lines if "lr" in line]


def test_two_trainings_with_one_seed_are_equal_and_with_two_they_are_not(run, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run("SEED", seed, "MODEL.DN_DETR.DROPOUT", 0.1, "DATASETS.TEST", "()", output=name)
    first, same, other = (losses(tmp_path / name) for name in "abc")
    assert len(first) == 3
    assert first == same
    assert all(
        one["total_loss"] != two["total_loss"] for one, two in zip(first, other, strict=True)
    )
    first, same = (torch.load(tmp_path / n / "model_final.pth")["model"] for n in "ab")
    assert all(torch.equal(value, same[name]) for name, value in first.items())


def test_a_resumed_training_goes_on_with_the_seed_that_was_drawn(run, tmp_path):
    """Its remaining iterations are those of a training with that number as its SEED."""
    drawn = ("SEED", -1, "DATASETS.TEST", "()")
    run(*drawn, "SOLVER.MAX_ITER", 2)
    checkpoint = torch.load(tmp_path / "run" / "model_final.pth")
    seed = checkpoint["trainer"]["_trainer"]["seed"]
    (tmp_path / "fixed").mkdir()
    for file in ("model_final.pth", "last_checkpoint"):
        (tmp_path / "fixed" / file).write_bytes((tmp_path / "run" / file).read_bytes())
    run(*drawn, "SOLVER.MAX_ITER", 4, flags=["--resume"])
    fixed = ("SEED", seed, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 4)
    run(*fixed, flags=["--resume"], output="fixed")
    assert losses(tmp_path / "run")[-2:] == losses(tmp_path / "fixed")
    assert f"continuing with the seed {seed}" in (tmp_path / "run" / "log.txt").read_text()


def test_a_seed_that_is_configured_is_not_replaced_by_that_of_a_checkpoint(run, tmp_path):
    run("SEED", 5, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    run("SEED", 6, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()", flags=["--resume"])
    saved = torch.load(tmp_path / "run" / "model_final.pth")["trainer"]["_trainer"]
    assert saved["seed"] == 6


def test_deterministic_algorithms_are_a_key(run, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        run("DETERMINISTIC", True, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_evaluation_alone_is_deterministic_too(run, monkeypatch, trained):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    weights = str(trained / "model_final.pth")
    try:
        run("DETERMINISTIC", True, "MODEL.WEIGHTS", weights, flags=["--eval-only"])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_batch_that_the_processes_cannot_share_is_refused(batch_size):
    with pytest.raises(InputError, match=f"multiple of the number .*got {batch_size} images for 2"):
        TrainLoader([{}], mapper=None, batch_size=batch_size, seed=0, rank=0, world_size=2)
