"""The benchmark measures what it says, and what it counts."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = str(ROOT / "configs" / "quick" / "dn_detr.yaml")
tool = runpy.run_path(str(ROOT / "tools" / "benchmark.py"))

SMALL = """
    MODEL.RESNETS.STEM_OUT_CHANNELS 8  MODEL.RESNETS.RES2_OUT_CHANNELS 8
    MODEL.DN_DETR.CHANNELS 16  MODEL.DN_DETR.NUM_HEADS 2  MODEL.DN_DETR.NUM_QUERIES 9
    MODEL.DN_DETR.FEED_FORWARD_DIM 16  MODEL.DN_DETR.ENCODER_LAYERS 1
""".split()


@pytest.mark.parametrize("task", ["train", "eval"])
def test_a_task_is_measured_and_written(task, tmp_path, monkeypatch, capsys):
    path = tmp_path / "times.json"
    arguments = ["--task", task, "--config-file", QUICK, "--batch", "2", "--size", "64x96"]
    few = ["--warmup", "1", "--iterations", "3", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, *few, *SMALL])
    tool["main"]()
    result = json.loads(path.read_text())
    assert (result["task"], result["batch"], result["size"]) == (task, 2, "64x96")
    assert result["iterations"] == 3
    assert result["images_per_second"] == pytest.approx(2000 / result["median_ms"])
    assert 0 < result["fastest_ms"] <= result["median_ms"] <= result["slowest_tenth_ms"]
    assert f"median_ms: {result['median_ms']:.2f}" in capsys.readouterr().out


def test_a_core_is_compiled_as_the_configuration_says(monkeypatch):
    compiled = []
    names = tool["train_task"].__globals__
    monkeypatch.setitem(names, "compile_core", lambda _core, backend: compiled.append(backend))
    few = ["--size", "64x96", "--warmup", "0", "--iterations", "1"]
    options = ["MODEL.DN_DETR.COMPILE", "inductor", *SMALL]
    command = ["benchmark.py", "--task", "train", "--config-file", QUICK, *few, *options]
    monkeypatch.setattr(sys, "argv", command)
    tool["main"]()
    assert compiled == ["inductor"]


def test_warm_up_is_run_but_not_counted():
    calls = []
    seconds = tool["measure"](lambda: calls.append(1), warmup=2, iterations=3, is_cuda=False)
    assert len(calls) == 5 and len(seconds) == 3


def test_an_exported_file_must_be_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--task", "export"])
    with pytest.raises(SystemExit, match="--task export needs --exported, a file ending in"):
        tool["main"]()
