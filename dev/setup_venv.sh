#!/usr/bin/env bash
# Sets up the virtual environment $1 with torch, Detectron2, and dn_detr with its compiled operators
# (CUDA only if there is a GPU, or with FORCE_CUDA=1). If Detectron2 cannot be installed, the rest
# is, and tests and demo skip the parts that need it; with DN_DETR_REQUIRE_ALL=1 this is an error.
set -euo pipefail
venv=$1
base=${BASE_PYTHON:-python3}

"$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
  echo "dn_detr needs Python 3.11 to 3.13, this is $("$base" --version); set BASE_PYTHON=..." >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
python=$venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# The tested versions; Detectron2's model zoo needs pkg_resources, which setuptools 82 removed.
pip install --quiet --upgrade "setuptools>=77,<82" wheel ninja
pip install --quiet torch==2.11.0 torchvision==0.26.0

if [ -z "${FORCE_CUDA:-}" ] &&
  ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "no GPU found: building the operators for the CPU only (FORCE_CUDA=1: also for CUDA)"
  export FORCE_CUDA=0
fi
pip install --quiet --no-build-isolation -e ".[dev]"
if ! "$python" -m dn_detr.install_detectron2; then
  [ "${DN_DETR_REQUIRE_ALL:-0}" != 1 ] || exit 1
  echo "continuing without Detectron2 (see above)" >&2
fi
"$python" -m dn_detr.info
