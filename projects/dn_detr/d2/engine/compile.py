"""torch.compile of the core, for training."""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn

from dn_detr.errors import InputError


def compile_core(core: nn.Module, backend: str) -> None:
    """Compile the training calls of `core`, in place.

    Evaluation, with images of many sizes, runs uncompiled. A shape becomes dynamic when it first
    changes, so few graphs are needed; MODEL.DN_DETR.PAD_OBJECTS_TO limits the numbers of objects.

    Args:
        core: Model that is called with (features, padding, targets, prompt).
        backend: Backend of torch.compile.

    Raises:
        InputError: If the backend is unknown.
    """
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise InputError(
            "MODEL.DN_DETR.COMPILE must be '' or a backend of torch.compile, one of "
            f"{', '.join(torch._dynamo.list_backends())}, got {backend!r}."
        )
    eager = type(core).forward
    compiled = torch.compile(eager, backend=backend)

    def forward(self, features, padding, targets=None, prompt=None):
        function = eager if targets is None else compiled
        return function(self, features, padding, targets, prompt)

    core.forward = MethodType(forward, core)
    core.is_compiled = True
