#!/usr/bin/env bash
# On a machine with a GPU, without a network: builds the operators, measures them, runs every test
# that uses the GPU, measures whole training steps, and checks for memory errors and races with
# compute-sanitizer. Two calls of at most nine minutes, each useful alone:
#
#   dev/pack_for_gpu.sh                                    # before, where there is a network
#   dev/gpu_check.sh first --packed .gpu --out results     # build smoke atomics bench
#   dev/gpu_check.sh second --packed .gpu --out results    # build smoke test train sanitize
#   DRY=1 dev/gpu_check.sh first                           # anywhere: the same, tiny, on the CPU
#
# What matters most comes first: each step saves what it has found before the next one starts, and
# the benchmark of the operators after each case, in bfloat16 before float32. A step that exceeds
# its time is interrupted as by Ctrl-C, so that pytest still lists its failures.
#
# Options: --packed FOLDER: output of dev/pack_for_gpu.sh. --out FOLDER: copy the results there.
# --only STEPS: instead of a call. --within SECONDS: of the whole call (540).
# PYTHON: the interpreter. A failing step does not stop the others, but sets the exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} dry=${DRY:-}
packed="" out="" steps="" within=540
while [ $# -gt 0 ]; do
  case $1 in
    first) steps="build smoke atomics bench" ;;
    second) steps="build smoke test train sanitize" ;;
    --packed) packed=$2; shift ;;
    --out) out=$2; shift ;;
    --only) steps=$2; shift ;;
    --within) within=$2; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
[ -z "$packed" ] || packed=$(realpath "$packed")
[ -n "$steps" ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
device=${dry:+cpu} device=${device:-cuda}
failed=()
scratch=$(mktemp -d)
results=benchmarks/results
[ -z "$dry" ] || results=$scratch/results
report=gpu_check_${steps// /_}.txt
[ -z "$out" ] || mkdir -p "$out"
finish() { # also if this script is stopped from outside
  [ -z "$out" ] || cp "$report" "$scratch"/*.xml "$scratch"/*.json "$results"/* "$out" 2> /dev/null
  rm -rf "$scratch"
}
trap finish EXIT
exec > >(tee "$report") 2>&1

wants() { [[ " $steps " == *" $1 "* ]]; }

# step SECONDS COMMAND...: within a time limit, or what is left of all but 15 s; then SIGINT, and 20
# s later SIGKILL. A failure is remembered.
step() {
  local limit=$1 left=$((within - SECONDS - 15)) start=$SECONDS status=0
  shift
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $*"
  if [ "$limit" -lt 3 ]; then
    echo "-- no time left"; failed+=("no time left: $*"); return 1
  fi
  timeout --signal=INT --kill-after=20 "$limit" "$@" || { status=$?; failed+=("status $status: $*"); }
  echo "-- status $status after $((SECONDS - start)) s, at $SECONDS s"
  return $status
}

date -u +%Y-%m-%d
[ -f "$packed/commit" ] && DN_DETR_COMMIT=$(cat "$packed/commit") && export DN_DETR_COMMIT
[ -n "$dry" ] || step 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

# Packages go into a folder of their own: the machine's Python is not ours to change.
export PYTHONPATH="$PWD/projects:$scratch/site:${packed:+$packed/python}${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$packed/*.whl" > /dev/null && [ -z "$dry" ]; then
  step 120 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$scratch/site" "$packed"/*.whl
fi

if wants build; then
  if [ -n "$dry" ]; then
    step 60 "$python" setup.py --quiet --version
  else
    FORCE_CUDA=1 step 240 "$python" setup.py --quiet build_ext --inplace
  fi
fi
step 60 "$python" -m dn_detr.info
if wants smoke; then
  # Without operators that work, nothing else is worth the time.
  step 90 "$python" dev/run_operators.py --device $device --smoke || [ -n "$dry" ] || exit 1
fi
if wants atomics; then
  step 90 "$python" dev/atomic_rates.py ${dry:+--compile-only} --save "$scratch/atomic_rates.json"
fi

save=(--device $device --save) attention=(--original "$packed/Deformable-DETR" --uniform 0 --seconds 0.2)
train=(--batch 2 8 --plain-operators --seconds 2)
if [ -n "$dry" ]; then
  save=(--device cpu --quick --save "$results/cpu.json") attention=()
  train=(--config-file configs/quick/dn_deformable.yaml --size 64 96 --batch 1 --no-memory)
fi
if wants bench; then
  step 300 "$python" benchmarks/ms_deform_attn.py "${save[@]}" "${attention[@]}" \
    --dtype bfloat16 float32 --measure time
  step 60 "$python" benchmarks/denoising_queries.py "${save[@]}"
  step 60 "$python" benchmarks/matcher.py "${save[@]}"
  step 120 "$python" benchmarks/ms_deform_attn.py "${save[@]}" "${attention[@]}" \
    --dtype bfloat16 --measure memory
fi

if wants test; then
  # Files of other folders that need Detectron2 are left out without it: an error while pytest
  # collects them would end the run before the first test.
  mapfile -t files < <(grep -rlE "cuda|DEVICES" tests --include="test_*.py" |
    grep -v -e tests/ops -e tests/equivalence -e tests/test_packaging -e tests/benchmarks)
  if ! "$python" -c "import detectron2" 2> /dev/null; then
    mapfile -t files < <(printf '%s\n' "${files[@]}" | grep -v -e tests/d2 -e tests/tools)
  fi
  files=(tests/ops "${files[@]}")
  workers=1
  ! "$python" -c "import xdist" 2> /dev/null || [ "$(nproc)" -lt 8 ] || workers=4
  export OMP_NUM_THREADS=$(($(nproc) > workers ? $(nproc) / workers : 1))
  [ -z "$dry" ] || files=(tests/layers/test_attention_mask.py)
  parallel=()
  [ $workers = 1 ] || parallel=(-n $workers)
  step 240 "$python" -m pytest -q -rf -p no:cacheprovider --continue-on-collection-errors \
    --junitxml "$scratch/tests.xml" "${parallel[@]}" "${files[@]}"
  unset OMP_NUM_THREADS
fi

if wants train; then
  if "$python" -c "import detectron2" 2> /dev/null; then
    step 150 "$python" benchmarks/train_step.py "${save[@]}" "${train[@]}"
  else
    echo "Detectron2 is not installed: no training steps"
  fi
fi
if wants bench || wants train; then
  step 30 "$python" benchmarks/render.py --folder "$results"
fi

if wants sanitize; then
  # On the PATH, beside nvcc, or in a toolkit.
  beside=$(dirname "$(readlink -f "$(command -v nvcc || echo /)")")
  sanitizer=""
  for path in "$(command -v compute-sanitizer)" "$beside/compute-sanitizer" \
    "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" /usr/local/cuda*/bin/compute-sanitizer; do
    [ -n "$sanitizer" ] || [ ! -x "$path" ] || sanitizer=$path
  done
  tools=(memcheck racecheck initcheck)
  if [ -z "$sanitizer" ] && [ -z "$dry" ]; then
    failed+=("compute-sanitizer is neither on the PATH nor beside nvcc")
    tools=()
  fi
  # They leave most of the GPU idle, so all run at once. Only kernels of this project are checked.
  # PyTorch's pools of memory would hide what is out of bounds.
  left=$((within - SECONDS - 20)) checks=()
  for tool in "${tools[@]}"; do
    checker=("$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=dn_detr)
    [ -z "$dry" ] || checker=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((left > 1 ? left : 1)) "${checker[@]}" \
      "$python" dev/run_operators.py --device $device ${dry:+--smoke} > "$scratch/$tool.txt" 2>&1 &
    checks+=($!)
  done
  for i in "${!tools[@]}"; do
    wait "${checks[i]}" || failed+=("status $? of ${tools[i]}")
    echo "== sanitizer: ${tools[i]}"
    tail -n 40 "$scratch/${tools[i]}.txt"
  done
fi

echo "== $SECONDS s, ${#failed[@]} failed"
[ ${#failed[@]} = 0 ] || printf '%s\n' "${failed[@]}"
sleep 1 # until all of it is in the report
[ ${#failed[@]} = 0 ]
