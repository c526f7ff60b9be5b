"""Training and evaluation from the command line."""

import io
import json
import sys

import pytest
import torch

from dn_detr.d2.engine import launch
from dn_detr.errors import InputError


def metrics(folder) -> list[dict]:
    """All lines of metrics.json."""
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


# ------------------------------------------------------------------------------- what a run leaves


def test_ctrl_c_ends_a_training_in_one_sentence(train_net, monkeypatch, capsys):
    def is_stopped(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", is_stopped)
    with pytest.raises(SystemExit) as caught:
        train_net.invoke_main([])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "train_net.py: stopped.\n"


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        (None, 0, ""),
        (SystemExit(), 0, ""),
        (SystemExit(130), 130, ""),
        (SystemExit("train_net.py: a sentence"), 1, "train_net.py: a sentence\n"),
        (RuntimeError("a fault"), 1, "RuntimeError: a fault\n"),
    ],
)
def test_a_process_of_torchrun_ends_with_its_status_and_without_pythons_finalisation(
    monkeypatch, capsys, ending, status, said
):
    """In which a thread of gloo aborted it now and then, on a busy machine."""

    def end():
        if ending is not None:
            raise ending

    left, handlers = [], []
    monkeypatch.setattr(launch.atexit, "_run_exitfuncs", lambda: handlers.append(len(left)))
    monkeypatch.setattr(launch.os, "_exit", left.append)
    launch.leave_after(end)
    assert left == [status]
    assert handlers == [0]  # before it leaves
    assert capsys.readouterr().err.endswith(said)


def test_a_training_leaves_what_detectron2_users_look_for(run, tmp_path):
    run("TEST.EVAL_PERIOD", 2)
    folder = tmp_path / "run"
    *iterations, evaluation = metrics(folder)
    assert [line["iteration"] for line in iterations] == [0, 1, 2]
    losses = {
        f"loss_{term}{segment}{layer}"
        for segment in ("", "_dn")
        for term in ("ce", "bbox", "giou")
        for layer in ("", "_0")
    }
    for line in iterations:
        assert {name for name in line if "loss" in name} == losses | {
            *("total_loss", "loss_match", "loss_dn")
        }
        assert line["total_loss"] == pytest.approx(sum(line[name] for name in losses))
        assert line["loss_match"] + line["loss_dn"] == pytest.approx(line["total_loss"])
    assert ["bbox/AP50" in line for line in iterations] == [False, True, False]
    assert "bbox/AP50" in evaluation and "total_loss" not in evaluation
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert (folder / "inference" / "coco_instances_results.json").is_file()
    assert "images     10" in (folder / "log.txt").read_text()  # the report on the datasets


def test_evaluation_alone_gives_the_results_of_the_training(run, tmp_path):
    run()
    weights = tmp_path / "run" / "model_final.pth"
    run("MODEL.WEIGHTS", weights, flags=["--eval-only"], output="evaluation")
    results = [
        json.loads((tmp_path / folder / "inference/coco_instances_results.json").read_text())
        for folder in ("run", "evaluation")
    ]
    assert results[0] == results[1] and len(results[0]) == 40


def test_tensorboard_holds_every_loss(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run()
    (file,) = (tmp_path / "run").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    first = metrics(tmp_path / "run")[0]
    for name in (name for name in first if "loss" in name):
        assert events.Scalars(name)[0].value == pytest.approx(first[name])


def test_metrics_are_medians_over_the_period(run, tmp_path):
    run("SOLVER.MAX_ITER", 4)
    run("SOLVER.MAX_ITER", 4, "LOG_PERIOD", 3, output="thirds")
    every = [line["total_loss"] for line in metrics(tmp_path / "run")[:4]]
    third, last = metrics(tmp_path / "thirds")[:2]
    assert (third["iteration"], last["iteration"]) == (2, 3)
    assert third["total_loss"] == sorted(every[:3])[1]
    assert last["total_loss"] == sorted(every[1:])[1]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_close_to_float32(run, tmp_path, precision):
    run()
    run("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision, output=precision)
    exact, mixed = (metrics(tmp_path / folder)[0] for folder in ("run", precision))
    for name in (name for name in exact if "loss" in name):
        assert mixed[name] == pytest.approx(exact[name], rel=0.1), name
    assert mixed["loss_ce"] != exact["loss_ce"]
    weights = torch.load(tmp_path / precision / "model_final.pth")["model"]
    assert all(value.isfinite().all() for value in weights.values())
    assert all(value.dtype != torch.float16 for value in weights.values())


def test_precise_batch_norm_is_detectron2s(run, tmp_path):
    precise = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2)
    run("TEST.EVAL_PERIOD", 3)
    run("TEST.EVAL_PERIOD", 3, *precise, output="precise")
    usual, precise = (
        torch.load(tmp_path / folder / "model_final.pth")["model"] for folder in ("run", "precise")
    )
    changed = {name for name in usual if not torch.equal(usual[name], precise[name])}
    changed = {name.rpartition(".")[2] for name in changed}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


# ------------------------------------------------------------------------------------- printing


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_the_log_above_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", Terminal())
    run()
    printed = sys.stdout.getvalue()
    bars = [part for part in printed.split("\r") if "| 3/3 [" in part]
    assert bars and "total_loss: " in bars[-1] and "loss_match: " in bars[-1]
    assert "iter 3/3" not in printed
    assert "iter 3/3" in (tmp_path / "run" / "log.txt").read_text()
    for line in printed.replace("\r", "\n").split("\n"):  # nothing stands on the line of a bar
        assert not ("it/s" in line and "Saving checkpoint" in line)
    assert printed.index("Starting training") < printed.index("| 3/3 [")


def test_a_log_gets_plain_lines_with_three_sums(run, capfd):
    run()
    printed = capfd.readouterr().out
    assert "\r" not in printed and "it/s" not in printed
    (line,) = [line for line in printed.splitlines() if "iter 2/3" in line]
    shown = [word for word in line.split() if "loss" in word]
    assert shown == ["total_loss:", "loss_match:", "loss_dn:"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-machines", "2", "--machine-rank", "2"], r"must be in \[0, 2\).*, got 2"),
        (["--num-machines", "2"], "several machines without GPUs need torchrun"),
    ],
)
def test_machines_that_could_not_work_together_are_refused(run, flags, words):
    with pytest.raises(SystemExit, match=words):
        run(flags=flags)


def test_the_address_of_the_first_machine_must_be_reachable(train_net, arguments):
    args = train_net.argument_parser().parse_args(arguments(flags=["--num-machines", "2"]))
    for address in (args.dist_url, "auto"):
        args.dist_url, args.num_gpus = address, 4
        with pytest.raises(InputError, match="--dist-url must be the address of the first"):
            launch.check_machines(args)
