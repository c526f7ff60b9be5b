"""A training that was killed and resumed equals one that was not, bit for bit on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "dev" / "check_resume.py"


def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(arguments, tmp_path):
    """With all that has a state of its own: dropout, loss scaling, workers, a learning-rate step,
    batch norm, a moving average, mosaics and mixed images, all that compares an evaluation with
    those before."""
    options = arguments(
        *("MODEL.DN_DETR.DROPOUT", 0.1, "DATALOADER.NUM_WORKERS", 1),
        *("TEST.EVAL_PERIOD", 7, "TEST.INSTABILITY.ENABLED", True),
        *("TEST.BEST.METRIC", "bbox/AP", "TEST.EARLY_STOP.METRIC", "bbox/AP"),
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"),
        *("SOLVER.WARMUP_ITERS", 9, "SOLVER.STEPS", "(12,)"),
        *("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.WARMUP", 5),
        *("INPUT.MOSAIC.ENABLED", True, "INPUT.MOSAIC.SIZE", 40, "INPUT.MIXUP.ENABLED", True),
        *("INPUT.SCHEDULE", "[4, 30, 36]", "MODEL.DN_DETR.LOSS.KIND", "mal"),
    )
    done = subprocess.run(
        [sys.executable, TOOL, tmp_path / "runs", "--iterations", "40", "--checkpoint", "7", "--"]
        + options,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("equal bit for bit: 15 losses in each of the iterations ")


def test_resuming_without_a_checkpoint_starts_from_the_beginning(run, tmp_path):
    run(flags=["--resume"])
    assert "Starting training from iteration 0" in (tmp_path / "run" / "log.txt").read_text()


def test_resuming_ignores_the_configured_weights(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    run("SOLVER.MAX_ITER", 3, "MODEL.WEIGHTS", "nowhere.pth", flags=["--resume"])
    assert "Starting training from iteration 2" in (tmp_path / "run" / "log.txt").read_text()


def test_an_optimizer_with_other_groups_cannot_be_resumed(run):
    run("SOLVER.MAX_ITER", 2)
    with pytest.raises(SystemExit, match="the optimizer of this checkpoint does not fit"):
        run("SOLVER.BACKBONE_MULTIPLIER", 0.5, flags=["--resume"])


def test_a_training_in_float16_resumes_one_in_float32(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16")
    run(*amp, flags=["--resume"])
    assert "Starting training from iteration 2" in (tmp_path / "run" / "log.txt").read_text()
