"""Settings are data, whatever they contain. Code and pickles that come with a model are not run.
Paths may have spaces and any letters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import transformers.dynamic_module_utils

from pre_kernels import cli
from pre_kernels.demo.export import save_model
from pre_kernels.diagnostics.run.loading import load
from pre_kernels.integrations import apply_pre, launch
from pre_kernels.integrations.launch_settings import parameters

from .support.tiny.models import build

TOUCH = "__import__('pathlib').Path('pwned').touch()"
HOSTILE = [
    TOUCH,
    f"exec({TOUCH!r})",
    "$(touch pwned)",
    "`touch pwned`",
    "x; touch pwned",
    "!!python/object/apply:os.system ['touch pwned']",
    "!!python/object/new:os.system ['touch pwned']",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "{{ ''.__class__ }}",
    "%(x)s",
    "../../etc/passwd",
    "os:system",
    "\N{RIGHT-TO-LEFT OVERRIDE}\x1b[2J",
]


def exit_status(main: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    """The return value or the exit status."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes into a folder with a script and a module that leave a file behind if they run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("open('pwned', 'w')")
    (tmp_path / "evil.py").write_text("open('pwned', 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("text", HOSTILE)
def test_settings_of_the_launcher_are_not_evaluated(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.runpy, "run_path", lambda *_, **__: None)
    # Settings of the form module:name import the module by design.
    named = [name for name, p in parameters().items() if "Callable" in str(p.annotation)]
    for name in parameters().keys() - (named if text == "os:system" else ()):
        (folder / "pre.yaml").write_text(f"{name}: {text}\n", encoding="utf-8")
        # The text as YAML, and as a string in YAML.
        for options in (
            ["--config", "pre.yaml"],
            ["--set", f"{name}={text}"],
            ["--set", f"{name}={json.dumps(text)}"],
        ):
            # Status 2 means that the settings were rejected.
            assert exit_status(launch.main, [*options, "--", "script.py"]) in (None, 2), options
            assert "Traceback" not in capsys.readouterr().err
            assert not (folder / "pwned").exists()


def test_only_callables_are_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.runpy, "run_path", lambda *_, **__: None)
    for name, parameter in parameters().items():
        if "Callable" in str(parameter.annotation):
            continue
        with pytest.raises(SystemExit):
            launch.main(["--set", f"{name}=evil:x", "--set", "layer=0", "--", "script.py"])
        assert not (folder / "pwned").exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_options_of_the_command_line_are_not_evaluated(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["demo", "--seeds", text],
        ["demo", "--weight", text],
        ["diagnose", text, text],
        ["diagnose", "model", "images", "--layers", text],
        ["diagnose", "model", "images", "--metrics", text],
        ["diagnose", "model", "images", "--device", text],
        ["trace", text],
        ["tune", "--width", text],
    ):
        assert exit_status(cli.main, arguments) == 2, arguments
        assert "Traceback" not in capsys.readouterr().err
        assert not (folder / "pwned").exists()


def test_a_model_that_brings_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "cache")
    )
    (folder / "model").mkdir()
    classes = {
        "AutoConfig": "evil.Config",
        "AutoModelForImageTextToText": "evil.Model",
        "AutoProcessor": "evil.P",
    }
    config = {"model_type": "evil", "auto_map": classes, "architectures": ["Model"]}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')")
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load("model")
    assert not (folder / "pwned").exists()
    assert cli.parser().parse_args(["diagnose", "model", "images"]).trust_remote_code is False
    with pytest.raises(Exception):  # noqa: B017 - it has no class Config
        load("model", trust_remote_code=True)
    assert (folder / "pwned").exists()


class Touch:
    def __reduce__(self) -> Any:
        return open, ("pwned", "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_that_brings_a_pickle(name: str, folder: Path) -> None:
    build("llava").save_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"weight": Touch()}, folder / "model" / name)
    with pytest.raises(Exception) as raised:
        load(str(folder / "model"))
    assert not (folder / "pwned").exists()
    assert "safetensors" in str(raised.value) or "header" in str(raised.value)


def test_an_adapter_that_brings_a_pickle(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_model(build("llava"), folder / "base")
    model = transformers.AutoModelForImageTextToText.from_pretrained("base")
    save_model(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), folder / "adapter")
    assert load("adapter").model is not None
    weights = folder / "adapter" / "adapter_model.safetensors"
    # PEFT would load this pickle.
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        load("adapter")


def test_a_head_that_is_a_pickle(folder: Path) -> None:
    with apply_pre(build("llava")) as handle:
        handle.save("head")
        torch.save({"w1": Touch()}, folder / "head" / "pre_head.safetensors")
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            handle.load("head")
    assert not (folder / "pwned").exists()


def test_paths_with_spaces_and_any_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mit Leerzeichen, ß 目录 'q' \"d\" 100%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with apply_pre(build("llava"), layer=2) as handle:
        handle.save(folder / "kopf ü")
        before = handle.head.w1.detach().clone()
    script = folder / "träin 1.py"
    script.write_text("import sys\nprint(sys.argv, sys.path[0])", encoding="utf-8")
    # A setting in the file names this module.
    (folder / "häkchen.py").write_text("def mask(inputs): ...", encoding="utf-8")
    (folder / "pre ä.yaml").write_text("layer: 2  # λ\nmask_fn: häkchen:mask\n", encoding="utf-8")
    for script_name in (script.name, str(script)):
        launch.main(
            ["--config", "pre ä.yaml", "--head", "kopf ü", "--", script_name, "an argument"]
        )
        assert f"{[script_name, 'an argument']} {folder}" in capsys.readouterr().out
    with apply_pre(build("llava"), layer=2) as handle:
        torch.nn.init.zeros_(handle.head.w1)
        handle.load(folder / "kopf ü")
        assert torch.equal(handle.head.w1, before)
