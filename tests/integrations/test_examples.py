"""The README's Python and the examples in docstrings run, against tiny stand-ins where they name a
model or data."""

from __future__ import annotations

import ast
import doctest
import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from verify import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("lightning")

import lightning
import transformers

import pre_kernels
import pre_kernels.integrations.lightning as of_lightning
import pre_kernels.integrations.pre_callback as pre_callback
from pre_kernels import diagnostics, integrations
from pre_kernels.demo.export import processor, save_scenes
from pre_kernels.demo.model import build
from pre_kernels.demo.scenes import PATCHES, compose, split_digits
from pre_kernels.demo.settings import Settings
from pre_kernels.demo.text import visual_batch
from pre_kernels.diagnostics.run import callback, samples

from .support.tiny.nanovlm_like import small
from .support.tiny.training import InOrder, arguments

FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODULES = (
    pre_kernels,
    pre_kernels.reference,
    integrations,
    callback,
    pre_callback,
    of_lightning,
    diagnostics,
    samples,
)


def of_the_readme() -> Iterator[Any]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for found in FENCED.finditer(text):
        yield pytest.param(found[1], id=f"README:{text[: found.start()].count(chr(10)) + 1}")


def of_docstrings() -> Iterator[Any]:
    for file in sorted(
        [*(ROOT / "pre_kernels").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                name = getattr(node, "name", "module")
                for number, code in enumerate(FENCED.findall(ast.get_docstring(node) or "")):
                    yield pytest.param(
                        code, id=f"{file.stem}.{name}" + (f"-{number}" if number else "")
                    )


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has images and a model's processor."""
    folder = tmp_path_factory.mktemp("examples")
    save_scenes(split_digits(0)[2], 2, 0, folder / "scenes")
    (folder / "scenes" / "images").rename(folder / "held-out")
    for more in sorted((folder / "held-out").iterdir())[2:]:  # classes, two of which are enough
        shutil.rmtree(more)
    processor().save_pretrained(folder / "checkpoint")
    return folder


class Given:
    """What the examples take as given, made when one names it."""

    def __init__(self, out: Path) -> None:
        self.folder = str(out)
        self.checkpoint = "checkpoint"
        self.scenes = compose(split_digits(0)[0], 4, 0)
        self.hidden, self.anchor = (
            torch.randn(1, 3, 4096, requires_grad=True),
            torch.randn(1, 3, 4096),
        )
        self.visual_mask = torch.tensor([[True, False, True]])
        self.masks = torch.arange(PATCHES) % 2 == torch.arange(2)[:, None]

    def names(self, code: str) -> dict[str, Any]:
        public = {
            name: getattr(module, name)
            for module in MODULES
            for name in getattr(module, "__all__", ())
        }
        public |= {"LayerCallback": callback.LayerCallback, "load_samples": samples.load_samples}
        public |= {
            "PreCallback": pre_callback.PreCallback,
            "PreLightningCallback": of_lightning.PreLightningCallback,
        }
        named = set(re.findall(r"\w+", code)) - {"scenes", "names"}
        variables = {name: getattr(self, name) for name in named if hasattr(self, name)}
        if "decoder.blocks" in code:  # a model that is not Hugging Face's
            model, inputs = small()
            variables |= {
                "model": model,
                "batches": [inputs],
                "param_groups": [{"params": [*model.parameters()]}],
            }
        return {
            "torch": torch,
            "lightning": lightning,
            "AutoModel": transformers.AutoModel,
            **public,
            **variables,
        }

    @functools.cached_property
    def model(self) -> Any:
        return build(Settings(width=16, layers=32)).train()

    @functools.cached_property
    def processor(self) -> Any:
        return processor()

    @functools.cached_property
    def module(self) -> Any:
        """A LightningModule with PRe."""
        model = self.model
        integrations.apply_pre(model)

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, inputs: Any, index: int) -> torch.Tensor:
                return self.model(**inputs).loss

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        return Module()

    @property
    def loader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    @property
    def batches(self) -> list[Any]:
        return [visual_batch(self.scenes, torch.arange(2))]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: value[:1] for name, value in self.batches[0].items() if name != "labels"}

    @property
    def data(self) -> list[Any]:
        return [(self.inputs, self.masks, label) for label in (0, 0, 1, 1)]

    @property
    def images(self) -> list[Any]:
        state = torch.randn(PATCHES, 16)
        return [(state, state + 1, state * 2, self.masks, label) for label in (0, 0, 1, 1)]

    @property
    def samples(self) -> list[Any]:
        return samples.load_samples(self.model, self.processor, "held-out")

    @functools.cached_property
    def trainer(self) -> Any:
        return InOrder(
            model=self.model,
            args=arguments(Path(self.folder), 1, 2),
            train_dataset=list(range(4)),
            data_collator=lambda drawn: visual_batch(self.scenes, torch.tensor(drawn)),
        )

    def my_vqa_accuracy(self, model: Any) -> float:
        return 0.5


@pytest.fixture
def given(held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    monkeypatch.chdir(held_out)
    return Given(tmp_path)


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network; a Trainer that an example left patched is put back."""
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    encoder = transformers.Dinov2Model(config)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", mock.Mock(return_value=encoder))
    yield
    patch = vars(transformers.Trainer).get("_pre_patch")
    if patch is not None:
        patch.remove()


@pytest.mark.parametrize("code", [*of_the_readme(), *of_docstrings()])
def test_example(code: str, given: Given) -> None:
    torch.manual_seed(0)
    names = given.names(code)
    if ">>>" not in code:
        exec(compile(code, "<example>", "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, names, "example", None, 0)
    said: list[str] = []
    found = doctest.DocTestRunner().run(test, out=said.append)
    assert found.attempted
    assert not found.failed, "".join(said)


def test_the_readme_trains_with_pre(given: Given) -> None:
    """The stand-ins are no excuse: the head is there before the training, and was trained."""
    code = next(
        code
        for code in FENCED.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if "train()" in code
    )
    head = "before = handle.head.w1.detach().clone()\n"
    code = code.replace(
        "trainer.train()", f"{head}trainer.train()\nmoved = not torch.equal(before, handle.head.w1)"
    )
    names = given.names(code)
    exec(code, names)
    assert names["moved"]
    assert any("pre_loss" in entry for entry in given.trainer.state.log_history)


def members(module: Any) -> Iterator[tuple[str, Any]]:
    """The public names of a documented module and the public methods of its classes."""
    names = getattr(module, "__all__", None) or [
        n for n, v in vars(module).items() if _own(module, n, v)
    ]
    for name in names:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        yield f"{module.__name__}.{name}", value
        for key, member in vars(value).items() if inspect.isclass(value) else ():
            plain = inspect.unwrap(getattr(member, "__func__", member))
            if not key.startswith("_") and (
                inspect.isfunction(plain) or isinstance(member, property)
            ):
                yield f"{module.__name__}.{name}.{key}", member


def _own(module: Any, name: str, value: Any) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


def test_everything_public_has_a_docstring() -> None:
    found = dict(pair for module in MODULES for pair in members(module))
    assert {"pre_kernels.fused_pre_loss", "pre_kernels.integrations.PreHandle.save"} <= found.keys()
    missing = [name for name, value in found.items() if not (value.__doc__ or "").strip()]
    assert not missing
    assert all((module.__doc__ or "").strip() for module in MODULES)


def test_arguments_in_docstrings_are_those_of_the_function() -> None:
    for name, value in dict(pair for module in MODULES for pair in members(module)).items():
        section = re.search(
            r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(value.__doc__ or ""), re.MULTILINE
        )
        if section is None or isinstance(value, property):
            continue
        lines = textwrap.dedent(section[1]).splitlines()
        listed = [
            n for line in lines if line[:1].strip() for n in line.partition(":")[0].split(", ")
        ]
        taken = inspect.signature(getattr(value, "__func__", value)).parameters
        var_keyword = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        unknown = [n for n in listed if n not in taken and not var_keyword]
        assert not unknown, f"{name}: its docstring has arguments {unknown}"


def test_make_docs_has_these_modules() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    named = re.search(r"^API := (.*)$", makefile, re.MULTILINE)[1].split()
    # pdoc documents what a listed module's __all__ names, modules too
    assert sorted([*named, "pre_kernels.reference"]) == sorted(
        module.__name__ for module in MODULES
    )
