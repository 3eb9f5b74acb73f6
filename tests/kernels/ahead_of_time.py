"""Compile every kernel variant for a GPU that is not there, and read the machine code that came out.

Triton needs no GPU to compile: given a target (sm_90 is Hopper, sm_100 Blackwell) it runs its passes, calls the
`ptxas` of its own wheel and hands back the binary, which the `nvdisasm` and `cuobjdump` beside it take apart. Much of
what makes a kernel slow or wrong shows there: registers spilled to memory, FP8 products computed some other way than
by the FP8 matrix instruction, copies that no longer run asynchronously, a loop that grew. What does not show:
deadlocks, races, wrong swizzles, the accumulator's width, speed.

A package offers `variants()` (see `headrace_fp8_gemm.variants`): one dict per kernel and configuration, with the keys
name, kernel, signature, constants, options, attributes (argument name -> divisor), targets, expects, and optionally
`source`, the class that turns these into what the compiler reads (ASTSource by default, GluonASTSource for Gluon).

Compilation runs in a process of its own (`compile_package`), because Triton decides at import whether it interprets,
and because two releases of Triton are looked at: the one that the pinned torch names and the newest. Rewrite the
committed budget, after reading why it grew, with

    .venv/bin/python tests/kernels/ahead_of_time.py write-budget
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET = HERE / "instruction_budget.json"
PACKAGES = ("headrace_fp8_quantisation", "headrace_fp8_gemm", "headrace_moe_routing", "headrace_dispatch")
NEWEST = ROOT / ".venv" / "triton-newest"
INSTALL_NEWEST = f"{sys.executable} -m pip install --no-deps --target {NEWEST} triton==3.9.0"
MMA = {"sm_90": re.compile(r"QGMMA\S*\.E4M3\.E4M3"), "sm_100": re.compile(r"UTCQMMA")}
ASYNC_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP")
MMA_PER_GROUP = 4  # a matrix instruction contracts 32 FP8 values: four make 128 of K, after which the sum is promoted


class Instruction(NamedTuple):
    """One line of machine code: its place, whether a predicate guards it, its name with modifiers, its operands."""

    address: int
    guarded: bool
    opcode: str
    operands: str


def read_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of the output of `nvdisasm -c`, and for each label the index of the instruction after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            instructions.append(Instruction(int(match[1], 16), bool(match[2]), match[3], match[4].strip()))
    return instructions, labels


def successors(index: int, instructions: list[Instruction], labels: dict[str, int]) -> list[int]:
    """Indices of the instructions that may run after this one."""
    one = instructions[index]
    following = [index + 1] if index + 1 < len(instructions) else []
    if one.opcode.startswith("BRA"):
        target = labels[re.search(r"\.L_x_\d+", one.operands)[0]]
        always = not one.guarded and re.fullmatch(r"`?\(\.L_x_\d+\)", one.operands)
        return [target] if always else [target, *following]
    return [] if one.opcode in ("EXIT", "RET") and not one.guarded else following


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """The natural loops: a branch back to an instruction that every path to the branch went through (it dominates it),
    and all that lies between. Counting by address would be wrong: waits that fail are retried in code behind EXIT."""
    after = [successors(index, instructions, labels) for index in range(len(instructions))]
    before: list[list[int]] = [[] for _ in instructions]
    for index, targets in enumerate(after):
        for target in targets:
            before[target].append(index)
    found: dict[int, set[int]] = {}
    for end, targets in enumerate(after):
        for head in targets:
            if head <= end and not reaches(end, after, avoiding=head):
                found.setdefault(head, {head}).update(between(head, end, before))
    return [[instructions[index] for index in sorted(body)] for body in found.values()]


def reaches(end: int, after: list[list[int]], avoiding: int) -> bool:
    """Whether the kernel's entry leads to `end` without passing `avoiding`."""
    seen = {avoiding}
    todo = [0] if avoiding else []
    while todo:
        index = todo.pop()
        if index == end:
            return True
        if index not in seen:
            seen.add(index)
            todo.extend(after[index])
    return False


def between(head: int, end: int, before: list[list[int]]) -> set[int]:
    """The instructions from which `end` is reached without passing `head` again."""
    body = {head}
    todo = [end]
    while todo:
        index = todo.pop()
        if index not in body:
            body.add(index)
            todo.extend(before[index])
    return body


def hot_loop(instructions: list[Instruction], labels: dict[str, int], mma: re.Pattern[str]) -> list[Instruction]:
    """The innermost loop that holds an FP8 matrix instruction; warp-specialised kernels hold one per consumer: the
    longest of them. Empty where there is none."""
    if not any(mma.match(one.opcode) for one in instructions):
        return []
    bodies = [body for body in loops(instructions, labels) if any(mma.match(one.opcode) for one in body)]
    innermost = [body for body in bodies if not any(set(other) < set(body) for other in bodies)]
    return max(innermost, key=len, default=[])


def is_cta_barrier(one: Instruction) -> bool:
    """Whether all warps of the thread block wait here (a named barrier of some of them carries a thread count)."""
    return one.opcode.startswith("BAR.SYNC") and "," not in one.operands


def describe_sass(text: str, target: str) -> dict[str, object]:
    """What the disassembly of one kernel shows; `loop_per_128` is the hot loop's length per 128 of K."""
    instructions, labels = read_sass(text)
    assert instructions, "nvdisasm printed no instruction"
    count = Counter(one.opcode.split(".")[0] for one in instructions)
    loop = hot_loop(instructions, labels, MMA[target])
    groups = sum(bool(MMA[target].match(one.opcode)) for one in loop) / MMA_PER_GROUP
    return {
        "instructions": len(instructions),
        "spill_loads": count["LDL"],
        "spill_stores": count["STL"],
        "fp8_mma": sum(bool(MMA[target].match(one.opcode)) for one in instructions),
        "async_copies": sum(bool(ASYNC_COPY.match(one.opcode)) for one in instructions),
        "loop_per_128": round(len(loop) / groups, 2) if groups else None,
        "loop_barriers": sum(map(is_cta_barrier, loop)),
        "loop_opcodes": dict(Counter(one.opcode.split(".")[0] for one in loop).most_common()),
    }


def compile_variant(variant: dict, target: str) -> dict[str, object]:
    """Compile one variant for one target; runs in the process that `compile_package` starts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant["kernel"]
    names = kernel.arg_names
    constants = variant["constants"]
    signature = {name: "constexpr" if name in constants else variant["signature"][name] for name in names}
    hints = variant.get("attributes") or {}
    attributes = {(names.index(name),): [["tt.divisibility", divisor]] for name, divisor in hints.items()}
    source = variant.get("source", ASTSource)(kernel, signature, constants, attributes)
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=gpu, options=dict(variant["options"]))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        # -ndf: without an analysis of the data flow, which takes as long as the rest and adds nothing that is read here
        command = [tools / "nvdisasm", "-c", "-ndf", cubin.name]
        sass = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", cubin.name], text=True)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        **describe_sass(sass, target),
    }


def compile_all(package: str) -> dict[str, object]:
    """Every variant of a package for each of its targets: {"triton": version, "kernels": {"name sm_90": findings}}."""
    import triton

    kernels = {}
    for variant in importlib.import_module(f"{package}.variants").variants():
        for target in variant["targets"]:
            key = f"{variant['name']} {target}"
            assert key not in kernels, f"{package}: two variants are called {key}"
            kernels[key] = {**compile_variant(variant, target), "expects": variant["expects"]}
    return {"triton": triton.__version__, "kernels": kernels}


def compile_package(package: str, triton_folder: Path | None = None, beside: Path | None = None) -> dict:
    """Compile `package` in a process of its own: with the installed Triton or the one in `triton_folder`; `beside` is a
    further folder to import from. Raises RuntimeError with the compiler's last words where it fails."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (triton_folder, beside) if folder)
        command = [sys.executable, str(HERE / "ahead_of_time.py"), "compile", package]
        done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{package} did not compile:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_everything(folder: Path | None) -> dict[str, dict | RuntimeError]:
    """Every package with one Triton, two processes at a time."""

    def attempt(package: str) -> dict | RuntimeError:
        try:
            return compile_package(package, folder)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(PACKAGES, pool.map(attempt, PACKAGES), strict=True))


def budget_of(kernel: dict) -> dict[str, float]:
    """What is held for one kernel: its hot loop per 128 of K, or its whole length where it multiplies no matrices."""
    if kernel["loop_per_128"] is None:
        return {"instructions": kernel["instructions"]}
    return {"loop_per_128": kernel["loop_per_128"], "loop_barriers": kernel["loop_barriers"]}


def write_budget() -> None:
    """Compile everything and commit to what came out."""
    budget: dict[str, dict] = {}
    results = [pair for folder in (None, NEWEST) for pair in compile_everything(folder).items()]
    for package, result in results:
        if isinstance(result, RuntimeError):
            raise SystemExit(str(result))
        kernels = {key: budget_of(kernel) for key, kernel in result["kernels"].items()}
        budget.setdefault(package, {})[result["triton"]] = dict(sorted(kernels.items()))
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"] and len(sys.argv) == 3:
        print(json.dumps(compile_all(sys.argv[2])))
    elif sys.argv[1:] == ["write-budget"]:
        write_budget()
    else:
        raise SystemExit(f"usage: {sys.argv[0]} compile PACKAGE | write-budget")
