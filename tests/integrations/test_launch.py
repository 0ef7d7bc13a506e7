"""The launcher runs scripts like python, with PRe on the model of each Trainer that they
construct."""

from __future__ import annotations

import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from pre_kernels.integrations import apply_pre, launch, patch_trainer

from .support.scripts import START, TRAIN, under_the_launcher
from .support.tiny.models import batch, build
from .support.tiny.training import UNEQUAL_IMAGES, assert_head, by_hand


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    return under_the_launcher(tmp_path)


def test_a_training_is_that_of_apply_pre_and_patch_trainer(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(vars(Trainer))
    argv = sys.argv
    path = list(sys.path)
    handle = apply_pre(build("llava"))
    handle.save(tmp_path / "head")
    run(TRAIN, "--layer", "2", "--weight", "0.5", "--head", str(tmp_path / "head"))
    assert dict(vars(Trainer)) == before
    assert (sys.argv, sys.path) == (argv, path)

    grads, logs = torch.load(tmp_path / "out" / "found")
    tokens = sum(int(batch("llava", [s]).visual.sum()) for s in UNEQUAL_IMAGES)
    assert_head(grads, by_hand("llava", UNEQUAL_IMAGES, handle, [1 / tokens] * 4, "sum"))
    assert "pre_loss" in logs[0]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("PRe: ")]
    assert said == [
        "PRe: attached to LlavaForConditionalGeneration: layer 2 of 4, λ 0.5, anchor pre_llm, "
        f"level patch, head of 2,112 parameters from {tmp_path / 'head'}"
    ]


def test_the_head_is_kept_where_the_trainer_saves_nothing_of_it(run: Any, tmp_path: Path) -> None:
    """Like the first stage of LLaVA, whose trainer writes only the projector."""
    run(
        """
        class Adapter(InOrder):
            def _save_checkpoint(self, *_):
                (out / f"checkpoint-{self.state.global_step}").mkdir()
            def _save(self, *_): pass
        InOrder = Adapter
        model = build("llava")
        model.requires_grad_(False)
        t = trainer(model, steps=2, save_strategy="steps", save_steps=1)
        t.train()
        torch.save(dict(model.pre_head.state_dict()), out / "last")
        """
    )
    last = torch.load(tmp_path / "out" / "last")
    for folder, same in (("checkpoint-1", False), ("checkpoint-2", True), (".", True)):
        handle = apply_pre(build("llava"))
        handle.load(tmp_path / "out" / folder)
        assert torch.equal(handle.head.w1, last["w1"]) is same


def test_what_the_script_draws_is_what_it_draws_alone(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    def late():
        model = build("llava")
        torch.rand(draws)
        return model
    t = trainer(None, model_init=late)
    head = getattr(t.model, "pre_head", None)
    torch.save((torch.rand(3), None if head is None else head.w1), out / "drawn")
    """
    drawn = []
    for draws in (7, 0):
        run(f"draws = {draws}{textwrap.dedent(body)}")
        drawn.append(torch.load(tmp_path / "out" / "drawn"))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "out")])
    runpy.run_path(str(tmp_path / "train.py"))
    plain, nothing = torch.load(tmp_path / "out" / "drawn")
    assert nothing is None
    assert torch.equal(plain, drawn[1][0])
    # The heads of the ranks are equal, although the ranks drew different numbers before.
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_the_script_sees_what_python_gives_it(tmp_path: Path) -> None:
    """The script sees its argv, path and __main__; nothing that reads the environment was imported
    before; traceback and exit status are its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "neighbour.py").write_text("value = 3")
    (folder / "train.py").write_text(
        "import sys, neighbour\n"
        "print([__name__, __file__, sys.argv, sys.path[0], 'transformers' in sys.modules])\n"
        "assert sys.modules['__main__'].__dict__ is globals()\n"
        "def fails():\n    raise KeyError('mine')\n"
        "sys.exit(7) if sys.argv[1:] == ['exit'] else fails()\n"
    )
    start = [
        sys.executable,
        "-m",
        "pre_kernels.integrations.launch",
        "--local_rank=1",
        "--",
        "project/train.py",
    ]
    done = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path, check=False)
    argv = ["project/train.py", "--local_rank=1"]
    assert done.stdout.strip() == str(["__main__", "project/train.py", argv, str(folder), False])
    assert done.returncode == 1
    assert "in fails\n    raise KeyError('mine')\nKeyError: 'mine'" in done.stderr


def test_exit_status_and_exceptions_come_through(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(vars(Trainer))
    with pytest.raises(SystemExit) as left:
        run("sys.exit(7)")
    assert left.value.code == 7
    with pytest.raises(KeyError) as raised:
        run("def fails(): raise KeyError('mine')\nfails()")
    assert raised.traceback[-1].name == "fails"
    assert dict(vars(Trainer)) == before
    assert "PRe: " not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["module", "package", "command"])
def test_targets(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"target_of_launch_{kind}"
    (tmp_path / name).mkdir()
    for file in ("__init__", "__main__", "train"):
        (tmp_path / name / f"{file}.py").write_text(
            f"import sys\nprint({file!r}, __name__, sys.argv[1:])"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    if kind == "command":
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[console_scripts]\n{name}-cli = {name}:main\n")
        (tmp_path / name / "__init__.py").write_text(
            "import sys\ndef main():\n    print(sys.argv)\n    return 5"
        )
        with pytest.raises(SystemExit) as left:
            launch.main(["--", f"{name}-cli", "a"])
        assert left.value.code == 5
        assert capsys.readouterr().out == f"{[f'{name}-cli', 'a']}\n"
    elif kind == "module":
        launch.main(["--", "-m", f"{name}.train", "--a"])
        assert capsys.readouterr().out.splitlines()[-1] == "train __main__ ['--a']"
    else:
        launch.main(["--", "-m", name])
        assert capsys.readouterr().out.splitlines()[-1] == "__main__ __main__ []"


def test_models_that_are_left_alone_and_models_that_come_late(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        """
        from transformers import LlamaConfig, LlamaForCausalLM
        from pre_kernels.integrations import find_handle
        from tests.integrations.support.tiny.models import text_config
        plain = trainer(LlamaForCausalLM(LlamaConfig(**text_config())), samples=[[("text", 4)]] * 4)
        plain.train()
        assert find_handle(plain.model) is None
        model = build("llava")
        handles = [find_handle(trainer(model).model) for _ in range(2)]
        assert handles[0] is handles[1]
        late = trainer(None, model_init=lambda: build("llava"))
        late.train()  # makes the model again
        assert any(n.startswith("pre_head") for n in recorder.steps[-1])
        """
    )
    said = capsys.readouterr().err
    assert "PRe: not attached to LlamaForCausalLM: it is not a vision-language model" in said
    assert said.count("PRe: attached") == 3
    # It comes in the first training, before the second step.
    assert said.count("WARNING") == 1
    assert (
        "PRe: WARNING: InOrder trains LlamaForCausalLM, which is not a vision-language model"
        in said
    )


def test_peft_model(run: Any) -> None:
    run(
        """
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(build("llava"), LoraConfig(target_modules=["q_proj"]))
        trainer(model).train()
        assert recorder.steps[0]["pre_head.w1"].abs().max() > 0
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all("lora" in n or "pre_head" in n for n in trained)
        """
    )


def test_warnings_when_pre_does_nothing(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("pass")
    assert "PRe: WARNING: nothing was trained with PRe" in capsys.readouterr().err
    run("trainer(build('llava'), samples=[[('text', 4)]] * 4).train()")
    said = capsys.readouterr().err
    assert (
        "PRe: WARNING: LlavaForConditionalGeneration was trained, but no batch had a term of PRe"
        in said
    )
    run("trainer(build('llava')).train()", "--weight", "0")
    assert "WARNING" not in capsys.readouterr().err


def test_errors_at_the_model_leave_nothing_behind(run: Any, tmp_path: Path) -> None:
    before = dict(vars(Trainer))
    with pytest.raises(ValueError, match=r"layer: got 9, want 1..4"):
        run("trainer(build('llava'))", "--layer", "9")
    apply_pre(build("llava"), hidden_dim=8).save(tmp_path / "other")
    body = """
    model = build("llava")
    try:
        trainer(model)
    finally:
        assert not hasattr(model, "pre_head")
    """
    with pytest.raises(ValueError, match=r"hidden_dim: .* says 8, this handle has 32"):
        run(body, "--head", str(tmp_path / "other"))
    body = """
    model = build("llava")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(model, optimizers=(optimizer, None)).train()
    """
    with pytest.raises(
        RuntimeError, match=r"optimizer: InOrder's does not hold the parameters of `pre_head`"
    ):
        run(body)
    assert dict(vars(Trainer)) == before


def test_a_trainer_without_batch_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers before 4.46. The original LLaVA was trained with 4.37."""
    monkeypatch.delattr(Trainer, "get_batch_samples")
    before = dict(vars(Trainer))
    with pytest.warns(
        UserWarning, match=r"no Trainer.get_batch_samples, .* its micro-batches weigh the same"
    ):
        patch = patch_trainer()
    assert vars(Trainer)["training_step"] is not before["training_step"]
    patch.remove()
    assert dict(vars(Trainer)) == before


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        START
        + textwrap.dedent(
            """
            model = build("llava")
            t = trainer(model, size=1, ddp_backend="gloo", ddp_find_unused_parameters=True)
            t.train()
            if torch.distributed.get_rank() == 0:
                torch.save(recorder.steps[0], out / "found")
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            """
        )
    )
    handle = apply_pre(build("llava"))
    handle.save(tmp_path / "head")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    start += [
        "-m",
        "pre_kernels.integrations.launch",
        "--layer",
        "2",
        "--head",
        str(tmp_path / "head"),
        "--",
    ]
    done = subprocess.run(
        [*start, str(script), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("PRe: attached") == 1
    tokens = sum(int(batch("llava", [s]).visual.sum()) for s in UNEQUAL_IMAGES)
    wanted = by_hand("llava", UNEQUAL_IMAGES, handle, [1 / tokens] * 4, "sum")
    assert_head(torch.load(tmp_path / "out" / "found"), wanted)
