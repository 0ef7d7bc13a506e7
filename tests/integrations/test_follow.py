"""The launcher follows a script into the processes that it starts, and reports in time which it
cannot follow."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre
from pre_kernels.integrations.follow import LAUNCHER, Following

from ..slow import thinned
from .support.scripts import START
from .support.tiny.models import batch, build
from .support.tiny.training import UNEQUAL_IMAGES, assert_head, by_hand

PY = sys.executable
RUN = ["-m", LAUNCHER, "--layer=2", "--"]
START_LAUNCHER = [PY, "-m", LAUNCHER]


@pytest.fixture
def following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Following:
    """In a folder with scripts and programs of several kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.py").write_text("")
    (tmp_path / "bin").mkdir()
    # deepspeed's command is a file like this and not an entry point. The other two do not belong to
    # this Python.
    lines = {
        "a-command": f"#!{PY}",
        "env-command": "#!/usr/bin/env python",
        "binary": "\x7fELF",
        "python": "",
    }
    lines |= {"numactl": "#!/bin/sh", "foreign": "#!/elsewhere/bin/python"}
    for name, first in lines.items():
        path = tmp_path / "bin" / name
        path.write_text(f"{first}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path(PY).parent}{os.pathsep}{tmp_path / 'bin'}")
    follower = Following(["--layer=2"])
    follower._active = True
    return follower


def package(name: str) -> str:
    return str(Path(__import__(name).__file__).parent)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ([PY, "train.py", "-m", "a"], [PY, *RUN, "train.py", "-m", "a"]),
        (
            (PY, "-u", "-X", "dev", "-Wd", "train.py"),
            [PY, "-u", "-X", "dev", "-Wd", *RUN, "train.py"],
        ),
        (
            ["python", "-m", "mine.train", "run.yaml"],
            ["python", *RUN, "-m", "mine.train", "run.yaml"],
        ),
        (
            [PY, "-u", "-m", "torch.distributed.run", "train.py"],
            [PY, "-u", *RUN, "-m", "torch.distributed.run", "train.py"],
        ),
        (
            [PY, "-u", "-m", "deepspeed.launcher.launch", "a.py"],
            [PY, "-u", *RUN, "-m", "deepspeed.launcher.launch", "a.py"],
        ),
        ([PY, Path("train.py")], [PY, *RUN, "train.py"]),
        (
            ["torchrun", "--nproc-per-node", "2", "train.py"],
            [PY, *RUN, "torchrun", "--nproc-per-node", "2", "train.py"],
        ),
        (["accelerate", "launch", "-m", "a.b"], [PY, *RUN, "accelerate", "launch", "-m", "a.b"]),
        ([f"{Path(PY).parent}/torchrun", "train.py"], [PY, *RUN, "torchrun", "train.py"]),
        (["a-command", "x"], [PY, *RUN, "{bin}/a-command", "x"]),
        (["env-command", "x"], [PY, *RUN, "{bin}/env-command", "x"]),
        (["{bin}/a-command", "x"], [PY, *RUN, "{bin}/a-command", "x"]),
        (
            ["numactl", "-C", "0-3", PY, "-u", "train.py"],
            ["numactl", "-C", "0-3", PY, "-u", *RUN, "train.py"],
        ),
        *(
            ([PY, script, "--a"], [PY, *RUN, script, "--a"])
            for script in ([f"{package('trl')}/scripts/sft.py"] if find_spec("trl") else [])
        ),
        # > not changed
        ([PY, "-c", "print(1)"], None),
        ([PY, "-"], None),
        ([PY], None),
        ([PY, "-m"], None),
        ([PY, "-m", "pytest", "x"], None),
        ([PY, "-m", "http.server"], None),
        ([PY, "-m", "torch.utils.collect_env"], None),
        ([PY, "-S", "train.py"], None),
        ([PY, "missing.py"], None),
        ([PY, f"{package('torch')}/_inductor/compile_worker/__main__.py", "--workers=2"], None),
        ([PY, f"{package('huggingface_hub')}/cli/hf.py"], None),
        (["pip", "install", "x"], None),
        (["pre-kernels-of-nobody"], None),
        (["binary", "train.bin"], None),
        (["git", "status"], None),
        ("torchrun", None),
        ([b"python", b"train.py"], None),
        ([], None),
    ],
    ids=lambda value: None if value is None else shlex.join(map(str, value))[-60:],
)
def test_commands(command: Any, wanted: Any, following: Following, tmp_path: Path) -> None:
    def placed(words: Any) -> Any:
        return type(words)(
            w.replace("{bin}", str(tmp_path / "bin")) if isinstance(w, str) else w for w in words
        )

    command = command if isinstance(command, str) else placed(command)
    changed = following.changed(command)
    if wanted is None:
        assert changed is command
        assert following.followed == 0
        assert not following.lost
    else:
        assert changed == placed(wanted)
        assert following.followed == 1


def test_commands_elsewhere(following: Following, tmp_path: Path) -> None:
    """Another folder, another PATH, a command that has the launcher already, and a line for a
    shell."""
    assert following.changed([PY, "other.py"]) == [PY, "other.py"]
    assert following.changed([PY, "other.py"], cwd=b"sub") == [PY, *RUN, "other.py"]
    assert following.changed([PY, "other.py"], cwd=tmp_path / "sub") == [PY, *RUN, "other.py"]
    there = [PY, "-m", LAUNCHER, "--layer", "3", "--", "train.py"]
    assert following.changed(there) is there
    line = "torchrun --nproc-per-node 2 train.py --lr=1e-3"
    assert following.changed(line, line=True) == shlex.join([PY, *RUN, *line.split()])
    assert following.followed == 4
    assert not following.lost
    for lost in ("cd sub && python other.py", "python train.py > log"):
        assert following.changed(lost, line=True) is lost
    for words in (["bash", "run.sh"], ["foreign", "x.py"], ["ssh", "node", "python", "train.py"]):
        following.changed(words)
    other = {"PATH": str(tmp_path / "bin")}
    following.changed(["python", "train.py"], env=other)
    assert following.lost == [
        *("cd sub && python other.py", "python train.py > log"),
        *("bash run.sh", "foreign x.py", "ssh node python train.py", "python train.py"),
    ]
    assert following.followed == 4


def test_a_program_that_may_be_run_and_not_read(
    following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuses)
    assert following.changed(["a-command", "x"]) == ["a-command", "x"]


def test_processes_start_as_before_and_what_others_replace_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = subprocess.Popen.__init__, os.execv, os.execve, os.system
    show = tmp_path / "show.py"
    show.write_text("import sys; print(sys.argv[1:], flush=True)")
    with Following([]) as following:
        monkeypatch.setattr(
            following, "changed", lambda words, *_, **__: [*words[:1], str(show), *words[1:]]
        )
        done = subprocess.run([PY, "a"], capture_output=True, text=True, check=True)
        assert done.stdout == "['a']\n"
        assert done.args == [PY, "a"]  # the caller sees its own command
        with pytest.raises(TypeError, match="args"):
            subprocess.Popen()  # type: ignore[call-overload]
        named = subprocess.run(
            ["a"], executable=PY, input="print(1)", capture_output=True, text=True, check=True
        )
        assert named.stdout == "1\n"
    assert (subprocess.Popen.__init__, os.execv, os.execve, os.system) == before

    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        ours(self, *args, **kwargs)

    with Following([]) as following:
        ours = subprocess.Popen.__init__
        subprocess.Popen.__init__ = theirs  # type: ignore[method-assign]
    try:
        assert subprocess.Popen.__init__ is theirs
        assert (
            subprocess.run([PY, str(show), "b"], capture_output=True, text=True, check=True).stdout
            == "['b']\n"
        )
        assert following.followed == 0
    finally:
        subprocess.Popen.__init__ = before[0]  # type: ignore[method-assign]


def script(tmp_path: Path, body: str) -> str:
    path = tmp_path / "work" / "train.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(START + textwrap.dedent(body))
    return str(path)


def launched(tmp_path: Path, *words: str, options: list[str] | None = None, **more: Any) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [*START_LAUNCHER, *(options or []), "--", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, **more
    )


MAIN = """
import os
def main():
    model = build("llava")
    two = int(os.environ.get("WORLD_SIZE", 1)) == 2
    more = dict(ddp_backend="gloo", ddp_find_unused_parameters=True) if two else {}
    t = trainer(model, size=1 if two else 2, **more)
    t.train()
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(recorder.steps[0], out / "found")
    if two:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.parametrize("command", thinned(["torchrun", "accelerate", "exec"], 3))
def test_a_command_that_starts_the_training_is_followed(command: str, tmp_path: Path) -> None:
    """The settings come from a file beside the caller, not beside the script. The gradients are
    those by hand."""
    train = script(tmp_path, MAIN)
    words = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--standalone", train],
        "accelerate": ["accelerate", "launch", "--cpu", "--num_processes", "1", "train.py"],
        "exec": [str(tmp_path / "becomes.py"), train],
    }[command]
    (tmp_path / "becomes.py").write_text(
        "import os, sys\n"
        "os.execvpe(os.path.basename(sys.executable), ['python', '-u', *sys.argv[1:]], "
        "os.environ | {'PATH': os.path.dirname(sys.executable)})"
    )
    handle = apply_pre(build("llava"))
    handle.save(tmp_path / "work" / "head")
    (tmp_path / "work" / "pre.yaml").write_text("weight: 0.5")
    options = ["--config", "pre.yaml", "--layer", "2", "--head", "head"]
    done = launched(tmp_path, *words, str(tmp_path / "out"), options=options, cwd=tmp_path / "work")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("PRe: attached") == 1, done.stderr
    assert "WARNING: " not in done.stderr.replace("[W", "")
    tokens = sum(int(batch("llava", [s]).visual.sum()) for s in UNEQUAL_IMAGES)
    assert_head(
        torch.load(tmp_path / "out" / "found"),
        by_hand("llava", UNEQUAL_IMAGES, handle, [1 / tokens] * 4, "sum"),
    )
    apply_pre(build("llava")).load(tmp_path / "out")


@pytest.mark.slow
def test_trl_sft(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from .support.tiny.trl import conversations, processor

    build("llava").save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    conversations([1] * 4).to_parquet(tmp_path / "data" / "train.parquet")
    words = "sft --model_name_or_path model --dataset_name data --output_dir out --max_steps 2"
    words += " --logging_steps 1 --use_cpu --per_device_train_batch_size 2 --bf16 False"
    words += " --report_to none --max_length none --save_strategy no"
    done = launched(tmp_path, "trl", *words.split(), options=["--layer", "2"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("PRe: attached to LlavaForConditionalGeneration: layer 2 of 4") == 1
    assert "PRe: WARNING" not in done.stderr
    assert (done.stdout + done.stderr).count("'pre_head_grad_norm'") == 2
    apply_pre(build("llava")).load(tmp_path / "out")


STARTS = """
import os, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
(here / "{child}").write_text({body!r})
sys.exit(subprocess.run({command}).returncode)
"""
LOOP = """
import sys, torch
w = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([w], lr=0.1)
for _ in range(3):
    w.sum().backward()
    optimizer.step()
    print("STEP", file=sys.stderr, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("child", "command", "body", "said"),
    [
        ("idle.py", "[sys.executable, here / 'idle.py']", "pass", None),
        ("helps.py", "[sys.executable, here / 'helps.py']", "import sys; sys.exit(3)", None),
        (
            "becomes.py",
            "os.execl(sys.executable, 'python', '-u', here / 'becomes.py')",
            "import sys; sys.exit(0)",
            "nothing was trained with PRe",
        ),
        (
            "loop.py",
            "os.system(f'{sys.executable} {here}/loop.py') or ['true']",
            LOOP,
            "the first optimizer step was",
        ),
        (
            "loop.py",
            "[sys.executable, here / 'loop.py']",
            LOOP,
            "the first optimizer step was outside of a",
        ),
        ("run.sh", "['sh', here / 'run.sh']", "exit 0", "nothing was trained with PRe"),
    ],
)
def test_each_process_reports_for_itself(
    child: str, command: str, body: str, said: str | None, tmp_path: Path
) -> None:
    """A process that starts others leaves the report to them. For a command that cannot be followed
    the report has the line that works."""
    starts = tmp_path / "starts.py"
    starts.write_text(STARTS.format(child=child, body=body, command=command))
    done = launched(tmp_path, str(starts), options=["--weight", "0.25", "--set", "loss=mse"])
    assert done.returncode == (3 if child == "helps.py" else 0), done.stderr
    lines = [line for line in done.stderr.splitlines() if line == "STEP" or "PRe: " in line]
    if said is None:
        assert lines == []
    else:
        assert lines[0].startswith(f"PRe: WARNING: {said}")
        assert lines[1:] == ["STEP"] * (3 if child == "loop.py" else 0)
    if child == "run.sh":
        assert f"that the launcher cannot follow (`sh {tmp_path}/run.sh`)" in lines[0]
        assert (
            f"start those with `python -m {LAUNCHER} --weight=0.25 --set=loss=mse -- train.py`"
            in lines[0]
        )


def test_a_module_named_in_a_setting_is_found_from_the_callers_folder(tmp_path: Path) -> None:
    """The module is beside the script that starts the others, not beside the one that it starts,
    which sees the path that python gives it."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "masks_of_follow.py").write_text("def mine(inputs): ...")
    starts = tmp_path / "starts.py"
    command = "[sys.executable, here / 'sub' / 'child.py']"
    body = "import sys; print(sys.path[0]); print(sys.path[-1])"
    starts.write_text(STARTS.format(child="sub/child.py", body=body, command=command))
    done = launched(
        tmp_path, "starts.py", options=["--set", "mask_fn=masks_of_follow:mine"], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.split()
    assert first == str(tmp_path / "sub")
    assert last != str(tmp_path)
