"""dn_detr: denoising training for DETR-like detectors (2203.01305), on Detectron2.

The core (everything but `dn_detr.d2`) is plain PyTorch; importing it never imports Detectron2.
`python -m dn_detr.info` says what is installed and which compiled operators exist.
"""

__version__ = "0.1.0"
