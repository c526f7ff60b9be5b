"""dn_detr: denoising training for DETR-like detectors (2203.01305), on Detectron2.

The core (everything but `dn_detr.d2`) is plain PyTorch; importing it never imports Detectron2, only
using `dn_detr.Detector` does.
`python -m dn_detr.info` says what is installed and which compiled operators exist.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Detector`, imported when it is first used, because it needs Detectron2."""
    if name == "Detector":
        import_module("dn_detr.d2")  # first: it says how to install Detectron2
        return import_module("dn_detr.detector").Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
