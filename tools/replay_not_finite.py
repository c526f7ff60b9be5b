#!/usr/bin/env python
"""Replay an iteration with a non-finite loss and locate the cause.

    python tools/replay_not_finite.py output/not_finite_0001234_rank0.pth
    python tools/replay_not_finite.py output/not_finite_0001234_rank0.pth SOLVER.AMP.ENABLED False

Trailing KEY VALUE pairs override the configuration of the run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dn_detr.conversion.safe_load import read_pickle
from dn_detr.d2.config.defaults import add_dn_detr_config, merge
from dn_detr.d2.engine.nonfinite_dump import as_sample
from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.modeling.batch import batch_stats
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError


def watch(model: nn.Module) -> list[str]:
    """Return a list that is filled with the names of modules with non-finite outputs, in order."""
    broken: list[str] = []

    def look(name, output):
        values = output if isinstance(output, list | tuple) else [output]
        if any(isinstance(value, Tensor) and not value.isfinite().all() for value in values):
            broken.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
    return broken


def read(file: Path) -> dict:
    """Read the file saved by the training."""
    if not file.is_file():
        raise InputError(f"there is no file {file}.")
    try:
        kept = read_pickle(file)
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or "num_parts" not in kept:
        raise InputError(f"{file} is not a not_finite_*.pth file saved by a training.")
    return kept


def config_of(kept: dict, opts: list[str]) -> CfgNode:
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(kept["config"]))
    merge("the KEY VALUE pairs of the command line", cfg.merge_from_list, opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    try:
        kept = read(args.file)
        cfg = config_of(kept, args.opts)
    except InputError as error:
        sys.exit(f"replay_not_finite.py: {error}")
    model = build_model(cfg)
    model.load_state_dict(kept["model"])
    unhealthy = [name for name, value in kept["model"].items() if not value.isfinite().all()]
    samples = [as_sample(sample) for sample in kept["samples"]]
    step = TrainStep(
        model,
        [samples],
        build_optimizer(cfg, model),
        precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
        seed=kept["seed"],
        num_parts=kept["num_parts"],
    )
    model.seed = kept["seed"]
    step.iter = kept["iteration"]
    normalisers = {name: kept[name] for name in ("num_objects", "num_teacher_boxes")}
    stats = replace(batch_stats(samples, step.device), **normalisers)
    broken = watch(model)
    print(f"weights and statistics that are not finite: {unhealthy or 'none'}")
    torch.manual_seed(kept["device_seed"])
    with EventStorage(kept["iteration"]), torch.autograd.set_detect_anomaly(True):
        try:
            losses = {**step.backward(samples, stats), "grad_norm": step.gradient_norm()}
        except (FloatingPointError, RuntimeError) as error:  # the latter from anomaly detection
            print(str(error).splitlines()[0])
        else:
            print({name: float(value) for name, value in losses.items()})
    print(f"first module with an output that is not finite: {broken[0] if broken else 'none'}")


if __name__ == "__main__":
    main()
