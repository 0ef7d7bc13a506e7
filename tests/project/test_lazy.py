"""Names and modules of the packages that are imported on first use, and what an import costs."""

import subprocess
import sys

import pytest

import pre_kernels
from pre_kernels import integrations
from pre_kernels._lazy import lazy

# It runs in a process of its own, since the tests have imported all modules.
CODE = """
import pre_kernels, pre_kernels.integrations, pre_kernels.diagnostics, sys
print("torch" in sys.modules)
print(pre_kernels.loss.__name__, pre_kernels.checks.__name__)
print(pre_kernels.integrations.trainer.patch_trainer.__name__)
print(pre_kernels.diagnostics.run.__name__)
"""


def test_a_module_is_an_attribute_of_its_package_without_an_import_of_it():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [
        "False",
        "pre_kernels.loss",
        "pre_kernels.checks",
        "patch_trainer",
        "pre_kernels.diagnostics.run",
    ], done.stderr


@pytest.mark.parametrize("name", ["aply_pre", "__wrapped__", "_cpu"])
@pytest.mark.parametrize("package", [pre_kernels, integrations])
def test_a_name_that_does_not_exist(package, name):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute"):
        getattr(package, name)


def test_a_module_that_needs_a_missing_package_names_that(monkeypatch, tmp_path):
    (tmp_path / "package_of_a_test").mkdir()
    (tmp_path / "package_of_a_test/__init__.py").touch()
    (tmp_path / "package_of_a_test/part.py").write_text("import missing_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="missing_package"):
        lazy("package_of_a_test", {})("part")


COUNTED = """
import sys, torch
before = set(sys.modules)
{line}
print(*sorted(set(sys.modules) - before))
"""
# Modules of the standard library that an import may bring beside those that torch has imported.
LIMIT = 5


@pytest.mark.parametrize(
    ("line", "most"),
    [
        ("from pre_kernels import PreHead, fused_pre_loss, reference", 14),
        ("import pre_kernels.integrations", 4),
        ("import pre_kernels.diagnostics", 4),
        ("from pre_kernels.integrations import *", 52),
        ("from pre_kernels.diagnostics import *", 36),
    ],
)
def test_an_import_brings_the_library_alone_beside_torch(line, most):
    """Not transformers, triton, matplotlib, einops, safetensors or numpy, nor parts of torch that
    `import torch` leaves out. Each module costs a millisecond or two, and the core has to take less
    than 0.1 s.

    most: how many modules of the library the line may import; few more than it does.
    """
    code = COUNTED.format(line=line)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    brought = done.stdout.split()
    ours = [name for name in brought if name.partition(".")[0] == "pre_kernels"]
    others = {name for name in brought if name not in ours}
    standard = {name for name in others if name.partition(".")[0] in sys.stdlib_module_names}
    assert "pre_kernels" in ours
    assert others == standard
    assert len(standard) <= LIMIT
    assert len(ours) <= most
