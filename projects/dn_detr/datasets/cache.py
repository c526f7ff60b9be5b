"""The folder for what can be made or fetched again and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return DN_DETR_CACHE, else dn_detr in the user's cache; it need not exist."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DN_DETR_CACHE") or f"{user}/dn_detr").expanduser()
