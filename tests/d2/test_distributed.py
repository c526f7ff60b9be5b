"""Two processes on the CPU."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import two_processes
from coco_files import make_content, write

ROOT = Path(__file__).resolve().parents[2]
TRAIN_NET, QUICK = ROOT / "train_net.py", ROOT / "configs" / "quick"

FEW_POINTS = ("MODEL.DN_DETR.LOSS.MASK_POINTS", 40)


def in_two_processes(function, *args, timeout: float) -> None:
    """Run function(rank, *args) for both ranks; ends them and fails if they hang."""
    context = torch.multiprocessing.start_processes(function, args, nprocs=2, join=False)
    end = time.monotonic() + timeout
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"two processes hang: not done after {timeout} s")


def test_a_rank_without_objects_trains_in_step_with_the_other(tiny_config, tmp_path):
    cfg = tiny_config("MODEL.DN_DETR.TEACH.ENABLED", True)
    others = {  # the loss of what rank 1 has none of -> configuration
        "loss_box_reg_dn": tiny_config(config_file=QUICK / "dn_faster_rcnn_fpn.yaml"),
        "loss_dice_dn": tiny_config(*FEW_POINTS, config_file=QUICK / "dn_mask2former.yaml"),
        "loss_mask_dn": tiny_config(*FEW_POINTS, config_file=QUICK / "mask_dino.yaml"),
        "loss_bbox_prompt": tiny_config(
            *(
                "MODEL.DN_DETR.BOX_PROMPTS.ENABLED",
                True,
                "MODEL.DN_DETR.BOX_PROMPTS.PROBABILITY",
                1.0,
            ),
            *("MODEL.DN_DETR.NUM_GROUPS", 3, "SEED", 0),  # which gives objects of the first image
        ),
        "loss_bbox_group_teacher": tiny_config(
            "MODEL.DN_DETR.TEACH.ENABLED", True, "MODEL.DN_DETR.NUM_GROUPS", 3
        ),
    }
    in_two_processes(
        two_processes.train_with_an_empty_rank, tmp_path, cfg, *others.values(), timeout=120
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # (4 + 0) objects and (5 + 0) boxes of the teacher, by 2 processes
    assert first["normalisers"] == second["normalisers"] == (2.0, 2.5)
    for name, value in first["losses"].items():
        if name != "data_time":
            assert second["losses"][name] == value, name
    assert first["losses"].keys() == second["losses"].keys()
    assert first["losses"]["loss_bbox_dn"] > 0 and first["losses"]["loss_bbox_teacher"] > 0
    for kind in ("gradients", "weights"):
        assert first[kind].keys() == second[kind].keys()
        for name, value in first[kind].items():
            assert value.isfinite().all(), name
            if "running" not in name:  # batch norm sees each rank's own images
                assert torch.equal(value, second[kind][name]), name
    # Both end when one of them breaks, and each says who it was.
    assert "images [2, 3] of rank 1" in second["error"]
    assert "loss_bbox_0, in iteration 1, from rank 1;" in first["error"]
    for number, loss in enumerate(others):
        first, second = (torch.load(tmp_path / f"{number}_{rank}.pt") for rank in (0, 1))
        assert first["losses"] == second["losses"] and first["losses"][loss] > 0
        for name, gradient in first["gradients"].items():
            assert gradient.isfinite().all(), name
            assert torch.equal(gradient, second["gradients"][name]), name


def test_a_process_with_a_broken_image_or_gradient_is_named_by_all_and_keeps_the_evidence(
    tiny_config, tmp_path
):
    """Its gradient is in that of all when the processes notice."""
    in_two_processes(two_processes.break_a_rank, tmp_path, tiny_config(), timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == len(second) == 2
    assert all("in iteration 0, from rank 1;" in sentence for sentence in first)
    assert "NaN or infinity in the logits" in second[0]
    assert second[1].startswith("not finite: grad_norm, in iteration 0, from the images [1]")
    assert [p.name for p in tmp_path.glob("not_finite_*")] == ["not_finite_0000000_rank1.pth"]


def test_an_error_of_one_process_ends_all_and_is_told_once(tiny_config, tmp_path):
    cfg = tiny_config("WANDB.ENABLED", True)
    in_two_processes(two_processes.meet_errors_of_one, tmp_path, cfg, timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    told, heard = "InputError", "RemoteInputError"
    wandb = "WANDB.ENABLED needs wandb: pip install wandb."
    assert first[:2] == ["read by 0", "read by 0"] and second[:2] == ["read by 0", "read by 1"]
    zero, one = ("the file of 0 is broken.", "the file of 1 is broken.")
    image = "an image of 1 is broken."
    assert first[2:] == [(told, zero), (heard, one), (told, wandb), (heard, image)]
    assert second[2:] == [(heard, zero), (told, one), (heard, wandb), (told, image)]


def test_a_faulty_dataset_ends_a_training_of_two_processes_in_one_sentence(arguments, tmp_path):
    """Rank 0 alone looks at the images."""
    json_file, images = write(tmp_path, make_content())
    (tmp_path / "images" / "12.png").unlink()
    entry = str([["broken", json_file, images]])
    options = (
        "DATASETS.COCO_FORMAT",
        entry,
        "DATASETS.TRAIN",
        "('broken',)",
        "DATASETS.TEST",
        "()",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(TRAIN_NET), *arguments(*options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("train_net.py: "))
    assert "1 of the 4 images of the dataset 'broken' cannot be used" in sentence
    for noise in ("RuntimeError", "terminate called", "SIGABRT", "Aborted"):
        assert noise not in done.stderr


def test_two_machines_train_as_one(arguments, tmp_path):
    """Two torchruns, as on two machines: each with a process and a machine rank of its own."""
    options = arguments("SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            + ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
            + [str(TRAIN_NET), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    for machine in machines:
        _, errors = machine.communicate(timeout=180)
        assert machine.returncode == 0, errors
    logs = [(tmp_path / "run" / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    assert "Rank of current process: 0. World size: 2" in logs[0]
    assert "Rank of current process: 1. World size: 2" in logs[1]
    assert "2 x 1 (processes x images)" in logs[0]
    # The datasets are checked by one process alone.
    assert "images     10" in logs[0] and "images     10" not in logs[1]
    assert torch.load(tmp_path / "run" / "model_final.pth")["iteration"] == 1


def test_torchrun_trains_and_evaluates_in_two_processes(arguments, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(TRAIN_NET), *arguments("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4)]
        + [
            "INPUT.SCHEDULE",
            "[1, 2, 2]",
            "INPUT.MOSAIC.ENABLED",
            "True",
            "INPUT.MIXUP.ENABLED",
            "True",
        ]
        + ["INPUT.MOSAIC.PROBABILITY", "1.0", "INPUT.MIXUP.PROBABILITY", "1.0"]
        + ["SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1", "TEST.BEST.METRIC", "bbox/AP"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1]
    assert "bbox/AP" in lines[-1]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Rank of current process: 0. World size: 2" in log
    assert "iterations 1 to 1: 100.0% mosaics, 100.0% mixed" in log
    results = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert len(results) == 40  # ten of each of the four images, whichever rank had it
