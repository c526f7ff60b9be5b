#!/usr/bin/env python
"""Train the small version of every method with and without denoising; compare AP50.

    python tools/train_all_quick.py --iterations 800 --output output/all_quick
    python tools/train_all_quick.py --only dn_detr dino --num-gpus 1
    python tools/train_all_quick.py --backbone output/quick/dn_deformable/model_final.pth \
        MODEL.BACKBONE.FREEZE_AT 5 SOLVER.BASE_LR 0.0004

All runs use `shapes`, the same seed and the same number of iterations. With --backbone they start
from the backbone of that detector, instead of ImageNet's. Writes results.md, results.json and
curves.png. Complete runs are not repeated, and results of other methods in results.json are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from dn_detr.d2.evaluation.curves import read_metrics, series

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {
    "DETR": ("detr", "dn_detr_vanilla"),
    "Conditional DETR": ("conditional_detr", "dn_conditional_detr"),
    "DAB-DETR": ("dab_detr", "dn_detr"),
    "Anchor DETR": ("anchor_detr", "dn_anchor_detr"),
    "SMCA": ("smca", "dn_smca"),
    "Deformable DETR, refined": ("deformable_detr_refine", "dn_deformable_detr_refine"),
    "DAB-Deformable": ("dab_deformable", "dn_deformable"),
    "DAB-Deformable, encoder only": (
        "dab_deformable_encoder_only",
        "dn_deformable_encoder_only",
    ),
    "DINO": ("dino_no_dn", "dino"),
    "Faster R-CNN": ("faster_rcnn_fpn", "dn_faster_rcnn_fpn"),
    "Mask2Former": ("mask2former", "dn_mask2former"),
    "Mask DINO": ("mask_dino_no_dn", "mask_dino"),
}
"""Method -> configurations without and with denoising in configs/quick/. Those with masks compare
the AP50 of their masks."""

WITHOUT_DENOISING = {"dino_no_dn": ("dino", ["MODEL.DN_DETR.DENOISING.ENABLED", "False"])}
"""Variants without denoising that have no configuration: (configuration, overrides)."""


def save_backbone(checkpoint: Path, path: Path) -> Path:
    """Write only the backbone of `checkpoint` to `path`.

    Names have no "backbone." prefix, so that Detectron2 also matches them inside a feature pyramid.
    """
    model = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    name = "backbone."
    weights = {k.removeprefix(name): v for k, v in model.items() if k.startswith(name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights, "matching_heuristics": True}, path)
    return path


def train(
    name: str, output: Path, iterations: int, num_gpus: int, common: list[str]
) -> dict[int, dict]:
    """Return metrics.json of a run of configuration `name`; train it unless it exists.

    common: KEY VALUE pairs that all runs share.
    """
    folder = output / name
    if not (folder / "model_final.pth").is_file():
        config, overrides = WITHOUT_DENOISING.get(name, (name, []))
        command = [
            *(sys.executable, "train_net.py", "--num-gpus", str(num_gpus)),
            *("--config-file", f"configs/quick/{config}.yaml", *overrides),
            *(
                "SOLVER.MAX_ITER",
                str(iterations),
                "SOLVER.STEPS",
                f"({iterations * 5 // 6},)",
            ),
            *(
                "TEST.EVAL_PERIOD",
                str(iterations // 4),
                "SOLVER.CHECKPOINT_PERIOD",
                "1000000",
            ),
            *("OUTPUT_DIR", str(folder.resolve())),
            *common,
        ]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "console.txt", "w") as console:
            code = subprocess.call(command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT)
        if code:
            sys.exit(f"train_all_quick.py: training {name} failed, see {folder / 'console.txt'}")
    return read_metrics(folder)


Results = dict[str, dict[str, dict[int, float]]]
"""Method -> {"plain", "denoised"} -> iteration -> AP50."""


def read(path: Path) -> Results:
    """Read results.json; an empty dict if there is none."""
    if not path.is_file():
        return {}

    def points(run: dict[str, float]) -> dict[int, float]:
        return {int(iteration): ap for iteration, ap in run.items()}

    return {
        method: {label: points(run) for label, run in runs.items()}
        for method, runs in json.loads(path.read_text()).items()
    }


def write(results: Results, output: Path) -> None:
    (output / "results.json").write_text(json.dumps(results, indent=1))
    lines = [
        "| method | iterations | AP50 without | AP50 denoised | gain |",
        "|---|---|---|---|---|",
    ]
    for method, runs in results.items():
        last = max(runs["plain"])
        plain, denoised = runs["plain"][last], runs["denoised"][last]
        gain = f"{denoised - plain:+.1f}"
        lines.append(f"| {method} | {last} | {plain:.1f} | {denoised:.1f} | {gain} |")
    (output / "results.md").write_text("\n".join(lines) + "\n")
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4 * columns, 3 * rows),
        squeeze=False,
        constrained_layout=True,
    )
    for axis, (method, runs) in zip(axes.flat, results.items(), strict=False):
        for style, (label, points) in zip(("o--", "o-"), runs.items(), strict=True):
            axis.plot(list(points), list(points.values()), style, label=label)
        axis.set(title=method, xlabel="iteration", ylabel="AP50", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    figure.savefig(output / "curves.png", dpi=110)
    print((output / "results.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=800)
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="parallel trainings")
    parser.add_argument("--output", type=Path, default=Path("output/all_quick"))
    parser.add_argument(
        "--backbone", type=Path, help="checkpoint of a quick detector to start from"
    )
    parser.add_argument("--only", nargs="+", help="train only the methods of these configurations")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides for all of them")
    args = parser.parse_args()
    known = {name for pair in PAIRS.values() for name in pair}
    if unknown := set(args.only or ()) - known:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}, only {sorted(known)}")
    methods = {
        method: pair
        for method, pair in PAIRS.items()
        if not args.only or set(args.only) & set(pair)
    }

    common = args.opts
    if args.backbone:
        weights = save_backbone(args.backbone, args.output / "backbone.pth")
        common = ["MODEL.WEIGHTS", str(weights.resolve()), *common]

    def ap50(name: str) -> dict[int, float]:
        metrics = train(name, args.output, args.iterations, args.num_gpus, common)
        has_masks = any("segm/AP50" in line for line in metrics.values())
        x, y = series(metrics, "segm/AP50" if has_masks else "bbox/AP50")
        points = {min(i + 1, args.iterations): ap for i, ap in zip(x, y, strict=True)}
        print(f"{name}: {points}", flush=True)
        return points

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: pool.submit(ap50, name) for pair in methods.values() for name in pair}
        results = {
            method: {"plain": runs[plain].result(), "denoised": runs[denoised].result()}
            for method, (plain, denoised) in methods.items()
        }
    results = {**read(args.output / "results.json"), **results}
    write({method: results[method] for method in PAIRS if method in results}, args.output)


if __name__ == "__main__":
    main()
