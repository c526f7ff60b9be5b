#!/usr/bin/env python
"""Train a small DN-Deformable-DETR on synthetic images; draw its detections and curves.

Without Detectron2 the same model trains in an ordinary PyTorch loop: examples/plain_pytorch.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("output/demo")
CONFIG = "configs/quick/dn_deformable.yaml"


def run(*command: str) -> None:
    print("\n$ python " + " ".join(command), flush=True)
    code = subprocess.call([sys.executable, *command], cwd=ROOT)
    if code:
        sys.exit(code)


def main() -> None:
    os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))
    if importlib.util.find_spec("detectron2") is None:
        print("Detectron2 is not installed: training in a plain PyTorch loop instead.")
        run("examples/plain_pytorch.py", "--output", str(OUTPUT / "detections.png"))
        return
    run("train_net.py", "--config-file", CONFIG, "--overwrite", "OUTPUT_DIR", str(OUTPUT))
    run(
        *("-m", "dn_detr", "visualize", "detections"),
        *("--weights", str(OUTPUT / "model_final.pth")),
        *("--output", str(OUTPUT / "detections.png")),
    )
    run("-m", "dn_detr", "plot", str(OUTPUT), "--output", str(OUTPUT / "curves.png"))


if __name__ == "__main__":
    main()
