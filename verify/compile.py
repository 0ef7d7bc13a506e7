"""Compile every kernel launch of the Triton implementation ahead of time, without a GPU:
`python -m verify.compile --help`. The launches are those of `launches.py`."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from . import budgets
from .launches import OPERANDS, TARGETS, Launch, element_type, launches

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def resources(target: str, kernel: Any, counted: bool) -> dict[str, Any]:
    """Registers, spills and shared memory of a compiled kernel; if it is `counted`, which NVIDIA's
    tools can do, also its `budgets.Count`."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        spills = number("vgpr_spill_count") + number("sgpr_spill_count")
        return {
            "registers": number("vgpr_count"),
            "spills": spills,
            "shared": kernel.metadata.shared,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def shown(tool: str, option: str) -> str:
            return subprocess.run(
                [BIN / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout

        text = shown("cuobjdump", "--dump-resource-usage")
        # The disassembler takes half a second, as long as the compilation.
        code = shown("nvdisasm", "-c") if counted else ""
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    # A call of the slow path of a division or a root needs a stack frame, which is not a spill.
    if stack <= 8:
        stack = 0
    used = {"registers": registers, "spills": stack + local, "shared": kernel.metadata.shared}
    if counted:
        used["count"] = budgets.count(code, kernel.metadata.num_warps)
        used["ahead"] = budgets.AHEAD in code
    return used


def compile_launch(launch: Launch) -> dict[str, Any]:
    """The result of compiling one launch: its resources and the matrix instructions it uses."""
    from pre_kernels.fused.kernels import (
        activation,
        finish,
        gram,
        matmul,
        norm,
        quantize,
        row_loss,
        rows,
        weight_grad,
    )

    modules = (activation, finish, gram, matmul, norm, quantize, row_loss, rows, weight_grad)
    kernel = next(
        vars(module)[launch.kernel] for module in modules if launch.kernel in vars(module)
    )
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned
    }
    source = ASTSource(kernel, launch.signature, launch.constants, attributes)
    compiled = triton.compile(source, target=TARGETS[launch.target], options=launch.options)
    code = compiled.asm.get("ptx", "")
    present_words = {
        word: word in code
        for word in ("wgmma", "tcgen05.mma", "mma.sync", "tf32", "cp.async.bulk.tensor")
    }
    return {
        "name": launch.name,
        "target": launch.target,
        "kernel": launch.kernel,
        # The weight that is quantised is not an operand of a matmul.
        "dtype": next(
            (
                element_type(kind)
                for name, kind in launch.signature.items()
                if name in OPERANDS and launch.tile
            ),
            None,
        ),
        "precision": launch.constants.get("PRECISION"),
        "fusion": launch.options.get("enable_fp_fusion"),
        "budget": launch.budget,
        **resources(launch.target, compiled, bool(launch.budget) or present_words["wgmma"]),
        "instructions": [word for word, present in present_words.items() if present],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels for NVIDIA and AMD GPUs, "
        "and report what each one uses.",
        epilog="examples:\n"
        "  python -m verify.compile\n"
        "  python -m verify.compile --json kernels.json --jobs 8\n"
        "  python -m verify.compile --targets sm90 --only 128x256",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (default: 2)")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all"
    )
    parser.add_argument("--only", default="", help="only launches whose name contains this")
    arguments = parser.parse_args()
    todo = [launch for launch in launches(arguments.targets) if arguments.only in launch.name]
    if not todo:
        parser.error(f"--only: got {arguments.only!r}, want a part of the name of a launch")
    results = []
    print(f"{len(todo)} kernels, triton {triton.__version__}", flush=True)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(compile_launch, launch) for launch in todo]):
            result = future.result()
            results.append(result)
            used = (
                f"{result['registers']:4} registers  {result['spills']:4} spilled bytes  "
                f"{result['shared']:7} B shared"
            )
            issued = f"{result['count'].issued:6} issued" if "count" in result else " " * 13
            print(
                f"{used}  {issued}  {','.join(result['instructions']):26} {result['name']}",
                flush=True,
            )
    results.sort(key=lambda result: result["name"])
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "kernels": results}, indent=1)
        )
    spilled = sum(result["spills"] > 0 for result in results)
    over = [
        result for result in results if result["budget"] and result["count"].over(result["budget"])
    ]
    for result in over:
        allowed = budgets.BUDGETS.get(result["budget"])
        wanted = f"no budget {result['budget']!r} in verify/budgets.py"
        if allowed is not None:
            wanted = f"want at most {allowed}"
        print(f"{result['name']}: {result['count']}, {wanted}")
    print(
        f"{len(results)} kernels compiled by triton {triton.__version__}, "
        f"{spilled} spill, {len(over)} over budget"
    )
    raise SystemExit(spilled > 0 or len(over) > 0)


if __name__ == "__main__":
    main()
