"""Weights & Biases, by a module that only remembers what it was given."""

import json
import sys
import types

import pytest


class FakeRun:
    def __init__(self, settings):
        self.settings = settings
        self.id = settings["id"] or "x1y2"
        self.metrics = []
        self.logged = []
        self.is_finished = False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
    """The runs that were begun."""
    runs = []

    def init(**settings):
        runs.append(FakeRun(settings))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


ON = ("WANDB.ENABLED", True)


def test_a_run_gets_what_metrics_json_gets(run, wandb, tmp_path):
    run(*ON, "WANDB.PROJECT", "cells", "WANDB.NAME", "first", "TEST.EVAL_PERIOD", 2)
    (begun,) = wandb
    assert begun.settings["project"] == "cells" and begun.settings["name"] == "first"
    assert begun.settings["dir"] == str(tmp_path / "run")
    assert begun.settings["config"]["SOLVER"]["MAX_ITER"] == 3
    assert ("*", "iteration") in begun.metrics and begun.is_finished
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    written = {line["iteration"]: line for line in map(json.loads, lines)}
    assert [values["iteration"] for values in begun.logged] == sorted(written)
    for values in begun.logged:
        assert str(values) and set(values) == set(written[values["iteration"]])
        assert values["iteration"] == 3 or values["total_loss"] > 0
    assert "bbox/AP50" in begun.logged[-1]


def test_a_resumed_training_continues_its_run(run, wandb):
    run(*ON, "SOLVER.MAX_ITER", 1)
    run(*ON, "SOLVER.MAX_ITER", 2, flags=["--resume"])
    assert [begun.settings["id"] for begun in wandb] == [None, "x1y2"]
    assert all(begun.settings["resume"] == "allow" for begun in wandb)
    assert wandb[1].settings["name"] == "run"  # that of the folder


def test_without_wandb_there_is_one_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes its import fail
    with pytest.raises(SystemExit) as caught:
        run(*ON)
    assert str(caught.value) == "train_net.py: WANDB.ENABLED needs wandb: pip install wandb."
