#!/usr/bin/env python
"""Write the manifest of `dn_detr.install_detectron2`: the files of the wheel that are Detectron2's.

    git clone https://github.com/facebookresearch/detectron2.git
    python dev/make_detectron2_manifest.py detectron2 sal_detectron2-0.7.2-cp310-none-any.whl

A file is Detectron2's if its git blob occurs anywhere in the history of the clone.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from dn_detr.install_detectron2 import (
    LICENCE,
    MANIFEST,
    WHEELS_LICENCE,
    as_detectron2s,
    git_blob,
)


def blobs_of(clone: str) -> set[str]:
    """Return all git objects of the history."""
    command = ["git", "-C", clone, "rev-list", "--all", "--objects"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split(" ", 1)[0] for line in done.stdout.splitlines()}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    clone, wheel = sys.argv[1:]
    blobs, lines, others = blobs_of(clone), [], []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            is_source = Path(name).suffix in (".py", ".yaml") and name.startswith("detectron2/")
            blob = git_blob(as_detectron2s(name, archive.read(name)))
            if (is_source or name == WHEELS_LICENCE) and blob in blobs:
                lines.append(f"{blob} {LICENCE if name == WHEELS_LICENCE else name}\n")
            else:
                others.append(name)
    MANIFEST.write_text("".join(lines))
    print(f"{len(lines)} files are Detectron2's own; not taken: {', '.join(others)}")


if __name__ == "__main__":
    main()
