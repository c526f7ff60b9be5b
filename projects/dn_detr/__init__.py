"""dn_detr: denoising training for DETR-like detectors (2203.01305), on Detectron2.

The core (everything but `dn_detr.d2`) is plain PyTorch; importing it never imports Detectron2, only
using the names in `__all__` does. The command is `dn-detr`, also as `python -m dn_detr`;
`dn-detr info` says what is installed and which compiled operators exist.

`__all__` is the stable interface: `Detector` finds objects in images and gives `DetectedObjects`;
`train` trains a `Detector`; `BoxPrompts` are objects that it is told; `InputError` says in one
sentence what is wrong with a file or a setting.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["BoxPrompts", "DetectedObjects", "Detector", "InputError", "train"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used, because it needs Detectron2."""
    if name == "InputError":
        return import_module("dn_detr.errors").InputError
    if name in __all__:
        import_module("dn_detr.d2")  # first: it says how to install Detectron2
        return getattr(import_module("dn_detr.detector"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
