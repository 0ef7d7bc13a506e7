"""Nothing is unpickled, evaluated or run that the user did not ask for; any path will do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from verify import ROOT

FOLDERS = ("pre_kernels", "integrations", "hub")
SOURCES = sorted([ROOT / "setup.py", *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])
UNPICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "importlib.import_module",
        "torch.hub.load",
    ),
    *(
        "torch.load",
        "numpy.load",
        "np.load",
        "pandas.read_pickle",
        "torch.jit.load",
        "torch.package.PackageImporter",
    ),
    *(
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.load_all",
        "runpy.run_path",
        "runpy.run_module",
    ),
    *(
        "subprocess.run",
        "subprocess.Popen",
        "subprocess.call",
        "subprocess.check_output",
        "subprocess.getoutput",
    ),
}
# (file, function): its purpose
ALLOWED = {
    ("integrations/launch.py", "runpy.run_path"): "the script that the user names",
    ("integrations/launch.py", "runpy.run_module"): "the module that the user names",
    (
        "integrations/launch_settings.py",
        "importlib.import_module",
    ): "a callable named as module:name",
    (
        "integrations/follow.py",
        "subprocess.Popen",
    ): "not called: it is replaced, so that the launcher follows the processes of the script",
    (
        "pre_kernels/diagnostics/run/data.py",
        "importlib.import_module",
    ): "an optional package by a name in the source",
    (
        "pre_kernels/_lazy.py",
        "importlib.import_module",
    ): "its own modules, when one of their names is looked up",
    ("pre_kernels/_moved.py", "importlib.import_module"): "the module to which a name has moved",
    ("pre_kernels/check/command.py", "subprocess.Popen"): "an implementation, which may crash",
    ("pre_kernels/check/memory.py", "subprocess.run"): "a module of ours, whose peak is measured",
    ("pre_kernels/check/device.py", "subprocess.run"): "nvidia-smi",
    (
        "pre_kernels/demo/real/pieces.py",
        "subprocess.run",
    ): "pip, apt-get and dpkg, if the user gives --fetch",
    (
        "pre_kernels/demo/real/pieces.py",
        "torch.load",
    ): "with weights_only, of a file whose digest is checked, to write it as safetensors",
    ("pre_kernels/demo/parts.py", "subprocess.run"): "git, for the commit in the demo's report",
}


def used(path: Path) -> Iterator[str]:
    """The names of imported modules, and of functions that are called or passed on."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            yield ast.unparse(node)


def dangerous(name: str) -> bool:
    return name in CALLS or name.split(".")[0] in UNPICKLES


def test_sources_neither_unpickle_nor_evaluate() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in SOURCES
        for name in used(path)
        if dangerous(name)
    }
    assert found == ALLOWED.keys()


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    lines = ["import pickle", "from joblib import load", "x = torch.load", "eval('1')"]
    lines += ["model.eval()", "re.compile('a')"]
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert [name for name in used(tmp_path / "a.py") if dangerous(name)] == [
        "pickle",
        "joblib.load",
        "torch.load",
        "eval",
    ]


def test_processes_are_started_without_a_shell() -> None:
    for path in [*SOURCES, *(ROOT / "bench").rglob("*.py")]:
        assert not re.search(r"shell\s*=\s*True", path.read_text(encoding="utf-8")), path


def test_code_of_models_is_run_on_request_alone() -> None:
    """`trust_remote_code` comes only from an option, which is off by default; every model is read
    from safetensors."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for word in node.keywords if isinstance(node, ast.Call) else ():
                if word.arg == "trust_remote_code":
                    assert not isinstance(word.value, ast.Constant), path
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                unread = ast.unparse(node.func) in (
                    "AutoConfig.from_pretrained",
                    "AutoProcessor.from_pretrained",
                )
                # A GGUF file holds no pickle.
                if not unread and "gguf_file" not in words:
                    assert words.get("use_safetensors") == "True", f"{path}: {ast.unparse(node)}"


# An upper bound needs a known break of a later version, which is stated here by the package.
BREAKS = {
    "pymdown-extensions": "mkdocstrings fails with 12.2, and its mended releases need Python 3.11",
}


def test_dependencies_have_upper_bounds_only_where_a_break_is_known() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r'"([\w.-]+(?:\[[\w,-]+\])?)((?:[<>=!~]=?[\w.*]+,?)*)(?:;[^"]*)?"', text)
    bounded = {name for name, bounds in needed if re.search(r"<|==|~=|!=", bounds)}
    assert bounded == BREAKS.keys()
    assert ("torch", ">=2.9") in needed
