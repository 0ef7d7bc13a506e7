"""Two processes: loss and every averaged gradient are those that one process computes by hand from both batches."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from eager import assert_same_gradients, copy_of, expected_gradients, gradients, pre_loss, watch
from pre_kernels.integrations import apply_pre
from tiny_models import Batch, batch, build
from tiny_training import one_image
from torch import Tensor, nn
from two import both

PLAIN, TWO_IMAGES = one_image(3), [("text", 4), ("image", 8, 8), ("text", 1), ("image", 8, 8), ("text", 8)]
TEXT = [("text", 7)]
MASKED = [("image", 8, 8), ("text", 7)]  # a dummy image under the attention mask, as some data pipelines add
# the samples of each rank, one forward each
UNEVEN = [[TWO_IMAGES, PLAIN], [PLAIN, TWO_IMAGES]]
TEXT_ONLY = [[TWO_IMAGES, PLAIN], [TEXT, TWO_IMAGES]]
DUMMY = [[TWO_IMAGES, PLAIN], [MASKED, TWO_IMAGES]]


def batches(samples: list[Any], rank: int) -> list[Batch]:
    found = []
    for number, sample in enumerate(samples[rank]):
        data = batch("llava", [sample], seed=2 * number + rank)
        if sample is MASKED or sample == MASKED:
            data.inputs["attention_mask"][0, :5] = 0
            data.visual[:] = False
            data.lengths.clear()
        found.append(data)
    return found


def made(frozen: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    """A model, without its vision part's gradients if `frozen`, and its handle; alike wherever it is called."""
    model = build("llava")
    if frozen:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    return model, apply_pre(model, **options)


def by_hand(
    samples: list[Any], group: bool = True, frozen: bool = False, level: str = "patch", forwards: int = 2
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """The mean over the ranks of each forward's loss, and of the gradients accumulated over them."""
    model, handle = made(frozen)
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, "llava")
    losses = []
    for number in range(forwards):
        data = [batches(samples, rank)[number] for rank in range(2)]
        counts = [len(d.lengths) if level == "image" else int(d.visual.sum()) for d in data]
        total = torch.zeros(())
        for d, count in zip(data, counts, strict=True):
            loss = model(**d.inputs).loss / 2
            divisor = max(sum(counts), 1) if group else 2 * max(count, 1)
            loss = loss + 0.5 * pre_loss(seen, d, [2], head, level, reduction="sum") / divisor
            (loss / forwards).backward()
            total += loss.detach()
        losses.append(total)
    return losses, gradients(model) | {f"pre_head.{n}": p.grad for n, p in head.items()}


def plainly(data: Batch, level: str = "patch") -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of one forward in one process, with the head that `made` makes."""
    model, handle = made()
    head = handle.head
    handle.remove()
    return expected_gradients(model, "llava", data, head, [2], level=level)


def check(found: list[Any], wanted: tuple[list[Tensor], dict[str, Tensor | None]]) -> None:
    """(losses, gradients) of both ranks."""
    for zero, one, loss in zip(found[0][0], found[1][0], wanted[0], strict=True):
        torch.testing.assert_close((zero + one) / 2, loss)
    for _, gradient in found:
        # a parameter that no rank used has no gradient, or zeros
        seen = {n: gradient[n] for n in wanted[1]} if gradient.keys() >= wanted[1].keys() else gradient
        zeros = {n: g for n, g in seen.items() if g is not None and wanted[1].get(n) is None and not g.any()}
        assert_same_gradients({n: None if n in zeros else g for n, g in seen.items()}, wanted[1])


def steps(model: nn.Module, samples: list[Any], no_sync: Any = None, backward: Any = None) -> list[Tensor]:
    """The losses of this rank's forwards, their gradients accumulated; the last backward synchronises."""
    data = batches(samples, torch.distributed.get_rank())
    losses = []
    for number, d in enumerate(data):
        last = number == len(data) - 1
        with contextlib.nullcontext() if last or no_sync is None else no_sync():
            loss = model(**d.inputs).loss
            (loss / len(data)).backward() if backward is None else backward(loss)
        losses.append(loss.detach())
    return losses


# --- DDP


def ddp(samples: list[Any], apply: dict[str, Any], frozen: bool, **options: Any) -> Any:
    model, _ = made(frozen, **apply)
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    return steps(wrapped, samples, None if options.get("static_graph") else wrapped.no_sync), gradients(model)


@pytest.mark.parametrize("samples", [UNEVEN, TEXT_ONLY], ids=["uneven", "text-only"])
@pytest.mark.parametrize("level", ["patch", "image"])
def test_ddp_with_group(samples: list[Any], level: str) -> None:
    """Accumulation under no_sync; every parameter may be unused on a rank."""
    found = both(ddp, samples, {"group": "world", "level": level}, False, find_unused_parameters=True)
    check(found, by_hand(samples, level=level))


def test_ddp_without_group_is_the_mean_of_the_ranks_means() -> None:
    found = both(ddp, TEXT_ONLY, {}, False, find_unused_parameters=True)
    check(found, by_hand(TEXT_ONLY, group=False))


@pytest.mark.parametrize(("forwards", "options"), [(2, {}), (1, {}), (1, {"static_graph": True})], ids=str)
def test_ddp_finds_the_head_on_a_text_only_rank(forwards: int, options: dict[str, Any]) -> None:
    """DDP waits for every trainable parameter of each rank, in the forward after which it averages."""
    samples = [r[:forwards] for r in TEXT_ONLY]
    found = both(ddp, samples, {"group": "world"}, True, timeout=60, **options)
    check(found, by_hand(samples, frozen=True, forwards=forwards))


def subgroups() -> Any:
    """A group of one process counts its own terms."""
    groups = [torch.distributed.new_group([rank]) for rank in range(2)]
    model, handle = made(group=groups[torch.distributed.get_rank()])
    alone, _ = made()
    data = batches(UNEVEN, torch.distributed.get_rank())[0]
    assert model(**data.inputs).loss == alone(**data.inputs).loss
    copy.deepcopy(model)(**data.inputs)  # as EMA does
    with pytest.raises(TypeError, match=r"group: got .*, want a ProcessGroup that this process is in"):
        made(group=groups[1 - torch.distributed.get_rank()])
    return handle.metrics()


def test_a_process_group() -> None:
    zero, one = both(subgroups)
    assert (zero["pre_rows"], one["pre_rows"]) == (8, 4)


def test_group_of_one_process() -> None:
    """ "world" where torch.distributed is not initialised, as when the same script runs without a launcher."""
    data = batches(UNEVEN, 0)[0]
    assert made(group="world")[0](**data.inputs).loss == made()[0](**data.inputs).loss


@pytest.mark.parametrize("group", ["all", 2, object()])
def test_bad_group(group: Any) -> None:
    model = build("llava")
    with pytest.raises(TypeError, match=r"group: got .*want a ProcessGroup"):
        apply_pre(model, group=group)
    assert not hasattr(model, "pre_head")


def group_metrics() -> Any:
    model, handle = made(group="world")
    alone, own = made()
    data = batches(UNEVEN, torch.distributed.get_rank())[0]
    for m in (model, alone):
        m(**data.inputs)
    return handle.metrics(), own.metrics()


def test_group_does_not_change_the_metrics() -> None:
    for found, wanted in both(group_metrics):
        assert found == pytest.approx(wanted, rel=1e-5)


def item_shares() -> Any:
    """A trainer's num_items_in_batch over all processes: loss times world size, gradients averaged."""
    rank = torch.distributed.get_rank()
    data = [batches(UNEVEN, r)[0] for r in range(2)]
    items = 2 * sum(int(d.inputs["labels"][:, 1:].ne(-100).sum()) for d in data)  # of two micro-batches, say
    model, _ = made(group="world")
    (2 * model(**data[rank].inputs, num_items_in_batch=torch.tensor(items)).loss).backward()
    gradient = model.pre_head.w1.grad
    torch.distributed.all_reduce(gradient)
    return gradient / 2


def test_group_and_the_share_of_a_trainers_items() -> None:
    _, wanted = by_hand([r[:1] for r in UNEVEN], forwards=1)
    for found in both(item_shares):
        torch.testing.assert_close(found, wanted["pre_head.w1"] / 2, rtol=1e-4, atol=1e-7)


# --- FSDP


def shard(model: nn.Module, own: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers:
        fully_shard(layer)
    if own:
        for head in model.pre_head if isinstance(model.pre_head, nn.ModuleList) else [model.pre_head]:
            fully_shard(head)
    return fully_shard(model)


def fsdp2(samples: list[Any], own: bool, frozen: bool) -> Any:
    model, _ = made(frozen, group="world")
    shard(model, own)
    losses = steps(model, samples)
    return losses, {n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()}


@pytest.mark.parametrize("own", [False, True], ids=["under the root", "a group of its own"])
@pytest.mark.parametrize("samples", [UNEVEN, TEXT_ONLY], ids=["uneven", "text-only"])
def test_fsdp2(own: bool, samples: list[Any]) -> None:
    frozen = samples is TEXT_ONLY  # FSDP2 reduces unequal sets of gradients otherwise, with PRe or without
    check(both(fsdp2, samples, own, frozen), by_hand(samples, frozen=frozen))


def fsdp2_from_meta() -> Any:
    """Made on the meta device, sharded, then materialised: head.reset_parameters() under a common seed."""
    source, _ = made()
    with torch.device("meta"):
        model = type(source)(source.config)
    handle = apply_pre(model.train())
    assert {p.device.type for p in handle.head.parameters()} == {"meta"}
    shard(model, False).to_empty(device="cpu")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain = {n: p for n, p in source.state_dict().items() if not n.startswith("pre_head")}
    set_model_state_dict(model, plain, options=StateDictOptions(full_state_dict=True, strict=False))
    for name, buffer in model.named_buffers():
        buffer.copy_(source.get_buffer(name))
    torch.manual_seed(5)
    handle.head.reset_parameters()
    head = {n: p.full_tensor() for n, p in handle.head.named_parameters()}
    source.pre_head.load_state_dict(head)
    data = batches(UNEVEN, 0)[0]
    return model(**data.inputs).loss.detach(), source(**data.inputs).loss.detach(), head


def test_fsdp2_from_the_meta_device() -> None:
    zero, one = both(fsdp2_from_meta)
    for sharded, plain, head in (zero, one):
        torch.testing.assert_close(sharded, plain)
        assert 0.1 < head["w1"].abs().max() <= 32**-0.5
        assert all(torch.equal(head[n], zero[2][n]) for n in head)


def fsdp1(samples: list[Any], own: bool) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from pre_kernels import PreHead

    model, _ = made(group="world")
    policy = ModuleWrapPolicy({type(model.model.language_model.layers[0]), *([PreHead] if own else [])})
    wrapped = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    losses = steps(wrapped, samples)
    with FSDP.summon_full_params(wrapped, with_grads=True):
        found = {n.replace("_fsdp_wrapped_module.", ""): g for n, g in gradients(wrapped).items()}
    return losses, found


@pytest.mark.parametrize("own", [False, True], ids=["under the root", "a unit of its own"])
def test_fsdp1(own: bool) -> None:
    check(both(fsdp1, TEXT_ONLY, own), by_hand(TEXT_ONLY))


def attach_late(how: str) -> None:
    model = build("llava")
    if how == "FullyShardedDataParallel":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(
        TypeError, match=rf"model: got .* with {how} around or inside; want the plain model: call apply"
    ):
        apply_pre(model)
    assert not hasattr(model, "pre_head")


@pytest.mark.parametrize("how", ["FullyShardedDataParallel", "DistributedDataParallel"])
def test_attached_after_wrapping(how: str) -> None:
    both(attach_late, how)


# --- DeepSpeed


def need_deepspeed() -> None:
    """Skip a test where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")


def deepspeed() -> Any:
    """The package, without the C++ operator that it would compile for sums in shared memory."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def config(stage: int, accumulation: int = 2, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **more,
    }


def engine(model: nn.Module, stage: int, kind: Any = torch.optim.Adam, rate: float = 0.1, accumulation: int = 2) -> Any:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)
    return deepspeed().initialize(model=model, optimizer=optimizer, config=config(stage, accumulation))[0]


def zero_steps(model: nn.Module, samples: list[Any], stage: int) -> Any:
    ds = engine(model, stage, accumulation=len(samples[0]))
    head = model.pre_head
    whole = {n: p.shape for n, p in head.named_parameters()}
    inside = []
    head.register_forward_pre_hook(lambda *_: inside.append({n: p.shape for n, p in head.named_parameters()}))
    from deepspeed.utils import safe_get_full_grad

    losses, found = [], {}
    for d in batches(samples, torch.distributed.get_rank()):
        loss = ds(**d.inputs).loss
        losses.append(loss.detach())
        ds.backward(loss)
        if ds.is_gradient_accumulation_boundary():
            found = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
            found = {n: None if g is None else g.clone() for n, g in found.items()}
        ds.step()
    if stage == 3:
        assert set(whole.values()) == {(0,)} == {p.shape for p in head.parameters()}
        assert [i["w1"] for i in inside] == [(32, 32)] * len(inside)
    return losses, found


def zero(samples: list[Any], stage: int, frozen: bool = False) -> Any:
    deepspeed()
    return zero_steps(made(frozen, group="world")[0], samples, stage)


@pytest.mark.parametrize(("stage", "samples"), [(2, UNEVEN), (2, TEXT_ONLY), (3, UNEVEN), (3, DUMMY)])
def test_zero(stage: int, samples: list[Any]) -> None:
    need_deepspeed()
    frozen = samples is TEXT_ONLY  # ZeRO-2 also reduces unequal sets of gradients otherwise
    check(both(zero, samples, stage, frozen), by_hand(samples, frozen=frozen))


def test_zero3_text_only() -> None:
    """On both ranks: a rank that skips the vision tower alone makes ZeRO-3 wait for ever, with PRe or without."""
    need_deepspeed()
    samples = [[TEXT], [TEXT]]
    check(both(zero, samples, 3), by_hand(samples, forwards=1))


def zero_init(folder: str, samples: list[Any]) -> Any:
    """The model is loaded under zero.Init, as from_pretrained does under the Trainer; the head comes afterwards."""
    deepspeed()
    from transformers import LlavaForConditionalGeneration
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(config(3))
    model = LlavaForConditionalGeneration.from_pretrained(folder).train()
    assert {p.shape for p in model.parameters()} == {(0,)}
    torch.manual_seed(7)
    apply_pre(model, group="world")
    assert model.pre_head.w1.shape == (32, 32)
    head = {n: p.detach().clone() for n, p in model.pre_head.named_parameters()}
    found = zero_steps(model, samples, 3)
    del alive
    return found, head


def test_zero3_init(tmp_path: Path) -> None:
    need_deepspeed()
    model, handle = made()
    build("llava").save_pretrained(tmp_path)
    zero, one = both(zero_init, str(tmp_path), UNEVEN)
    torch.manual_seed(7)
    handle.head.reset_parameters()
    assert all(torch.equal(p, zero[1][n]) for n, p in handle.head.named_parameters())
    # by_hand has another head, so the whole step is done here
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, "llava")
    losses = []
    for number in range(2):
        data = [batches(UNEVEN, rank)[number] for rank in range(2)]
        count = sum(int(d.visual.sum()) for d in data)
        parts = [model(**d.inputs).loss / 2 + 0.5 * pre_loss(seen, d, [2], head, reduction="sum") / count for d in data]
        (sum(parts) / 2).backward()
        losses.append(sum(parts).detach())
    check([zero[0], one[0]], (losses, gradients(model) | {f"pre_head.{n}": p.grad for n, p in head.items()}))


# --- sequence and tensor parallelism, device_map


class Gathered(torch.autograd.Function):
    """The parts (B, heads, T / 2, width) of both ranks along the sequence."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(2)]
        torch.distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(2, 2)[torch.distributed.get_rank()]


def ring(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Causal attention of this rank's half of the queries to the keys of both."""
    key, value = Gathered.apply(key), Gathered.apply(value)
    mine, total = query.shape[2], key.shape[2]
    place = torch.arange(mine)[:, None] + torch.distributed.get_rank() * mine
    found = nn.functional.scaled_dot_product_attention(query, key, value, place >= torch.arange(total))
    return found.transpose(1, 2).contiguous(), None


def sequence_parallel(sample: Any, level: str) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rank = torch.distributed.get_rank()
    data = batch("llava", [sample])
    mine = slice(rank * data.visual.shape[1] // 2, (rank + 1) * data.visual.shape[1] // 2)
    ALL_ATTENTION_FUNCTIONS.register("ring", ring)
    model = build("llava")
    text = model.model.language_model
    text.config._attn_implementation_internal = "ring"

    def split(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        places = torch.arange(data.visual.shape[1])[None]
        more = {"inputs_embeds": kwargs["inputs_embeds"][:, mine], "position_ids": places[:, mine]}
        return args, kwargs | more | {"attention_mask": None}

    text.register_forward_pre_hook(split, with_kwargs=True)  # before apply_pre, so that it sees the half
    apply_pre(model, group="world", level=level, mask_fn=lambda inputs: data.visual[:, mine])
    shifted = nn.functional.pad(data.inputs["labels"][:, 1:], (0, 1), value=-100)
    items = shifted.ne(-100).sum()
    loss = model(**data.inputs, shift_labels=shifted[:, mine], num_items_in_batch=items).loss
    loss.backward()
    found = gradients(model)
    for name, parameter in model.named_parameters():
        total = torch.zeros_like(parameter) if found[name] is None else found[name]
        torch.distributed.all_reduce(total)
        found[name] = None if found[name] is None else total
    return loss.detach(), found


HALVES = {
    "an image on each rank": [("text", 2), ("image", 8, 8), ("text", 3), ("image", 8, 8), ("text", 6)],
    "none on the second": [("text", 2), ("image", 8, 8), ("text", 13)],
    "one across the cut": [("text", 5), ("image", 8, 8), ("text", 2), ("image", 8, 8), ("text", 2)],
}


@pytest.mark.parametrize(
    ("sample", "level"),
    [*((name, "patch") for name in HALVES), ("an image on each rank", "image")],
)
def test_sequence_parallel(sample: str, level: str) -> None:
    """Two halves of one sequence: what the ranks add up to is the whole sequence's loss and gradients."""
    found = both(sequence_parallel, HALVES[sample], level)
    data = batch("llava", [HALVES[sample]])
    loss, wanted = plainly(data, level)
    torch.testing.assert_close(found[0][0] + found[1][0], loss)
    for _, gradient in found:
        assert_same_gradients(gradient, wanted)


def column_row() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    column = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    return {n: ColwiseParallel() for n in column} | {
        n: RowwiseParallel() for n in ("self_attn.o_proj", "mlp.down_proj")
    }


def tensor_parallel(before: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = build("llava")
    if before:
        apply_pre(model)
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, column_row())
    if not before:
        apply_pre(model)
    data = batches(UNEVEN, 0)[0]
    loss = model(**data.inputs).loss
    loss.backward()
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients(model).items()}
    return [loss.detach()], whole


@pytest.mark.parametrize("before", [True, False], ids=["attached before", "attached after"])
def test_tensor_parallel(before: bool) -> None:
    """Whole hidden states between layers whose weights are split: the same on both ranks as on one."""
    loss, wanted = plainly(batches(UNEVEN, 0)[0])
    check(both(tensor_parallel, before), ([loss], wanted))


def split_hidden() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    model, handle = made()
    text = model.model.language_model
    whole = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    back = {
        n: RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        for n in ("self_attn.o_proj", "mlp.down_proj")
    }
    norms = {n: SequenceParallel() for n in ("input_layernorm", "post_attention_layernorm")}
    mlp = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    for layer in text.layers:
        parallelize_module(layer, mesh, column_row() | back | norms | {"self_attn": whole, "mlp": mlp})
    first = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False)
    parallelize_module(text, mesh, {"layers.0": first, "norm": SequenceParallel()})
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())})
    data = batch("llava", [[("text", 3), ("image", 8, 8), ("text", 4)]])
    with pytest.raises(
        TypeError, match=r"hidden: got a DTensor with placements \(Shard\(dim=1\),\), want plain tensors"
    ):
        model(**data.inputs)
    handle.enabled = False
    assert torch.isfinite(model(**data.inputs).loss)


def test_hidden_states_that_are_split() -> None:
    if torch.__version__.startswith("2.9."):
        pytest.skip("DTensors of torch 2.9 cannot be sliced as the model does")
    both(split_hidden)


def test_dispatched_model() -> None:
    """accelerate's hooks of a device_map, which move every module's arguments."""
    from accelerate import dispatch_model

    model = build("llava")
    text = model.model.language_model
    parts = ["vision_tower", "multi_modal_projector", *(f"language_model.{name}" for name, _ in text.named_children())]
    parts.remove("language_model.layers")
    parts += [f"language_model.layers.{number}" for number in range(len(text.layers))]
    devices = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name in parts}
    model = dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.language_model.layers[1].mlp.up_proj, "_hf_hook")
    apply_pre(model)
    data = batches(UNEVEN, 0)[0]
    loss = model(**data.inputs).loss
    loss.backward()

    wanted, expected = plainly(data)
    torch.testing.assert_close(loss.detach(), wanted)
    assert_same_gradients(gradients(model), expected)


def test_offloaded_model() -> None:
    """Frozen weights that are on "meta" between forwards: the head is made where the layer computes, and trains."""
    from accelerate import cpu_offload

    model, plain = build("llava").requires_grad_(False), build("llava").requires_grad_(False)
    cpu_offload(model, torch.device("cpu"))
    assert model.model.language_model.layers[1].mlp.up_proj.weight.is_meta
    handle, own = apply_pre(model), apply_pre(plain)
    own.head.load_state_dict(handle.head.state_dict())
    data = batches(UNEVEN, 0)[0]
    for m in (model, plain):
        m(**data.inputs).loss.backward()
    # the frozen decoder has no gradient, the head has
    for name, p in own.head.named_parameters():
        torch.testing.assert_close(handle.head.get_parameter(name).grad, p.grad)
