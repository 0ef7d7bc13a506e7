"""A second copy of the library in a process, and a Python or torch that is too old: errors that say
so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pre_kernels.fused import ops

COPIES = """
import shutil, sys, types
from pathlib import Path
import torch
import pre_kernels.loss
# Another project's module of this name, and a copy with operators of its own.
sys.modules["another.fused.ops"] = types.ModuleType("another.fused.ops")
sys.modules["hub.fused.ops"] = types.ModuleType("hub.fused.ops")
sys.modules["hub.fused.ops"].__file__ = "/hub/fused/ops.py"
sys.modules["hub.fused.ops"].LIBRARY = torch.library.Library("a_build", "DEF")
folder = Path(sys.argv[1])
for parent in (folder / "vendored", folder / "later"):
    shutil.copytree(Path(pre_kernels.__file__).parent, parent / "pre_kernels", symlinks=True)
(folder / "vendored" / "__init__.py").touch()
sys.path.insert(0, str(folder))

def fails(load):
    try:
        load()
    except ImportError as error:
        print(error)

def vendored():
    import vendored.pre_kernels.loss

def later():
    packages = ("pre_kernels", "vendored")
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    sys.path.insert(0, str(folder / "later"))
    import pre_kernels.loss

def older():
    torch.__version__ = torch.torch_version.TorchVersion(sys.argv[2])
    later()

if sys.argv[2:]:
    fails(older)
else:
    fails(vendored)
    fails(later)
"""


def import_copies(*arguments: str) -> list[str]:
    """The errors of importing other copies of the package, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", COPIES, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_a_second_copy_says_where_the_first_is(tmp_path: Path) -> None:
    vendored, later = import_copies(str(tmp_path))
    first = Path(ops.__file__)
    assert f"got a second copy, {tmp_path / 'vendored/pre_kernels/fused/ops.py'}" in vendored
    assert f"in a process in which {first} has registered the operators" in vendored
    assert f"got a second copy, {tmp_path / 'later/pre_kernels/fused/ops.py'}" in later
    assert "in which an earlier import has registered the operators torch.ops.pre_kernels" in later


@pytest.mark.parametrize("version", ["2.8.1", "1.13.0+cu118"])
def test_an_older_torch_is_named(version: str, tmp_path: Path) -> None:
    oldest = ".".join(map(str, ops.OLDEST_TORCH))
    (error,) = import_copies(str(tmp_path), version)
    assert error == f"torch: got {version}, want {oldest} or newer"


def test_the_command_line_ends_in_one_line() -> None:
    script = (
        "import sys, torch; torch.__version__ = torch.torch_version.TorchVersion('2.8.0')\n"
        "from pre_kernels.cli import main; sys.exit(main(['env']))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == (
        "",
        "pre-kernels: error: torch: got 2.8.0, want 2.9 or newer\n",
    )


def test_a_development_build_of_the_oldest_torch_is_taken(tmp_path: Path) -> None:
    (error,) = import_copies(str(tmp_path), "2.9.0a0+git1234")
    assert "got a second copy" in error


def test_an_older_python_is_named() -> None:
    """The check comes before anything that such a Python cannot read."""
    script = (
        "import sys; sys.version_info = (3, 9, 18, 'final', 0)\n"
        "try:\n    import pre_kernels\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "Python: got 3.9, want 3.10 or newer for pre_kernels\n"
