#!/usr/bin/env bash
# On a machine with a GPU: builds the operators for it, runs every test that uses it, and looks for
# memory errors and races with compute-sanitizer. Writes all of it to $1 (default gpu_check.txt).
#   PYTHON=.venv/bin/python dev/gpu_check.sh results.txt
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
result=${1:-gpu_check.txt}
failed=0
exec > >(tee "$result") 2>&1

step() {
  echo "== $*"
  "$@" || failed=1
}

date -u +%Y-%m-%d
git rev-parse HEAD 2>/dev/null
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || failed=1
FORCE_CUDA=1 step "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
step "$python" -m dn_detr.info
step "$python" -m pytest -q tests/ops tests/losses tests/layers tests/models tests/methods tests/assists
if "$python" -c "import detectron2" 2>/dev/null; then
  step "$python" -m pytest -q tests/d2
fi
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q tests/ops -k cuda
  done
else
  echo "compute-sanitizer is not installed: no memory checks"
fi
exit "$failed"
