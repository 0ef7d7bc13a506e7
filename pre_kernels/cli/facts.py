"""Versions, devices and settings, for bug reports."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

import torch

from pre_kernels.fused.products import half_precision
from pre_kernels.loss import unavailable


def facts() -> dict[str, str]:
    """Return versions, devices and settings, for bug reports."""
    packages = ("triton", "einops", "transformers", "accelerate", "peft", "trl")
    rows = [
        ("pre-kernels", version("pre-kernels") + commit()),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        *((name, version(name)) for name in packages),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            size = f"{card.total_memory / 2**30:.0f} GiB"
            text = f"{card.name}, compute capability {card.major}.{card.minor}, {size}"
            rows.append((f"GPU {index}", text))
    else:
        rows.append(("GPU", "none that torch can use"))
    rows.append(('impl="auto"', ": ".join(automatic())))
    rows.append(("CPU products", half_precision()))
    rows += [
        (name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(("PRE_KERNELS_", "TRITON_"))
    ]
    return dict(rows)


def version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    return installed(package) or "not installed"


def commit() -> str:
    """Return the commit that pip recorded on installation (PEP 610), or an empty string."""
    try:
        record = metadata.distribution("pre-kernels").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return ""
    commit_id = json.loads(record or "{}").get("vcs_info", {}).get("commit_id")
    return f" (commit {commit_id})" if commit_id else ""


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def automatic() -> tuple[str, str]:
    """Return the implementation that `impl="auto"` picks on this machine, and why."""
    if not torch.cuda.is_available():
        return "torch", "no GPU that torch can use"
    device = torch.device("cuda", torch.cuda.current_device())
    reason = unavailable(device, torch.bfloat16)
    if reason is not None:
        return "torch", reason
    return (
        "blas",
        "on GPU tensors, or triton where only the device knows how many rows a mask has; torch on "
        "CPU tensors",
    )
