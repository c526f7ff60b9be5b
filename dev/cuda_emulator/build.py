"""Build a package whose operators on the CPU are the CUDA kernels, run by the emulator.

    python dev/cuda_emulator/build.py build/emulate
    PYTHONPATH=build/emulate/lib python -m pytest tests/ops

Writes FOLDER/lib/dn_detr, a copy of the package with its own _C.so. Objects are kept in
FOLDER/objects by the hash of what they are made of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from translate import translate  # noqa: E402

# -O1: compiling takes longer than running. No FMA, no warnings about CUDA's pragmas.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-w", "-fno-strict-aliasing", "-fvisibility=hidden"]
CHECKED = ["-fsanitize=thread"]


def torch_flags() -> tuple[list[str], list[str]]:
    """(flags to compile, flags to link) against torch."""
    from torch.utils import cpp_extension

    python = sysconfig.get_path("include")
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), python)]
    folders = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu"]
    return ["-DEMULATOR_WITH_TORCH", *includes], [*folders, *libraries]


def contents(source: Path) -> bytes:
    """Return the text of a source and of all headers of the project that it includes."""
    seen, queue = {}, [source]
    while queue:
        path = queue.pop()
        seen[path] = path.read_bytes()
        for name in re.findall(r'#include "([^"]+)"', seen[path].decode()):
            found = (path.parent / name).resolve()
            found = found if found.is_file() else HERE / name
            if found not in seen:
                queue.append(found)
    return b"".join(seen.values())


def compiled(source: Path, folder: Path, flags: list[str]) -> Path:
    """Return the object of a source."""
    names = [flag for flag in flags if not flag.startswith("-I")]
    key = hashlib.sha256(contents(source) + " ".join(names).encode()).hexdigest()
    target = folder / f"{source.stem}-{key[:16]}.o"
    if not target.is_file():
        part = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(part)], check=True)
        part.rename(target)
    return target


def link(sources: list[Path], objects: Path, library: Path, flags: list[str], links: list[str],
         jobs: int) -> None:  # fmt: skip
    """Compile translated sources, and emulator.cpp without checks, to a library."""
    objects.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, f"-I{HERE}", *flags]
    work = [(source, [*flags, *CHECKED]) for source in sources] + [(HERE / "emulator.cpp", flags)]
    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(lambda x: str(compiled(x[0], objects, x[1])), work))
    library.unlink(missing_ok=True)  # a process may have loaded it
    subprocess.run(["g++", "-shared", "-o", str(library), *made, *links], check=True)


def translated(csrc: Path, folder: Path) -> list[Path]:
    """Write csrc as C++ to `folder`; return the sources to compile."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "cuda").mkdir(parents=True)
    found = []
    for path in sorted([*csrc.glob("*.*"), *csrc.glob("cuda/*")]):
        name = path.relative_to(csrc)
        target = folder / name
        if path.suffix == ".cu":
            target = target.with_suffix(".cpp")
        target.write_text(translate(path.read_text(), f"csrc/{name}"))
        if target.suffix == ".cpp":
            found.append(target)
    return found


def build(folder: Path, csrc: Path, arch: int, jobs: int, objects: Path | None = None) -> Path:
    """Build the package from `csrc`; return the folder to import it from."""
    import torch

    flags, links = torch_flags()
    flags = ["-include", "emulator.h", f"-DEMULATED_CUDA_ARCH={arch}", *flags]
    package = folder / "lib" / "dn_detr"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("_C.*", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "projects" / "dn_detr", package, ignore=ignored)
    sources = translated(csrc, folder / "csrc")
    link(sources, objects or folder / "objects", package / "_C.so", flags, links, jobs)
    record = {"torch": torch.__version__, "cuda": torch.version.cuda, "emulated": True}
    (package / "_build.json").write_text(json.dumps(record) + "\n")
    return package.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--arch", type=int, default=900, help="__CUDA_ARCH__")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    print(build(options.folder, options.csrc, options.arch, options.jobs))


if __name__ == "__main__":
    main()
