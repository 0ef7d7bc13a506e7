"""apply_pre(anchor_norm=): anchors less their mean, or standardised over each image, against the
equations by hand in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pre_kernels.integrations import apply_pre, objective, patch_trainer, terms
from pre_kernels.integrations.tokens import draw, normalised

from .support.by_hand import (
    assert_same_gradients,
    expected_gradients,
    gradients,
    projector_rows,
    watch,
)
from .support.processes import both
from .support.ranks import TEXT_ONLY, UNEVEN, batches, made
from .support.tiny.models import batch, build
from .support.tiny.training import make
from .support.waits import Waits
from .support.warned import said

SIZES = [
    [("text", 2), ("image", 8, 16), ("text", 3), ("image", 8, 8), ("text", 4)],
    [("image", 16, 16), ("text", 5)],
]


def by_hand(norm: str, rows: Tensor, lengths: list[int]) -> Tensor:
    """The targets, from the anchors of the visual tokens."""
    rows = rows.double()
    if norm == "center":
        return rows - rows.mean(0)
    parts = rows.split(lengths)
    return torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6) for x in parts])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    masks = []

    def keep(mask: Tensor, fraction: float) -> Any:
        found = draw(mask, fraction)
        masks.append(found[0])
        return found

    monkeypatch.setattr(terms, "draw", keep)
    return masks


@pytest.mark.parametrize("norm", ["center", "spatial"])
@pytest.mark.parametrize("anchor", ["pre_llm", "pre_projector", "(N, z)", "(B, T, z)"])
@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "mse"}, {"fraction": 0.4}, {"weighting": "image"}, {"level": "image"}],
    ids=str,
)
def test_the_equation(norm: str, anchor: str, options: dict[str, Any], drawn: list[Tensor]) -> None:
    if norm == "spatial" and "level" in options:
        pytest.skip("refused")
    data = batch("llava" if anchor != "pre_projector" else "qwen2_vl", SIZES)
    family = "llava" if anchor != "pre_projector" else "qwen2_vl"
    more: dict[str, Any] = {"anchor": anchor}
    # Other rows may hold anything, and a common part is what is subtracted.
    whole = torch.full((*data.visual.shape, 7), float("nan"))
    whole[data.visual] = torch.randn(int(data.visual.sum()), 7) + 3
    target = whole[data.visual]
    if anchor == "pre_projector":
        target = projector_rows(family, data)
    elif anchor == "pre_llm":
        plain = build(family)
        seen = watch(plain, family)
        with torch.no_grad():
            plain(**data.inputs)
        target = seen["embeds"][data.visual]
    else:
        flat = anchor == "(N, z)"
        more = {"anchor": lambda inputs, rows: target if flat else whole, "anchor_dim": 7}

    model = build(family)
    handle = apply_pre(model, anchor_norm=norm, **more, **options)
    loss = model(**data.inputs).loss
    loss.backward()
    chosen = drawn[0][data.visual] if drawn else None
    options.pop("fraction", None)
    wanted_loss, wanted = expected_gradients(
        build(family),
        family,
        data,
        handle.head,
        [2],
        anchor=by_hand(norm, target, data.lengths).float(),
        chosen=chosen,
        **options,
    )
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("norm", ["center", "spatial"])
@pytest.mark.parametrize("flat", [False, True])
def test_what_is_skipped_is_not_in_the_mean(norm: str, flat: bool) -> None:
    data = batch("llava", SIZES)
    whole = torch.randn(*data.visual.shape, 7)
    wanted = whole.clone()
    lost = data.visual.nonzero()[3]
    whole[lost[0], lost[1], 2] = float("inf")
    kept = data.visual.clone()
    kept[lost[0], lost[1]] = False
    lengths = [data.lengths[0] - 1, *data.lengths[1:]]
    wanted = by_hand(norm, wanted[kept], lengths).float()

    model = build("llava")
    handle = apply_pre(
        model,
        anchor=lambda inputs, rows: whole[rows] if flat else whole,
        anchor_dim=7,
        anchor_norm=norm,
        nonfinite="skip",
    )
    seen = []
    handle.head.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(**data.inputs)
    _, anchor, _ = seen[0]
    torch.testing.assert_close(anchor if anchor.dim() == 2 else anchor[kept], wanted)
    assert handle.metrics()["pre_tokens"] == int(kept.sum())


def test_several_targets_are_normalised_each() -> None:
    data = batch("llava", SIZES)
    model = build("llava")
    handle = apply_pre(
        model, targets=[(1, "pre_llm"), (2, "pre_projector"), (3, "pre_llm")], anchor_norm="center"
    )
    seen = []
    for head in handle.head:
        head.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(**data.inputs)
    first, second, third = seen
    assert first is third
    rows = projector_rows("llava", data)
    torch.testing.assert_close(second, rows - rows.mean(0))
    assert first[data.visual].mean(0).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("flat", [False, True])
def test_standardised(dtype: torch.dtype, flat: bool) -> None:
    """Numbers may have gaps and any order; an image of one token becomes 0; nothing waits."""
    torch.manual_seed(1)
    mask = torch.rand(3, 20) < 0.6
    numbers = torch.tensor([9, 4, 700])[torch.randint(3, (int(mask.sum()),))]
    numbers[5] = 33
    rows = torch.full((3, 20, 6), float("nan"), dtype=dtype)
    rows[mask] = (torch.randn(int(mask.sum()), 6) * 3 + 50).to(dtype)
    given = rows[mask] if flat else rows
    with Waits() as waits:
        got = normalised(given, mask, numbers, None)
    assert waits.found == []
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.shape == (len(numbers), 6) if flat else rows.shape
    got = got if flat else got[mask]
    for number in (9, 4, 700):
        x = rows[mask][numbers == number].double()
        wanted = (x - x.mean(0)) / (x.std(0) + 1e-6)
        torch.testing.assert_close(got[numbers == number].double(), wanted, rtol=1e-4, atol=1e-4)
    assert not got[5].any()
    assert normalised(rows[:0], mask[:0], numbers[:0], None).shape == (0, 20, 6)


def test_centering_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    find_terms = objective.find_terms

    def watched(*args: Any) -> Any:
        with waits:
            return find_terms(*args)

    monkeypatch.setattr(objective, "find_terms", watched)
    model = build("llava")
    apply_pre(model, anchor_norm="center", fraction=0.5)
    model(**batch("llava").inputs)
    assert waits.found == []


@pytest.mark.parametrize("norm", ["center", "spatial"])
def test_a_batch_without_images(norm: str) -> None:
    model = build("llava")
    handle = apply_pre(model, anchor_norm=norm)
    loss = model(**batch("llava", [[("text", 6)]]).inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert not handle.head.w1.grad.any()
    data = batch("llava", [[("image", 8, 8), ("text", 4)]])
    data.inputs["attention_mask"][0, :5] = 0
    loss = model(**data.inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert handle.head.w1.grad.isfinite().all()


def centered(samples: list[Any], deferred: bool, group: str | None) -> Any:
    """What this rank's forwards give the head as targets, and the anchors themselves."""
    model, handle = made(anchor_norm="center", group=group)
    seen = watch(model, "llava")
    given = []
    handle.head.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    found = []
    rank = torch.distributed.get_rank()
    for data in batches(samples, rank):
        if deferred:
            # Rank 1 could not count its terms.
            divisor = 3.0 if rank == 0 else None
            with handle.defer(divisor, ungrouped=divisor is None):
                model(**data.inputs)
        else:
            model(**data.inputs)
        rows = seen["embeds"].detach()[data.visual]
        targets = given[-1]
        found.append((rows, targets[data.visual] if len(rows) else targets))
    return found


@pytest.mark.parametrize("samples", [UNEVEN, TEXT_ONLY], ids=["uneven", "text-only"])
@pytest.mark.parametrize("how", ["group", "deferred", "own"])
def test_over_two_processes(samples: list[Any], how: str) -> None:
    ranks = both(centered, samples, how == "deferred", "world" if how == "group" else None)
    for forward in range(2):
        rows = [found[forward][0].double() for found in ranks]
        for own, (_, targets) in zip(rows, [found[forward] for found in ranks], strict=True):
            counted = own if how == "own" else torch.cat(rows)
            if len(own):
                torch.testing.assert_close(targets.double(), own - counted.mean(0))
            else:
                assert len(targets) == 0


def alone(number: int, folder: str) -> list[float]:
    """L_PRe of the steps of a training of its own; samples and steps differ by `number`."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    model = build("llava")
    torch.manual_seed(0)
    apply_pre(model, anchor_norm="center")
    samples = UNEVEN[number] * 2
    with patch_trainer():
        trainer = make(Path(folder), model, samples=samples, max_steps=2 + number)
        trainer.train()
    assert trainer.accelerator.num_processes == 1
    return [entry["pre_loss"] for entry in trainer.state.log_history if "pre_loss" in entry]


def side_by_side(folder: str) -> list[float]:
    rank = torch.distributed.get_rank()
    return alone(rank, f"{folder}/{rank}")


def test_trainings_of_their_own_in_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes share a group, as workers of a framework do, and train independently."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    wanted = [alone(number, str(tmp_path / f"alone-{number}")) for number in range(2)]
    assert both(side_by_side, str(tmp_path)) == wanted


def ddp_gradients(samples: list[Any]) -> Any:
    model, _ = made(anchor_norm="center", group="world", loss="mse")
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    (data, *_) = batches(samples, torch.distributed.get_rank())
    wrapped(**data.inputs).loss.backward()
    return gradients(model)


def test_ddp() -> None:
    """The gradients of the head are those of all tokens at once."""
    zero, one = both(ddp_gradients, UNEVEN)
    assert_same_gradients(zero, one, 0, 1e-7)
    model, handle = made(loss="mse")
    seen = watch(model, "llava")
    hidden, rows = [], []
    for rank in range(2):
        data = batches(UNEVEN, rank)[0]
        model(**data.inputs)
        hidden.append(seen[2][data.visual])
        rows.append(seen["embeds"][data.visual].detach())
    model.zero_grad()
    anchors = torch.cat(rows)
    (0.5 * handle.head(torch.cat(hidden), anchors - anchors.mean(0), loss="mse")).backward()
    of_head = {n: g for n, g in gradients(model).items() if n.startswith("pre_head.")}
    assert_same_gradients({n: zero[n] for n in of_head}, of_head)


@pytest.mark.parametrize(("accumulation", "norm"), [(1, "center"), (2, "center"), (2, "spatial")])
def test_a_trainer_that_accumulates_says_it(accumulation: int, norm: str, tmp_path: Path) -> None:
    model = build("llava")
    apply_pre(model, anchor_norm=norm)
    with patch_trainer():
        trainer = make(tmp_path, model, accumulation=accumulation, max_steps=2)
        texts = said(trainer.train)
    wanted = ['PRe: a step has 2 micro-batches, and anchor_norm="center" subtracts']
    assert [text[: len(wanted[0])] for text in texts] == wanted * (
        accumulation == 2 and norm == "center"
    )


def test_files_say_it(tmp_path: Path) -> None:
    with apply_pre(build("llava")) as handle:
        handle.save(tmp_path)
    file = tmp_path / "pre_head.json"
    saved = json.loads(file.read_text())
    assert saved.pop("anchor_norm") == "none"
    file.write_text(json.dumps(saved))  # as an older version wrote it
    with apply_pre(build("llava")) as handle:
        handle.load(tmp_path)
    handle = apply_pre(build("llava"), anchor_norm="center")
    assert "anchor pre_llm, anchor_norm center, level patch" in str(handle)
    with pytest.raises(ValueError, match=r"anchor_norm: .* says 'none', this handle has 'center'"):
        handle.load(tmp_path)


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match="anchor_norm: got 'mean', want one of 'none', 'center'"):
        apply_pre(build("llava"), anchor_norm="mean")
    with pytest.raises(ValueError, match="anchor_norm: got 'spatial' with level='image'"):
        apply_pre(build("llava"), anchor_norm="spatial", level="image")
