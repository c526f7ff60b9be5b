"""What ends a training before its last iteration, and what is left then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


class Training:
    """train_net.py in a process group of its own, past its first iterations."""

    def __init__(self, folder: Path, command: list[str], *, runner=(), ignored=(), wait=True):
        def ignore():
            for signum in ignored:
                signal.signal(signum, signal.SIG_IGN)

        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, *runner, str(ROOT / "train_net.py"), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=ignore,
        )
        while wait and self.num_iterations() < 2:
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.05)

    def num_iterations(self) -> int:
        path = self.folder / "metrics.json"
        lines = path.read_text().splitlines() if path.exists() else []
        return sum("total_loss" in line for line in lines)

    def end(self) -> tuple[int, list[str]]:
        """Exit status and this program's sentences."""
        _, errors = self.process.communicate(timeout=60)
        sentences = [line for line in errors.splitlines() if line.startswith("train_net.py: ")]
        own = errors.partition("torch/distributed/elastic")[0]  # torchrun has its own after that
        assert "Traceback" not in own, errors
        return self.process.returncode, sentences


LONG = ("SOLVER.MAX_ITER", 100_000, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 1)


@pytest.fixture
def start(arguments, tmp_path):
    """Start a training that would go on for hours; killed in the end."""
    started = []

    def start(*opts, flags=(), **more):
        command = arguments(*LONG, *opts, flags=flags)
        started.append(Training(tmp_path / "run", command, **more))
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            os.killpg(training.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_ends_a_training_in_one_sentence(start, tmp_path, name):
    """It reaches the data workers as well, as Ctrl-C and torchrun's signals do."""
    training, signum = start(), getattr(signal, name)
    os.killpg(training.process.pid, signum)
    status, (sentence,) = training.end()
    assert status == 128 + signum
    last = (tmp_path / "run" / "last_checkpoint").read_text()
    done = torch.load(tmp_path / "run" / last)["iteration"] + 1
    assert training.num_iterations() == done >= 2
    assert sentence == (
        f"train_net.py: stopped by {name} after {done} of 100000 iterations: saved in "
        f"{tmp_path}/run/{last}; --resume continues there."
    )


def test_an_ignored_signal_stays_ignored_and_a_second_one_ends_at_once(start):
    training = start(ignored=[signal.SIGHUP])
    training.process.send_signal(signal.SIGHUP)
    before = training.num_iterations()
    while training.num_iterations() < before + 3:
        assert training.process.poll() is None
        time.sleep(0.05)
    # Its writing of the checkpoint never ends: a pipe that nobody reads
    os.mkfifo(training.folder / "last_checkpoint.unfinished")
    training.process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert training.process.poll() is None
    training.process.send_signal(signal.SIGTERM)
    assert training.process.wait(timeout=10) == -signal.SIGTERM


def test_a_stopped_training_of_two_processes_saves_together(start, tmp_path):
    training = start(runner=TORCHRUN)
    children = Path(f"/proc/{training.process.pid}/task/{training.process.pid}/children")
    second = max(map(int, children.read_text().split()))
    os.kill(second, signal.SIGUSR1)  # one of them alone
    _, (sentence,) = training.end()
    assert "stopped by SIGUSR1 after" in sentence
    last = (tmp_path / "run" / "last_checkpoint").read_text()
    assert torch.load(tmp_path / "run" / last)["iteration"] + 1 == training.num_iterations()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_one_sentence_of_the_other(start, tmp_path, signum):
    training = start("PROCESS_TIMEOUT", 0.05, runner=TORCHRUN)
    children = Path(f"/proc/{training.process.pid}/task/{training.process.pid}/children")
    second = max(map(int, children.read_text().split()))
    begin = time.monotonic()
    os.kill(second, signum)
    if signum == signal.SIGSTOP:
        while not (tmp_path / "run" / "last_checkpoint").exists():
            assert time.monotonic() - begin < 30
            time.sleep(0.1)
        os.kill(second, signal.SIGKILL)
    _, errors = training.process.communicate(timeout=60)
    (sentence,) = (x for x in errors.splitlines() if x.startswith("train_net.py: "))
    assert "rank 0 has lost another process" in sentence and "0.05 minutes" in sentence
    assert "gloo" not in errors
    assert (tmp_path / "run" / "last_checkpoint").is_file()  # of the last iteration done


def test_an_error_leaves_a_checkpoint_of_the_iterations_done(run, tmp_path, monkeypatch):
    from dn_detr.d2.engine.train_step import TrainStep

    def fail(self):
        if self.iter == 2:
            raise RuntimeError("an operator failed")
        original(self)

    original = TrainStep.run_step
    monkeypatch.setattr(TrainStep, "run_step", fail)
    with pytest.raises(RuntimeError, match="an operator failed"):
        run("SOLVER.MAX_ITER", 4)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"
    monkeypatch.setattr(TrainStep, "run_step", original)
    run("SOLVER.MAX_ITER", 4, flags=["--resume"])
    run("SOLVER.MAX_ITER", 4, output="whole")
    resumed, whole = (torch.load(tmp_path / f / "model_final.pth") for f in ("run", "whole"))
    assert all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items())


def test_a_full_disk_keeps_the_checkpoint_before_and_is_one_sentence(run, tmp_path, monkeypatch):
    def write_half(_content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    original, saved = torch.save, []

    def save(content, file):
        saved.append(file)
        (original if len(saved) == 1 else write_half)(content, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as caught:
        run("SOLVER.CHECKPOINT_PERIOD", 1)
    assert str(caught.value) == (
        f"train_net.py: the checkpoint {tmp_path}/run/model_0000001.pth cannot be written ([Errno "
        "28] No space left on device); those before it are as they were."
    )
    assert [p.name for p in (tmp_path / "run").glob("*.pth*")] == ["model_0000000.pth"]
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000000.pth"


def test_a_checkpoint_is_due_after_minutes_as_well(run, tmp_path):
    run("SOLVER.CHECKPOINT_MINUTES", 1e-9, "SOLVER.MAX_ITER", 5)
    names = sorted(p.name for p in (tmp_path / "run").glob("model_0*.pth"))
    assert names == [f"model_000000{i}.pth" for i in (2, 3, 4)]  # the newest three


def test_checkpoints_at_multiples_stay_beside_the_newest(run, tmp_path):
    keep = ("SOLVER.KEEP_NEWEST", 2, "SOLVER.KEEP_EVERY", 3, "SOLVER.CHECKPOINT_PERIOD", 1)
    run(*keep, "SOLVER.MAX_ITER", 8)
    names = sorted(p.name for p in (tmp_path / "run").glob("model_*.pth"))
    assert names == [f"model_000000{i}.pth" for i in (2, 5, 6, 7)] + ["model_final.pth"]


def test_stored_scalars_are_bounded_and_medians_are_those_of_all():
    from detectron2.utils.events import EventStorage

    from dn_detr.d2.engine.event_storage import BoundedEventStorage

    bounded, whole = BoundedEventStorage(0, 30), EventStorage(0)
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    for i, value in enumerate(values):
        for storage in (bounded, whole):
            storage.iter = i
            storage.put_scalar("loss", value)
            storage.put_scalar("bbox/AP", value, smoothing_hint=False)
        for window in (1, 20, 30):
            found, expected = (s.latest_with_smoothing_hint(window) for s in (bounded, whole))
            assert found == expected
    assert [len(h.values()) for h in bounded.histories().values()] == [30, 30]
    assert [len(h.values()) for h in whole.histories().values()] == [1000, 1000]


def test_a_training_keeps_no_more_scalars_than_its_longest_window(tiny_config, tmp_path):
    from dn_detr.d2.engine.trainer import LONGEST_WINDOW, Trainer

    cfg = tiny_config("SOLVER.MAX_ITER", LONGEST_WINDOW + 5, "DATASETS.TEST", "()")
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = Trainer(cfg)
    trainer.train()
    lengths = {len(h.values()) for h in trainer.storage.histories().values()}
    assert max(lengths) == LONGEST_WINDOW
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert len([x for x in map(json.loads, lines) if "total_loss" in x]) == LONGEST_WINDOW + 5
