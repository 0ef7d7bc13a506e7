"""The formulas of docs/scale.md against what the real code counts on small shapes."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import scale, scale_costs, scale_messages, scale_tables, training
from bench.scale_costs import MODELS, Model, Training
from pre_kernels import PreHead, checks
from pre_kernels.check.cases import Shape, formula
from pre_kernels.fused import ops, steps_triton
from pre_kernels.fused.kernels import common
from pre_kernels.integrations import metrics
from tests.core.counted import count

BFLOAT16 = torch.bfloat16
# A training of one GPU with a head of widths 16 → 24 → 32.
SMALL = Training(
    model=Model("small", 16, 4, 1, 1),
    tokens=40,
    visual=28,
    sequence=20,
    hidden_dim=24,
    out_dim=32,
)


class Opened(TorchDispatchMode):
    """Runs the operators of this package so that the modes around this one see their matmuls."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pre_kernels":
            real, _ = ops.OPERATORS[function._schema.name.split("::")[1]]
            return real(*args)
        return function(*args, **(kwargs or {}))


def head_of(sizes: Training, **options: object) -> PreHead:
    d, *_, z = sizes.widths
    head = PreHead(d, sizes.hidden_dim, z, depth=sizes.depth, loss=sizes.loss, **options)
    return head.requires_grad_(not sizes.frozen_head)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("loss", scale_costs.LOSSES)
def test_flop_of_the_heads(depth, frozen, loss):
    sizes = replace(SMALL, depth=depth, frozen_head=frozen, loss=loss, heads=2, micro_batches=2)
    heads = [head_of(sizes) for _ in range(2)]
    with FlopCounterMode(display=False) as counted:
        for _ in range(2):
            hidden = torch.randn(20, 16, requires_grad=True)
            anchor, mask = torch.randn(20, 32), torch.arange(20) < 14
            with Opened():
                for head in heads:
                    head(hidden, anchor, rows=mask).backward()
                    if loss != "cosine":
                        metrics.sample_cosine(head, hidden, anchor, mask, "auto")
    assert counted.get_total_flops() == scale_costs.head_flop(sizes)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_parameters_of_a_head(depth):
    sizes = replace(SMALL, depth=depth)
    found = sum(p.numel() for p in head_of(sizes, device="meta").parameters())
    assert found == sizes.head_parameters


def square(width: int, **more: object) -> Training:
    """A training whose heads have one width."""
    model = Model("square", width, 4, 1, 1)
    return replace(SMALL, model=model, hidden_dim=width, out_dim=width, **more)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_bytes_of_the_passes(depth, frozen):
    """The formula leaves out the partial column sums, which are small at real sizes."""
    sizes = square(256, visual=4096, tokens=5120, depth=depth, frozen_head=frozen)
    found = count("blas", "index", 4096, 5120, 256, depth=depth, frozen=frozen)
    sums = 0 if frozen else 2 * depth * 256 * 256 * 4
    assert found.bytes - sums == scale_costs.pass_bytes(sizes)


def test_rows_of_a_chunk(monkeypatch):
    """The kernels cut the rows where the formula says so."""
    workspace = 4 * 264 * 2 * 256 + 1024 * 4 * 256 * 2
    monkeypatch.setattr(scale_costs, "WORKSPACE", workspace)
    for n, several in ((1024, False), (1025, True)):
        assert scale_costs.several_chunks(square(256, visual=n, tokens=n)) is several
        found = count("blas", "index", n, n, 256, workspace=workspace)
        assert (found.launches["row_loss_kernel"] > 1) is several


SIZES = [
    scale_tables.LLAVA,
    replace(scale_tables.LLAVA, visual=2 * 9216, tokens=32 * 640),
    replace(scale_tables.LLAVA, visual=2 * 9216, tokens=32 * 640, frozen_head=True),
    replace(scale_tables.LLAVA, visual=2 * 9216, tokens=32 * 640, depth=3),
    replace(scale_tables.LLAVA, out_dim=1024, hidden_dim=2048),
    scale_tables.QWEN,
    scale_tables.LARGE,
    replace(scale_tables.LARGE, visual=24576, tokens=32768),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_peak_of_a_call(sizes):
    """The formula is that of `pre-kernels check`, which measures the peak beside it."""
    d, m, *_, z = (*sizes.widths, sizes.widths[-1])
    m = sizes.hidden_dim or d
    shape = Shape(
        "", 1, sizes.tokens, sizes.visual, d, m, z, "", frozen=sizes.frozen_head, depth=sizes.depth
    )
    assert scale_costs.memory(sizes).peak == formula(shape, BFLOAT16, "blas", torch.device("cpu"))


def test_constants_are_those_of_the_library():
    assert steps_triton.TritonSteps.workspace == scale_costs.WORKSPACE
    assert scale_costs.CHUNK_MULTIPLE == steps_triton.CHUNK_MULTIPLE
    assert scale_costs.PROGRAMS == common.PROGRAMS
    assert scale_costs.SAMPLE == metrics.SAMPLE
    assert {*scale_costs.LOSSES} == {*checks.ALL_LOSSES} - {"gram"}
    names = metrics.Totals([1, 2, 3], "cosine", False).names
    # 6 is the number of sums that integrations/counting.py adds.
    assert scale_messages.small(3)[1].size == 8 * (len(names) + 6)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_models(name):
    transformers = pytest.importorskip("transformers")
    config = {
        "llava15-7b": lambda: transformers.LlamaConfig(**training.LLAVA.text),
        "qwen25vl-7b": lambda: qwen(3584, 18944, 28, 28),
        "qwen25vl-72b": lambda: qwen(8192, 29568, 80, 64),
    }[name]()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = sum(p.numel() for p in model.parameters())
    # Norms and biases are left out.
    assert MODELS[name].parameters == pytest.approx(found, rel=1e-4)
    embeddings = model.get_input_embeddings().weight.numel()
    assert MODELS[name].weights == MODELS[name].parameters - embeddings


def qwen(width, inner, layers, heads):
    from transformers import Qwen2Config

    sizes = training.transformer(width, inner, layers, heads)
    return Qwen2Config(
        **sizes, num_key_value_heads=8 if heads > 28 else 4, vocab_size=152064,
        tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flop_of_a_decoder(frozen, checkpointing):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **training.llama(64, 96, 3, 4, kv_heads=2, vocabulary=80, positions=64),
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).train().requires_grad_(not frozen)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    decoder = scale_costs.llama("tiny", 64, 3, 96, 32, 80)
    sizes = replace(SMALL, model=decoder, tokens=48, visual=1, sequence=24, frozen=frozen)
    inputs = torch.randn(2, 24, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        model(inputs_embeds=inputs).logits.sum().backward()
    # Eager attention computes the half that causality masks too. Neither the output layer nor the
    # last matmul of each layer is repeated, and the rotations of queries and keys are small.
    attention = (6 + 2 * checkpointing) * 3 * 64 * 24 * 48
    extra = attention - 2 * checkpointing * 48 * 64 * (80 + 3 * 96)
    wanted = scale_costs.model_flop(sizes, checkpointing) + extra
    assert counted.get_total_flops() == pytest.approx(wanted, rel=1e-3)


def test_tensor_parallel_ranks_repeat_the_head():
    whole, split = scale_tables.LARGE, scale_tables.IN_PARALLEL
    assert scale_costs.head_flop(split) == scale_costs.head_flop(whole)
    assert scale_costs.model_flop(split) * 8 == pytest.approx(scale_costs.model_flop(whole))
    sent = [sum(m.sent for m in scale_messages.of_heads(s)) for s in (whole, split)]
    assert sent[1] > sent[0]


def test_memory_is_split_by_the_strategy():
    parts = {
        name: scale_costs.memory(replace(SMALL, strategy=name, ranks=16, node=4))[:3]
        for name in scale_costs.SPLIT
    }
    elements = SMALL.head_parameters
    each = {"ddp": (1, 1, 1), "zero1": (1, 1, 16), "zero2": (1, 16, 16), "zero3": (16, 16, 16)}
    each |= {"fsdp": (16, 16, 16), "hsdp": (4, 4, 4)}
    for name, (weights, gradients, states) in each.items():
        wanted = (2 * elements / weights, 2 * elements / gradients, 12 * elements / states)
        assert parts[name] == wanted, name
    assert scale_costs.memory(replace(SMALL, frozen_head=True))[1:3] == (0, 0)


def test_messages_between_nodes_are_predicted_by_the_cards_that_take_part():
    rates = scale_costs.Rates(1.0, 1.0, node=100.0, network=10.0)
    message = scale_messages.Message("all-reduce", 1, 800.0, 8, 2, False)
    time = lambda **sizes: scale_messages.seconds(  # noqa: E731
        replace(SMALL, ranks=16, node=8, **sizes), [message], rates
    )
    assert message.sent == 1400
    assert time() == 1400 / 80
    assert time(tensor=8) == time(strategy="hsdp") == 1400 / 10
    assert scale_messages.seconds(SMALL, [message._replace(inside=True)], rates) == 14


def run(capsys, line):
    scale.main(shlex.split(line))
    return capsys.readouterr().out


def test_the_command_prints_the_tables_of_the_page(capsys):
    printed = run(capsys, "")
    for table in (
        scale_tables.ranks_table(),
        scale_tables.work(),
        scale_tables.memory_table(),
        scale_tables.messages_table(),
        scale_tables.small_table(),
    ):
        assert table in printed


def test_the_examples_of_the_help_text_run(capsys):
    text = scale.__doc__.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python -m bench.scale")]
    assert len(lines) == 5
    for line in lines:
        arguments = line.removeprefix("python -m bench.scale").split("   ")
        command = next(
            part for part in [*arguments, ""] if part.strip().startswith("--") or not part
        )
        assert "predicted" in run(capsys, command)


def test_a_training_of_ones_own(capsys):
    own = "--dim 4096 --layers 32 --params 6738673664 --tokens 16_384 --visual 9216 --sequence 1K"
    printed = run(capsys, own.replace("1K", "1024"))
    (row,) = [line for line in printed.splitlines() if line.startswith("| yours ")][:1]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:4] == ["9,216 of 16,384", "1.86"]
    assert "2 all-gathers of 64 MiB" in run(capsys, f"{own} --strategy zero3")
    frozen = run(capsys, "--model llava15-7b --frozen-head")
    assert "| none " in frozen
    assert run(capsys, "--model llava15-7b --tflops 400") != run(capsys, "--model llava15-7b")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--params 7X", "argument --params: got '7X', want a number such as 8192, 7e9 or 7B"),
        ("--tflops 0", "argument --tflops: got '0', want a number above 0"),
        ("--heads 2", "--dim: got nothing, want a number, or --model for what is not given"),
        ("--model llava15-7b --heads 0", "--heads: got 0, want at least 1"),
        ("--model llava15-7b --heads 33", "--heads: got 33, want at most the model's 32 layers"),
        ("--model llava15-7b --visual 1M", "--visual: got 1000000, want at most 16384 tokens"),
        ("--model llava15-7b --depth 4", "--depth: got 4, want 1, 2 or 3 layers"),
        (
            "--model llava15-7b --ranks 12",
            "--ranks: got 12, want whole nodes of 8 GPUs; --node sets their size",
        ),
        (
            "--model llava15-7b --ranks 1e400",
            "argument --ranks: got '1e400', want a whole number, 1e15 at most",
        ),
        (
            "--model llava15-7b --ranks 1.5",
            "argument --ranks: got '1.5', want a whole number, 1e15 at most",
        ),
        ("--model llava15-7b --sequence 99999", "--sequence: got 99999, want at most 16384"),
        (
            "--model llava15-7b --own-group",
            "--own-group: got 'ddp', want a strategy that shards weights: fsdp, hsdp, zero3",
        ),
        (
            "--model llava15-7b --tensor 3",
            "--tensor: got 3, want a divisor of 8 GPUs in a node and of 8 ranks",
        ),
        ("--model llava15-7b --params 0", "--params: got 0, want at least 1"),
    ],
)
def test_a_wrong_option_is_an_error(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        scale.main(shlex.split(line))
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said}\n")
