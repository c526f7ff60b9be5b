"""Build the operators `dn_detr._C` against the installed torch; the rest is in pyproject.toml.

Environment variables:
  DN_DETR_NO_EXTENSION=1  build no operators: everything runs as plain PyTorch, as without torch
  FORCE_CUDA=1            fail where the CUDA operators cannot be built; FORCE_CUDA=0: do not try
  CUDA_HOME               toolkit to build with; else the nvcc on the PATH, else NVIDIA's wheels
  TORCH_CUDA_ARCH_LIST    "9.0", "8.0;9.0+PTX"; else the GPUs that are present, else a short list
  MAX_JOBS                how many files are compiled at a time
  DN_DETR_CXXFLAGS        options of the C++ compiler, instead of -O3 -g0
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SKIP_EXTENSION = os.environ.get("DN_DETR_NO_EXTENSION") == "1"
FORCE_CUDA = os.environ.get("FORCE_CUDA")
ARCHITECTURES = ("8.0", "9.0")  # A100, RTX 30 and 40; H100
NEW_ARCHITECTURES = ("10.0", "12.0")  # Blackwell, from CUDA 12.8 on

SWITCHED_OFF = "dn_detr._C was not built because DN_DETR_NO_EXTENSION=1"
NO_TORCH = "dn_detr._C was not built because torch was not installed before dn_detr"


def import_torch():
    """torch, or None. An isolated build hides what is installed: look there, behind its own."""
    try:
        import torch
    except ImportError:
        installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        sys.path.extend(sorted(installed - set(sys.path)))
        try:
            import torch
        except ImportError:
            return None
    return torch


# ----------------------------------------------------------------------------------------- CUDA


def toolkit_of(nvcc):
    """Root of the toolkit of an nvcc, which may be a link or a script that calls another one."""
    output = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", output.stderr, re.MULTILINE)
    return Path(top.group(1).strip() if top else Path(nvcc).resolve().parents[1]).resolve()


def nvcc_version(root):
    """Release of the nvcc in a toolkit, "13.0", or None."""
    command = [root / "bin" / "nvcc", "--version"]
    try:
        output = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    release = re.search(r"release (\d+\.\d+)", output.stdout)
    return release and release.group(1)


def find_toolkit(torch):
    """(root, version, None) of a toolkit of torch's CUDA major, or (None, None, why not)."""
    if FORCE_CUDA == "0":
        return None, None, "built without CUDA because FORCE_CUDA=0"
    if torch.version.cuda is None:
        return None, None, f"built without CUDA because torch {torch.__version__} has no CUDA"
    major = torch.version.cuda.split(".")[0]
    on_path = shutil.which("nvcc")
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    named = [name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [(name, Path(os.environ[name])) for name in named]
    if on_path:
        places.append(("nvcc on the PATH", toolkit_of(on_path)))
    places += [("wheels", wheels / f"cu{major}"), ("wheels", wheels / "cuda_nvcc")]
    places.append(("default", Path("/usr/local/cuda")))
    searched = []
    for name, root in places:
        version = nvcc_version(root)
        if version and version.split(".")[0] == major:
            return root, version, None
        searched.append(f"{root} ({name}: {f'nvcc {version}' if version else 'no nvcc'})")
    return (
        None,
        None,
        (
            f"built without CUDA because no nvcc of CUDA {major}, which torch {torch.__version__} "
            f"needs, was found in " + ", ".join(searched)
        ),
    )


def wheel_folders(torch, kind):
    """Folders "include" or "lib" of NVIDIA's wheels: what a small toolkit lacks, torch has."""
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    return [str(path) for path in sorted(wheels.glob(f"*/{kind}"))]


def find_runtime(torch, root):
    """Path of libcudart: the toolkit's, else that of torch's wheels (which has no plain name)."""
    folders = [root / "lib64", root / "lib", *map(Path, wheel_folders(torch, "lib"))]
    found = (path for folder in folders for path in sorted(folder.glob("libcudart.so*")))
    return next(found, None)


def architectures(torch, root, version):
    """Return TORCH_CUDA_ARCH_LIST, else the architectures of the GPUs that are present.

    Without GPUs: those of a short list that the nvcc knows, with PTX for newer GPUs.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if present:
        return ";".join(f"{major}.{minor}" for major, minor in sorted(present))
    is_new = tuple(map(int, version.split("."))) >= (12, 8)
    command = [root / "bin" / "nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True).stdout
    wanted = [
        name
        for name in ARCHITECTURES + NEW_ARCHITECTURES * is_new
        if not known or f"compute_{name.replace('.', '')}\n" in known + "\n"
    ]
    return ";".join(wanted) + "+PTX"


# ------------------------------------------------------------------------------------ extension


def sources(folder, pattern):
    """Relative to setup.py: absolute paths break installs."""
    paths = (ROOT / "csrc" / folder).glob(pattern)
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def extension(torch, root):
    """The extension, with CUDA if there is the root of a toolkit."""
    from torch.utils import cpp_extension

    # The name of torch makes the build tool compile anew for another one.
    torch_name = f"-DDN_DETR_TORCH={torch.__version__}"
    flags = os.environ.get("DN_DETR_CXXFLAGS", "-O3 -g0" if os.name != "nt" else "/O2")
    cxx = [torch_name, *flags.split()]
    if sys.platform == "linux":
        # Only compiled with OpenMP, not linked: its functions come from the library that torch
        # has loaded, a second one would have threads of its own.
        cxx += ["-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    options = {
        "sources": sources(".", "*.cpp") + sources("cpu", "*.cpp"),
        "include_dirs": cpp_extension.include_paths(),
        "library_dirs": cpp_extension.library_paths(),
        "libraries": ["c10", "torch", "torch_cpu"],
        "extra_compile_args": {"cxx": cxx},
        "extra_link_args": [],
        "language": "c++",
        "py_limited_api": True,
    }
    if root is not None:
        runtime = find_runtime(torch, root)
        options["sources"] += sources("cuda", "*.cu")
        options["include_dirs"] += [str(root / "include"), *wheel_folders(torch, "include")]
        options["libraries"] += ["c10_cuda", "torch_cuda"]
        # --threads: several architectures at a time.
        options["extra_compile_args"]["nvcc"] = [torch_name, "-O3", "-lineinfo", "--threads=4"]
        options["extra_link_args"] += [str(runtime)] if runtime else ["-lcudart"]
    return Extension("dn_detr._C", **options)


def build_command(record):
    """Return torch's build_ext, extended to write the record of the build beside the library."""
    from torch.utils import cpp_extension

    if record["toolkit"]:
        cpp_extension.CUDA_HOME = record["toolkit"]  # torch would take a script's parent for it

    class Build(cpp_extension.BuildExtension):
        def run(self):
            super().run()
            record["compiler"] = " ".join(map(str, self._check_abi()))
            folder = Path(self.get_ext_fullpath("dn_detr._C")).parent
            (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    return Build


class BuildPackage(build_py):
    """Copy the configurations into the wheel, as dn_detr/configs."""

    def run(self):
        super().run()
        if not self.editable_mode:
            copied = Path(self.build_lib, "dn_detr", "configs")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(ROOT / "configs", copied)


def build_without_extension(reason):
    """Return a build_py that records why there is no library.

    It also removes the library of an earlier editable install.
    """

    class Build(BuildPackage):
        def run(self):
            super().run()
            folder = ROOT / "projects" if self.editable_mode else Path(self.build_lib)
            for library in (folder / "dn_detr").glob("_C.*"):
                library.unlink()
            record = json.dumps({"no_extension": reason})
            (folder / "dn_detr" / "_build.json").write_text(record + "\n")

    return Build


def extension_arguments():
    """Return the arguments of setup() for the extension."""
    torch = None if SKIP_EXTENSION else import_torch()
    if torch is None and not SKIP_EXTENSION and FORCE_CUDA == "1":
        sys.exit("FORCE_CUDA=1, but there is no torch to build against: `pip install torch` first")
    if torch is None:
        reason = SWITCHED_OFF if SKIP_EXTENSION else NO_TORCH
        return {"cmdclass": {"build_py": build_without_extension(reason)}}
    root, version, reason = find_toolkit(torch)
    if root is None and FORCE_CUDA == "1":
        sys.exit(f"FORCE_CUDA=1, but dn_detr would be {reason}")
    if root is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(torch, root, version)
    record = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "toolkit": root and str(root),
        "nvcc": version,
        "architectures": root and os.environ["TORCH_CUDA_ARCH_LIST"],
        "no_cuda": reason,
    }
    return {
        "ext_modules": [extension(torch, root)],
        "cmdclass": {"build_ext": build_command(record), "build_py": BuildPackage},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension_arguments())
