"""A loss that is not finite stops the training, and can be computed again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.structures import BitMasks
from samples import sample

from dn_detr.d2.engine.nonfinite_dump import as_plain, as_sample
from dn_detr.losses.loss_terms import L1

TOOL = Path(__file__).resolve().parents[2] / "tools" / "replay_not_finite.py"


def test_a_training_ends_in_one_sentence_and_leaves_what_reproduces_it(run, tmp_path):
    """An infinite learning rate: the second iteration has weights that are not finite."""
    with pytest.raises(SystemExit) as caught:
        run(
            "SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CLIP_GRADIENTS.ENABLED", False
        )
    sentence = str(caught.value)
    assert "\n" not in sentence and "NaN or infinity in the logits" in sentence
    (file,) = (tmp_path / "run").glob("not_finite_*_rank0.pth")
    assert str(file) in sentence
    assert sentence.removeprefix("train_net.py: ") in (tmp_path / "run" / "log.txt").read_text()
    kept = torch.load(file)  # nothing in it that needs trust
    assert f"in iteration {kept['iteration']}, from the images [" in sentence
    assert "BASE_LR: 1.0e+30" in kept["config"]
    assert all(str(s["image_id"]) in sentence for s in kept["samples"])
    assert all(s["file_name"] in sentence for s in kept["samples"])
    replayed = subprocess.run(
        [sys.executable, TOOL, file], capture_output=True, text=True, timeout=120
    )
    assert replayed.returncode == 0, replayed.stderr
    assert "NaN or infinity in the logits" in replayed.stdout
    assert "first module with an output that is not finite: backbone.res2.0" in replayed.stdout


def test_other_files_cannot_be_computed_again(tool, tmp_path, monkeypatch):
    file = tmp_path / "a.pth"
    monkeypatch.setattr(sys, "argv", ["replay_not_finite.py", str(file)])
    for make, words in (
        (lambda: None, "there is no file"),
        (lambda: file.write_text("no weights"), "is not a not_finite_*.pth"),
        (lambda: torch.save({"model": {}}, file), "is not a not_finite_*.pth"),
    ):
        make()
        with pytest.raises(SystemExit) as caught:
            tool("replay_not_finite").main()
        assert words in caught.value.code and str(file) in caught.value.code


def test_a_gradient_that_is_not_finite_stops_before_it_is_learned_from(run, tmp_path, monkeypatch):
    def with_a_broken_gradient(self, matched, num_objects):
        value = original(self, matched, num_objects)
        return value + 0 * matched.boxes.sum().mul(0).sqrt()  # its derivative is infinite times 0

    original = L1.__call__
    monkeypatch.setattr(L1, "__call__", with_a_broken_gradient)
    with pytest.raises(SystemExit, match="not finite: grad_norm, in iteration 0, from the images"):
        run()
    (file,) = (tmp_path / "run").glob("not_finite_*_rank0.pth")
    assert all(value.isfinite().all() for value in torch.load(file)["model"].values())


def test_a_sample_survives_being_written_down():
    original = sample(4, 3)
    original["instances"].gt_masks = BitMasks(torch.rand(3, 64, 96) > 0.5)
    original["teacher_instances"] = sample(5, 2)["instances"]
    original["teacher_instances"].scores = torch.tensor([0.5, 0.25])
    again = as_sample(as_plain(original))
    assert again.keys() == original.keys()
    assert torch.equal(again["image"], original["image"])
    assert again["instances"].image_size == original["instances"].image_size
    for field in ("gt_boxes", "gt_classes", "gt_masks"):
        one, other = again["instances"].get(field), original["instances"].get(field)
        assert torch.equal(getattr(one, "tensor", one), getattr(other, "tensor", other))
    one, other = again["teacher_instances"], original["teacher_instances"]
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.gt_boxes.tensor, other.gt_boxes.tensor)
