"""Python blocks of pages and docstrings, and tiny stand-ins for what they take as given."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import transformers

import pre_kernels
import pre_kernels.integrations.lightning as of_lightning
import pre_kernels.integrations.pre_callback as pre_callback
from pre_kernels import diagnostics, integrations
from pre_kernels.demo.export import processor
from pre_kernels.demo.model import build
from pre_kernels.demo.scenes import PATCHES, compose, split_digits
from pre_kernels.demo.settings import Settings
from pre_kernels.demo.text import visual_batch
from pre_kernels.diagnostics.run import callback, samples
from pre_kernels.integrations import apply_pre

from .tiny import interleaved, openvla_like
from .tiny.nanovlm_like import small
from .tiny.training import InOrder, arguments

FENCED = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
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


@dataclasses.dataclass(frozen=True)
class Block:
    """Python from a page or a docstring."""

    code: str
    # what the page's blocks above it import; None in a docstring, which need not import at all
    imported: str | None = None


def of_page(page: str, text: str) -> Iterator[Any]:
    imported = ""
    for found in FENCED.finditer(text):
        code = textwrap.dedent(found["code"])
        line = text[: found.start()].count("\n") + 1
        yield pytest.param(Block(code, imported), id=f"{page}:{line}")
        if ">>>" not in code:
            imports = (ast.Import, ast.ImportFrom)
            kept = [node for node in ast.parse(code).body if isinstance(node, imports)]
            imported += "".join(f"{ast.unparse(node)}\n" for node in kept)


class Names(dict[str, Any]):
    """The globals of an example, which make a stand-in when the example first names it."""

    def __init__(self, given: Given, named: dict[str, Any]) -> None:
        super().__init__(named)
        self.given = given

    def __missing__(self, name: str) -> Any:
        if name.startswith("_") or name in ("names", "held_out") or not hasattr(Given, name):
            raise KeyError(name)
        self[name] = getattr(self.given, name)
        return self[name]

    def copy(self) -> Names:
        """doctest's, which would take a plain dictionary."""
        return self


class Given:
    """What the examples take as given, made when one names it."""

    torch, nn, F, lightning = torch, torch.nn, torch.nn.functional, lightning
    checkpoint = "checkpoint"
    width = 16

    def __init__(self, out: Path) -> None:
        self._out = str(out)
        self._scenes = compose(split_digits(0)[0], 4, 0)

    def names(self, block: Block) -> Names:
        public = {
            name: getattr(module, name)
            for module in MODULES
            for name in getattr(module, "__all__", ())
        }
        public |= {"LayerCallback": callback.LayerCallback, "AutoModel": transformers.AutoModel}
        public |= {
            "PreCallback": pre_callback.PreCallback,
            "PreLightningCallback": of_lightning.PreLightningCallback,
        }
        names = Names(self, public if block.imported is None else {})
        if "decoder.blocks" in block.code:  # a model that is not Hugging Face's
            model, inputs = small()
            groups = [{"params": [*model.parameters()]}]
            names |= {"model": model, "batches": [inputs], "param_groups": groups}
        return names

    @functools.cached_property
    def folder(self) -> str:
        return self._out

    @functools.cached_property
    def hidden(self) -> torch.Tensor:
        return torch.randn(1, 3, 4096, requires_grad=True)

    @functools.cached_property
    def anchor(self) -> torch.Tensor:
        return torch.randn(1, 3, 4096)

    @functools.cached_property
    def visual_mask(self) -> torch.Tensor:
        return torch.tensor([[True, False, True]])

    @functools.cached_property
    def masks(self) -> torch.Tensor:
        return torch.arange(PATCHES) % 2 == torch.arange(2)[:, None]

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
        apply_pre(model)

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
        return [visual_batch(self._scenes, torch.arange(2))]

    @property
    def batch(self) -> Any:
        return self.batches[0]

    @functools.cached_property
    def optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    @functools.cached_property
    def handle(self) -> Any:
        return apply_pre(self.model)

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
            args=arguments(Path(self._out), 1, 2),
            train_dataset=list(range(4)),
            data_collator=lambda drawn: visual_batch(self._scenes, torch.tensor(drawn)),
        )

    @property
    def vlm(self) -> Any:
        """prismatic's model, of which an example reads one number."""
        return SimpleNamespace(vision_backbone=SimpleNamespace(num_patches=4))

    @functools.cached_property
    def vla(self) -> Any:
        return openvla_like.openvla_like(layers=32)

    @property
    def vla_batch(self) -> Any:
        return openvla_like.openvla_batch()

    def visual(self, inputs: Any, shift: int = 0) -> torch.Tensor:
        return openvla_like.visual(inputs, shift)

    def vggt(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(pixels), openvla_like.PATCHES, self.width)

    @functools.cached_property
    def policy(self) -> Any:
        return interleaved.policy()[0]

    @property
    def policy_batch(self) -> Any:
        return interleaved.policy()[1]

    def prefix(self, inputs: Any) -> torch.Tensor:
        return interleaved.prefix(inputs)

    def my_vqa_accuracy(self, model: Any) -> float:
        return 0.5


def run(block: Block, given: Given) -> Names:
    """Run a block; its names afterwards."""
    torch.manual_seed(0)
    names = given.names(block)
    exec(block.imported or "", names)
    if ">>>" not in block.code:
        exec(compile(block.code, "<example>", "exec"), names)
        return names
    test = doctest.DocTestParser().get_doctest(block.code, names, "example", None, 0)
    said: list[str] = []
    found = doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert found.attempted
    assert not found.failed, "".join(said)
    return names
