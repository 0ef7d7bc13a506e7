"""Puts the core of the library (loss, head and kernels) together as a kernel for the Kernel Hub.

    python -m verify.hub       writes build/hub/pre-kernels and prints its operators' namespaces

What is written is a source tree for the Hub's builder (build.toml, flake.nix, CARD.md, torch-ext,
benchmarks), and under `build` the variant of each backend, as the builder makes it: the kernel is
Python alone. So `kernels.get_local_kernel` loads the folder, and an upload needs no further build.

The namespace of a variant's operators ends in a hash of all its sources. Two builds have the same
namespace only if their code is the same.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from . import ROOT
from .dist import parsed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own there

HUB = ROOT / "hub"
PACKAGE = ROOT / "pre_kernels"
MODULE = "pre_kernels"
# What the package and the Hub's kernel have in common. `_ops.py` differs in one line.
CORE = (
    "checks.py",
    "device_checks.py",
    "fused",
    "head.py",
    "loss.py",
    "problem.py",
    "reference.py",
)
OPS = "_ops.py"
NAMESPACE = 'NAMESPACE = "pre_kernels"\n'


def sources() -> dict[str, bytes]:
    """The Python files of the kernel by their path in it, without `_ops.py`."""
    files = {
        path: path.relative_to(HUB / "torch-ext" / MODULE)
        for path in (HUB / "torch-ext" / MODULE).rglob("*.py")
    }
    for name in CORE:
        part = PACKAGE / name
        for path in part.rglob("*.py") if part.is_dir() else (part,):
            files[path] = path.relative_to(PACKAGE)
    return {name.as_posix(): path.read_bytes() for path, name in files.items()}


def identifier(files: dict[str, bytes]) -> str:
    """12 hex digits that only the same files have."""
    text = hashlib.sha256()
    for name, content in sorted(files.items()):
        text.update(f"{name} {len(content)}\n".encode() + content)
    return text.hexdigest()[:12]


def ops_module(namespace: str) -> bytes:
    text = (PACKAGE / OPS).read_text(encoding="utf-8")
    if text.count(NAMESPACE) != 1:
        raise ValueError(
            f"{PACKAGE / OPS}: got {text.count(NAMESPACE)} lines {NAMESPACE!r}, want 1"
        )
    return text.replace(NAMESPACE, f'NAMESPACE = "{namespace}"\n').encode()


def metadata(general: dict[str, Any], backend: str, name: str, files: dict[str, bytes]) -> bytes:
    hashes = {
        path: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for path, content in sorted(files.items())
    }
    content = {
        "name": general["name"],
        "id": name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build(out: Path) -> dict[str, str]:
    """Write the kernel to `out`, which is replaced. Returns the namespace of each backend."""
    if out.is_dir():
        shutil.rmtree(out)
    shutil.copytree(HUB, out, ignore=shutil.ignore_patterns("__pycache__", "torch-ext"))
    shutil.copy(ROOT / "LICENSE", out)
    files = sources()
    # The builder makes `_ops.py` itself.
    write(out / "torch-ext" / MODULE, files)
    general = tomllib.loads((HUB / "build.toml").read_text(encoding="utf-8"))["general"]
    unique = identifier({**files, OPS: ops_module(MODULE)})
    names = {backend: f"_{MODULE}_{backend}_{unique}" for backend in general["backends"]}
    for backend, name in names.items():
        variant = {**files, OPS: ops_module(name)}
        variant["metadata.json"] = metadata(general, backend, name, variant)
        write(out / "build" / f"torch-{backend}", variant)
    # The builder's `upload` takes the card from here.
    shutil.copy(HUB / "CARD.md", out / "build")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "hub" / "pre-kernels",
        help="replaced; may be an earlier build (default: build/hub/pre-kernels)",
    )
    options = parsed(parser)
    if (
        options.out.is_dir()
        and [*options.out.iterdir()]
        and not (options.out / "build.toml").exists()
    ):
        parser.error(
            f"--out: got {options.out}, which is not an earlier build, want another folder"
        )
    for backend, name in build(options.out).items():
        print(f"{options.out / 'build' / f'torch-{backend}'}  torch.ops.{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
