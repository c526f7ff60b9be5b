#!/usr/bin/env bash
# On a machine with a GPU, without a network: builds the operators, runs every test that uses the
# GPU, checks for memory errors and races with compute-sanitizer, and runs all benchmarks. Writes
# the output to gpu_check.txt and measurements to benchmarks/results/<device>.json.
#
#   dev/pack_for_gpu.sh                                    # before, where there is a network
#   dev/gpu_check.sh --packed .gpu --out results           # there
#   dev/gpu_check.sh --dry-run                             # anywhere: the same steps, tiny, on the CPU
#
# --packed FOLDER: output of dev/pack_for_gpu.sh. --out FOLDER: copy results there.
# --only STEPS: some of "build test sanitize bench train". --within SECONDS: time limit; steps that
# exceed it are stopped or skipped with a message, and results so far are kept. With a limit of ten
# minutes per command, first run --only "build bench" --within 570, which measures the operators,
# and then --only "build test sanitize train" --within 570; the build is reused. These steps have
# never been timed on a GPU.
# PYTHON: the interpreter. A failing step does not stop the others, but sets the exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
packed="" out="" device=cuda only="build test sanitize bench train" within=86400
while [ $# -gt 0 ]; do
  case $1 in
    --packed) packed=$2; shift ;;
    --out) out=$2; shift ;;
    --only) only=$2; shift ;;
    --within) within=$2; shift ;;
    --dry-run) device=cpu ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
failed=()
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
exec > >(tee gpu_check.txt) 2>&1

wants() { [[ " $only " == *" $1 "* ]]; }

# limited SECONDS: that, or less where less is left of all; the last seconds are for the copies.
limited() {
  local left=$((within - SECONDS - 15))
  echo $(($1 < left ? $1 : left > 1 ? left : 1))
}

# step SECONDS COMMAND...: within a time limit; a failure is remembered.
step() {
  local limit start=$SECONDS status=0
  limit=$(limited "$1"); shift
  echo "== $*"
  timeout "$limit" "$@" || { status=$?; failed+=("status $status: $*"); }
  echo "-- status $status after $((SECONDS - start)) s, at $SECONDS s"
}

date -u +%Y-%m-%d
[ -f "$packed/commit" ] && DN_DETR_COMMIT=$(cat "$packed/commit") && export DN_DETR_COMMIT
[ $device = cpu ] || step 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

# Packages go into a folder of their own: the machine's Python is not ours to change.
export PYTHONPATH="$PWD/projects:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$packed/*.whl" > /dev/null; then
  step 120 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$scratch/site" "$packed"/*.whl
fi

if wants build; then
  if [ $device = cuda ]; then
    FORCE_CUDA=1 step 240 "$python" setup.py --quiet build_ext --inplace
  else
    step 60 "$python" setup.py --quiet --version
  fi
fi
step 60 "$python" -m dn_detr.info

# The sanitizers are slow and leave most of the GPU idle: they run in parallel with each other and
# the tests.
tools=() checks=()
if wants sanitize && [ $device = cpu ]; then
  tools=(none)
elif wants sanitize && command -v compute-sanitizer > /dev/null; then
  tools=(memcheck racecheck initcheck)
elif wants sanitize; then
  failed+=("compute-sanitizer is not installed")
fi
for tool in "${tools[@]}"; do
  checker=(compute-sanitizer --tool "$tool" --error-exitcode 9)
  [ "$tool" != none ] || checker=()
  # PyTorch's pools of memory would hide what is out of bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(limited 360)" "${checker[@]}" \
    "$python" dev/run_operators.py --device $device > "$scratch/$tool.txt" 2>&1 &
  checks+=($!)
done

if wants test; then
  # tests/ops selects its devices in conftest.py.
  mapfile -t files < <(grep -rlE "cuda|DEVICES" tests --include="test_*.py" |
    grep -v -e tests/ops -e tests/equivalence -e tests/test_packaging)
  files=(tests/ops "${files[@]}")
  parallel=()
  "$python" -c "import xdist" 2> /dev/null && [ "$(nproc)" -ge 8 ] && parallel=(-n 4)
  [ $device = cuda ] || files=(tests/layers/test_attention_mask.py)
  step 280 "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" "${files[@]}"
fi

for i in "${!tools[@]}"; do
  wait "${checks[i]}" || failed+=("status $? of ${tools[i]}")
  echo "== sanitizer: ${tools[i]}"
  tail -n 40 "$scratch/${tools[i]}.txt"
done

common=(--device cuda --save)
folder=benchmarks/results
attention=(--original "$packed/Deformable-DETR" --uniform 0 --seconds 0.2 --dtype)
train=(--batch 2 8 --plain-operators --seconds 2)
if [ $device = cpu ]; then
  folder=$scratch/results
  common=(--device cpu --quick --save "$folder/cpu.json")
  attention=(--dtype)
  train=(--config-file configs/quick/dn_deformable.yaml --size 64 96 --batch 1 --no-memory)
fi
if wants bench; then
  step 60 "$python" benchmarks/denoising_queries.py "${common[@]}"
  step 60 "$python" benchmarks/matcher.py "${common[@]}"
  # One type after the other: if time runs out, the first one's figures are saved.
  for dtype in float32 bfloat16; do
    step 240 "$python" benchmarks/ms_deform_attn.py "${common[@]}" "${attention[@]}" $dtype
  done
fi
if wants train && "$python" -c "import detectron2" 2> /dev/null; then
  step 150 "$python" benchmarks/train_step.py "${common[@]}" "${train[@]}"
elif wants train; then
  echo "Detectron2 is not installed: no training steps"
fi
if wants bench || wants train; then
  step 30 "$python" benchmarks/render.py --folder "$folder"
fi

echo "== $SECONDS s, ${#failed[@]} failed"
[ ${#failed[@]} = 0 ] || printf '%s\n' "${failed[@]}"
if [ -n "$out" ]; then
  sleep 1 # until all of it is in gpu_check.txt
  mkdir -p "$out"
  cp gpu_check.txt benchmarks/results/* "$out"
fi
[ ${#failed[@]} = 0 ]
