"""Report instructions, registers and occupancy of the compiled kernels of deformable attention.

    python dev/sass_report.py [LIBRARY] [--arch sm_90] [--all] [--opcodes]

Reads the machine code of the built library (or a cubin) with cuobjdump, which is part of the CUDA
toolkit and of Triton. Prints the instructions that a warp issues for one sample of one query and
head, with 16 samples (4 levels of 4 points):

- corners: the innermost loop that reads corners (backward: the loop that reads and adds them and
  computes sample positions);
- samples: the rest of the next outer loop, where lanes compute sample positions;
- rest: everything else in the kernel, divided by the number of samples.

Two numbers if code may be skipped (padding, boxes, the last samples, error paths): with all of it
skipped, and with none. Loops over logits are counted once, as 16 samples need. Memory and stalls
are not included: this does not measure time. --opcodes: what the loop over corners consists of, per
sample, none of it skipped.

Exits with an error if a kernel has atomics on memory whose address space the compiler does not
know.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

SAMPLES = 16
REGISTERS, MOST_WARPS = 65536, 64  # of a multiprocessor, sm_80 and sm_90
THREADS = {"forward": 512, "backward": 256}  # of a block
TYPES = {"f": "fp32", "d": "fp64", "N3c108BFloat16E": "bf16", "N3c104HalfE": "fp16"}
# A mangled name: types (S3_ is one that came before), integers, and how gradients are summed.
KERNEL = re.compile(
    r"(?P<name>forward|backward)_kernelI(?P<value>f|d|N3c108BFloat16E|N3c104HalfE)"
    r"(?P<offset>f|d|S\d*_)[fd]Li(?P<vector>\d+)ELi(?P<lanes>\d+)ELi(?P<stride>\d+)E(?P<rest>.*)"
)
READ, BRANCH = re.compile(r"\bLDG\.E\.128"), re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


def find_tool(name):
    """Find one of NVIDIA's binary tools: on the PATH, in the toolkit, or in Triton's wheel."""
    folders = [Path("/usr/local/cuda/bin")]
    folders += [Path(p) / "triton/backends/nvidia/bin" for p in sys.path]
    return shutil.which(name) or next(
        (str(folder / name) for folder in folders if (folder / name).is_file()), None
    )


def call(tool, flag, library, arch):
    arguments = [tool, flag, *(["-arch", arch] if library.suffix == ".so" else []), library]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


def read_code(text):
    """Return {function: [(address, instruction)]}."""
    functions = {}
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = functions.setdefault(match.group(1), [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?!NOP)(.+?);", line):
            code.append((int(match.group(1), 16), match.group(2).strip()))
    return functions


def read_resources(text):
    """Return {function: {"REG": registers, "STACK": bytes, "SHARED": bytes, ...}}."""
    found = re.findall(r"Function (\S+):\s*\n?\s*(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", use)} for name, use in found}


def branches(code):
    """[(address, target)] of all jumps."""
    found = ((address, BRANCH.search(text)) for address, text in code)
    return [(address, int(match.group(1), 16)) for address, match in found if match]


def within(address, region):
    return region[0] <= address <= region[1]


def loops_over_corners(code):
    """Return (addresses of 128-bit reads, the loops with at least four, innermost first)."""
    reads = [address for address, text in code if READ.search(text)]
    loops = [(to, at) for at, to in branches(code) if to < at]
    loops = [loop for loop in loops if sum(within(a, loop) for a in reads) >= 4]
    return reads, sorted(loops, key=lambda loop: loop[1] - loop[0])


def opcodes(code, lanes):
    """Return {opcode: instructions of a warp for a sample of a query and head} of that loop."""
    reads, loops = loops_over_corners(code)
    samples = sum(within(a, loops[0]) for a in reads) / 4 * (32 // lanes)
    names = (re.sub(r"^@!?U?P\w+ ", "", text) for a, text in code if within(a, loops[0]))
    counts = Counter(name.split()[0].split(".")[0] for name in names)
    return {name: count / samples for name, count in counts.most_common()}


def instructions(code, lanes):
    """[(least, most)] for a sample of a query and head: corners, samples, rest. None if unclear."""
    jumps = branches(code)
    reads, loops = loops_over_corners(code)
    if not loops:
        return None
    skips = [(at + 16, to - 16) for at, to in jumps if to > at]
    skips = [s for s in skips if not any(within(a, s) for a in reads)]
    needed = [address for address, _ in code if not any(within(address, s) for s in skips)]
    everything = [address for address, _ in code]
    groups = 32 // lanes
    figures = []
    for addresses in (needed, everything):
        inner, outer = loops[0], loops[-1]
        in_inner = sum(within(a, inner) for a in addresses)
        in_outer = sum(within(a, outer) for a in addresses)
        a_round = sum(within(a, inner) for a in reads) / 4
        figures.append(
            (
                in_inner / a_round / groups,
                (in_outer - in_inner) / min(lanes, SAMPLES) / groups,
                (len(addresses) - in_outer) / SAMPLES / groups,
            )
        )
    return list(zip(*figures, strict=True))


def warps(registers, threads):
    """Return warps per multiprocessor; registers are allocated in units of 8 per thread."""
    block = threads // 32
    return min(MOST_WARPS, REGISTERS // (-(-registers // 8) * 8 * 32)) // block * block


def show(pair):
    least, most = pair
    return f"{least:.1f}" if most - least < 0.05 else f"{least:.1f} - {most:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", type=Path, nargs="?", help="default: the built one")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument(
        "--all", action="store_true", help="all kernels, not only 8 heads of 32 channels"
    )
    parser.add_argument("--opcodes", action="store_true")
    options = parser.parse_args()
    package = Path(__file__).resolve().parents[1] / "projects/dn_detr"
    library = options.library or next(package.glob("_C*.so"), None)
    tool = find_tool("cuobjdump")
    if library is None or tool is None:
        sys.exit("needs the built library and cuobjdump (CUDA toolkit, or pip install triton)")
    resources = read_resources(call(tool, "-res-usage", library, options.arch))
    print("| kernel | corners | samples | rest | sum | registers | stack | shared | warps |")
    print("|---|---|---|---|---|---|---|---|---|")
    functions = read_code(call(tool, "-sass", library, options.arch))
    for function, code in sorted(functions.items()):
        match = KERNEL.search(function)
        if not match or not (options.all or match["stride"] == "256"):
            continue
        value = TYPES[match["value"]]
        offset = value if match["offset"].startswith("S") else TYPES[match["offset"]]
        tiling = f"{match['lanes']} lanes of {match['vector']}"
        kind = "" if match["name"] == "forward" else ", sums of int64" * ("FixedPoint" in function)
        use = resources[function]
        parts = instructions(code, int(match["lanes"]))
        sums = [sum(figure) for figure in zip(*parts, strict=True)] if parts else None
        cells = [show(part) for part in (*parts, sums)] if parts else ["-"] * 4
        name = f"{match['name']} {value}, offsets {offset}, {tiling}{kind}"
        occupancy = warps(use["REG"], THREADS[match["name"]])
        cells += [str(use["REG"]), str(use["STACK"]), str(use["SHARED"])]
        print(f"| {name} | {' | '.join(cells)} | {occupancy} of {MOST_WARPS} |")
        if options.opcodes and parts:
            found = opcodes(code, int(match["lanes"])).items()
            print("   ", ", ".join(f"{opcode} {count:.2f}" for opcode, count in found))
    asking = [name for name, code in functions.items() if any("QSPC" in text for _, text in code)]
    if asking:
        sys.exit("\nAtomics that return a value and check the address space: " + ", ".join(asking))


if __name__ == "__main__":
    main()
