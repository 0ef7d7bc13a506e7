"""Count the work of a step of the loss, without running a kernel."""

from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pre_kernels import fused_pre_loss
from pre_kernels.fused import ops
from verify.fences import KERNEL

# These names of operators make the host wait for the device.
WAITS = ("item", "_local_scalar_dense", "nonzero", "masked_select", "equal.default", "unique")


class Steps(TorchDispatchMode):
    """The work that a step asks of the device: Triton's launches, torch's own, and the bytes that
    Triton's row kernels move."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.launches = Counter()
        self.waits = []
        self.bytes = 0
        self.allocated = 0
        self.allocations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pre_kernels":
            real, _ = ops.OPERATORS[function._schema.name.split("::")[1]]
            with self:
                return real(*args)
        name = str(function)
        result = function(*args, **(kwargs or {}))
        if any(word in name for word in WAITS):
            self.waits.append(name)
        if isinstance(result, torch.Tensor) and ("empty" in name or "new_" in name):
            self.allocated += result.nbytes
            self.allocations += 1
        if isinstance(result, torch.Tensor) and "empty" not in name:
            storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            is_view = (
                result.untyped_storage().data_ptr() in storages and not function._schema.is_mutable
            )
            if not is_view:
                self.launches[name] += 1
        return result

    def run(self, kernel, *args, grid, warmup, **kwargs):
        function = kernel.fn
        self.launches[function.__name__] += 1
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        bound = dict(zip(names, args, strict=False)) | kwargs
        if "matmul" in function.__name__ or "weight_grad" in function.__name__:
            return
        for name, tensor in bound.items():
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                whole = name in ("out_ptr", "sums_ptr") or tensor.shape[0] <= self.rows
                # Of a tensor that is gathered only the selected rows are read.
                share = 1 if whole else self.rows / tensor.shape[0]
                # dP is written over P, and dZ over Z.
                times = 2 if name == "p_ptr" or (name == "z_ptr" and "dg_ptr" in bound) else 1
                self.bytes += tensor.nbytes * share * times


def count(
    impl, rows, n=256, total=1024, width=128, depth=2, frozen=False, needs_dh=True, **options
):
    """Run a forward and backward without computing values; `frozen`: without gradients of the
    layers; `needs_dh`: with one of hidden."""
    selection = torch.zeros(total, dtype=torch.bool)
    selection[:n] = True
    if rows != "mask":
        selection = selection.nonzero().squeeze(1) if rows == "index" else None
    tensors = {"hidden": torch.zeros(total, width, dtype=torch.bfloat16), "w2": None, "b2": None}
    for layer in range(1, depth + 1):
        tensors[f"w{layer}"] = torch.zeros(width, width, dtype=torch.bfloat16)
        tensors[f"b{layer}"] = torch.zeros(width, dtype=torch.bfloat16)
    leaves = [
        x
        for name, x in tensors.items()
        if x is not None and not (frozen if name[1] in "123" else not needs_dh)
    ]
    leaves += [x for name, x in options.items() if name in ("norm_weight", "norm_bias")]
    for leaf in leaves:
        leaf.requires_grad_()
    anchor = torch.zeros(total, width, dtype=torch.bfloat16)
    upstream = torch.full((n,) if options.get("reduction") == "none" else (), 0.5)
    steps = Steps(n)
    run = lambda kernel, *args, **kwargs: steps.run(kernel, *args, **kwargs)  # noqa: E731
    with (
        mock.patch.object(KERNEL, "run", run),
        mock.patch("pre_kernels.loss.unavailable", return_value=None),
        mock.patch("pre_kernels.device_checks.row_values"),  # This check does not read a GPU.
        steps,
    ):
        loss = fused_pre_loss(anchor=anchor, rows=selection, impl=impl, **tensors, **options)
        torch.autograd.grad(loss, leaves, upstream)
    return steps
