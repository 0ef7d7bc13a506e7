"""Processes that train together with different PRe: an error on every process, before any step."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels.integrations import agreement, apply_pre, patch_trainer
from pre_kernels.integrations.pre_callback import PreCallback

from .support.processes import both
from .support.ranks import TEXT_ONLY, UNEVEN, batches, made
from .support.split_layers import column_row
from .support.tiny.models import build
from .support.tiny.training import Recorder, make

# By name: the settings of rank 0 and of the other ranks (None: no handle), and the error.
DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "weight and layer": (
        {},
        {"weight": 1.0, "layer": 3},
        "apply_pre: got layers [2] on ranks [0], [3] on ranks [1]; weight 0.5 on ranks [0], 1.0 on "
        "ranks [1]; want the same settings on every rank: call it with the same arguments on every "
        "rank",
    ),
    "head": (
        {"hidden_dim": 8},
        {"loss": "mse"},
        "apply_pre: got hidden_dim 8 on ranks [0], 32 on ranks [1]; loss 'cosine' on ranks [0], "
        "'mse' on ranks [1]; want",
    ),
    "no handle": (
        {},
        None,
        "handle: got none on ranks [1], whose model has no PRe, want one on every rank, like ranks "
        "[0]; call apply_pre on every rank",
    ),
    "version": (
        {},
        {"version": "0.0.1"},
        f"pre_kernels: got version {agreement.__version__} on ranks [0], 0.0.1 on ranks [1], want "
        "one version on every rank; install the same version in each environment",
    ),
}


def settings(name: str) -> Any:
    mine = DIFFERENT[name][min(torch.distributed.get_rank(), 1)]
    if mine is not None and "version" in mine:
        agreement.__version__ = mine["version"]
        return {}
    return mine


def trained(name: str, how: str, folder: str) -> None:
    version = agreement.__version__
    recorder = Recorder()
    callbacks: list[Any] = [recorder]
    model = build("llava")
    mine = settings(name)
    if how == "patch_trainer" and mine is not None:
        apply_pre(model, **mine)
    elif how == "PreCallback":
        callbacks.append(PreCallback(**mine))
    trainer = make(Path(folder), model, size=1, callbacks=callbacks, ddp_backend="gloo")
    try:
        with patch_trainer(), pytest.raises(ValueError, match=re.escape(DIFFERENT[name][2])):
            trainer.train()
    finally:
        agreement.__version__ = version
    assert not recorder.steps


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "patch_trainer") for name in DIFFERENT), ("weight and layer", "PreCallback")],
)
def test_trainer(name: str, how: str, tmp_path: Path) -> None:
    both(trained, name, how, str(tmp_path))


def fit(folder: str, name: str) -> None:
    import lightning

    from pre_kernels.integrations.lightning import PreLightningCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llava")
            apply_pre(self.model, **settings(name))

        def training_step(self, data: Any, index: int) -> Any:
            raise AssertionError("a step was taken")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[PreLightningCallback()],
    )
    with pytest.raises(ValueError, match=re.escape(DIFFERENT[name][2])):
        trainer.fit(Module(), [0])


def test_lightning(tmp_path: Path) -> None:
    """Where the parameters differ, as without a handle, DDP raises an error of its own before."""
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("needs lightning")
    both(fit, str(tmp_path), "weight and layer")


def loop(name: str) -> Any:
    """The first forward of a loop of one's own, in which the last rank has other settings, another
    seed, or only text."""
    rank = torch.distributed.get_rank()
    last = rank == torch.distributed.get_world_size() - 1
    model = build("llava")
    if name == "seed" and last:
        torch.manual_seed(5)
    handle = apply_pre(model, weight=1.0 if name == "weight" and last else 0.5, group="world")
    if name == "off" and last:
        handle.enabled = False
    exchanges = []
    exchange = torch.distributed.all_gather_object
    torch.distributed.all_gather_object = lambda *a, **k: (exchanges.append(1), exchange(*a, **k))
    try:
        for data in batches([UNEVEN[0], TEXT_ONLY[1]], rank):
            model(**data.inputs).loss.backward()
    except ValueError as error:
        assert not any(p.grad is not None for p in model.parameters())
        return str(error)
    finally:
        torch.distributed.all_gather_object = exchange
    return len(exchanges), handle.metrics()["pre_forwards"]


def test_loop_of_ones_own() -> None:
    """One exchange in the first forward, and none later; the last rank begins with a text."""
    assert both(loop, "nothing") == [(1, 2)] * 2
    weight = (
        "apply_pre: got weight 0.5 on ranks [0], 1.0 on ranks [1]; want the same settings on "
        "every rank: call it with the same arguments on every rank"
    )
    seed = (
        "head: its weights on ranks [1] differ from those on rank 0, want the same head on every "
        "rank; give all ranks the same seed before apply_pre"
    )
    assert both(loop, "weight") == [weight] * 2
    assert both(loop, "seed") == [seed] * 2
    off = "apply_pre: got enabled True on ranks [0], False on ranks [1]; want the same settings on"
    assert all(error.startswith(off) for error in both(loop, "off"))


def split_layers() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = build("llava")
    torch.manual_seed(torch.distributed.get_rank())
    apply_pre(model)
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, column_row())
    data = batches(UNEVEN, 0)[0]
    with pytest.raises(ValueError, match=r"head: its weights on ranks \[1\] differ from those on"):
        model(**data.inputs)


def test_tensor_parallel_ranks_with_different_heads() -> None:
    """Nothing averages or copies the head there, so ranks with different heads would drift apart,
    also without a group."""
    both(split_layers)


def one_rank_of_a_group() -> None:
    """Ranks that are not counted together may differ."""
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group([r]) for r in range(2)]
    torch.manual_seed(rank)
    model, _ = made(group=groups[rank], weight=1.0 + rank)
    model(**batches(UNEVEN, rank)[0].inputs).loss.backward()


def test_processes_that_train_by_themselves() -> None:
    both(one_rank_of_a_group)
