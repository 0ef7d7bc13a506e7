"""Every Python block of every page and of every docstring runs, against tiny stand-ins where it
names a model or data.

A block of a page has what the blocks above it import, and nothing else of this library: what it
names has to be imported on its page.
"""

from __future__ import annotations

import ast
import dataclasses
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
from verify.docs import pages

pytest.importorskip("sklearn")
pytest.importorskip("lightning")

import transformers

from pre_kernels.demo.export import processor, save_scenes
from pre_kernels.demo.scenes import split_digits

from .support.examples import FENCED, MODULES, Block, Given, of_page, run


def of_pages() -> Iterator[Any]:
    for page in pages(ROOT):
        yield from of_page(page, (ROOT / page).read_text(encoding="utf-8"))


def of_docstrings() -> Iterator[Any]:
    for folder in ("pre_kernels", "integrations"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    name = getattr(node, "name", "module")
                    found = FENCED.finditer(ast.get_docstring(node) or "")
                    for number, match in enumerate(found):
                        number_of = f"-{number}" if number else ""
                        yield pytest.param(
                            Block(match["code"]), id=f"{file.stem}.{name}{number_of}"
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


@pytest.fixture
def given(held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    for path in held_out.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("block", [*of_pages(), *of_docstrings()])
def test_example(block: Block, given: Given) -> None:
    run(block, given)


MADE_UP = """
```python
from pre_kernels.integrations import apply_pre
```

It needs the block above.

```python
handle = apply_pre(model)
```

- In a list:

  ```python
  patch_trainer()
  ```

```text
not Python
```

```python
>>> 1 + 1
3
```
"""


def test_an_example_that_fails_is_found(given: Given) -> None:
    _, attached, unknown, wrong = (param.values[0] for param in of_page("made-up.md", MADE_UP))
    assert run(attached, given)["handle"].model is given.model
    with pytest.raises(NameError, match="patch_trainer"):
        run(unknown, given)
    with pytest.raises(AssertionError, match=r"Expected:\s+3"):
        run(wrong, given)


def test_pages_and_docstrings_have_examples() -> None:
    found = {param.id.partition(":")[0] for param in of_pages()}
    assert {"README.md", "docs/training.md", "docs/loss.md", "docs/stacks.md"} <= found
    assert any(param.id == "attach.apply_pre" for param in of_docstrings())


def test_the_readme_trains_with_pre(given: Given) -> None:
    """It does so with the stand-ins: the head is there before the training, and is trained."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [param.values[0] for param in of_page("README.md", text)]
    (block,) = (block for block in blocks if "trainer.train()" in block.code)
    before = "before = handle.head.w1.detach().clone()"
    after = "moved = not torch.equal(before, handle.head.w1)"
    code = block.code.replace("trainer.train()", f"{before}\ntrainer.train()\n{after}")
    assert run(dataclasses.replace(block, code=code), given)["moved"]
    assert any("pre_loss" in entry for entry in given.trainer.state.log_history)


def test_the_readme_by_hand_is_what_apply_pre_adds(given: Given) -> None:
    """With the same weights both codes of the first screen have the same loss and gradients."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    by_hand, attached = (param.values[0] for param in list(of_page("README.md", text))[:2])
    model = given.model
    names = run(by_hand, given)
    names["loss"].backward()
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    model.zero_grad()

    # The second code with the weights of the first one's head.
    first, _, second = names["head"]
    weights = [first.weight, first.bias, second.weight, second.bias]
    model.by_hand = weights
    copy = "for mine, its in zip(handle.head.parameters(), model.by_hand): mine.data.copy_(its)"
    code = attached.code.replace("\nloss =", f"\n{copy}\nloss =")
    added = run(dataclasses.replace(attached, code=code), given)
    added["loss"].backward()
    torch.testing.assert_close(added["loss"], names["loss"])
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    for mine, its in zip(added["handle"].head.parameters(), weights, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


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
