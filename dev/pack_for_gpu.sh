#!/usr/bin/env bash
# Collects what dev/gpu_check.sh needs on a machine without a network that has Python 3.12, torch
# 2.11, numpy, scipy, pytest and ninja: wheels of missing packages, including Detectron2, and
# checkouts of other implementations to measure. Writes to a folder that git ignores.
#   dev/pack_for_gpu.sh [--original CHECKOUT] [--msda-triton CHECKOUT] [--detectron2 CHECKOUT] [FOLDER]
# Detectron2 is built if there is a Python 3.12 with torch 2.11 (PYTHON312=...); otherwise its Python
# files are taken, which training steps need: from --detectron2, this Python's, or a wheel on PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.gpu original="" triton="" detectron2=""
while [ $# -gt 0 ]; do
  case $1 in
    --original) original=$2; shift ;;
    --msda-triton) triton=$2; shift ;;
    --detectron2) detectron2=$2; shift ;;
    *) folder=$1 ;;
  esac
  shift
done
python=${PYTHON:-python3}
python312=${PYTHON312:-python3.12}
mkdir -p "$folder"
git describe --always --dirty=+ --exclude="*" > "$folder/commit"

download() {
  "$python" -m pip --disable-pip-version-check download --quiet --no-deps \
    --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 --dest "$folder" "$@"
}

# Another implementation to measure, and dependencies of this package, of Detectron2 and of parallel
# tests.
download deformops==3.0.1
download torchvision==0.26.0 msgspec pytest-xdist execnet
download pycocotools yacs omegaconf==2.3.1 hydra-core==1.3.8 portalocker termcolor
download tabulate cloudpickle tqdm pyyaml pillow packaging
download matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six
# Only as sources on PyPI; pure Python.
"$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$folder" \
  fvcore==0.1.5.post20221221 iopath==0.1.9 antlr4-python3-runtime==4.9.3

if [ -n "$triton" ]; then
  "$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$folder" "$triton"
fi
if [ -n "$original" ]; then
  mkdir -p "$folder/Deformable-DETR/models/ops"
  cp -r "$original/models/ops/src" "$folder/Deformable-DETR/models/ops/"
fi
if "$python312" -c "import torch" 2> /dev/null; then
  commit=$(sed -n 's/^COMMIT = "\([0-9a-f]\{40\}\)".*/\1/p' projects/dn_detr/install_detectron2.py)
  source=${detectron2:-git+https://github.com/facebookresearch/detectron2.git@$commit}
  FORCE_CUDA=0 "$python312" -m pip --disable-pip-version-check wheel --quiet --no-deps \
    --no-build-isolation --wheel-dir "$folder" "$source"
else
  # 3 MB without compiled operators, which no method needs.
  rm -rf "$folder/python"
  found=$("$python" -c "import importlib.util as u; s = u.find_spec('detectron2'); print(s.origin if s else '')")
  source=${detectron2:+$detectron2/detectron2} source=${source:-${found%/__init__.py}}
  if [ -n "$source" ]; then
    mkdir -p "$folder/python"
    (cd "$source/.." && find -L detectron2 -name "*.py" -o -name "*.yaml") |
      tar -C "$source/.." -chf - -T - | tar -C "$folder/python" -xf -
  else
    "$python" -m dn_detr.install_detectron2 --files "$folder/python"
  fi
fi
du -sh "$folder"
ls "$folder" "$folder"/python 2> /dev/null || true
# What one run may carry, with the repository itself.
most=60 size=$(du -sm "$folder" | cut -f1)
[ "$size" -le $most ] || { echo "$folder has $size MiB, more than $most" >&2; exit 1; }
