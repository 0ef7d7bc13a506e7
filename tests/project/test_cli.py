import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch

import pre_kernels
from pre_kernels import cli
from verify import ROOT


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """The arguments with which the demo was started; no test here trains anything."""
    calls = []
    stand_in = types.SimpleNamespace(run=lambda *arguments, jobs: calls.append((*arguments, jobs)))
    monkeypatch.setitem(sys.modules, "pre_kernels.demo.run", stand_in)
    return calls


def status(*arguments: str) -> int:
    """The exit status. argparse raises it, the commands return it."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def test_env_prints_what_a_bug_report_needs(capsys):
    assert status("env") == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["torch"].strip().startswith(torch.__version__)
    assert printed["pre-kernels"].split()[0] == importlib.metadata.version("pre-kernels")
    picked = "blas" if torch.cuda.is_available() else "torch"
    assert printed['impl="auto"'].strip().startswith(picked + ": ")
    assert {"python", "triton", "transformers", "platform"} <= printed.keys()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"url": "u", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}', " (commit c0ffee)"),
        ('{"url": "u"}', ""),
        (None, ""),
    ],
)
def test_env_knows_the_commit_that_pip_installed(record, said, monkeypatch, capsys):
    stand_in = types.SimpleNamespace(version="0.1", read_text={"direct_url.json": record}.get)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: stand_in)
    assert status("env") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("  0.1" + said)


def test_env_without_optional_packages(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert status("env") == 0
    assert "not installed" in capsys.readouterr().out


COMMANDS = ("check", "demo", "diagnose", "trace", "tune", "env")


def alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_help_version_and_wrong_options_import_nothing_slow():
    """All in one process, whose modules and own time are asked for at its end."""
    code = """
import sys, time
from pre_kernels.cli import main
for line in sys.argv[1:]:
    try:
        print("status", main(line.split()))
    except SystemExit as stop:
        print("status", stop.code)
print("seconds", time.process_time())
print("modules", *sys.modules)
"""
    helps = [f"{command} --help" for command in COMMANDS]
    done = alone(code, "", "--help", "--version", *helps, "demo --sedes", "train")
    statuses = re.findall(r"^status (.*)$", done.stdout, re.M)
    assert statuses == ["2", *["0"] * (2 + len(COMMANDS)), "2", "2"], done.stderr
    for command in COMMANDS:
        assert f"usage: pre-kernels {command} " in done.stdout
    *_, seconds, modules = done.stdout.splitlines()
    slow = {"torch", "numpy", "transformers", "rich", "importlib.metadata", "asyncio"}
    assert not slow & set(modules.split())
    assert float(seconds.split()[1]) < 0.5


def test_without_a_command_the_help_is_shown(capsys):
    assert status() == 2
    printed = capsys.readouterr()
    assert "examples:" in printed.out
    assert not printed.err


def test_a_wrong_option_shows_the_usage_of_its_command(capsys):
    assert status("demo", "--sedes", "3") == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: pre-kernels demo ")
    assert "\npre-kernels demo: error: got --sedes 3" in said


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert status(*command, "--help") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    # A command that is wrapped can still be copied.
    lines = printed.splitlines()
    for place, line in enumerate(lines):
        if line.endswith("\\"):
            assert lines[place + 1].startswith("    ")


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "pre_kernels", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"pre-kernels {pre_kernels.__version__}\n"


def test_help_of_the_demo_has_examples(capsys):
    status("demo", "--help")
    printed = capsys.readouterr().out
    for option in (
        "--seeds",
        "--quick",
        "--out",
        "--device",
        "--layer",
        "--weight",
        "--head",
        "examples:",
    ):
        assert option in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "command: got 'train', want one of check, demo, diagnose"),
        (
            ("dignose", "m", "i"),
            "want one of check, demo, diagnose, trace, tune, env; did you mean di",
        ),
        (
            ("--verison",),
            "got --verison, want only what pre-kernels --help lists; did you mean --v",
        ),
        (("demo", "--sedes", "3"), "demo --help lists; did you mean --seeds?"),
        (("demo", "--sedes=3"), "got --sedes=3, want only what pre-kernels demo --help lists; did"),
        (("demo", "quick"), "did you mean --quick?"),
        (("trace", "a", "--zzz"), "got --zzz, want only what pre-kernels trace --help lists\n"),
        (
            ("check", "--impl", "trito"),
            "--impl: got 'trito', want one of blas, triton, fp8, torch; di",
        ),
        (("demo", "--seeds", "0"), "--seeds: got '0', want a whole number of at least 1"),
        (("demo", "--seeds", "two"), "--seeds: got 'two'"),
        (("demo", "--weight", "-1"), "--weight: got '-1', want a number above 0"),
        (("demo", "--weight", "nan"), "--weight: got 'nan'"),
        (("demo", "--weight", "heavy"), "--weight: got 'heavy'"),
        (("demo", "--layer", "0"), "--layer: got 0, want 1..8"),
        (("demo", "--head", "dino"), "--head: got 'dino', want one of pre, viral, blindvla"),
        (("demo", "--layer", "9"), "--layer: got 9, want 1..8"),
        (("demo", "--device", "tpu"), "--device: got 'tpu', want one of auto, cpu, cuda"),
    ],
)
def test_bad_arguments_say_what_is_wanted(
    arguments, message, capsys, tmp_path, monkeypatch, started
):
    monkeypatch.chdir(tmp_path)
    assert status(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert not started


def test_out_that_is_a_file(tmp_path, capsys, started):
    (tmp_path / "file").write_text("")
    assert status("demo", "--out", str(tmp_path / "file")) == 2
    assert "--out: cannot write into" in capsys.readouterr().err
    assert not started


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_cuda_without_a_gpu(tmp_path, capsys):
    assert status("demo", "--device", "cuda", "--out", str(tmp_path)) == 2
    assert "--device: got cuda, but torch sees no CUDA device" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("sklearn", "rich") else real(name, *a),
    )
    assert status("demo", "--out", str(tmp_path / "new")) == 2
    assert "scikit-learn, rich: pip install 'pre-kernels[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "absent", "named"),
    [
        (
            ("demo",),
            ("PIL", "scipy", "threadpoolctl"),
            "the demo needs pillow, scipy, threadpoolctl: ",
        ),
        (("diagnose", "model", "images"), ("jinja2", "PIL"), "diagnose needs jinja2, pillow: "),
        (("trace", "log"), ("matplotlib", "transformers", "rich"), "trace needs matplotlib: "),
    ],
)
def test_a_command_names_what_it_needs_itself(
    tmp_path, monkeypatch, capsys, command, absent, named
):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a)
    )
    assert status(*command, "--out", str(tmp_path / "new")) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_trace_needs_matplotlib_alone(tmp_path):
    pytest.importorskip("matplotlib")
    log = [{"step": step, "layer_1/linear_probe": 0.5, "score": 0.5} for step in (1, 2)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    others = (
        "transformers",
        "accelerate",
        "safetensors",
        "sklearn",
        "scipy",
        "rich",
        "jinja2",
        "threadpoolctl",
        "einops",
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others})); "
        "from pre_kernels import cli; sys.exit(cli.main())"
    )
    done = alone(code, "trace", str(tmp_path), "--out", str(tmp_path / "plot.svg"))
    assert done.returncode == 0, done.stderr
    assert "2 steps" in done.stdout


@pytest.mark.parametrize("device", ["meta", "hpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named_before_any_work(tmp_path, capsys, device):
    for package in ("sklearn", "rich", "matplotlib", "jinja2", "PIL", "transformers"):
        pytest.importorskip(package)
    assert (
        status(
            "diagnose",
            str(tmp_path),
            str(tmp_path),
            "--device",
            device,
            "--out",
            str(tmp_path / "new"),
        )
        == 2
    )
    assert f"--device: got '{device}', which torch cannot use" in capsys.readouterr().err


def test_options_reach_the_demo(tmp_path, started):
    arguments = (
        "demo",
        "--seeds",
        "3",
        "--layer",
        "8",
        "--weight",
        "0.25",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    )
    assert status(*arguments) == 0
    settings, device, out, jobs = started[0]
    assert (settings.seeds, settings.pre_layer, settings.weight, device, out) == (
        3,
        8,
        0.25,
        "cpu",
        tmp_path,
    )
    assert jobs == min(3, os.cpu_count())
    assert status(*arguments, "--jobs", "2") == 0
    assert started.pop()[-1] == 2
    assert status("demo", "--quick", "--device", "cpu", "--out", str(tmp_path)) == 0
    quick = started.pop()[0]
    assert quick.text_steps < settings.text_steps
    assert quick.pre_layer == settings.layers // 2


def test_importing_the_package_imports_no_extra():
    code = "import sys; from pre_kernels import *; from pre_kernels.diagnostics import METRICS; "
    code += "from pre_kernels.cli import commands; print(*sys.modules)"
    out = alone(code)
    assert "pre_kernels.loss" in out.stdout, out.stderr
    extras = {"sklearn", "matplotlib", "transformers", "rich", "accelerate", "einops"}
    assert not {*extras, "pre_kernels.integrations"} & set(out.stdout.split())


def test_the_core_wants_no_package_that_has_to_be_built():
    """flash-attn is built from its source, so it is an extra."""
    project = (ROOT / "pyproject.toml").read_text()
    core = project.split("\ndependencies = [")[1].split("\n]")[0]
    assert re.findall(r'"([\w-]+)', core) == ["torch", "triton"]
    assert re.search(r"^flash-attn = ", project, re.M)
