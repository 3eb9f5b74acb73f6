"""Everything that only a GPU can say about the kernels, in one command of under eight minutes: `make bench-gpu`.

    python benchmarks/gpu.py            on a GPU: checks, figures, kernels/gpu_results.json; elsewhere one sentence
    python benchmarks/gpu.py --quick    the checks alone, small, in Triton's interpreter where there is no GPU

First every kernel of the four packages is compared with its reference (gpu_checks.py); what is wrong is marked and not
timed, and the exit status is 1. Then: products at DeepSeek-V3's shapes beside PyTorch, torchao and DeepGEMM where they
are installed, quantisers, router, dispatch (the packages' own benchmarks), a MoE feed-forward network and a transformer
layer in FP8 and BF16 (gpu_layers.py). The aims are set from what others published for an H100.

Each part runs in a process of its own with a limit, because a kernel that deadlocks or writes where it must not takes
its process along; rows come back one by one, so that what was measured before counts. `absent` names what was missing.

NOT RUN YET: no GPU was at hand when this was written. The checks and a small layer ran in the interpreter, the
assembling of results on invented rows; everything that needs a GPU has only been read. Meant for torch 2.10 to 2.13 and
triton 3.6 to 3.9.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import gpu_checks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "kernels" / "gpu_results.json"
NOTE = "Written by `make bench-gpu` on the GPU named here; not run in CI."
SECONDS = 470.0  # for everything: what has not begun by then is left out and named
LIMITS = {"gemms": 120.0, "layers": 120.0}  # seconds of a part on a GPU
OTHERS, INTERPRETED = 60.0, 240.0  # of all others, and of a check in the interpreter
MOVERS = "movers (CUDA)"
LAYERS = ("triton moe feed-forward", "triton transformer layer")
OURS = ("triton", "gluon")
QUANTISERS = ("quantise_rows", "quantise_rows_and_columns", "requantise_columns", "quantise_weight")  # of a layer
MARK = "@row "
SECTIONS = ("gemms", "quantisers", "routing", "dispatch", "layers", "aims")
SCRIPTS = {"quantisation": "fp8_quantisation", "routing": "moe_routing", "dispatch": "dispatch"}
AIMS = [  # what, unit, aim, rows of which section, and which of them
    ("dense, K >= 7168", "TFLOPS", 1250.0, "gemms", lambda row: row["product"] == "dense" and k_of(row) >= 7168),
    ("m-grouped", "TFLOPS", 1230.0, "gemms", lambda row: row["product"] == "m_grouped"),
    ("k-grouped weight gradient", "TFLOPS", 800.0, "gemms", lambda row: row["product"] == "k_grouped"),
    ("quantisers", "TB/s", 2.5, "quantisers", lambda row: "quantise" in row["kernel"]),
    ("FP8 layer, times the speed of BF16", "x", 1.5, "layers", lambda row: row["module"] == "transformer layer"),
]
FIGURES = {"TFLOPS": "tflops", "TB/s": "tb_s", "x": "speed_up"}
Run = Callable[[str, list[str], float], tuple[list[dict[str, Any]], str]]


def main() -> int:
    """Check, measure, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the checks; no figures, no file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file to write")
    parser.add_argument("--commit", help="hash of the source, where there is no git to ask")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a process of ours runs
    parser.add_argument("--wrong", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        for row in run_part(arguments.part, arguments.wrong.split(",")):
            print(MARK + json.dumps(row), flush=True)
        return 0
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.quick:
        print("There is no GPU here: nothing was measured and no file written (--quick checks in the interpreter).")
        return 0
    commit = arguments.commit or git("rev-parse", "HEAD")
    if cuda and not arguments.quick and not commit:
        print("There is no git here to say what is measured: give --commit HASH.")
        return 2
    results = collect(in_process, arguments.quick, cuda)
    rows = [{"section": section} | row for section in SECTIONS for row in results.get(section, [])]
    status = report(results["correctness"], rows, list((results["absent"] | results["failures"]).items()))
    if not arguments.quick:
        arguments.output.write_text(json.dumps(machine(commit) | results, indent=1) + "\n")
        print(f"\nWritten: {arguments.output}")
    return int(status or bool(results["failures"]))


def collect(run: Run, quick: bool, cuda: bool) -> dict[str, Any]:
    """Checks, then figures; `run` starts a part and gives its rows and why it ended early, or nothing."""
    started = time.monotonic()
    results: dict[str, Any] = {"correctness": {}, "failures": {}, "absent": {}}

    def part(name: str, options: list[str]) -> list[dict[str, Any]]:
        left = SECONDS - (time.monotonic() - started)
        limit = min(left, LIMITS.get(name, OTHERS if cuda else INTERPRETED))
        rows, failure = run(name, options, limit) if left > 5 else ([], "no time was left")
        if failure:
            results["failures"][name] = failure
        return rows

    def check(name: str) -> None:
        rows = part(f"check {name}", [])
        names = LAYERS if name == "layers" else gpu_checks.PARTS[name][1]
        results["correctness"] |= verdicts(names, rows, results["failures"].get(f"check {name}", ""))

    gluon = [name for name in gpu_checks.PARTS if name.startswith("gluon")]
    with ThreadPoolExecutor(max_workers=4 if cuda else 1) as pool:
        list(pool.map(check, [name for name in gpu_checks.PARTS if name not in gluon]))
    for name in gluon if cuda else ["layers"]:  # alone: one that hangs would slow the others down
        check(name)
    if cuda and not quick:
        results["correctness"][MOVERS] = movers(part("movers", []))
    if quick:
        return results | {"seconds": time.monotonic() - started}

    wrong = wrong_ones(results["correctness"])
    rows = part("gemms", ["--wrong", ",".join(wrong)])
    results["gemms"] = [row for row in rows if "product" in row]
    results["absent"] = {row["absent"]: row["reason"] for row in rows if "absent" in row}
    for name in SCRIPTS:
        lost = name != "quantisation" and set(gpu_checks.PARTS[name][1]) & set(wrong)
        found = [] if lost else part(f"script {name}", [])
        results["quantisers" if name == "quantisation" else name] = found
    for row in (row for whole in results["quantisers"] for row in whole.get("rows", [])):
        if row["kernel"] in wrong:
            row.pop("tb_s", None)
            row["wrong"] = "wrong in the checks"
    results["copy_tb_s"] = next((whole["copy_tb_s"] for whole in results["quantisers"]), None)
    results["quantisers"] = [row for whole in results["quantisers"] for row in whole["rows"]]
    results["layers"] = with_speed_ups(part("layers", ["--wrong", ",".join(wrong)]))
    results["aims"] = list(compare_with_aims(results))
    return results | {"seconds": time.monotonic() - started}


def verdicts(names: tuple[str, ...], rows: list[dict[str, Any]], failure: str) -> dict[str, dict[str, Any]]:
    """Right is what a part that ended well found right in every case; silence is wrong, and so is an early end."""
    found = {}
    for name in names:
        wrongs = [row["wrong"] for row in rows if row["name"] == name]
        wrong = next(filter(None, wrongs), "") or failure or ("" if wrongs else "no answer")
        found[name] = {"passed": not wrong, "detail": wrong}
    return found


def wrong_ones(checks: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the kernels that gave a wrong result or none."""
    return [name for name, found in checks.items() if found["passed"] is False]


def in_process(name: str, options: list[str], limit: float) -> tuple[list[dict[str, Any]], str]:
    """Run a part in a process of its own; its rows, and why it ended early."""
    command = [sys.executable, str(Path(__file__)), "--part", name, *options]
    if name.startswith("script "):
        command = [sys.executable, str(ROOT / "kernels" / SCRIPTS[name[7:]] / "benchmarks" / "benchmark.py")]
    if name == "movers":
        test = "kernels/dispatch/tests/test_dispatch_movers.py"
        command = [sys.executable, "-m", "pytest", "-rs", "-m", "gpu", "--timeout", "170", test]
        limit = 3 * limit  # nvcc takes a minute
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, error = process.communicate(timeout=limit)
        status = process.returncode
        last = (error.strip() or out.strip() or "it said nothing").splitlines()[-1]
        failure = f"exit status {status}: {last}" if status else ""
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        failure = f"no end after {limit:.0f} s"
    lines = out.splitlines()
    if name == "movers":
        return [{"summary": lines[-1] if lines else "", "status": process.returncode}], ""
    if name.startswith("script "):
        return [json.loads(line) for line in lines[-1:] if line.startswith("{")], failure
    return [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)], failure


def run_part(name: str, wrong: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one part; runs in the process that `in_process` starts."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        gpu_checks.load_script(ROOT / "kernels" / "interpreter.py").interpret()
    if name == "check layers":
        for row in importlib.import_module("gpu_layers").measure(("triton",), "cpu", quick=True):
            yield {"name": f"triton {row['module']}", "wrong": row.get("wrong", row.get("failed", ""))}
    elif name.startswith("check "):
        for kernel, found in gpu_checks.PARTS[name.removeprefix("check ")][0]():
            yield {"name": kernel, "wrong": found}
    elif name == "gemms":
        yield from gemms(wrong)
    elif name == "layers":
        layers = importlib.import_module("gpu_layers")
        usable = tuple(one for one in OURS if not any(item.startswith(f"{one} ") for item in wrong))
        yield from layers.measure(() if set(QUANTISERS) & set(wrong) else usable)


def gemms(wrong: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of fp8_gemm's benchmark, and of the experts' input gradients, by every back end that is right."""
    benchmark = gpu_checks.load_script(ROOT / "kernels" / "fp8_gemm" / "benchmarks" / "benchmark.py")
    back_ends, absent = benchmark.find_back_ends()
    yield from ({"absent": name, "reason": reason} for name, reason in absent.items())
    for case in benchmark.cases():
        yield from gemm_rows(benchmark, case, case.shape, back_ends, wrong)
    for outputs, inputs, what in ((7168, 4096, "input gradient, up"), (2048, 7168, "input gradient, down")):
        experts, tokens = 8, 4096
        groups = torch.arange(experts, dtype=torch.int32, device="cuda").repeat_interleave(tokens // 128)
        a = benchmark.quantise(experts * tokens, inputs, tile=(1, 128))
        b = (part.unflatten(0, (experts, -1)) for part in benchmark.quantise(experts * outputs, inputs, (128, 128)))
        shape, flops = f"E{experts} M{tokens} N{outputs} K{inputs}", 2.0 * experts * tokens * outputs * inputs
        case = benchmark.Case("m_grouped", shape, flops, (*a, *b, groups), experts)
        yield from gemm_rows(benchmark, case, f"{shape}, {what}", back_ends, wrong)


def gemm_rows(
    benchmark: Any, case: Any, shape: str, back_ends: dict[str, Any], wrong: list[str]
) -> Iterator[dict[str, Any]]:
    """One case; the accumulation of `dense` speaks for the products that share its loop."""
    marked = {one for one in OURS if {f"{one} {case.kind}", f"{one} accumulation"} & set(wrong)}
    for name in marked & back_ends.keys():
        yield {"product": case.kind, "shape": shape, "back_end": name, "failed": "wrong in the checks, not timed"}
    right = {name: prepare for name, prepare in back_ends.items() if name not in marked}
    yield from (row | {"shape": shape} for row in benchmark.measure_case(case, right))


def movers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on the CUDA movers from their test: right, wrong, or not run (no nvcc, no sm_90)."""
    summary, status = (rows[0]["summary"], rows[0]["status"]) if rows else ("no time was left", 1)
    if "failed" in summary or "error" in summary or (status and "skipped" not in summary):
        return {"passed": False, "detail": summary or "the test did not end"}
    return {"passed": True if "passed" in summary else None, "detail": "" if "passed" in summary else summary}


def with_speed_ups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FP8 rows with how many times faster than BF16 they are."""
    plain = {row["module"]: row["ms"] for row in rows if row["precision"] == "bf16" and "ms" in row}
    timed = lambda row: row["precision"].startswith("fp8") and row["module"] in plain and "ms" in row  # noqa: E731
    return [row | {"speed_up": plain[row["module"]] / row["ms"]} if timed(row) else row for row in rows]


def compare_with_aims(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Our best and worst figure beside every aim; the aim is met where the worst meets it."""
    for what, unit, aim, section, belongs in AIMS:
        best: dict[str, float] = {}  # by shape: the better of our back ends
        for row in results[section]:
            ours = row.get("back_end", "triton") in OURS
            if ours and FIGURES[unit] in row and belongs(row):
                key = f"{row.get('kernel', '')} {row.get('shape', row.get('module'))}"
                best[key] = max(best.get(key, 0.0), row[FIGURES[unit]])
        low, high = (min(best.values()), max(best.values())) if best else (None, None)
        yield {"what": what, "unit": unit, "aim": aim, "lowest": low, "highest": high, "met": bool(best) and low >= aim}


def k_of(row: dict[str, Any]) -> int:
    """K of a shape such as 'M4096 N7168 K16384'."""
    return int(row["shape"].rpartition("K")[2].partition(",")[0])


def machine(commit: str | None) -> dict[str, Any]:
    """What was measured, on what, and when."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    told = command_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")
    values = dict(zip(query.split(","), [value.strip() for value in (told or "").split(",")], strict=False))
    triton = importlib.import_module("triton").__version__
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton}
    return {
        "benchmark": "gpu",
        "note": NOTE,
        "card": torch.cuda.get_device_name(),
        "driver": values.pop("driver_version", None),
        "clocks": values or None,
        "versions": versions | {"cuda": torch.version.cuda or ""},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def git(*words: str) -> str | None:
    """What git says about this tree."""
    return command_output("git", "-C", str(ROOT), *words)


def command_output(*command: str) -> str | None:
    """Standard output of a command, or nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def report(checks: dict[str, dict[str, Any]], rows: list[dict[str, Any]], missing: list[tuple[str, str]]) -> int:
    """Print verdicts, figures, and what is missing with its reason; 1 where a kernel is wrong."""
    for name, found in checks.items():
        print(f"{name:28} {'not run: ' * (found['passed'] is None)}{found['detail'] or 'right'}")
    for row in rows:
        print(
            "   ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items())
        )
    for name, reason in missing:
        print(f"{name}: {reason}")
    return int(bool(wrong_ones(checks)))


if __name__ == "__main__":
    sys.exit(main())
