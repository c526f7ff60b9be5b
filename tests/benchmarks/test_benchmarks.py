"""Every benchmark runs, at tiny sizes, and what it writes can be read and rendered."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
CONFIG = "configs/quick/dn_deformable.yaml"
OPTIONS = {
    "ms_deform_attn": ("--dtype", "float32", "bfloat16", "--measure", "time"),
    "denoising_queries": (),
    "matcher": (),
    "train_step": ("--config-file", CONFIG, "--size", "64", "96", "--batch", "1", "--no-memory"),
    "auxiliary_queries": ("--host", "Mask2Former"),
}
OWN = {"train_step": "denoised", "auxiliary_queries": "denoised"}


def run(script, *arguments):
    """A script of benchmarks/ as a user starts it, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "projects")}
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "machine.json"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_benchmark_measures_us_and_others_and_saves_it(name, results):
    if name in ("train_step", "auxiliary_queries") and not HAS_DETECTRON2:
        pytest.skip("needs Detectron2")
    script = name
    run(script, "--quick", "--save", str(results), *OPTIONS[name])
    section = json.loads(results.read_text())[name]
    assert section["machine"]["torch"] == torch.__version__
    assert f"benchmarks/{script}.py --quick" in section["commands"][0]
    times = [(row["who"], row["ms"]) for row in section["rows"] if "ms" in row]
    assert all(ms > 0 for _, ms in times)
    assert OWN.get(name, "dn_detr") in {who for who, _ in times}
    assert len({who for who, _ in times}) > 1
    notes = [row["note"] for row in section["rows"] if "note" in row]
    assert not [note for note in notes if note.startswith(("wrong", "fails"))]


def test_the_tables_are_rendered_from_what_was_saved(results):
    if not results.is_file():
        pytest.skip("the benchmarks did not run")
    run("render", "--folder", str(results.parent))
    text = (results.parent / "README.md").read_text()
    rows = json.loads(results.read_text())["matcher"]["rows"]
    assert "### Matching" in text and "published style" in text
    assert f"{rows[0]['ms']:.3g}" in text


@pytest.mark.usefixtures("benchmarks")
def test_a_comparison_can_be_run_in_parts(tmp_path):
    from common import save

    args = argparse.Namespace(device="cpu", save=str(tmp_path / "machine.json"))
    for rows in ([("a", 1), ("b", 2)], [("b", 3), ("c", 4)]):
        rows = [{"case": case, "who": "dn_detr", "ms": ms} for case, ms in rows]
        save(args, "part", rows, ("case",), against="dn_detr")
    section = json.loads((tmp_path / "machine.json").read_text())["part"]
    assert {row["case"]: row["ms"] for row in section["rows"]} == {"a": 1, "b": 3, "c": 4}


@pytest.mark.usefixtures("benchmarks")
def test_candidates_are_timed_in_turn():
    from common import time_side_by_side

    order = []
    timings = time_side_by_side(
        {name: lambda name=name: lambda: order.append(name) for name in "ab"}, "cpu", seconds=0.0
    )
    assert "".join(order).replace("a" * 20, "A").replace("b" * 20, "B") == "ab" + 3 * "AB"
    assert timings["a"].rounds == 60 and timings["a"].low_ms <= timings["a"].ms


def wrong_output(value, shapes, locations, weights):
    from dn_detr.ops import ms_deform_attn

    return ms_deform_attn(value, shapes, locations, weights) * 1.01


@pytest.mark.usefixtures("benchmarks")
def test_wrong_results_are_not_timed():
    from ms_deform_attn import Case, measure

    case = Case(30, 1, "float32", "uniform", (64, 96))
    rows = [
        row for row in measure(case, "cpu", {"peer": wrong_output}, 0.0, 1.0)
        if row["who"] == "peer"
    ]  # fmt: skip
    assert rows and all("ms" not in row and row["note"].startswith("wrong: output") for row in rows)


@pytest.mark.usefixtures("benchmarks")
def test_a_peer_that_sums_in_bfloat16_is_timed_beside_its_error():
    """deformops was left out as wrong in its fastest mode, which is the one to compare with."""
    from ms_deform_attn import Case, measure

    case = Case(30, 1, "bfloat16", "uniform", (64, 96))
    peers = {"deformops": lambda *inputs: wrong_output(*inputs) * 1.05}
    rows = [row for row in measure(case, "cpu", peers, 0.0, 1.0) if row["who"] == "deformops"]
    assert rows and all(row["ms"] > 0 and 0.05 < row["error"] < 0.1 for row in rows)


@pytest.mark.usefixtures("benchmarks")
def test_cases_are_saved_one_by_one(tmp_path, monkeypatch, capsys):
    """Time ran out on a GPU, and nothing had been saved."""
    import ms_deform_attn as script

    done = []

    def measure(case, *_):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return [{**case.row(), "measure": "forward", "who": "dn_detr", "note": "done"}]

    monkeypatch.setattr(script, "measure", measure)
    path = tmp_path / "x.json"
    arguments = ["--quick", "--dtype", "bfloat16", "float32", "--save", str(path)]
    monkeypatch.setattr(sys, "argv", ["ms_deform_attn.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    (row,) = json.loads(path.read_text())["ms_deform_attn"]["rows"]
    assert row["dtype"] == "bfloat16" and "done" in capsys.readouterr().out


def allocate(mebibytes):
    def run():
        kept = torch.ones(mebibytes, 2**18)
        return (kept + kept).sum()

    return run


@pytest.mark.usefixtures("benchmarks")
def test_peak_memory_is_what_the_call_touches():
    import peak_memory

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell")
    mib = peak_memory._on_cpu(allocate, (1,), (64,), torch.get_num_threads())
    assert 127 <= mib < 140


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("benchmarks")
def test_denoising_queries_are_one_launch_and_never_wait_for_the_device():
    import denoising_queries as script
    from common import count_launches

    from dn_detr.ops import noise_objects
    from dn_detr.structures import pad_targets

    for case in script.CASES:
        targets = pad_targets(script.make_targets(case)).to("cuda")

        def build(case=case, targets=targets):
            return script.build(noise_objects, targets, case, torch.bfloat16)

        torch.cuda.set_sync_debug_mode("error")
        try:
            build()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert count_launches(build) == {"kernels": 1, "copies": 0, "waits": 0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("benchmarks")
def test_modules_of_peers_do_not_wait_for_the_device():
    """Their launches are queued before the clock starts; a wait would count against them."""
    from attention_inputs import Case, make_inputs
    from ms_deform_attn import as_module, whole

    from dn_detr.ops import ms_deform_attn

    x = make_inputs(Case(30, 1, "float32", "realistic", (64, 96)), "cuda")
    module = as_module(ms_deform_attn)
    whole(module, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole(module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
