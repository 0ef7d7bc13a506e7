"""The launcher's command line: settings and their file, and errors before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pre_kernels.integrations import launch
from pre_kernels.integrations.launch_settings import parameters
from pre_kernels.integrations.launched import Launch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to run: want `-- script.py"),
        (["--"], "nothing to run"),
        (["--", "-m"], "nothing to run"),
        (
            ["--", "missing.py"],
            "script: 'missing.py' is neither a file nor an installed console command",
        ),
        (
            ["--", "--layer", "2", "ok.py"],
            "script: got '--layer', want a script, -m module or command first behind the --",
        ),
        (["--", "-m", "missing.module"], "no module named 'missing.module' can be run"),
        (["--", "-m", "wsgiref"], "no module named 'wsgiref' can be run"),
        (["--lyer", "2", "--", "ok.py"], "unrecognized arguments: --lyer; did you mean --layer?"),
        (
            ["--hidden-dim", "8", "--", "ok.py"],
            "unrecognized arguments: --hidden-dim; want `--set hidden_dim=…`",
        ),
        (
            ["--lr=2e-5", "--", "ok.py"],
            f"options of the script go behind it: `{launch.LINE} --lr=2e-5`",
        ),
        (
            ["--layer", "2", "ok.py", "--lr", "2e-5"],
            f"got no -- before 'ok.py', want it there: `python -m {launch.LAUNCHER} --layer 2 -- "
            "ok.py --lr 2e-5`",
        ),
        (["ok.py"], f"`python -m {launch.LAUNCHER} -- ok.py`"),
        (["--weight=1", "ok.py", "--", "--lr", "1"], "--weight=1 -- ok.py --lr 1`"),
        (["--layer", "2", "-m", "a.b", "--layer"], "--layer 2 -- -m a.b --layer`"),
        (["--layer", "[1, 2]", "torchrun", "ok.py"], "--layer '[1, 2]' -- torchrun ok.py`"),
        (["--set", "lyer=2", "--", "ok.py"], "--set: unknown setting 'lyer'; did you mean layer"),
        (
            ["--set", "qqq=2", "--", "ok.py"],
            "--set: unknown setting 'qqq'; want one of layer, weight",
        ),
        (["--set", "layer", "--", "ok.py"], "--set: got 'layer', want key=value"),
        (["--set", "layer=[2", "--", "ok.py"], "--set: layer: '[2' is not a valid YAML value"),
        (
            ["--set", "layer=!!python/object/apply:os.getcwd []", "--", "ok.py"],
            "is not a valid YAML value",
        ),
        (["--layer", "middle", "--", "ok.py"], "layer: got 'middle', want an int"),
        (["--layer", "0", "--", "ok.py"], "layer: got 0, want an int of at least 1"),
        (["--weight", "-1", "--", "ok.py"], "weight: got -1"),
        (["--weight", "much", "--", "ok.py"], "weight: got 'much' (str), want a number"),
        (["--set", "loss=l3", "--", "ok.py"], "loss: got 'l3'"),
        (["--set", "hidden_dim=0", "--", "ok.py"], "hidden_dim: got 0"),
        (["--set", "anchor=json:nothing", "--", "ok.py"], "anchor: cannot import 'json:nothing'"),
        (
            ["--set", "mask_fn=no.module:f", "--", "ok.py"],
            "mask_fn: cannot import 'no.module:f': No module named 'no'",
        ),
        (
            ["--config", "missing.yaml", "--", "ok.py"],
            "--config: got 'missing.yaml' (No such file or directory), want a YAML file of "
            "settings, such as a line `layer: 16`",
        ),
        (["--config", ".", "--", "ok.py"], "--config: got '.' (Is a directory), want a YAML file"),
        (
            ["--config", "empty.yaml", "--", "ok.py"],
            "--config: got 'empty.yaml', which is empty, want a YAML file",
        ),
        (
            ["--config", "list.yaml", "--", "ok.py"],
            "--config: 'list.yaml' holds list, want a mapping of settings",
        ),
        (["--config", "broken.yaml", "--", "ok.py"], "--config: 'broken.yaml' is not valid YAML"),
        (["--config", "binary.yaml", "--", "ok.py"], "--config: 'binary.yaml' is not valid YAML"),
        (
            ["--config", "typo.yaml", "--", "ok.py"],
            "--config typo.yaml: unknown setting 'wieght'; did you mean weight",
        ),
        (["--head", "nowhere", "--", "ok.py"], "--head: 'nowhere/pre_head.json' is missing"),
        (
            ["--", "bash", "run.sh"],
            "script: 'bash' is a shell or a shell script, which cannot be followed; "
            "write `python -m pre_kernels",
        ),
        (["--", "./run.sh"], "script: './run.sh' is a shell or a shell script, which cannot be "),
        (
            ["--", "ray", "job"],
            "script: 'ray' runs its command elsewhere, where it cannot be followed; make that",
        ),
        (
            ["--", "env", "A=1", "ok.py"],
            "script: 'env' is not a python program; put it in front: `env … python -m pre_",
        ),
        (
            ["--", "python", "-c", "x"],
            "script: got 'python -c x', want a script or -m module; put python's own flags",
        ),
        (
            ["--", "python", "-X", "dev", "ok.py"],
            "script: got 'python -X dev', want a script or -m module",
        ),
        (["--", "python"], "script: got 'python', want a script or -m module"),
        (
            ["--", "python", "missing.py"],
            "script: 'missing.py' is neither a file nor an installed console command",
        ),
    ],
)
def test_errors_before_any_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        "list": b"- layer",
        "empty": b"# layer: 16",
        "broken": b"layer: [2",
        "binary": b"\xff\xfe\x00\xd8",
        "typo": b"wieght: 1",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    (tmp_path / "ok.py").write_text("raise AssertionError('it ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    argv = sys.argv
    with pytest.raises(SystemExit) as left:
        launch.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert sys.argv is argv


def test_settings_come_from_the_file_and_options_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ok.py").write_text("")
    (tmp_path / "anchors_of_launch.py").write_text("def dino(inputs, rows): ...")
    (tmp_path / "pre.yaml").write_text(
        "layer: [1, 3]\nweight: 1e-3\nloss: mse\nlevel: image\nhidden_dim: 64\n"
    )
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr(Launch, "__enter__", lambda self: seen.append(self.settings))
    more = [
        "--set",
        "loss=smooth_l1",
        "--set",
        "anchor=anchors_of_launch:dino",
        "--set",
        "anchor_dim=768",
    ]
    launch.main(
        ["--config", "pre.yaml", "--layer", "2", "--set", "hidden_dim=null", *more, "--", "ok.py"]
    )
    anchor = seen[0].pop("anchor")  # from a module beside the script
    assert (anchor.__module__, anchor.__name__) == ("anchors_of_launch", "dino")
    wanted = {
        "layer": 2,
        "weight": 1e-3,
        "loss": "smooth_l1",
        "level": "image",
        "hidden_dim": None,
        "anchor_dim": 768,
    }
    assert seen[0] == wanted


def test_pairs_of_layers_and_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ok.py").write_text("")
    (tmp_path / "anchors_of_pairs.py").write_text("def dino(inputs, rows): ...")
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr(Launch, "__enter__", lambda self: seen.append(self.settings))
    launch.main(["--set", "targets=[[8, pre_llm], [16, anchors_of_pairs:dino]]", "--", "ok.py"])
    (first, (layer, anchor)) = seen[0]["targets"]
    assert (first, layer, anchor.__name__) == ([8, "pre_llm"], 16, "dino")
    with pytest.raises(SystemExit):
        launch.main(["--set", "targets=[8, pre_llm]", "--", "ok.py"])


def test_every_setting_of_apply_pre_is_taken_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in parameters())
