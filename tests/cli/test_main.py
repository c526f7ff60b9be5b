"""The command line: help without torch, keys anywhere, sentences for mistakes."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dn_detr.cli import main as command_line
from dn_detr.cli.main import COMMANDS, KEYS, NODES, main, parse, split_keys
from dn_detr.d2.config.defaults import default_config, read_config
from dn_detr.d2.config.files import config_names, find_config
from dn_detr.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def fastest(*words: str) -> tuple[float, str]:
    """The processor seconds of the fastest of three calls, and what it printed."""
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "dn_detr", *words], capture_output=True)
        after = os.times()
        assert done.returncode == 0, done.stderr
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    return min(seconds), done.stdout.decode()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_takes_no_time(command):
    """torch alone takes two seconds to import."""
    seconds, printed = fastest(*filter(None, [command]), "--help")
    assert seconds < 0.5
    assert f"dn-detr {command or 'COMMAND'}" in printed


def test_the_table_is_the_package():
    modules = {path.stem for path in Path(command_line.__file__).parent.glob("*.py")}
    assert modules - {"__init__", "main", "common"} == set(COMMANDS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"dn-detr": "dn_detr.cli.main:main"}


def test_nodes_and_keys_are_those_of_the_configuration():
    cfg = default_config()
    assert {key for key in cfg if isinstance(cfg[key], dict)} <= set(NODES)
    assert {key for key in cfg if not isinstance(cfg[key], dict)} <= set(KEYS)


def test_keys_stand_anywhere_and_flags_behind_them_are_understood():
    line = "SOLVER.MAX_ITER 5 dino --epochs 3 SEED=-1 --resume TEST.BEST.METRIC= --output o"
    args = parse(["train", *line.split()])
    assert args.opts == ["SOLVER.MAX_ITER", "5", "SEED", "-1", "TEST.BEST.METRIC", ""]
    assert (args.config, args.epochs, args.resume, args.output) == ("dino", 3, True, "o")


def test_file_and_class_names_in_capitals_are_no_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("TEST.JPG").touch()
    words = ["DSC_0001.JPG", "IMG.PNG", "TEST.JPG", "--classes", "WBC", "RBC"]
    assert split_keys(words) == (words, [])
    assert split_keys(["SOLVR.MAX_ITER", "3"]) == ([], ["SOLVR.MAX_ITER", "3"])  # to be refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evla", "there is no command 'evla': did you mean 'eval'?"),
        ("train dn_deformabel", "no configuration 'dn_deformabel': did you mean dn_deformable"),
        ("train dino SOLVER.MAX_ITERS=3 --num-gpus 0", "did you mean SOLVER.MAX_ITER?"),
        ("train dino SOLVER.MAX_ITER", "the key SOLVER.MAX_ITER needs a value"),
        ("train dino --num-gpus -1", "must be at least 0, got -1"),
        ("train dino --workers -1", "must be at least 0, got -1"),
        ("train dino --epochs -1", "must be at least 0, got -1"),
        ("train dino --epochs 2 SOLVER.EPOCHS=-2", "SOLVER.EPOCHS must be at least 0, got -2"),
        ("train", "name a configuration"),
        ("train quick/dino SOLVER.EPOCHS=1e999", "SOLVER.EPOCHS must be finite, got inf"),
        ("train --resume --output nowhere", "there is no training to resume in 'nowhere'"),
        ("eval --data x", "an evaluation needs weights: --weights FILE"),
        ("predict nothing.jpg --weights nothing.pth", "there is no checkpoint 'nothing.pth'"),
        ("predict a.jpg --weights b.pth --threshold 2", "must be in [0, 1], got 2"),
        ("info nothing", "there is no configuration 'nothing'"),
        ("info nothing.pth", "there is no checkpoint 'nothing.pth'"),
        ("check nowhere/", "there is no folder 'nowhere/'"),
        ("split nowhere", "there is no folder 'nowhere'"),
        ("plot nowhere", "there is no nowhere"),
        ("visualize layers", "needs --weights FILE"),
        ("visualize batches", "name a configuration"),
        ("export --weights nothing.pth", "there is no checkpoint 'nothing.pth'"),
        ("convert weights a.pth --output b.pth --method yolo", "--method must be one of"),
        ("benchmark --task export", "--task export needs --exported"),
    ],
)
def test_mistakes_are_said_in_one_sentence(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    said = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- configurations


def test_configurations_have_names_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"dino", "quick/dino"} <= set(config_names())
    assert not any("Base" in name or "Small" in name for name in config_names())
    for name in ("quick/dino", "configs/quick/dino.yaml", "quick/dino.yaml"):
        assert Path(find_config(name)).samefile(ROOT / "configs/quick/dino.yaml")
    Path("dino").write_text("_BASE_: quick/dino\nSEED: 3\nSOLVER: {EPOCHS: 5}\n")
    assert find_config("dino") == "dino"  # a file of the user's comes first
    assert read_config("dino", []).MODEL.DN_DETR.METHOD == "dino"
    assert read_config("dino", []).SOLVER.EPOCHS == 5.0
    assert read_config("dino", ["SOLVER.EPOCHS", "7"]).SOLVER.EPOCHS == 7.0
    for name in ("../configs/dino", "/dino", "./dino.yaml"):
        with pytest.raises(InputError, match="there is no configuration"):
            find_config(name)


def test_data_beside_a_configuration_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine/images").mkdir(parents=True)
    (tmp_path / "mine/a.json").touch()
    text = "_BASE_: quick/dino\nDATASETS:\n  FOLDER: images\n  COCO_FORMAT: [[a, a.json, images]]\n"
    (tmp_path / "mine/mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    node = read_config("mine/mine.yaml", []).DATASETS
    assert node.FOLDER == "mine/images"
    assert node.COCO_FORMAT == [["a", "mine/a.json", "mine/images"]]
    monkeypatch.chdir(tmp_path / "mine")
    assert read_config("mine.yaml", []).DATASETS.COCO_FORMAT == [["a", "a.json", "images"]]


@pytest.mark.parametrize(
    "program", [["train_net.py", "--num-gpus", "0"], ["-m", "dn_detr", "eval"]]
)
def test_ctrl_c_while_libraries_are_imported_ends_without_a_traceback(program, tmp_path):
    """torch, which is found first, stands for an import that is interrupted."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted)\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "")
