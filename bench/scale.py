"""What PRe adds to an optimizer step on one GPU and on many: FLOP, memory traffic, memory and
messages, computed from formulas and not measured. docs/scale.md explains every column.

python -m bench.scale                                     the tables of docs/scale.md
python -m bench.scale --model llava15-7b --heads 3        one training: three layers are read
python -m bench.scale --model qwen25vl-72b --strategy hsdp --ranks 512
python -m bench.scale --dim 5120 --layers 64 --params 32B --tokens 16384 --visual 9216 \\
    --ranks 64 --strategy zero3                           a model of your own
python -m bench.scale --model llava15-7b --tflops 400 --memory 2 --network 25   other rates
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from . import where
from .scale_costs import LOSSES, SPLIT, Model, Rates

NEEDED = ("dim", "layers", "params", "tokens", "visual")
FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
# The names of options that are fields of Training, where they differ.
FIELDS = {"frozen_llm": "frozen"}
# The options of the fields of Rates, in this order, and their units.
RATES = {"tflops": 1e12, "memory": 1e12, "nvlink": 1e9, "network": 1e9}


def count(text: str) -> int:
    """Return a number such as 8192, 16_384, 7e9, 7B or 300M."""
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)([KMB]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number such as 8192, 7e9 or 7B")
    value = Decimal(re.sub("[_,]", "", match[1])) * FACTORS[match[2]]
    if value > 10**15 or value % 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number, 1e15 at most")
    return int(value)


def rate(text: str) -> float:
    """Return a rate above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number above 0")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = where.parser(__doc__)
    models = ("llava15-7b", "qwen25vl-7b", "qwen25vl-72b")
    model = made.add_argument_group("the model and a GPU's part of an optimizer step")
    add = model.add_argument
    add("--model", choices=models, help="take what is not given from this training")
    add("--dim", type=count, help="the width d of the hidden states")
    add("--layers", type=count, help="decoder layers of the model")
    add("--params", type=count, help="parameters of the LLM, such as 7B")
    add("--tokens", type=count, help="tokens of the GPU's sequences in a step, padding included")
    add("--visual", type=count, help="visual tokens N among them")
    add("--sequence", type=count, help="tokens of a sequence (default: --tokens)")
    add("--micro-batches", type=count, help="forwards of a step, whose tokens are counted together")
    add("--frozen-llm", action="store_true", help="only adapters, or only the projector, train")
    add("--trained", type=count, help="trained parameters without the heads")
    head = made.add_argument_group("the head")
    add = head.add_argument
    add("--heads", type=count, help="layers that PRe reads (default: 1)")
    add("--hidden-dim", type=count, help="the width m between a head's layers (default: d)")
    add("--out-dim", type=count, help="the width z of the anchors (default: d)")
    add("--depth", type=count, help="layers of a head: 1, 2 or 3 (default: 2)")
    add("--loss", choices=LOSSES, help="default: cosine")
    add("--frozen-head", action="store_true", help="the head does not train")
    split = made.add_argument_group("the GPUs")
    add = split.add_argument
    add("--strategy", choices=SPLIT, help="default: ddp")
    add("--ranks", type=count, help="GPUs (default: 8)")
    add("--node", type=count, help="GPUs in a node (default: 8)")
    add("--tensor", type=count, help="GPUs of a tensor-parallel group (default: 1)")
    add("--own-group", action="store_true", help="FSDP shards each head by a call of its own")
    add("--weight-bytes", type=count, help="bytes of a parameter's weight (default: 2)")
    add("--gradient-bytes", type=count, help="of its gradient (default: 2)")
    add("--state-bytes", type=count, help="of the optimizer's states of it (default: 12)")
    rates = made.add_argument_group("rates for which times are predicted")
    add = rates.add_argument
    add("--tflops", type=rate, default=790.0, help="TFLOP/s of matmuls (default: %(default)g)")
    add("--memory", type=rate, default=4.3, help="TB/s of the memory (default: %(default)g)")
    add("--nvlink", type=rate, default=450.0, help="GB/s of a GPU in a node (default: %(default)g)")
    add("--network", type=rate, default=50.0, help="GB/s of a GPU's card (default: %(default)g)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(argv)
    given = {
        name: value
        for name, value in vars(options).items()
        if value is not None and value is not False
    }
    rates = Rates(*[given.pop(name) * factor for name, factor in RATES.items()])
    base = given.pop("model", None)
    missing = [f"--{name}" for name in NEEDED if name not in given]
    if given and base is None and missing:
        made.error(f"{missing[0]}: got nothing, want a number, or --model for what is not given")

    # This imports torch, for seconds.
    from . import scale_tables

    try:
        print(scale_tables.everything(_training(base, given), rates))
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        name = {"weights": "params"}.get(name, name)
        made.error(f"--{name.replace('_', '-')}: {rest}")


def _training(name: str | None, given: dict[str, Any]) -> Any:
    from dataclasses import replace

    from .scale_costs import Training
    from .scale_tables import BY_NAME

    if name is None and not given:
        return None
    fields = {FIELDS.get(n, n): value for n, value in given.items()}
    model = {n: fields.pop(n) for n in ("dim", "layers", "params") if n in fields}
    if "params" in model:
        model["weights"] = model["parameters"] = model.pop("params")
    if name is not None:
        base = BY_NAME[name]
        fields.setdefault("sequence", min(base.sequence, fields.get("tokens", base.tokens)))
        return replace(base, model=base.model._replace(**model), **{"what": "", **fields})
    fields.setdefault("sequence", fields["tokens"])
    return Training(model=Model(name="yours", **model), **fields)


if __name__ == "__main__":
    main(sys.argv[1:])
