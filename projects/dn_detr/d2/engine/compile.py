"""torch.compile of the core, for training."""

from __future__ import annotations

import torch
from torch import nn

from dn_detr.errors import InputError


def compile_core(core: nn.Module, backend: str) -> None:
    """Let the training calls of `core` run compiled by this backend of torch.compile, in place.

    Evaluation, whose images have every size, stays as it is. Shapes that change become dynamic at the
    second of them, so that few graphs serve all; MODEL.DN_DETR.PAD_OBJECTS_TO keeps the numbers of
    objects few as well.
    """
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise InputError(
            "MODEL.DN_DETR.COMPILE must be '' or a backend of torch.compile, one of "
            f"{', '.join(torch._dynamo.list_backends())}, got {backend!r}."
        )
    plain = type(core).forward

    def forward(self, features, padding, targets=None, prompt=None):
        function = plain if targets is None else compiled
        return function(self, features, padding, targets, prompt)

    compiled = torch.compile(plain, backend=backend)
    core.__class__ = type(type(core).__name__, (type(core),), {"forward": forward})
