"""Turn CUDA sources into C++ for the emulator.

Launches, shared variables, launch bounds and PTX become calls of emulator.h; lines keep their
numbers. Each PTX text has its C++ here, which was compared with NVIDIA's description of the PTX
(PTX ISA 9.0) by reading: PTX that is not listed is an error.
"""

import re

POINTER = "mad.wide.s32 %0, %1, %2, %3;"
PTX = {
    "": "",
    # d = a * b + c, the product of two signed 32-bit numbers in 64 bits.
    POINTER: "{0} = ::emulator::mad_wide({1}, {2}, {3})",
    # Approximately 2^a: here exactly, within its error of 2^-22. Subnormal numbers count as zero.
    "ex2.approx.ftz.f32 %0, %1;": "{0} = std::exp2({1})",
    # A predicated instruction does nothing where the predicate is false. neu: also true for NaN.
    "{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}": (
        "if ({5} != 0) ::emulator::load_v4({0}, {1}, {2}, {3}, {4})"
    ),
    "{.reg .pred p; setp.neu.f32 p, %5, 0f00000000; "
    "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}": (
        "if ({5} != 0.f) ::emulator::load_v4({0}, {1}, {2}, {3}, {4})"
    ),
    # Fused in hardware, two roundings here.
    "{.reg .pred p; setp.ne.s32 p, %3, 0; @p fma.rn.f32 %0, %1, %2, %0;}": (
        "if ({3} != 0) {0} = {1} * {2} + {0}"
    ),
    "{.reg .pred p; setp.neu.f32 p, %1, 0f00000000; @p fma.rn.f32 %0, %1, %2, %0;}": (
        "if ({1} != 0.f) {0} = {1} * {2} + {0}"
    ),
    # red: an atomic sum without a result; relaxed.gpu: visible to the device, ordered by nothing.
    **{
        f"{{.reg .pred p; setp.ne.s32 p, %2, 0; @p red.relaxed.gpu.global.add.{kind} [%0], %1;}}": (
            "if ({2} != 0) ::emulator::atomic_add({0}, {1})"
        )
        for kind in ("f32", "f64", "u64")
    },
    "{.reg .pred p; setp.neu.f32 p, %5, 0f00000000; "
    "@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};}": (
        "if ({5} != 0.f) ::emulator::red_v4({0}, {1}, {2}, {3}, {4})"
    ),
}

OPENING, CLOSING = "([{", ")]}"


def closing(text: str, start: int) -> int:
    """Return the position behind the bracket that closes the one at `start`."""
    depth, i = 0, start
    while True:
        if text[i] == '"':
            i = re.compile(r'"(\\.|[^"\\])*"').match(text, i).end()
            continue
        depth += (text[i] in OPENING) - (text[i] in CLOSING)
        i += 1
        if depth == 0:
            return i


def split(text: str, separator: str) -> list[str]:
    """Split at separators outside of brackets and strings."""
    parts, i, start = [], 0, 0
    while i < len(text):
        if text[i] == '"':
            i = re.compile(r'"(\\.|[^"\\])*"').match(text, i).end()
        elif text[i] in OPENING:
            i = closing(text, i)
        else:
            if text[i] == separator:
                parts.append(text[start:i])
                start = i + 1
            i += 1
    return [part.strip() for part in (*parts, text[start:])]


def replace(text: str, start: int, end: int, new: str) -> str:
    """Replace a part by one with as many lines."""
    return text[:start] + new + "\n" * text[start:end].count("\n") + text[end:]


def launches(text: str) -> str:
    """kernel<<<grid, threads, shared, stream>>>(arguments)."""  # noqa: D400
    while (at := text.find("<<<")) >= 0:
        start = len(text[:at].rstrip())
        if text[start - 1] == ">":  # template arguments
            depth = 1
            while depth:
                start -= 1
                depth += (text[start - 1] == ">") - (text[start - 1] == "<")
            start -= 1
        start = re.search(r"[\w:]+$", text[:start]).start()
        middle = text.index(">>>", at)
        end = closing(text, middle + 3)
        config = split(text[at + 3 : middle], ",")
        grid, threads, shared = (*config, "0")[:3]
        kernel = " ".join(text[start:at].split())
        arguments = " ".join(text[middle + 4 : end - 1].split())
        call = f"[=](auto... a) {{ {kernel}(a...); }}"
        call = f"::emulator::launch({grid}, {threads}, {shared}, {call}, {arguments})"
        text = replace(text, start, end, call)
    return text


def assembly(text: str) -> str:
    while match := re.search(r"\basm\b(\s+volatile)?\s*\(", text):
        end = closing(text, match.end() - 1)
        code, *operands = split(text[match.end() : end - 1], ":")
        ptx = "".join(re.findall(r'"((?:\\.|[^"\\])*)"', code))
        ptx = " ".join(ptx.replace("\\n", " ").replace("\\t", " ").split())
        if ptx not in PTX:
            raise ValueError(f"translate.py has no C++ for the PTX {ptx!r}")
        values = [
            "(" + " ".join(re.fullmatch(r'"[^"]*"\s*\((.*)\)', operand, re.DOTALL)[1].split()) + ")"
            for group in operands[:2] if group for operand in split(group, ",")
        ]  # fmt: skip
        text = replace(text, match.start(), end, PTX[ptx].format(*values))
    return text


def launch_bounds(text: str) -> str:
    """Check the bounds at the start of a kernel's body."""
    while match := re.search(r"__launch_bounds__\s*\(", text):
        end = closing(text, match.end() - 1)
        most = split(text[match.end() : end - 1], ",")[0]
        body = text.index("{", closing(text, text.index("(", end))) + 1
        check = f" ::emulator::check_launch_bounds({most});"
        text = text[:body] + check + text[body:]
        text = replace(text, match.start(), end, "")
    return text


def shared_variables(text: str) -> str:
    def declare(match: re.Match) -> str:
        is_dynamic, kind, name, size = match.groups()
        line = text.count("\n", 0, match.start())
        call = (
            f"::emulator::shared_memory(sizeof({name}_type), alignof({name}_type), "
            f'"{name}:{line}", {str(bool(is_dynamic)).lower()})'
        )
        return (
            f"using {name}_type = {kind}{'[1]' if is_dynamic else size}; "
            f"auto& {name} = *static_cast<{name}_type*>({call});"
        )

    pattern = r"(extern\s+)?\b__shared__\s+([\w:<>, ]+?)\s+(\w+)((?:\[[^\]]*\])*);"
    text = re.sub(pattern, declare, text)
    if "__shared__" in text:
        raise ValueError("translate.py does not understand a shared variable")
    return text


def translate(text: str, name: str) -> str:
    """Return a file of csrc/cuda (or csrc, which kernels include) as C++. name: for messages."""
    text = launches(assembly(launch_bounds(shared_variables(text))))
    text = text.replace("__CUDA_ARCH__", "EMULATED_CUDA_ARCH")
    text = re.sub(r"#include <(c10/cuda|ATen/cuda|cuda)[\w/]*\.h>", '#include "emulator.h"', text)
    text = re.sub(r"TORCH_LIBRARY_IMPL\((\w+), CUDA,", r"TORCH_LIBRARY_IMPL(\1, CPU,", text)
    return f'#line 1 "{name}"\n{text}'
