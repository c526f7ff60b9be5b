"""`python -m dn_detr.install_detectron2`: install the tested Detectron2, which is not on PyPI.

It is installed from GitHub at the tested commit. If GitHub is unreachable, the Python files of
Detectron2 are taken from a third-party wheel on PyPI, each verified against the Detectron2 history,
without compiled operators, which dn_detr does not need. Environment variables:

    DETECTRON2=PATH_OR_URL  install this instead: any requirement that pip accepts
    DETECTRON2=github       install from GitHub only, or fail
    PIP_INDEX_URL, ...      as usual for pip

`--files FOLDER` installs nothing and writes the verified files of the wheel to that folder.
Detectron2 is licensed under the Apache License 2.0 from either source.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib import metadata
from pathlib import Path, PurePosixPath

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # pinned only here
GITHUB = f"detectron2 @ git+{REPOSITORY}@{COMMIT}"

WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
WHEEL_TAGS = ("--python-version=3.10", "--implementation=cp", "--abi=none", "--platform=any")
MANIFEST = Path(__file__).with_name("detectron2_manifest.txt")
"""Git blob and path of each file to take; written by `dev/make_detectron2_manifest.py`."""
VERSION_FILE = "detectron2/__init__.py"
VERSIONS = (b'__version__ = "0.7.2"', b'__version__ = "0.6"')
"""Version lines in VERSION_FILE: of the wheel and of Detectron2."""
LICENCE, WHEELS_LICENCE = "detectron2/LICENSE", "sal_detectron2-0.7.2.dist-info/LICENSE"
LOCAL_VERSION = "0.6+python.files.of.sal.detectron2.0.7.2"

BUILD = ("setuptools>=70,<82", "wheel", "ninja")
"""Build requirements; the model zoo imports pkg_resources, which setuptools 82 removed."""
UNDECLARED = ("opencv-python-headless",)
"""The visualizer imports OpenCV without declaring it."""
REQUIREMENTS = (
    *("Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8"),
    *("tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6"),
    *("iopath>=0.1.7,<0.1.10", "omegaconf>=2.1,<2.4", "hydra-core>=1.1", "packaging"),
)
"""Requirements of Detectron2 at the tested commit, except the formatter black."""

PROBE_SECONDS = 30


class Failed(Exception):
    """The installation failed; the message explains why."""


def describe() -> str:
    """Describe the installed Detectron2 without importing it."""
    try:
        found = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return "not installed"
    if found.version == LOCAL_VERSION:
        return f"0.6, the Python files in {WHEEL} on PyPI, without compiled operators"
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    if commit:
        tested = ", the tested one" if commit == COMMIT else f", tested is {COMMIT[:8]}"
        return f"{found.version}, commit {commit[:8]} of {origin['url']}{tested}"
    return f"{found.version} from {origin.get('url', 'an index')}"


def has_metadata() -> bool:
    """Whether pip has a record of Detectron2; its files may be gone."""
    try:
        metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return False
    return True


def is_installed() -> bool:
    """Whether the package and pip's record of it are there, or the package is on PYTHONPATH.

    Files without a record are those of an interrupted installation, or of the current directory.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # a folder without __init__.py has no origin
        return False
    folders = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    package = Path(spec.origin).resolve().parent
    return has_metadata() or package.parent in {Path(folder).resolve() for folder in folders}


def is_settled(source: str) -> bool:
    """Whether to keep the installed Detectron2.

    Keeps the tested commit, and a version of the user unless DETECTRON2=github. Replaces files from
    PyPI and earlier tested commits.
    """
    if not is_installed():
        return False
    try:
        found = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:  # a folder on PYTHONPATH
        return source != "github"
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("vcs_info", {}).get("commit_id") == COMMIT:
        return True
    is_from_here = found.version == LOCAL_VERSION or origin.get("url") == REPOSITORY
    return source != "github" and not is_from_here


def main() -> None:
    """Install according to the environment; exits with a message on failure."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    source = os.environ.get("DETECTRON2", "")
    try:
        if sys.argv[1:]:
            write_files(sys.argv[1:])
            return
        for package in ("torch", "torchvision"):
            if importlib.util.find_spec(package) is None:
                raise Failed(f"{package} is missing: run `pip install torch torchvision` first")
        if source not in ("", "github"):
            install(source, f"from DETECTRON2={source}")
        elif is_settled(source):
            complete()
            print(f"Detectron2 is already installed: {describe()}")
        else:
            install_from_github_or_pypi(may_fall_back=not source)
    except Failed as failure:
        sys.exit(f"install_detectron2: {failure}.")


def write_files(arguments: list[str]) -> None:
    """`--files FOLDER`: write the verified files of the wheel, for use on PYTHONPATH."""
    if len(arguments) != 2 or arguments[0] != "--files":
        raise Failed(f"the only option is --files FOLDER, got {' '.join(arguments)}")
    if os.environ.get("DETECTRON2") == "github":
        raise Failed(f"--files takes files of {WHEEL}, and DETECTRON2=github forbids them")
    package = Path(arguments[1], "detectron2")
    if os.path.lexists(package):  # old files would stay among the new ones
        raise Failed(f"{package} exists already: remove it, or name another folder")
    with tempfile.TemporaryDirectory() as folder:
        files = checked_files(download_wheel(Path(folder)))
    try:
        for name, data in files.items():
            path = Path(arguments[1], name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except OSError as error:
        raise Failed(f"the files cannot be written: {error}") from error


def install_from_github_or_pypi(*, may_fall_back: bool) -> None:
    """Install from GitHub, or else from the wheel; raise `Failed` if neither works."""
    try:
        check_github()
        install(GITHUB, "from GitHub, at the tested commit")
        return
    except Failed as failure:
        if not may_fall_back:
            raise Failed(f"{failure}; DETECTRON2=github allows no other source") from failure
        reason = failure
    if is_installed():
        complete()
        print_banner(f"{reason}. The installed Detectron2 is kept: {describe()}.")
        return
    print_banner(
        f"{reason}. Instead, the Python files of Detectron2 are taken from the wheel {WHEEL} on "
        "PyPI, each verified against the Detectron2 history. No other file of the wheel is used, "
        "and none of its code is run. DETECTRON2=github disables this."
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = build_wheel(download_wheel(Path(folder)), Path(folder))
            install(str(wheel), f"Python files of {WHEEL}, without compiled operators")
    except Failed as failure:
        raise Failed(
            f"{reason}, and {failure}: copy Detectron2 at commit {COMMIT[:8]} to this machine and "
            "set DETECTRON2 to its folder"
        ) from failure


def check_github() -> None:
    """Raise `Failed` unless git reaches the repository in one of two attempts."""
    reason = ""
    for _ in range(2):
        try:
            subprocess.run(
                ["git", "ls-remote", REPOSITORY, "HEAD"],
                env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                check=True,
            )
            return
        except FileNotFoundError:
            raise Failed("git, which is needed to fetch Detectron2, is not installed") from None
        except subprocess.TimeoutExpired:
            reason = f"no response within {PROBE_SECONDS} s"
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split()) or f"git exited with {error.returncode}"
    raise Failed(f"GitHub cannot be reached ({reason})")


def install(requirement: str, source: str) -> None:
    """Install Detectron2 against the installed torch, and its undeclared requirements."""
    pip("install", "--quiet", *BUILD, failure=f"pip could not install {', '.join(BUILD)}")
    command = ("install", "--quiet", "--no-build-isolation", requirement)
    failure = f"pip could not install Detectron2 {source} (see its messages above)"
    if has_metadata():  # pip would keep an equal version, even if its files are gone
        pip(*command, "--no-deps", "--force-reinstall", failure=failure)
    pip(*command, *UNDECLARED, BUILD[0], failure=failure)
    print_banner(f"Detectron2 is installed {source}: {describe()}.")


def complete() -> None:
    """Install missing requirements of an installed Detectron2."""
    pip(
        *("install", "--quiet", *REQUIREMENTS, *UNDECLARED, BUILD[0]),
        failure="pip could not install the requirements of Detectron2 (see its messages above)",
    )


def pip(*arguments: str, failure: str) -> None:
    """Run pip; raise `Failed` with the message `failure` if it fails."""
    # FORCE_CUDA is meant for dn_detr: the CUDA operators of Detectron2 are not needed.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    print("$ pip " + shlex.join(arguments), flush=True)
    if subprocess.call(command, env={**os.environ, "FORCE_CUDA": "0"}):
        raise Failed(failure)


def print_banner(message: str) -> None:
    """Print a message between two rules."""
    line = "=" * 100
    print(f"{line}\n{message}\n{line}", flush=True)


# ----------------------------------------------------------------------- the files of the wheel


def download_wheel(folder: Path) -> Path:
    """Download the wheel without running code from it, and verify its sha256."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    pip(
        *("download", "--no-deps", "--only-binary=:all:", *WHEEL_TAGS, "--require-hashes"),
        *("--dest", str(folder), "--requirement", str(requirement)),
        failure=f"{WHEEL} cannot be downloaded either (see the messages of pip above)",
    )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise Failed(f"{WHEEL} has the sha256 {found} instead of {WHEEL_SHA256}")
    return wheel


def git_blob(data: bytes) -> str:
    """Compute the git blob hash of file content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def as_detectron2s(name: str, data: bytes) -> bytes:
    """Restore the version line of Detectron2 in a file of the wheel."""
    return data.replace(*VERSIONS) if name == VERSION_FILE else data


def read_manifest() -> dict[str, str]:
    """Map paths in the wheel to git blobs in the Detectron2 history."""
    lines = (line.split(" ", 1) for line in MANIFEST.read_text().splitlines())
    return {path: blob for blob, path in lines}


def checked_files(wheel: Path) -> dict[str, bytes]:
    """Read the files listed in the manifest, path -> content.

    Raises:
        Failed: if a file is missing or differs from that of Detectron2.
    """
    try:
        return _read_checked(wheel)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise Failed(f"{wheel.name} is damaged: {error}") from error


def _read_checked(wheel: Path) -> dict[str, bytes]:
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, blob in read_manifest().items():
            path = PurePosixPath(name)
            is_source = path.parts[0] == "detectron2" and path.suffix in (".py", ".yaml")
            if not (is_source or name == LICENCE) or ".." in path.parts:
                raise Failed(f"the manifest lists {name}, which is no Python file of Detectron2")
            try:
                data = archive.read(WHEELS_LICENCE if name == LICENCE else name)
                data = as_detectron2s(name, data)
            except KeyError:
                raise Failed(f"{wheel.name} lacks {name}") from None
            if git_blob(data) != blob:
                raise Failed(f"{name} in {wheel.name} is not Detectron2's file")
            files[name] = data
    return files


def build_wheel(source: Path, folder: Path) -> Path:
    """Build a wheel with only the verified files and new metadata, for pip to install."""
    info = f"detectron2-{LOCAL_VERSION}.dist-info"
    description = [
        *("Metadata-Version: 2.1", "Name: detectron2", f"Version: {LOCAL_VERSION}"),
        *("Home-page: https://github.com/facebookresearch/detectron2", "License: Apache-2.0"),
        f"Summary: Python files of Detectron2, from {WHEEL} by dn_detr; no compiled operators",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
    ]
    tags = [
        "Wheel-Version: 1.0",
        "Generator: dn_detr",
        "Root-Is-Purelib: true",
        "Tag: py3-none-any",
    ]
    files = checked_files(source)
    files[f"{info}/METADATA"] = "\n".join(description).encode() + b"\n"
    files[f"{info}/WHEEL"] = "\n".join(tags).encode() + b"\n"
    record = [f"{name},{_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]).encode() + b"\n"
    wheel = folder / f"detectron2-{LOCAL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"


if __name__ == "__main__":
    main()
