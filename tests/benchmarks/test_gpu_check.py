"""dev/gpu_check.sh does its steps in the right order, and time that runs out costs only one step.

In a copy of the folder, with programs that write down how they were called.
"""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!/bin/bash
echo "$(basename "$0") $* OMP_NUM_THREADS=$OMP_NUM_THREADS" >> "$LOG"
case "$*" in
  "-c import detectron2") exit ${NO_DETECTRON2:-0} ;;
  *pytest*)
    if [ -n "$SLOW_TESTS" ]; then
      trap 'echo interrupted >> "$LOG"; exit 2' INT
      sleep 30 & wait
    fi ;;
  *--smoke*) exit ${BROKEN:-0} ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """Return a function that runs the script: (exit status, output, the calls)."""
    folder, programs = tmp_path / "repository", tmp_path / "toolkit" / "bin"
    (folder / "dev").mkdir(parents=True)
    shutil.copy(ROOT / "dev" / "gpu_check.sh", folder / "dev")
    for name in ("ops/test_a.py", "d2/test_b.py", "tools/test_c.py", "losses/test_d.py"):
        (folder / "tests" / name).parent.mkdir(parents=True)
        (folder / "tests" / name).write_text("cuda")
    programs.mkdir(parents=True)
    for name in ("python3", "nvidia-smi", "nvcc", "compute-sanitizer", "nproc"):
        text = "#!/bin/bash\necho 16\n" if name == "nproc" else FAKE
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # nvcc is a link on the PATH; the sanitizer is only beside the real one.
    path = tmp_path / "path"
    path.mkdir()
    for name in ("python3", "nvidia-smi", "nvcc", "nproc"):
        (path / name).symlink_to(programs / name)

    def run(*arguments, **environment):
        log = tmp_path / "log.txt"
        log.write_text("")
        done = subprocess.run(
            ["bash", "dev/gpu_check.sh", *arguments],
            cwd=folder,
            env={"PATH": f"{path}:/usr/bin:/bin", "LOG": str(log)} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, log.read_text().splitlines()

    assert os.stat(path / "nvcc").st_mode & stat.S_IXUSR
    return run


def position(calls, *parts):
    found = [i for i, one in enumerate(calls) if all(part in one for part in parts)]
    assert found, (parts, calls)
    return found[0]


def test_the_first_call_measures_the_operators(call):
    status, output, calls = call("first", "--out", "found")
    assert status == 0, output
    order = [
        position(calls, "setup.py"), position(calls, "run_operators.py", "--smoke"),
        position(calls, "atomic_rates.py"),
        position(calls, "ms_deform_attn.py", "bfloat16 float32"), position(calls, "matcher.py"),
    ]  # fmt: skip
    assert order == sorted(order)
    assert not any("pytest" in one or "train_step" in one for one in calls)


def test_the_second_call_tests_trains_and_sanitizes(call):
    status, output, calls = call("second")
    assert status == 0, output
    tests = calls[position(calls, "pytest")]
    for part in ("-rf", "--junitxml", "-n 4", "tests/d2/test_b.py", "OMP_NUM_THREADS=4"):
        assert part in tests
    smoke, train = position(calls, "--smoke"), position(calls, "train_step.py")
    memcheck = position(calls, "compute-sanitizer", "memcheck", "kernel_substring=dn_detr")
    assert smoke < calls.index(tests) < train < memcheck
    position(calls, "compute-sanitizer", "racecheck")
    position(calls, "compute-sanitizer", "initcheck")


def test_files_that_need_detectron2_do_not_end_the_tests_without_it(call):
    _, output, calls = call("--only", "test train", NO_DETECTRON2="1")
    tests = calls[position(calls, "pytest")]
    assert "tests/losses/test_d.py" in tests and "tests/ops" in tests
    assert "tests/d2" not in tests and "tests/tools" not in tests
    assert "--continue-on-collection-errors" in tests
    assert "no training steps" in output and not any("train_step" in one for one in calls)


def test_tests_that_take_too_long_are_interrupted_and_the_rest_goes_on(call):
    """SIGINT: pytest then lists its failures and writes its XML."""
    status, output, calls = call("--only", "test render train", "--within", "19", SLOW_TESTS="1")
    assert status == 1 and "interrupted" in calls
    assert "-- status 124" in output or "-- status 2" in output
    assert "no time left" in output or any("train_step" in one for one in calls)


def test_nothing_is_measured_with_operators_that_do_not_work(call):
    status, _, calls = call("first", BROKEN="1")
    assert status == 1
    assert not any("ms_deform_attn.py" in one for one in calls)
