"""Break the CUDA kernels on purpose: the emulator with the operators' tests must notice each time.

    python dev/cuda_emulator/mutations.py build/emulate         # all
    python dev/cuda_emulator/mutations.py build/emulate --few   # those that compile fast

build/emulate: as build.py left it; its objects are used for what a mutation does not change.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from build import ROOT, build

MATCH = "tests/losses/test_linear_assignment.py"
COSTS = "tests/losses/test_matching_costs.py"
NOISE = "tests/ops/test_noise_objects.py"
SAMPLES = "tests/ops/test_ms_deform_attn.py"
DEFORM = "tests/ops/test_deformable_attention.py"
TILES = "tests/ops/test_deformable_attention_cuda.py"


@dataclass(frozen=True)
class Mutation:
    """In csrc/`file`, `old` (the first one) becomes `new`; `tests` must notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str
    is_fast: bool = False


MUTATIONS = (
    # Barriers.
    Mutation("no barrier before shared memory is written again", "cuda/assign_objects.cu",
             "__syncthreads(); // before", "// before", MATCH, True),
    Mutation("no barrier before shared memory is read", "cuda/assign_objects.cu",
             "    __syncthreads();\n    own = 0;", "    own = 0;", MATCH),
    Mutation("no barrier between two columns", "assignment_solver.h",
             "close(end.index);\n  }\n  team.sync();", "close(end.index);\n  }", MATCH),
    Mutation("no barrier after prices have changed", "assignment_solver.h",
             "  team.sync();\n  if (team.rank() == 0) {\n    w.row_price[first_row] +=",
             "  if (team.rank() == 0) {\n    w.row_price[first_row] +=", MATCH),
    Mutation("a barrier that only some threads reach", "cuda/matching_costs.cu",
             "  for (int64_t start = 0; start < z.objects",
             "  if (blockIdx.x * THREADS + threadIdx.x < z.slots)\n"
             "  for (int64_t start = 0; start < z.objects", COSTS),
    # Lanes.
    Mutation("a reduction that leaves lanes out", "cuda/assign_objects.cu",
             "distance = WARP / 2", "distance = WARP / 4", MATCH),
    Mutation("the mask of other lanes", "cuda/ms_deform_attn_backward.cu",
             "      << (threadIdx.x % 32 / LANES * LANES);", ";", SAMPLES),
    Mutation("lanes without a query leave their warp", "cuda/deformable_attention_forward.cu",
             "  const T largest", "  if (!q.is_active) return;\n  const T largest", TILES),
    Mutation("a shuffle across groups", "cuda/deformable_attention.cuh",
             "x, source, LANES)", "x, source)", DEFORM),
    Mutation("halves that are exchanged wrongly", "cuda/deformable_attention_backward.cuh",
             "lane & half;", "lane & COUNT;", DEFORM),
    # Bounds.
    Mutation("no check for the last group", "cuda/ms_deform_attn_forward.cu",
             "if (group >= g.queries * g.heads)", "if (false)", SAMPLES, True),
    Mutation("one cell too many", "cuda/ms_deform_attn.cuh",
             "left + 1 < level.width", "left + 1 <= level.width", SAMPLES),
    Mutation("no check for the last slot", "cuda/matching_costs.cu", "if (q >= z.slots)",
             "if (false)", COSTS, True),
    Mutation("no check for the last row of the mask", "cuda/noise_objects.cu", "if (i >= o.side())",
             "if (false)", NOISE, True),
    Mutation("no check for the last object", "cuda/noise_objects.cu",
             "m < most && batch.is_object", "batch.is_object", NOISE),
    Mutation("logits beyond the last one", "cuda/deformable_attention.cuh",
             "min(first + i * LANES + lane, samples - 1)", "first + i * LANES + lane", DEFORM),
    Mutation("NaN where no sample is inside", "cuda/deformable_attention_forward.cu",
             "sum[k] == T(0) ? T(0) : sum[k]", "sum[k]", DEFORM),
    Mutation("the next sample beyond the last one", "cuda/deformable_attention_forward.cu",
             "if (s + LANES < samples)", "if (true)", DEFORM),
    # Tiles and positions.
    Mutation("the last column of tiles is left out", "cuda/deformable_attention_tiles.cuh",
             "(grid.width + (1 << schedule.log_width) - 1)", "grid.width", TILES),
    Mutation("a query right of its tile's grid", "cuda/deformable_attention_tiles.cuh",
             "min(x, grid.width - 1)", "x", TILES),
    Mutation("lanes without a query write", "cuda/deformable_attention_forward.cu",
             "if (q.is_active && channel < g.channels)", "if (channel < g.channels)", TILES),
    Mutation("units of sums in another order", "cuda/ms_deform_attn_gradients.cuh",
             "to + k / 4 * step", "to + k", DEFORM),
    Mutation("sums read in another order", "cuda/ms_deform_attn_gradients.cuh",
             "* VECTOR + column * UNIT", "* VECTOR + column", DEFORM),
    Mutation("sums that are not atomic", "cuda/ms_deform_attn_gradients.cuh",
             "#if defined(__CUDA_ARCH__)\n  const auto", "#if 0\n  const auto", SAMPLES),
    # Launches and memory.
    Mutation("more threads than compiled for", "cuda/deformable_attention_tiles.cuh",
             "schedule.threads = most_threads;", "schedule.threads = 2 * most_threads;", TILES),
    Mutation("inputs that are not aligned", "cuda/ms_deform_attn.cuh", "% 16 == 0 ? y",
             "% 16 < 16 ? y", SAMPLES),
    Mutation("a gradient that is not written", "cuda/deformable_attention_backward.cuh",
             "  gradients.weights[index] = sampled;\n", "", DEFORM),
)  # fmt: skip


def is_noticed(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Return whether the tests fail, and what the first failure says."""
    shutil.rmtree(folder / "mutated", ignore_errors=True)
    csrc = folder / "mutated" / "original"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / mutation.file
    text = path.read_text()
    if mutation.old not in text:
        sys.exit(f"mutations.py: {mutation.file} has no {mutation.old!r}")
    path.write_text(text.replace(mutation.old, mutation.new, 1))
    library = build(folder / "mutated", csrc, 900, os.cpu_count() or 1, folder / "objects")
    others = "not pytorch-cpu and not [plain and not number_of_threads and not instruction_sets"
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", mutation.tests]
    command += ["-k", others]
    environment = {**os.environ, "PYTHONPATH": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    errors = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    return done.returncode == 1, (errors or ["nothing"])[0][1:].strip()[:150]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--only", default="", help="those whose description contains this")
    options = parser.parse_args()
    missed = []
    for mutation in MUTATIONS:
        if (options.few and not mutation.is_fast) or options.only not in mutation.what:
            continue
        start = time.perf_counter()
        caught, message = is_noticed(mutation, options.folder)
        print(f"{'noticed' if caught else 'MISSED'}: {mutation.what} ({mutation.file}), "
              f"{time.perf_counter() - start:.0f} s: {message}", flush=True)  # fmt: skip
        if not caught:
            missed.append(mutation.what)
    sys.exit(f"not noticed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
