#!/usr/bin/env bash
# Sets up the virtual environment $1: torch, Detectron2, dn_detr with its compiled operators.
# Without a reachable Detectron2 the rest is still installed, and tests and demo say what is left
# out; with DN_DETR_REQUIRE_ALL=1 that is an error instead.
set -euo pipefail
venv=$1
base=${BASE_PYTHON:-python3}

"$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || {
  echo "dn_detr needs Python 3.10 to 3.13, this is $("$base" --version); set BASE_PYTHON=..." >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# The tested pair; Detectron2's model zoo needs the pkg_resources of setuptools before 82.
pip install --quiet --upgrade "setuptools>=70,<82" wheel ninja
pip install --quiet torch==2.11.0 torchvision==0.26.0

# Detectron2 first, with its own CUDA operators only where it would build them by itself.
if ! DN_DETR_NO_EXTENSION=1 FORCE_CUDA=0 \
  pip install --quiet --no-build-isolation -e ".[detectron2,test]"; then
  if [ "${DN_DETR_REQUIRE_ALL:-0}" = 1 ]; then
    echo "Detectron2 could not be installed" >&2
    exit 1
  fi
  echo "Detectron2 could not be installed (see above): going on without it" >&2
  DN_DETR_NO_EXTENSION=1 pip install --quiet --no-build-isolation -e ".[test]"
fi
pip install --quiet --no-build-isolation --no-deps -e .
"$venv/bin/python" -m dn_detr.info
