"""Old import paths work for one version: they give the same objects, with a warning that names the
new path."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

# the old module and the name in it, as CHANGELOG.md lists them
MOVED = [
    ("pre_kernels.diagnose.samples", "load_samples"),
    ("pre_kernels.integrations.callback", "LayerCallback"),
    ("pre_kernels.integrations", "Sample"),
    ("pre_kernels.integrations", "measure"),
]


@pytest.mark.parametrize(("old", "name"), MOVED)
def test_the_old_path_gives_the_same_object_and_warns(old: str, name: str) -> None:
    pytest.importorskip("transformers")
    new = importlib.import_module("pre_kernels.diagnostics")
    text = rf"{old}\.{name} has moved to pre_kernels\.diagnostics\.{name}; .* goes in 0\.3"
    scope: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=text) as caught:
        exec(compile(f"from {old} import {name}", "the caller's file", "exec"), scope)
    assert scope[name] is getattr(new, name)
    files = {warning.filename for warning in caught if "has moved" in str(warning.message)}
    assert files == {"the caller's file"}


@pytest.mark.parametrize("old", sorted({old for old, _ in MOVED}))
def test_another_name_is_none_of_the_module(old: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        getattr(importlib.import_module(old), "nothing")  # noqa: B009


def test_importing_the_modules_themselves_warns_of_nothing() -> None:
    """Only a name that has moved warns. This holds under `-W error` too."""
    modules = ", ".join(sorted({old for old, _ in MOVED}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    code = f"import {modules}; import sys; assert 'transformers' not in sys.modules"
    command = [sys.executable, "-W", "error::DeprecationWarning:pre_kernels", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
