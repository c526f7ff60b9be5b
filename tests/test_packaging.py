"""The package as it is built, installed and loaded: what must work, and what must be said."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import dn_detr
from dn_detr.info import report
from dn_detr.ops.extension import KERNELS, OPERATORS, ExtensionMismatch, check_record

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(dn_detr.__file__).parent


def python(code, folder, **environment):
    """Run code in a new process that finds the package in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of the package without its library, in a folder of its own."""
    shutil.copytree(
        PACKAGE, tmp_path / "dn_detr", ignore=shutil.ignore_patterns("_C.*", "_build.json", "__py*")
    )
    return tmp_path


USE_ALL = """
import warnings, torch
from dn_detr import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        value, weights = torch.rand(1, 4, 1, 2), torch.rand(1, 3, 1, 1, 1)
        ops.ms_deform_attn(value, [(2, 2)], torch.rand(1, 3, 1, 1, 1, 2), weights)
        ops.noise_objects(
            torch.zeros(1, 1, dtype=torch.int64), torch.rand(1, 1, 4),
            torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64),
            num_groups=1, slots_per_group=1, num_classes=2, box_noise=0.1, label_noise=0.1,
            contrastive=False, num_matched=1, mask_dtype=torch.float32,
        )
for warning in caught:
    print(warning.message)
"""


# --------------------------------------------------------------------------------- loading


def test_importing_the_package_does_not_import_detectron2():
    code = (
        "import sys, dn_detr, dn_detr.info, dn_detr.ops\n"
        "print([name for name in sys.modules if name.startswith('detectron2')])"
    )
    result = python(code, PACKAGE.parent)
    assert result.stdout.strip() == "[]", result.stderr


def test_without_a_library_all_runs_after_one_warning(copy):
    result = python(USE_ALL, copy)
    assert result.returncode == 0, result.stderr
    (sentence,) = result.stdout.splitlines()
    assert sentence.startswith("dn_detr._C is not built; the operators run as plain PyTorch")


def test_the_warning_gives_the_reason_that_the_build_wrote_down(copy):
    (copy / "dn_detr" / "_build.json").write_text(json.dumps({"no_extension": "Nobody wanted it"}))
    assert python(USE_ALL, copy).stdout.startswith("Nobody wanted it; the operators run as plain")


def test_the_library_can_be_switched_off():
    result = python(USE_ALL, PACKAGE.parent, DN_DETR_NO_EXTENSION="1")
    (sentence,) = result.stdout.splitlines()
    assert sentence.startswith("dn_detr._C is not loaded because DN_DETR_NO_EXTENSION=1")


@pytest.mark.skipif(not KERNELS, reason="dn_detr._C is not built")
def test_with_a_library_nothing_is_warned_of():
    result = python(USE_ALL, PACKAGE.parent)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_library_of_another_torch_is_refused_before_it_is_loaded(copy):
    (copy / "dn_detr" / "_C.abi3.so").write_bytes(b"not a library: must not be opened")
    record = {"torch": "1.13.1+cu117", "cuda": "11.7"}
    (copy / "dn_detr" / "_build.json").write_text(json.dumps(record))
    # info says so, too, but is itself no victim of it
    result = python("from dn_detr.info import report; print(report())\nimport dn_detr.ops", copy)
    assert result.returncode == 1
    sentence = result.stderr.splitlines()[-1]
    assert "ExtensionMismatch: dn_detr._C was built for torch 1.13.1+cu117" in sentence
    assert f"this is torch {torch.__version__}" in sentence
    assert "rebuild with `pip install" in sentence
    assert "cannot be loaded: dn_detr._C was built for torch 1.13.1+cu117" in result.stdout


def test_library_without_a_record_is_refused():
    with pytest.raises(ExtensionMismatch, match="no _build.json"):
        check_record(None, "2.11.0", None)


@pytest.mark.parametrize(
    ("built", "running", "fits"),
    [
        (("2.11.0+cu130", "13.0"), ("2.11.0+cu130", "13.0"), True),
        (("2.11.0+cu130", "13.0"), ("2.11.0", "13.0"), True),
        (("2.11.0+cpu", None), ("2.11.0", None), True),
        (("2.11.0+cu130", "13.0"), ("2.11.1+cu130", "13.0"), False),
        (("2.11.0+cu130", "13.0"), ("2.12.0+cu130", "13.0"), False),
        (("2.11.0+cu130", "13.0"), ("2.11.0+cu128", "12.8"), False),
        (("2.11.0+cu130", "13.0"), ("2.11.0+cpu", None), False),
    ],
)
def test_release_and_cuda_version_must_be_those_of_the_build(built, running, fits):
    record = {"torch": built[0], "cuda": built[1]}
    if fits:
        check_record(record, *running)
    else:
        with pytest.raises(ExtensionMismatch, match="was built for torch"):
            check_record(record, *running)


# ----------------------------------------------------------------------------------- info


def test_report_names_versions_and_operators():
    text = report()
    assert dn_detr.__version__ in text and torch.__version__ in text
    if KERNELS:
        for name in OPERATORS:
            (line,) = (line for line in text.splitlines() if line.split()[0] == name)
            assert "compiled for CPU" in line
    else:
        assert "plain PyTorch only" in text


def test_info_is_a_program(copy):
    result = subprocess.run(
        [sys.executable, "-m", "dn_detr.info"], capture_output=True, text=True, cwd=copy
    )
    assert result.returncode == 0, result.stderr
    assert "plain PyTorch only: dn_detr._C is not built" in result.stdout


# ------------------------------------------------------------------------------- building


def run_setup(prelude, *arguments, **environment):
    code = (
        f"import runpy, sys, types\n{prelude}\nsys.argv = ['setup.py', *{arguments!r}]\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r}, run_name='__main__')"
    )
    return python(code, ROOT, **environment)


FAKE_TORCH = """
torch = types.ModuleType("torch")
torch.__version__, torch.__file__ = "99.1", "/nowhere/torch/__init__.py"
torch.version = types.SimpleNamespace(cuda="99.0")
sys.modules["torch"] = torch
"""


def test_a_build_without_torch_is_complete_but_for_the_operators_and_keeps_the_reason(tmp_path):
    """It ended in an error, in the midst of pip's traceback."""
    arguments = ("build_py", f"--build-lib={tmp_path}")
    result = run_setup("sys.modules['torch'] = None", *arguments, FORCE_CUDA="0")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "dn_detr" / "_build.json").read_text())
    assert "torch was not installed before dn_detr" in record["no_extension"]
    for name in ("detectron2_manifest.txt", "py.typed", "configs/quick/dn_deformable.yaml"):
        assert (tmp_path / "dn_detr" / name).is_file(), name


def test_cuda_cannot_be_forced_without_torch():
    result = run_setup("sys.modules['torch'] = None", "--version", FORCE_CUDA="1")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("FORCE_CUDA=1, but there is no torch to build")


def test_sources_can_be_packed_without_torch():
    result = run_setup("sys.modules['torch'] = None", "--version", FORCE_CUDA="0")
    assert (result.returncode, result.stdout.strip()) == (0, dn_detr.__version__), result.stderr


def test_forced_cuda_says_where_it_looked(tmp_path):
    result = run_setup(FAKE_TORCH, "--version", FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    sentence = result.stderr.splitlines()[-1]
    assert "no nvcc of CUDA 99, which torch 99.1 needs, was found" in sentence
    assert f"{tmp_path} (CUDA_HOME: no nvcc)" in sentence and "/nowhere/nvidia/cu99" in sentence


@pytest.fixture
def setup_names(monkeypatch):
    """Runs setup.py without building anything, and returns its names."""
    monkeypatch.setattr(setuptools, "setup", lambda **_options: None)
    monkeypatch.setenv("DN_DETR_NO_EXTENSION", "1")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)

    def run(**environment):
        monkeypatch.delenv("FORCE_CUDA", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return types.SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))

    return run


def make_toolkit(root, release):
    """A toolkit whose nvcc knows its version and, asked for a dry run, its root."""
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;\n"
        f"--dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return root


def make_torch(root, cuda):
    version = types.SimpleNamespace(cuda=cuda)
    return types.SimpleNamespace(
        __version__="2.11.0", __file__=str(root / "torch" / "__init__.py"), version=version
    )


def test_toolkit_behind_a_script_on_the_path_is_found(setup_names, tmp_path):
    toolkit = make_toolkit(tmp_path / "cuda-13.0", "13.0")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    setup = setup_names(PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert setup.find_toolkit(make_torch(tmp_path, "13.2")) == (toolkit, "13.0", None)


def test_cuda_home_comes_first_and_must_have_the_major_version(setup_names, tmp_path):
    old = make_toolkit(tmp_path / "cuda-12.8", "12.8")
    new = make_toolkit(tmp_path / "nvidia" / "cu13", "13.1")
    setup = setup_names(CUDA_HOME=str(old), PATH="/usr/bin:/bin")
    assert setup.find_toolkit(make_torch(tmp_path, "12.6"))[:2] == (old, "12.8")
    assert setup.find_toolkit(make_torch(tmp_path, "13.0"))[:2] == (new, "13.1")


@pytest.mark.parametrize(("environment", "cuda"), [({"FORCE_CUDA": "0"}, "13.0"), ({}, None)])
def test_reason_for_no_cuda_is_kept(setup_names, tmp_path, environment, cuda):
    root, release, reason = setup_names(**environment).find_toolkit(make_torch(tmp_path, cuda))
    assert root is None and release is None
    assert ("FORCE_CUDA=0" if environment else "has no CUDA") in reason


def test_architectures_can_be_named(setup_names):
    setup = setup_names(TORCH_CUDA_ARCH_LIST="9.0")
    assert setup.architectures(torch, None, "13.0") == "9.0"


@pytest.mark.parametrize(
    ("version", "known", "expected"),
    [
        ("12.6", "", "8.0;9.0+PTX"),
        ("12.8", "", "8.0;9.0;10.0;12.0+PTX"),
        ("13.0", "compute_80 compute_90 compute_100 compute_120", "8.0;9.0;10.0;12.0+PTX"),
        ("15.0", "compute_90 compute_100 compute_120", "9.0;10.0;12.0+PTX"),
    ],
)
def test_default_architectures_are_those_that_the_nvcc_knows(
    setup_names, monkeypatch, tmp_path, version, known, expected
):
    toolkit = make_toolkit(tmp_path / "cuda", version)
    nvcc = toolkit / "bin" / "nvcc"
    listed = "".join(f"echo {name};" for name in known.split())
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && {{ {listed} true; }}\n')
    gpus = types.SimpleNamespace(device_count=lambda: 0)
    torch = types.SimpleNamespace(cuda=gpus)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup_names().architectures(torch, toolkit, version) == expected


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]])
def test_wheel_holds_the_library_and_the_record_of_its_build(tmp_path, isolation):
    environment = {**os.environ, "FORCE_CUDA": "0"}
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", tmp_path, *isolation]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (wheel,) = tmp_path.glob("dn_detr-*.whl")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as content:
        assert "dn_detr/_C.abi3.so" in content.namelist()
        record = json.loads(content.read("dn_detr/_build.json"))
    assert record["torch"] == torch.__version__ and "FORCE_CUDA=0" in record["no_cuda"]


@pytest.mark.slow
def test_wheel_without_extension_is_pure_python(tmp_path):
    environment = {**os.environ, "DN_DETR_NO_EXTENSION": "1"}
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", tmp_path]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (wheel,) = tmp_path.glob("dn_detr-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        assert not any(name.startswith("dn_detr/_C") for name in content.namelist())
        record = json.loads(content.read("dn_detr/_build.json"))
    assert "DN_DETR_NO_EXTENSION=1" in record["no_extension"]
