"""A training that was killed and resumed equals one that was not, bit for bit on the CPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dn_detr.d2.engine.trainer import Trainer

TOOL = Path(__file__).resolve().parents[2] / "dev" / "check_resume.py"
sys.path.append(str(TOOL.parent))
import check_resume  # noqa: E402


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


def test_trainings_that_are_killed_at_random_moments_equal_an_undisturbed_one(arguments, tmp_path):
    """Ten of them; `dev/check_kills.py --kills 200` for more."""
    tool = TOOL.with_name("check_kills.py")
    done = subprocess.run(
        [sys.executable, tool, tmp_path / "kills", "--kills", "10", "--", *arguments()],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("10 kills") and "chains, 0 of them not equal" in done.stdout


def test_resuming_without_a_checkpoint_starts_from_the_beginning(run, tmp_path):
    run(flags=["--resume"])
    assert "Starting training from iteration 0" in (tmp_path / "run" / "log.txt").read_text()


def test_resuming_ignores_the_configured_weights(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    run("SOLVER.MAX_ITER", 3, "MODEL.WEIGHTS", "nowhere.pth", flags=["--resume"])
    assert "Starting training from iteration 2" in (tmp_path / "run" / "log.txt").read_text()


def test_other_groups_of_learning_rates_keep_the_state_of_each_parameter(run, tmp_path):
    """The groups change and, up to 1e-9, their values do not: then nor does the training."""
    run("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    weights = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    (tmp_path / "run" / "model_final.pth").unlink()
    (tmp_path / "run" / "model_0000003.pth").unlink()
    near = ("SOLVER.BACKBONE_MULTIPLIER", 1 + 1e-9, "SOLVER.WEIGHT_DECAY_NORM", 1e-4 + 1e-13)
    run("SOLVER.MAX_ITER", 4, *near, flags=["--resume"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "SOLVER.BACKBONE_MULTIPLIER 1.0 -> 1.000000001" in log
    after = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    for name, value in weights.items():
        assert torch.allclose(value, after[name], rtol=1e-5, atol=1e-7), name


def test_a_resumed_training_can_end_its_denoising(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    run("SOLVER.MAX_ITER", 3, "MODEL.DN_DETR.DENOISING.ENABLED", False, flags=["--resume"])
    state = torch.load(tmp_path / "run" / "model_final.pth")["trainer"]
    steps = [int(s["step"]) for s in state["_trainer"]["optimizer"]["state"].values()]
    assert len(steps) == len(state["parameters"]) and set(steps) == {3}


def test_a_training_in_float16_resumes_one_in_float32(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16")
    run(*amp, flags=["--resume"])
    assert "Starting training from iteration 2" in (tmp_path / "run" / "log.txt").read_text()


# ------------------------------------------------------------------ what was pending when it ended


class Killed(BaseException):
    """In the place of SIGKILL: nothing in the package catches it."""


EVALUATED = (
    *("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2),
    *("TEST.BEST.METRIC", "bbox/AP", "TEST.EARLY_STOP.METRIC", "bbox/AP"),
)


@pytest.fixture
def scores(monkeypatch):
    """scores(values): the bbox/AP of each evaluation to come; None kills the training in it."""

    def scores(*values):
        values = iter(values)

        def evaluate(_cfg, _model):
            value = next(values)
            if value is None:
                raise Killed
            return {"bbox": {"AP": value}}

        monkeypatch.setattr(Trainer, "test", staticmethod(evaluate))

    return scores


def assert_equal_runs(one, other):
    """All checkpoints of two trainings, but for their folders."""
    names = [sorted(p.name for p in folder.glob("*.pth")) for folder in (one, other)]
    assert names[0] == names[1] and "model_final.pth" in names[0]
    for name in names[0]:
        first, second = (check_resume.leaves(torch.load(f / name)) for f in (one, other))
        assert first.keys() == second.keys()
        for key in first.keys() - {"/detector/config"}:
            assert check_resume.are_equal(first[key], second[key]), (name, key)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_evaluation_that_was_killed_is_made_up(run, tmp_path, scores, number):
    """Best iteration and patience are those of the undisturbed training; the last of the three
    evaluations comes after the last iteration."""
    values = [2.0, 5.0, 3.0]
    scores(*values)
    run(*EVALUATED, output="whole")
    scores(*values[:number], None)
    with pytest.raises(Killed):
        run(*EVALUATED)
    scores(*values[number:])
    run(*EVALUATED, flags=["--resume"])
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    found = {
        line["iteration"]: line["bbox/AP"]
        for line in map(json.loads, (tmp_path / "run/metrics.json").read_text().splitlines())
        if "bbox/AP" in line
    }
    assert found == {1: 2.0, 3: 5.0, 6: 3.0}


def test_a_final_checkpoint_that_was_killed_is_written_by_a_resume(
    run, tmp_path, scores, monkeypatch
):
    def save(content, file):
        if "model_final" in file.name:
            file.write(b"half")
            raise Killed
        original(content, file)

    original = torch.save
    scores(1.0, 2.0, 3.0)
    run(*EVALUATED, output="whole")
    monkeypatch.setattr(torch, "save", save)
    scores(1.0, 2.0, 3.0)
    with pytest.raises(Killed):
        run(*EVALUATED)
    assert not (tmp_path / "run" / "model_final.pth").exists()
    monkeypatch.setattr(torch, "save", original)
    (tmp_path / "run" / "model_final.pth.unfinished").write_bytes(b"half")
    scores(3.0)
    run(*EVALUATED, flags=["--resume"])
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.unfinished*"))
    # All is done now: another resume evaluates nothing and writes nothing.
    before = (tmp_path / "run" / "model_final.pth").stat().st_mtime_ns
    scores()
    run(*EVALUATED, flags=["--resume"])
    assert (tmp_path / "run" / "model_final.pth").stat().st_mtime_ns == before


def test_a_training_that_stops_early_while_it_is_killed_still_ends_with_its_file(
    run, tmp_path, scores, monkeypatch
):
    def save(content, file):
        if "model_final" in file.name:
            raise Killed
        original(content, file)

    original = torch.save
    early = (*EVALUATED, "TEST.EARLY_STOP.PATIENCE", 1)
    monkeypatch.setattr(torch, "save", save)
    scores(2.0, 1.0)
    with pytest.raises(Killed):
        run(*early)
    monkeypatch.setattr(torch, "save", original)
    scores()
    run(*early, flags=["--resume"])
    assert torch.load(tmp_path / "run" / "model_final.pth")["iteration"] == 3


# --------------------------------------------------------------------------- which file is resumed


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(run, tmp_path):
    run("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1)
    folder = tmp_path / "run"
    content = bytearray((folder / "model_final.pth").read_bytes())
    content[len(content) // 2] ^= 1  # one bit, inside of a tensor
    (folder / "model_final.pth").write_bytes(content)
    (folder / "model_0000003.pth").write_bytes(content[:1000])
    run("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, flags=["--resume"])
    log = (folder / "log.txt").read_text()
    assert f"the checkpoint {folder}/model_final.pth is damaged: trying the one before it" in log
    assert "Starting training from iteration 3" in log
    run("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, output="whole")
    assert_equal_runs(tmp_path / "whole", folder)


@pytest.mark.parametrize("content", ["", "model_0000009.pth", "\0", "a" * 5000])
def test_a_wrong_last_checkpoint_hides_no_good_file(run, tmp_path, content):
    run("SOLVER.MAX_ITER", 2)
    (tmp_path / "run" / "last_checkpoint").write_text(content)
    run("SOLVER.MAX_ITER", 3, flags=["--resume"])
    assert "Starting training from iteration 2" in (tmp_path / "run" / "log.txt").read_text()


def test_what_is_no_file_hides_no_checkpoint(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    folder = tmp_path / "run"
    (folder / "model_0000007.pth").symlink_to("nowhere")
    (folder / "model_0000008.pth").symlink_to("model_0000008.pth")
    (folder / "model_0000009.pth").mkdir()
    (folder / "last_checkpoint").unlink()
    os.mkfifo(folder / "last_checkpoint")
    run("SOLVER.MAX_ITER", 3, flags=["--resume"])
    assert "Starting training from iteration 2" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("name", ["metrics.json", "log.txt", "a.unfinished", ".lock"])
def test_a_folder_in_the_place_of_a_file_is_one_sentence(run, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"written.*Is a directory"):
        run(flags=["--resume"])


def without(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def with_value(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


FIRST_STATE = ("trainer", "_trainer", "optimizer", "state", 0)


@pytest.mark.parametrize(
    "change",
    [
        *(without("trainer"), without("trainer", "_trainer", "optimizer")),
        *(without("run", "num_processes"), with_value(7, "run"), with_value([1], "trainer")),
        *(with_value(v, "trainer", "iteration") for v in (-5, "3", 2.5, None)),
        *(with_value(v, "detector", "config") for v in (None, "[1", "x")),
        *(with_value([1], "detector", "class_names"), with_value(5, "trainer", "hooks")),
        with_value({"best": "x", "num_worse": 0}, "trainer", "hooks", "EarlyStopping"),
        # Written beyond their end by the fused optimizer step
        *(with_value(torch.zeros(1), *FIRST_STATE, key) for key in ("exp_avg", "exp_avg_sq")),
    ],
)
def test_a_checkpoint_without_the_state_of_a_training_is_refused(run, tmp_path, change):
    stop = ("TEST.EVAL_PERIOD", 9, "TEST.EARLY_STOP.METRIC", "bbox/AP")
    run("SOLVER.MAX_ITER", 1, *stop)
    path = tmp_path / "run" / "model_final.pth"
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(SystemExit, match=r"--resume cannot continue '.*/model_final.pth', which"):
        run("SOLVER.MAX_ITER", 2, *stop, flags=["--resume"])


def test_overlapping_values_of_an_optimizer_get_memory_of_their_own(run, tmp_path):
    run("SOLVER.MAX_ITER", 1)
    path = tmp_path / "run" / "model_final.pth"
    content = torch.load(path)
    state = content["trainer"]["_trainer"]["optimizer"]["state"][0]
    state["exp_avg"] = torch.zeros(1).expand(state["exp_avg"].shape)
    torch.save(content, path)
    run("SOLVER.MAX_ITER", 2, flags=["--resume"])
    state = torch.load(path)["trainer"]["_trainer"]["optimizer"]["state"][0]
    assert state["exp_avg"].is_contiguous() and state["exp_avg"].unique().numel() > 1


def test_metrics_have_every_iteration_once_after_a_kill(run, tmp_path):
    """What a killed process has written beyond its last checkpoint goes, evaluations as well."""
    options = ("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 5)
    run(*options)
    folder = tmp_path / "run"
    before = metrics_of(folder)
    (folder / "model_final.pth").unlink()  # as if killed before it was written
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 5, "total_l')  # and while this was
    run(*options, flags=["--resume"])
    after = metrics_of(folder)
    assert set(before) == set(after) and len(after) == len(set(after))
    assert [k for k in after if k[0] == "bbox/AP"] == [("bbox/AP", i) for i in (1, 3, 5)]
    run(*options, "SOLVER.MAX_ITER", 6, flags=["--resume"])  # keeps the evaluation after 5
    after = metrics_of(folder)
    assert len(after) == len(set(after)) and ("bbox/AP", 5) in after


def metrics_of(folder) -> list[tuple[str, int]]:
    """Names and iterations of the losses and of AP."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(k, r["iteration"]) for r in rows for k in r if "loss" in k or k == "bbox/AP"]


def test_where_all_are_damaged_a_resume_is_refused(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    for path in (tmp_path / "run").glob("*.pth"):
        path.write_bytes(b"half")
    with pytest.raises(SystemExit, match="all checkpoints in .* are damaged"):
        run("SOLVER.MAX_ITER", 3, flags=["--resume"])


# ------------------------------------------------------------------------------ what may be changed


def test_what_changes_a_resumed_training_is_applied_and_said(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    changed = ("SOLVER.BASE_LR", 1e-5, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.MAX_ITER", 4)
    run(*changed, "OUTPUT_DIR", tmp_path / "run", flags=["--resume"])
    state = torch.load(tmp_path / "run" / "model_final.pth")["trainer"]["_trainer"]["optimizer"]
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    rates = [line["lr"] for line in map(json.loads, lines) if "lr" in line]
    assert rates[2:] == pytest.approx([1e-6, 1e-6])  # a tenth, after SOLVER.STEPS
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.5}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "SOLVER.BASE_LR 0.0008 -> 1e-05; SOLVER.MAX_ITER 2 -> 4; SOLVER.WEIGHT_DECAY" in log


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("SOLVER.OPTIMIZER", "SGD"), r"has other SOLVER.OPTIMIZER \(ADAMW\) than .* \(SGD\)"),
        (("DATASETS.TRAIN", "('tiny_val',)"), r"other training images .* \(10 images\) .*\(4 im"),
        (("SOLVER.MAX_ITER", 1), "has done 3 iterations, more than SOLVER.MAX_ITER 1"),
    ],
)
def test_what_a_resumed_training_cannot_change_is_refused(run, tmp_path, opts, words):
    run()
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(SystemExit, match=words):
        run(*opts, flags=["--resume"])
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_data_are_compared_by_content_and_not_by_path(run, tmp_path, tiny_data):
    _, json_file, images = ast.literal_eval(tiny_data[1])[0]
    content = json.loads(Path(json_file).read_text())
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(content))

    def data(name, file) -> tuple:
        entry = ("DATASETS.COCO_FORMAT", [[name, str(file), images]])
        return (*entry, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()")

    run("SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
    run(*data("moved", moved), "SOLVER.MAX_ITER", 3, flags=["--resume"])
    content["annotations"][0]["bbox"][2] += 1
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="other training images or objects"):
        run(*data("changed", changed), "SOLVER.MAX_ITER", 4, flags=["--resume"])


# ------------------------------------------------------------------------------------ a used folder


def test_a_new_training_does_not_overwrite_checkpoints_of_another(run, tmp_path):
    run("SOLVER.MAX_ITER", 2)
    folder = tmp_path / "run"
    before = (folder / "model_final.pth").read_bytes()
    with pytest.raises(SystemExit, match="--resume, name another OUTPUT_DIR, or .*--overwrite"):
        run("SOLVER.MAX_ITER", 1)
    assert (folder / "model_final.pth").read_bytes() == before
    config = (folder / "config.yaml").read_text()
    run("MODEL.WEIGHTS", folder / "model_final.pth", flags=["--eval-only"])
    assert (folder / "config.yaml").read_text() == config
    with pytest.raises(SystemExit, match="--overwrite would delete MODEL.WEIGHTS"):
        run("MODEL.WEIGHTS", folder / "model_final.pth", flags=["--overwrite"])
    run("SOLVER.MAX_ITER", 1, flags=["--overwrite"])
    assert torch.load(folder / "model_final.pth")["iteration"] == 0
    assert (folder / "earlier_1" / "metrics.json").is_file()
    lines = (folder / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1]
    assert len(list(folder.glob("events.*"))) == 1


def test_two_trainings_in_one_folder_are_kept_apart_until_the_first_is_killed(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    code = "import sys, time; from dn_detr.d2.engine.run_folder import lock\n"
    code += "file = lock(sys.argv[1]); print('locked', flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit, match=f"another training, process {other.pid}, is writing"):
            run("SOLVER.MAX_ITER", 1)
        other.kill()
    run("SOLVER.MAX_ITER", 1)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("SOLVER.MAX_ITER", 0), "SOLVER.MAX_ITER must be at least 1, got 0"),
        (("TEST.COCO_LIMIT", -1), "TEST.COCO_LIMIT must be at least 0, got -1"),
        (("SOLVER.CHECKPOINT_PERIOD", 0), "SOLVER.CHECKPOINT_PERIOD must be at least 1, got 0"),
        (("LOG_PERIOD", 0), "LOG_PERIOD must be at least 1, got 0"),
        (("INPUT.MIN_SIZE_TRAIN", "()"), "INPUT.MIN_SIZE_TRAIN must be one or more sizes"),
        (("SEED", 2**70), "SEED must be below 2\\^32"),
        (("INPUT.FORMAT", "XYZ"), "INPUT.FORMAT must be one of .*'BGR'.*, got 'XYZ'"),
        (("OUTPUT_DIR", "/proc/self"), "files cannot be written .*/proc/self"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(run, opts, words):
    with pytest.raises(SystemExit, match=f"train_net.py: {words}"):
        run(*opts)
