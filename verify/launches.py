"""The launches of the Triton kernels, recorded from real calls of `fused_pre_loss`: exactly the
kernels that would run are compiled ahead of time."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
TILE_ARCH = {"sm80": "sm80", "sm90": "sm90", "sm100": "sm100", "gfx942": "gfx", "gfx950": "gfx"}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}
WIDE, ODD, LONG = (4096, 4096, 4096), (123, 252, 507), (1024, 16384, 16384)
LONG_HIDDEN = (16384, 1024, 1024)
# numbers of rows: each takes different tiles
MANY, SOME, FEW = 8192, 512, 256
# bytes of workspace in which MANY rows of WIDE take several chunks
PARTS = 256 << 20


@dataclass
class Launch:
    """One specialisation of a kernel for one target."""

    target: str
    kernel: str
    constants: dict[str, Any]
    signature: dict[str, str]
    aligned: list[str]  # arguments known to be multiples of 16
    options: dict[str, Any]

    @property
    def width(self) -> str:
        return (
            "".join(
                sorted({"bf16", "fp16"} & {element_type(kind) for kind in self.signature.values()})
            )
            or "fp32"
        )

    @property
    def tile(self) -> str:
        return "x".join(str(self.constants[name]) for name in TILE if name in self.constants)

    @property
    def unaligned(self) -> bool:
        return not ({"K", "N", "Z", "D", "M"} & set(self.aligned) or self.kernel in NO_WIDTH)

    @property
    def name(self) -> str:
        flags = [
            str(v) if isinstance(v, str) else k.lower()
            for k, v in self.constants.items()
            if v and k.isupper()
        ]
        words = [
            self.target,
            self.kernel,
            self.width,
            self.tile,
            *(flag for flag in flags if flag not in SHAPES),
        ]
        return " ".join(word for word in words if word) + " unaligned" * self.unaligned

    @property
    def budget(self) -> str:
        """Its name in `budgets.BUDGETS`; empty for another target and for an uncommon width. For a
        pass over rows the common width is a block of 4,096 in bfloat16."""
        rows = {"ROWS": 1, "BLOCK": 4096, "WHOLE": True}
        known = self.constants
        common = self.kernel in NO_WIDTH or bool(self.tile)
        common |= self.width == "bf16" and all(
            known.get(name, value) == value for name, value in rows.items()
        )
        if self.target != "sm90" or self.unaligned or not common:
            return ""
        words = [
            self.kernel,
            self.tile,
            *(value for value in known.values() if isinstance(value, str)),
        ]
        if known.get("TRANSPOSED"):
            words.append("transposed")
        if self.signature.get("q_ptr", "constexpr") != "constexpr":
            words.append("float8")
        if known.get("ZERO_PADDING") and known.get("COUNT"):
            words.append("zero padding")
        return " ".join(word for word in words if word)


def element_type(kind: str) -> str:
    """The element type of a pointer or a descriptor: "bf16" for "*bf16" and for
    "tensordesc<bf16[128, 64]>"."""
    return re.sub(r"^(\*|tensordesc<)(\w+).*", r"\2", kind)


# the operands whose dtype is that of the matmul
OPERANDS = ("w_ptr", "w", "dy_ptr", "dy")
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
NO_WIDTH = (
    "gram_kernel",
    "count_kernel",
    "select_kernel",
    "invert_kernel",
    "divisor_kernel",
    "reduce_kernel",
    "scale_kernel",
    "quantize_kernel",
)
SHAPES = ("block_m", "block_n", "block_k", "group_m", "block", "rows", "columns")


def recorded(target: str, run_step: Any) -> list[Launch]:
    """The launches of `run_step()` with the tiles of `target`; no kernel runs."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
        bound = kernel.signature.bind(*args, **kwargs).arguments
        constants = {}
        signature = {}
        aligned = []
        for parameter in kernel.params:
            value = bound[parameter.name]
            special = not parameter.do_not_specialize
            if (
                parameter.is_constexpr
                or value is None
                or (isinstance(value, int) and value == 1 and special)
            ):
                constants[parameter.name], signature[parameter.name] = value, "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                aligned.append(parameter.name)
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = mangle_type(value)
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and special:
                    aligned.append(parameter.name)
        launches.append(Launch(target, kernel.fn.__name__, constants, signature, aligned, options))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("pre_kernels.loss.unavailable", return_value=None),
        mock.patch("pre_kernels.fused.steps_blas.linear"),
        mock.patch("pre_kernels.fused.steps_blas.scaled_linear"),
        mock.patch(
            "pre_kernels.fused.steps_blas.add_product",
            lambda total, dy, x, first: total.dtype == dy.dtype,
        ),
        mock.patch("pre_kernels.fused.kernels.tiles.arch", return_value=TILE_ARCH[target]),
    ):
        run_step()
    return launches


def step(
    dtype: torch.dtype,
    widths: tuple[int, int, int],
    rows: str,
    autocast: bool = False,
    impl: str = "triton",
    total: int = MANY,
    depth: int = 2,
    **options: Any,
) -> None:
    """A forward and backward of `fused_pre_loss` on uninitialised tensors."""
    from pre_kernels import fused_pre_loss

    d, m, z = widths
    weights = torch.float32 if autocast else dtype
    selection = {
        "mask": torch.ones(total, dtype=torch.bool),
        "index": torch.arange(total),
        "index32": torch.arange(total, dtype=torch.int32),
        "all": None,
    }[rows]
    layers = {1: ((z, d),), 2: ((m, d), (z, m)), 3: ((m, d), (m, m), (z, m))}[depth]
    leaves = {"hidden": torch.empty(total, d, dtype=weights), "w2": None, "b2": None}
    for i, shape in enumerate(layers, 1):
        leaves[f"w{i}"] = torch.empty(shape, dtype=weights)
        leaves[f"b{i}"] = torch.empty(shape[0], dtype=weights)
    if options.get("norm") == "layer":
        leaves |= {f"norm_{x}": torch.empty(d, dtype=weights) for x in ("weight", "bias")}
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    anchor = torch.empty(total, z, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = fused_pre_loss(anchor=anchor, rows=selection, impl=impl, **leaves, **options)
    loss.sum().backward()


def each_product(dtype: torch.dtype, n: int, width: int) -> None:
    """Launch each form of the matmul kernels, with n rows and square weights."""
    from pre_kernels.fused.kernels.matmul import matmul
    from pre_kernels.fused.kernels.weight_grad import add_weight_grad

    x, y, w = (torch.empty(rows, width, dtype=dtype) for rows in (n, n, width))
    total, count = torch.empty(width, width), torch.empty((), dtype=torch.int32)
    matmul(x, w.t(), y, bias=w[0], count=count)
    matmul(x, w, y, count=count)
    add_weight_grad(total, x, y, count=count)
    add_weight_grad(total, x, y, count=count, first=True)


def launches(targets: list[str]) -> list[Launch]:
    """Every specialisation to test: the main ones for all targets, the others only for sm_90."""
    weight = torch.ones(MANY)
    collected: list[Launch] = []

    def add(target: str, *arguments: Any, **options: Any) -> None:
        # One chunk stores its sums, several add to them.
        for workspace in (None, PARTS):
            collected.extend(
                recorded(
                    target, lambda w=workspace: step(*arguments, **{"workspace": w, **options})
                )
            )

    for target in targets:
        add(target, torch.bfloat16, WIDE, "mask")
        add(target, torch.float32, WIDE, "index", row_weight=weight)
        add(target, torch.bfloat16, WIDE, "mask", depth=3, norm="layer")
        gram = {"loss": "gram", "images": "batch", "total": SOME}
        add(target, torch.bfloat16, WIDE, "index", impl="blas", **gram)
        # Few rows take the small tiles of matmuls, small weights those of weight gradients.
        for n, width in ((SOME, 4096), (FEW, 1280), (FEW, 1024)):
            collected += recorded(
                target, lambda n=n, width=width: each_product(torch.bfloat16, n, width)
            )
    for target in {"sm90", "sm100"} & set(targets):
        add(target, torch.bfloat16, WIDE, "index", impl="blas", precision="fp8")
    if "sm90" in targets:
        for activation, loss in (("gelu_tanh", "mse"), ("silu", "smooth_l1"), ("relu", "cosine")):
            add("sm90", torch.bfloat16, WIDE, "all", activation=activation, loss=loss)
        add("sm90", torch.float16, WIDE, "mask")
        add("sm90", torch.bfloat16, WIDE, "index32", autocast=True)
        add("sm90", torch.bfloat16, WIDE, "mask", impl="blas")
        add("sm90", torch.bfloat16, WIDE, "index", impl="blas", depth=1, norm="rms")
        add("sm90", torch.bfloat16, WIDE, "index", impl="blas", precision="fp8", norm="layer")
        for dtype in (torch.bfloat16, torch.float32):
            add("sm90", dtype, ODD, "mask")
            for widths in (WIDE, ODD, LONG_HIDDEN):
                add("sm90", dtype, widths, "index", impl="blas", norm="layer", total=SOME)
        for dtype in (torch.bfloat16, torch.float32):
            add("sm90", dtype, (8192, 8192, 8192), "index", impl="blas", total=SOME)
        # These rows are longer than a block, and several chunks add up.
        add("sm90", torch.bfloat16, LONG, "index", impl="blas", workspace=1, total=SOME)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        add("sm90", torch.float32, WIDE, "index")
        torch.backends.cuda.matmul.fp32_precision = "none"
    distinct = {repr(sorted(asdict(launch).items(), key=str)): launch for launch in collected}
    return list(distinct.values())
