#!/usr/bin/env bash
# Sets up the virtual environment $1: torch, Detectron2, dn_detr with its compiled operators; those for
# CUDA only where there is a GPU, or with FORCE_CUDA=1.
# Where Detectron2 cannot be had the rest is still installed, and tests and demo say what is left
# out; with DN_DETR_REQUIRE_ALL=1 that is an error instead.
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

# The tested pair; Detectron2's model zoo needs the pkg_resources of setuptools before 82.
pip install --quiet --upgrade "setuptools>=70,<82" wheel ninja
pip install --quiet torch==2.11.0 torchvision==0.26.0

if [ -z "${FORCE_CUDA:-}" ] &&
  ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "no GPU here: the operators are built for the CPU alone (FORCE_CUDA=1: for CUDA, too)"
  export FORCE_CUDA=0
fi
pip install --quiet --no-build-isolation -e ".[test]"
if ! "$python" -m dn_detr.install_detectron2; then
  [ "${DN_DETR_REQUIRE_ALL:-0}" != 1 ] || exit 1
  echo "going on without Detectron2 (see above)" >&2
fi
"$python" -m dn_detr.info
