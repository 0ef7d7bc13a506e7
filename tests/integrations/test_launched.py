"""The launcher's messages: reports, the first step of a training without PRe, and methods that
others replace."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from pre_kernels.integrations import launch
from pre_kernels.integrations.launched import Launch
from verify import ROOT

from .support.scripts import TRAIN, under_the_launcher

NOTHING = "PRe: WARNING: nothing was trained with PRe"
Captured = pytest.CaptureFixture[str]
TEXT = "[[('text', 4)]] * 4"
PLAIN = """
from transformers import LlamaConfig, LlamaForCausalLM
from tests.integrations.support.tiny.models import batch, text_config
def plain(): return LlamaForCausalLM(LlamaConfig(**text_config()))
"""
LOOP = """
def loop(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(**batch("llava", UNEQUAL_IMAGES[:1]).inputs).loss.backward()
        optimizer.step()
        print("STEP", file=sys.stderr)
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    return under_the_launcher(tmp_path)


@pytest.mark.parametrize(
    ("ending", "code", "reports"),
    [
        ("sys.exit(main())", (), True),
        ("sys.exit(0)", (0,), True),
        ("sys.exit(3)", (3,), False),
        ("sys.exit('no data')", ("no data",), False),
        ("raise KeyError('mine')", ("mine",), False),
        ("raise KeyboardInterrupt", (), False),
    ],
)
def test_the_report_comes_however_the_script_ends(
    ending: str, code: Any, reports: bool, run: Any, capsys: Captured
) -> None:
    """After a failure "nothing was trained" would only be a consequence, so it is not reported. A
    training without terms is."""
    for training in ("", f"trainer(build('llava'), samples={TEXT}).train()"):
        with pytest.raises(BaseException) as left:
            run(f"def main(): pass\n{training}\n{ending}")
        assert left.value.args[:1] == code
        said = capsys.readouterr().err
        if training:
            warning = "LlavaForConditionalGeneration was trained, but no batch had a term of PRe"
            assert said.count(f"WARNING: {warning}") == 1
        assert (NOTHING in said) is (reports and not training)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_left_to_the_script(name: str, run: Any, capsys: Captured) -> None:
    """Its own handler gets the signal, also in the middle of a training, and ends it as it
    likes."""
    body = """
    import signal
    class Stops(InOrder):
        def training_step(self, *args, **more):
            if self.state.global_step:
                signal.raise_signal(number)
            return super().training_step(*args, **more)
    InOrder = Stops
    def save(number, frame):
        print("saved", number)
        sys.exit(3)
    """
    number = getattr(signal, name)
    before = signal.getsignal(number)
    try:
        with pytest.raises(SystemExit) as left:
            run(
                f"number = {int(number)}\n{textwrap.dedent(body)}\nsignal.signal(number, save)\n"
                "trainer(build('llava'), steps=2).train()"
            )
    finally:
        signal.signal(number, before)
    assert left.value.code == 3
    said = capsys.readouterr()
    assert f"saved {int(number)}" in said.out
    assert [line[:13] for line in said.err.splitlines() if "PRe: " in line] == ["PRe: attached"]


def test_a_signal_before_the_script_starts(tmp_path: Path) -> None:
    """It is not left to exceptions, which imports of extension modules swallow."""
    (tmp_path / "ok.py").write_text("raise AssertionError('it ran')")
    (tmp_path / "swallows.py").write_text(
        "import os, signal\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException: pass\n"
        "def dino(): ..."
    )
    done = subprocess.run(
        [sys.executable, "-m", launch.LAUNCHER, "--set=anchor=swallows:dino", "--", "ok.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "pre-kernels: interrupted: before the script started\n"


def test_a_handler_that_a_module_of_the_settings_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is there when the script runs."""
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "handles.py").write_text(
        "import signal\ndef dino(inputs, rows): ...\nsignal.signal(signal.SIGTERM, dino)"
    )
    (tmp_path / "ok.py").write_text(
        "import handles, signal\nassert signal.getsignal(signal.SIGTERM) is handles.dino"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        launch.main(
            ["--set=anchor=handles:dino", "--set=anchor_dim=8", "--", str(tmp_path / "ok.py")]
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_script_that_patches_the_trainer_itself(run: Any, capsys: Captured) -> None:
    """The launcher's patch outlives the script's block, so the second training has PRe too."""
    run(
        """
        from pre_kernels.integrations import patch_trainer
        with patch_trainer():
            trainer(build("llava")).train()
        t = trainer(build("llava"))
        t.train()
        assert "pre_loss" in t.state.log_history[0]
        """
    )
    assert "WARNING" not in capsys.readouterr().err


def test_a_training_that_breaks_off_is_left_to_its_traceback(run: Any, capsys: Captured) -> None:
    body = """
    class Breaks(InOrder):
        def training_step(self, *args, **more):
            if self.state.global_step:
                raise KeyError("second step")
            return super().training_step(*args, **more)
    InOrder = Breaks
    trainer(build("llava"), steps=2).train()
    """
    with pytest.raises(KeyError, match="second step"):
        run(body)
    assert "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "warning"),
    [
        (
            f"{LOOP}\nloop(build('llava'))",
            "the first optimizer step was outside of a transformers.Trainer",
        ),
        (
            f"t = trainer(plain(), samples={TEXT}, steps=3)\nt.add_callback(Says())\nt.train()",
            "InOrder trains LlamaForCausalLM, which is not a vision-language model "
            "according to its config",
        ),
    ],
    ids=["a loop of one's own", "a text model"],
)
def test_a_training_without_pre_is_named_at_its_first_step(
    training: str, warning: str, run: Any, capsys: Captured, recwarn: pytest.WarningsRecorder
) -> None:
    says = """
class Says(TrainerCallback):
    def on_optimizer_step(self, *_, **__): print("STEP", file=sys.stderr)
"""
    run(f"{PLAIN}\nfrom transformers import TrainerCallback\n{says}\n{training}")
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line == "STEP" or "WARNING" in line
    ]
    assert lines[1:] == ["STEP"] * 3
    assert lines[0].startswith(f"PRe: WARNING: {warning}")
    # patch_trainer must not give its own warning too.
    assert not [w for w in recwarn if "PRe: " in str(w.message)]


@pytest.mark.parametrize(
    "training",
    [
        "trainer(build('llava'), steps=3).train()",
        "trainer(build('llava'), samples=UNEQUAL_IMAGES[2:] * 2, size=1, steps=3).train()",
        "from pre_kernels.integrations import apply_pre\n"
        f"{LOOP}\nm = build('llava')\napply_pre(m)\nloop(m)",
        "trainer(build('llava'), steps=2, warmup_steps=1, lr_scheduler_type='linear').train()",
    ],
    ids=["images", "text first", "apply_pre in a loop", "warmup"],
)
def test_a_training_with_pre_is_not_warned_of(training: str, run: Any, capsys: Captured) -> None:
    run(f"{PLAIN}\n{training}", "--set", "schedule=cosine", "--set", "warmup=0.5")
    said = capsys.readouterr().err
    assert "first optimizer step" not in said
    assert "without PRe" not in said
    assert "no PRe" not in said


REPLACES = """
import functools
from transformers import Trainer
def plainly(name):  # as one who makes a method anew from its source
    method = getattr(Trainer, name)
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    def theirs(self, *args, **more): return method(self, *args, **more)
    setattr(Trainer, name, theirs)
"""


def test_a_constructor_that_others_replaced(run: Any, tmp_path: Path, capsys: Captured) -> None:
    """PRe is attached when `train()` begins, with the same head as in a training in which nothing
    was replaced."""
    run(TRAIN)
    wanted = torch.load(tmp_path / "out" / "found")
    before = dict(vars(Trainer))
    capsys.readouterr()
    try:
        run(f"{REPLACES}\nplainly('__init__')\n{TRAIN}")
        after = dict(vars(Trainer))
    finally:
        Trainer.__init__ = before["__init__"]  # type: ignore[method-assign]
    # The others' method stays in place.
    assert {name for name in before if after[name] is not before[name]} == {"__init__"}
    saved = torch.load(tmp_path / "out" / "found")
    for name, gradient in wanted[0].items():
        torch.testing.assert_close(saved[0][name], gradient, rtol=0, atol=0)
    assert saved[1][0]["pre_loss"] == wanted[1][0]["pre_loss"]
    said = capsys.readouterr().err
    assert said.count("PRe: attached") == 1
    assert "WARNING" not in said


def test_all_methods_replaced_is_said_at_the_first_step(run: Any, capsys: Captured) -> None:
    before = dict(vars(Trainer))
    try:
        run(
            f"{REPLACES}\nplainly('__init__')\nplainly('train')\n"
            "trainer(build('llava'), steps=2).train()"
        )
    finally:
        for name in ("__init__", "train"):
            setattr(Trainer, name, before[name])
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert (
        "PRe: WARNING: InOrder trains LlavaForConditionalGeneration without PRe, "
        "because Trainer.__init__" in said
    )


def test_a_method_that_others_put_around_ours_passes_through_afterwards(
    tmp_path: Path, capsys: Captured
) -> None:
    from .support.tiny.models import build
    from .support.tiny.training import arguments

    before = dict(vars(Trainer))
    with Launch({}):
        ours = Trainer.__init__

        def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
            ours(self, *args, **kwargs)

        Trainer.__init__ = theirs  # type: ignore[method-assign]
    try:
        assert Trainer.__init__ is theirs
        trainer = Trainer(build("llava"), arguments(tmp_path, 1, 1))
        assert not hasattr(trainer.model, "pre_head")
        assert all("KeepsHead" not in type(c).__name__ for c in trainer.callback_handler.callbacks)
    finally:
        Trainer.__init__ = before["__init__"]  # type: ignore[method-assign]
    assert dict(vars(Trainer)) == before
    assert capsys.readouterr().err == ""


def test_a_module_that_is_run_after_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pre_kernels.integrations.launched import _Importing

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "module_of_launched.py").write_text("")
    came: list[str] = []
    path = list(sys.meta_path)
    with _Importing("module_of_launched", lambda: came.append("now")) as finder:
        importlib.import_module("module_of_launched")
        assert came == ["now"]
        del sys.modules["module_of_launched"]
        spec = importlib.util.find_spec("module_of_launched")
        assert spec is not None
        sys.meta_path.remove(finder)  # removed by someone else
    assert sys.meta_path == path
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # type: ignore[union-attr]
    assert came == ["now"]


def test_python_may_be_named_in_front_of_the_script(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[1:])")
    for words in (["python"], ["python3", "-u"], [sys.executable]):
        launch.main(["--", *words, str(tmp_path / "train.py"), "-u"])
        assert capsys.readouterr().out == "['-u']\n"
