"""The benchmark measures what it says, and what it counts."""

import json
from pathlib import Path

import pytest

from dn_detr.cli.main import main
from dn_detr.d2.engine import benchmark

ROOT = Path(__file__).resolve().parents[2]
QUICK = str(ROOT / "configs" / "quick" / "dn_detr.yaml")

SMALL = """
    MODEL.RESNETS.STEM_OUT_CHANNELS 8  MODEL.RESNETS.RES2_OUT_CHANNELS 8
    MODEL.DN_DETR.CHANNELS 16  MODEL.DN_DETR.NUM_HEADS 2  MODEL.DN_DETR.NUM_QUERIES 9
    MODEL.DN_DETR.FEED_FORWARD_DIM 16  MODEL.DN_DETR.ENCODER_LAYERS 1
""".split()


@pytest.mark.parametrize("task", ["train", "eval"])
def test_a_task_is_measured_and_written(task, tmp_path, capsys):
    path = tmp_path / "times.json"
    arguments = ["benchmark", QUICK, "--task", task, "--batch", "2", "--size", "64x96"]
    few = ["--warmup", "1", "--iterations", "3", "--output", str(path)]
    main([*arguments, *few, *SMALL])
    result = json.loads(path.read_text())
    assert (result["task"], result["batch"], result["size"]) == (task, 2, "64x96")
    assert result["iterations"] == 3
    assert result["images_per_second"] == pytest.approx(2000 / result["median_ms"])
    assert 0 < result["fastest_ms"] <= result["median_ms"] <= result["slowest_tenth_ms"]
    assert f"median_ms: {result['median_ms']:.2f}" in capsys.readouterr().out


def test_a_core_is_compiled_as_the_configuration_says(monkeypatch):
    compiled = []
    monkeypatch.setattr(benchmark, "compile_core", lambda _core, backend: compiled.append(backend))
    few = ["--size", "64x96", "--warmup", "0", "--iterations", "1"]
    options = ["MODEL.DN_DETR.COMPILE", "inductor", *SMALL]
    main(["benchmark", QUICK, "--task", "train", *few, *options])
    assert compiled == ["inductor"]


def test_warm_up_is_run_but_not_counted():
    calls = []
    seconds = benchmark.measure(lambda: calls.append(1), warmup=2, iterations=3, is_cuda=False)
    assert len(calls) == 5 and len(seconds) == 3


def test_an_exported_file_must_be_named():
    with pytest.raises(SystemExit, match="--task export needs --exported, a file ending in"):
        main(["benchmark", "--task", "export"])
