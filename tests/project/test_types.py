"""What a user's type checker sees of the public names."""

import importlib
import re

from mypy import api

from verify import ROOT

PACKAGES = ("pre_kernels", "pre_kernels.integrations", "pre_kernels.diagnostics")


def test_no_public_name_is_any(monkeypatch):
    """A misspelled name is an error too, so mypy knows the names of the packages."""
    monkeypatch.chdir(ROOT)
    names = [
        f"{package}.{name}"
        for package in PACKAGES
        for name in importlib.import_module(package).__all__
    ]
    lines = [f"import {package}\n{package}.misspelled" for package in PACKAGES]
    lines += [f"reveal_type({name})" for name in names]
    said, errors, _ = api.run(["--no-error-summary", "-c", "\n".join(lines)])
    types = re.findall(r'Revealed type is "(.*)"$', said, re.MULTILINE)
    assert len(types) == len(names), said + errors
    assert [name for name, kind in zip(names, types, strict=True) if kind == "Any"] == []
    assert said.count('has no attribute "misspelled"') == len(PACKAGES), said
