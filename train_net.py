#!/usr/bin/env python
"""Train and evaluate detectors, with Detectron2's command line and defaults.

    python train_net.py --config-file configs/dn_deformable.yaml --num-gpus 8
    python train_net.py --eval-only MODEL.WEIGHTS output/dn_deformable/model_final.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/dn_deformable.yaml

Trailing KEY VALUE pairs override the configuration. `dn-detr train` does the same, with defaults
that follow the machine and the data.
"""

from __future__ import annotations

import argparse
import sys

try:
    from dn_detr.d2.engine import launch
except ImportError as error:  # or the operators were built for another torch
    missing = {
        "dn_detr": "dn_detr is not installed: run `pip install -e .` in the folder of train_net.py",
        "torch": "torch is not installed: run `pip install torch torchvision`",
    }
    sys.exit(f"train_net.py: {missing.get(error.name, error)} (README.md, Install).")
except KeyboardInterrupt:  # there is nothing to save yet
    sys.exit(130)

from detectron2.engine import default_argument_parser


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with the options of this program."""
    parser = default_argument_parser()
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="discard the checkpoints of an earlier training in OUTPUT_DIR",
    )
    return parser


def invoke_main(arguments: list[str] | None = None) -> None:
    """Run with these command-line arguments, those of the process by default."""
    launch.invoke(launch.run, argument_parser().parse_args(arguments), "train_net.py")


if __name__ == "__main__":
    launch.leave_after(invoke_main) if launch.is_torchrun() else invoke_main()
