"""Faults in training, injected: values that are not finite, no memory, interrupts, dying ranks.

Broken checkpoints are in test_checkpoint.py.
"""

from __future__ import annotations

import gc
import math
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from eager import assert_same_gradients, expected_gradients, gradients
from original_llava import build_original, original_batch
from pre_kernels.integrations import apply_pre, attach, cosine, objective, patch_trainer
from pre_kernels.integrations.checkpoint import WEIGHTS
from pre_kernels.integrations.llava import PREPARE
from pre_kernels.integrations.parallel import Whole
from ranks import made, shard
from safetensors.torch import load_file
from test_head_training import make
from test_options import Waits
from test_two_processes import ddp_resumes, trained
from tiny_models import FAMILIES, Batch, batch, build
from torch import Tensor, nn
from two import both, join

NAN, INF = float("nan"), float("inf")


# --- values that are not finite


def bad_places(data: Batch, *tokens: int) -> Tensor:
    """(B, T): these of the visual tokens, and the last token of the batch, which is none."""
    places = data.visual.nonzero()[list(tokens)]
    bad = torch.zeros_like(data.visual)
    bad[places[:, 0], places[:, 1]] = True
    bad[-1, -1] = True
    return bad


def without(data: Batch, bad: Tensor) -> Batch:
    """The batch as the equation sees it with these visual tokens left out."""
    kept = (data.visual & ~bad)[data.visual]
    lengths = [int(part.sum()) for part in kept.split(data.lengths)]
    return Batch(data.inputs, data.visual & ~bad, [n for n in lengths if n])


def attach_poisoned(family: str, bad: dict[Any, Tensor], value: float, **options: Any) -> tuple[nn.Module, Any]:
    """PRe is shown `value` at `bad[l]` after l layers and at `bad["embeds"]`, what the model computes with is left."""
    model = build(family)
    text = model.get_submodule(FAMILIES[family].text)
    modules = [(text if at == "embeds" else text.layers[at], places) for at, places in bad.items()]
    true: dict[nn.Module, Any] = {}

    def poison(module: nn.Module, args: Any, kwargs: dict[str, Any], places: Tensor) -> Any:
        true[module] = args, kwargs
        name = "inputs_embeds" if module is text else "hidden_states"
        given = kwargs[name] if name in kwargs else args[0]
        shown = torch.where(places[..., None], value, given)
        return (args, kwargs | {name: shown}) if name in kwargs else ((shown, *args[1:]), kwargs)

    for module, places in modules:
        hook: Any = lambda m, a, k, places=places: poison(m, a, k, places)  # noqa: E731
        module.register_forward_pre_hook(hook, with_kwargs=True)
    handle = apply_pre(model, **options)
    for module, _ in modules:
        module.register_forward_pre_hook(lambda m, a, k: true.pop(m), with_kwargs=True)
    return model, handle


SKIPS: list[tuple[str, float, dict[str, Any]]] = [
    ("llava", NAN, {}),
    ("qwen2_5_vl", -INF, {}),
    ("qwen2_5_vl", NAN, {"loss": "mse"}),
    ("llava", NAN, {"layer": [1, 2], "impl": "triton"}),
    ("llava", INF, {"impl": "blas"}),
    ("llava", INF, {"level": "image"}),
    ("llava", NAN, {"weighting": "image"}),
]


@pytest.mark.parametrize(("family", "value", "options"), SKIPS, ids=str)
def test_skip_is_the_batch_without_these_rows(family: str, value: float, options: dict[str, Any]) -> None:
    """Loss and every gradient; one image of llava loses all its tokens."""
    data = batch(family)
    hidden, embeds = bad_places(data, 1, 4, 5), bad_places(data, 5, 6, 7)
    layer = options.get("layer", 2)
    model, handle = attach_poisoned(
        family, {2: hidden, "embeds": embeds}, value, nonfinite="skip", **options | {"layer": layer}
    )
    loss = model(**data.inputs).loss
    loss.backward()
    more = {name: given for name, given in options.items() if name not in ("layer", "impl")}
    layers = [layer] if isinstance(layer, int) else layer
    rest = without(data, hidden | embeds)
    wanted_loss, wanted = expected_gradients(build(family), family, rest, handle.head, layers, **more)
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)

    found = handle.metrics()
    total, kept = int(data.visual.sum()), int(rest.visual.sum())
    assert (found["pre_tokens"], found["pre_skipped"]) == (kept, total - kept) == (total - 5, 5)
    assert found["pre_rows"] == (len(rest.lengths) if "image" in options.values() else kept)
    plain = build(family)(**data.inputs).loss.detach()
    assert found["pre_loss"] == pytest.approx(float((wanted_loss - plain) / 0.5), abs=1e-5)
    assert math.isfinite(found["pre_cosine"])
    assert handle.metrics()["pre_skipped"] == 0


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", [2, "embeds"])
def test_unless_asked_the_loss_says_so(where: Any, value: float) -> None:
    data = batch("llava")
    model, handle = attach_poisoned("llava", {where: bad_places(data, 3)}, value)
    loss = model(**data.inputs).loss
    loss.backward()
    assert not loss.isfinite()
    assert not handle.head.w1.grad.isfinite().all()
    found = handle.metrics()
    assert not math.isfinite(found["pre_loss"])
    assert "pre_skipped" not in found
    model, handle = attach_poisoned("llava", {where: bad_places(data)}, value)  # a token of text alone
    assert model(**data.inputs).loss.isfinite()
    assert math.isfinite(handle.metrics()["pre_loss"])


def bad_anchor(count: int) -> Callable[..., Tensor]:
    """(N, z) with nan in the last `count` rows."""

    def anchor(inputs: dict[str, Any], rows: Tensor) -> Tensor:
        found = torch.randn(int(rows.sum()), 7, generator=torch.Generator().manual_seed(0))
        found[len(found) - count :, 3] = NAN
        return found

    return anchor


@pytest.mark.parametrize("debug", ["0", "1"])
def test_skip_in_the_anchors_of_a_callable(debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRE_KERNELS_DEBUG", debug)
    model, data = build("llava"), batch("llava")
    handle = apply_pre(model, anchor=bad_anchor(2), anchor_dim=7, nonfinite="skip")
    loss = model(**data.inputs).loss
    loss.backward()
    rest = without(data, bad_places(data, -1, -2))
    anchor = bad_anchor(2)({}, data.visual)[:-2]
    wanted_loss, wanted = expected_gradients(build("llava"), "llava", rest, handle.head, [2], anchor=anchor)
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)


def test_a_count_made_ahead_keeps_skipped_rows_as_terms_of_0() -> None:
    model, data = build("llava"), batch("llava")
    handle = apply_pre(model, anchor=bad_anchor(4), anchor_dim=7, nonfinite="skip")
    mean = float(model(**data.inputs).loss.detach() - build("llava")(**data.inputs).loss.detach())
    with handle.defer(12.0) as deferred:
        model(**data.inputs)
    assert handle.count(data.inputs) == 12
    assert float(deferred.take()[0].detach()) == pytest.approx(mean * 8 / 12, abs=1e-6)


@pytest.mark.parametrize("more", [{}, {"loss": "mse"}, {"level": "image"}, {"weighting": "image"}, {"fraction": 0.5}])
def test_nothing_left_but_what_is_skipped(more: dict[str, Any]) -> None:
    model, data = build("llava"), batch("llava")
    handle = apply_pre(model, anchor=bad_anchor(12), anchor_dim=7, nonfinite="skip", **more)
    loss = model(**data.inputs).loss
    loss.backward()
    assert loss == build("llava")(**data.inputs).loss
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in handle.head.parameters())
    found = handle.metrics()
    assert (found["pre_rows"], found["pre_skipped"]) == (0, 12)
    assert math.isnan(found["pre_loss"])


def test_skipping_waits_for_nothing_and_costs_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, calls = Waits(), []
    terms, finite = objective.Objective._terms, objective.finite

    def watched(*args: Any) -> Any:
        with waits:
            return terms(*args)

    monkeypatch.setattr(objective.Objective, "_terms", watched)
    monkeypatch.setattr(objective, "finite", lambda *args: calls.append(1) or finite(*args))
    for nonfinite in attach.NONFINITE:
        model = build("llava")
        apply_pre(model, nonfinite=nonfinite)
        model(**batch("llava").inputs)
        assert waits.found == []
        assert len(calls) == (nonfinite == "skip")


def test_a_training_logs_what_it_skipped(tmp_path: Path) -> None:
    """All of it, and still finite."""
    model = build("llava")
    apply_pre(model, anchor=bad_anchor(8), anchor_dim=7, nonfinite="skip")
    with patch_trainer():
        trainer = make(tmp_path, model)
        trainer.train()
    log = trainer.state.log_history[0]
    assert (log["pre_skipped"], log["pre_tokens"]) == (16, 0)
    assert math.isfinite(log["loss"])


def test_the_sampled_cosine_counts_no_row_that_stands_in() -> None:
    """Fewer rows than the sample's size, and nan in the one that is read instead."""
    handle = apply_pre(build("llava"), loss="mse")
    hidden, mask = torch.ones(6, 32), torch.tensor([True, True, False, False, False, False])
    hidden[2:] = NAN
    assert cosine.sample_cosine(handle.head, hidden, torch.ones(6, 32), mask, "torch").isfinite().all()


# --- what ends a step in its midst


class Fault:
    """Raises when it is called for the `after`-th time, once."""

    def __init__(self, error: BaseException, after: int = 0) -> None:
        self.error, self.left = error, after

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == -1:
            error, self.error = self.error, KeyError("called again")
            raise error


def in_a_layer(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    model.model.language_model.layers[3].register_forward_pre_hook(fault)


def in_the_head(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    handle.head[1].register_forward_pre_hook(fault)  # the first one's loss is there


def after_us(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    model.register_forward_hook(fault)


def before_the_forward(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    model.register_forward_pre_hook(fault)


def in_a_kernels_buffer(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    new_empty = Tensor.new_empty
    patch.setattr(Tensor, "new_empty", lambda *args, **more: fault() or new_empty(*args, **more))


def in_the_backward(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    def watch(module: nn.Module, args: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).register_hook(fault)

    model.model.language_model.layers[2].register_forward_hook(watch)


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# (where, what, how many calls go well, the options, whether the forward had ended with us in it)
ENDS: list[tuple[Any, Callable[[], BaseException], int, dict[str, Any], bool]] = [
    (in_a_layer, out_of_memory, 0, {}, False),
    (in_the_head, out_of_memory, 0, {}, False),
    (in_a_kernels_buffer, out_of_memory, 0, {"impl": "triton"}, False),
    (in_a_kernels_buffer, out_of_memory, 7, {"impl": "triton"}, False),
    (in_the_backward, out_of_memory, 0, {}, True),
    (before_the_forward, lambda: KeyError("hook"), 0, {}, False),
    (after_us, lambda: KeyError("hook"), 0, {}, True),
    (in_a_layer, KeyboardInterrupt, 0, {}, False),
    (in_the_head, KeyboardInterrupt, 0, {}, False),
    (in_the_backward, KeyboardInterrupt, 0, {}, True),
]


def name(case: Any) -> str:
    return case.__name__ if callable(case) else str(case)


def step(model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(**batch("llava").inputs).loss.backward()
    return gradients(model)


def fails(call: Callable[[], Any], error: type[BaseException]) -> None:
    """Unlike pytest.raises it keeps no traceback, which would keep the tensors of its frames."""
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


@pytest.mark.parametrize(("place", "error", "after", "options", "counted"), ENDS, ids=name)
def test_the_step_after(
    place: Any, error: Any, after: int, options: Any, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the broken step is kept, and the next one is that of a model where nothing happened."""
    undisturbed = build("llava")
    apply_pre(undisturbed, [2, 3], **options)
    wanted = step(undisturbed)

    model, seen = build("llava"), []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    handle = apply_pre(model, [2, 3], **options)
    with monkeypatch.context() as patch:
        place(model, handle, Fault(error(), after), patch)
        fails(lambda: step(model), type(error()))
    interrupted = error is KeyboardInterrupt and not counted
    if interrupted:  # torch calls no hook then: the next forward, of whatever kind, or `remove` lets go
        with torch.no_grad():
            model(**batch("llava").inputs)
    gc.collect()
    assert all(ref() is None for ref in seen)
    assert len(seen) >= (0 if place is before_the_forward else 3)
    assert handle._capture.seen is None
    assert not handle._capture.inside
    found = handle.metrics()
    assert found["pre_forwards"] == counted
    assert math.isfinite(found["pre_loss"]) == counted
    after_it = step(model)
    for parameter, gradient in wanted.items():
        assert gradient is None or torch.equal(after_it[parameter], gradient), parameter


def test_remove_lets_go_of_an_interrupted_forward() -> None:
    model, seen = build("llava"), []
    handle = apply_pre(model)
    layer = model.model.language_model.layers[3]
    layer.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    layer.register_forward_pre_hook(Fault(KeyboardInterrupt()))
    fails(lambda: step(model), KeyboardInterrupt)
    handle.remove()
    gc.collect()
    assert seen[0]() is None


def test_an_interrupt_inside_the_original_llava() -> None:
    """Its merge is followed during a forward, once, however the last one ended."""
    model, data = build_original(), original_batch()
    handle = apply_pre(model)
    wanted = model(**data).loss
    for _ in range(2):
        model.model.layers[3].register_forward_pre_hook(Fault(KeyboardInterrupt()))
        fails(lambda: model(**data), KeyboardInterrupt)
    assert model(**data).loss == wanted
    assert PREPARE not in vars(model)
    model.model.layers[3].register_forward_pre_hook(Fault(KeyboardInterrupt()))
    fails(lambda: model(**data), KeyboardInterrupt)
    handle.remove()
    assert PREPARE not in vars(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, out_of_memory], ids=name)
def test_a_training_that_was_ended_leaves_model_and_trainer(error: Any, tmp_path: Path) -> None:
    model, undisturbed = build("llava"), build("llava")
    handle = apply_pre(model)
    apply_pre(undisturbed).head.load_state_dict(handle.head.state_dict())
    model.model.language_model.layers[3].register_forward_pre_hook(Fault(error(), 1))  # of the step's two forwards
    with patch_trainer():
        trainer = make(tmp_path, model)
        fails(trainer.train, type(error()))
    assert "backward" not in vars(trainer.accelerator)
    assert "create_optimizer" not in vars(trainer)
    assert handle._deferred is None
    for found, wanted in zip(step(model).values(), step(undisturbed).values(), strict=True):
        assert wanted is None or torch.equal(found, wanted)


# --- ranks


def ranks_that_die(folder: str, how: str) -> None:
    """Rank 1 does not take part in a collective of ours; rank 0 hears of it within the group's time limit.

    "save": from its beginning, "gather": when the parts of the head are put together.
    """
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    limit = timedelta(seconds=5)  # what both take part in has to end in it too, on a busy machine
    join(store, rank, timeout=limit)
    model, handle = made(group="world")
    wanted = step(model) if how == "forward" else None  # both take part
    (Path(folder) / "whole").mkdir(exist_ok=True)
    if how in ("save", "gather", "load"):
        shard(model, False)
        handle.save(f"{folder}/whole")
    save = lambda: handle.save(f"{folder}/half")  # noqa: E731
    call = {"save": save, "gather": save, "load": lambda: handle.load(f"{folder}/whole")}.get(how)
    if rank == 1:
        if how == "gather":
            with mock.patch.object(Whole, "read", side_effect=out_of_memory()):
                fails(save, torch.OutOfMemoryError)
        if how == "exit":
            model.model.language_model.layers[3].register_forward_pre_hook(lambda *_: os._exit(3))
            model(**batch("llava").inputs)
        if how == "forward":
            model.model.language_model.layers[3].register_forward_pre_hook(Fault(out_of_memory()))
            fails(lambda: step(model), torch.OutOfMemoryError)
        while not os.path.exists(f"{folder}/over"):  # alive, and elsewhere
            time.sleep(0.05)
        torch.distributed.destroy_process_group()
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        step(model) if call is None else call()
    assert time.monotonic() - start < 30
    Path(f"{folder}/over").touch()
    assert not os.path.exists(f"{folder}/half/{WEIGHTS}")
    torch.distributed.destroy_process_group()
    if call is None:  # it goes on alone: both ranks had the same batch, so the mean over them is its own
        assert handle._capture.seen is None
        alone = step(model)
        assert wanted is None or all(g is None or torch.equal(alone[n], g) for n, g in wanted.items())
        assert handle.metrics()["pre_forwards"] == (2 if how == "forward" else 1)


@pytest.mark.parametrize("how", ["forward", "save", "gather", "load", "exit"])
def test_a_rank_that_dies(how: str, tmp_path: Path) -> None:
    if how != "exit":
        both(ranks_that_die, str(tmp_path), how)
        return
    with pytest.raises(AssertionError, match=r"rank 0: returned\n--- rank 1: exit code 3"):
        both(ranks_that_die, str(tmp_path), how)


def test_two_processes_go_on_from_one(tmp_path: Path) -> None:
    """The other way round is in test_two_processes.py."""
    trained(str(tmp_path / "one"), 1, None)
    head = load_file(tmp_path / "one" / "checkpoint-1" / WEIGHTS)
    found = both(ddp_resumes, str(tmp_path / "two"), 2, str(tmp_path / "one" / "checkpoint-1"))
    assert all(torch.equal(w1, head["w1"]) for w1 in found)
    assert not torch.equal(load_file(tmp_path / "two" / "last" / WEIGHTS)["w1"], head["w1"])
