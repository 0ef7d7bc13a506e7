"""The mutants of the sources that compute: where each changes the text, and to what. Reads and
writes text; runs nothing."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .. import ROOT
from .rules import Visitor

PACKAGE = ROOT / "pre_kernels" / "fused"
SURVIVORS = Path(__file__).with_name("survivors.txt")
OPERATORS = ("sign", "index", "mask", "scale", "chunk")
KERNELS = (
    "activation",
    "finish",
    "common",
    "matmul",
    "quantize",
    "row_loss",
    "rows",
    "tiles",
    "weight_grad",
)
HOST = (
    "function",
    "ops",
    "sweep",
    "steps_torch",
    "passes",
    "steps_blas",
    "steps_triton",
    "products",
)
FILES = (*(f"kernels/{name}.py" for name in KERNELS), *(f"{name}.py" for name in HOST))


class Mutant(NamedTuple):
    """One change at one place. `before` and `after` are the lines around it, which identify it when
    lines move."""

    file: str
    function: str
    lines: tuple[int, int]  # first and last line of the statement, or of its head
    operator: str
    before: str
    after: str
    start: int  # in bytes, as stop
    stop: int
    text: str

    @property
    def key(self) -> str:
        return f"{self.file} {self.function}: {self.before} → {self.after}"

    @property
    def short(self) -> str:
        """The key in a result file."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.stop :]).decode()


def optional_arguments(sources: Iterator[str]) -> dict[str, set[str]]:
    """The arguments that have a default, by the name of their function."""
    arguments: dict[str, set[str]] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                usual = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                names = {a.arg for a, default in named if default is not None} | {
                    a.arg for a in usual
                }
                arguments.setdefault(node.name, set()).update(names)
    return arguments


def mutants(file: str, source: str, optional: dict[str, set[str]]) -> list[Mutant]:
    """Every mutant of a file, in the order of the text. `after` has a number if several read the
    same."""
    visitor = Visitor(source, optional)
    visitor.visit(ast.parse(source))
    all_mutants = []
    seen = Counter[tuple[str, ...]]()
    for operator, function, lines, start, stop, text in sorted(
        visitor.found, key=lambda one: one[3:]
    ):
        before, after = _around(source.encode(), start, stop, text.encode())
        seen[function, before, after] += 1
        if (times := seen[function, before, after]) > 1:
            after += f"  #{times}"
        all_mutants.append(
            Mutant(file, function, lines, operator, before, after, start, stop, text)
        )
    return all_mutants


def every_mutant() -> list[Mutant]:
    sources = {file: (PACKAGE / file).read_text() for file in FILES}
    optional = optional_arguments(iter(sources.values()))
    return [
        mutant for file, source in sources.items() for mutant in mutants(file, source, optional)
    ]


def named() -> dict[str, dict[str, str]]:
    """The reasons why no test kills a mutant, by "equivalent" or "gap", then by key."""
    found: dict[str, dict[str, str]] = {"equivalent": {}, "gap": {}}
    kind = reason = ""
    for line in SURVIVORS.read_text().splitlines():
        if line.startswith("  "):
            found[kind][line.strip()] = reason
        elif line and not line.startswith("#"):
            kind, _, reason = line.partition(": ")
    return found


def stale(every: Iterable[Mutant]) -> list[str]:
    """The named keys that none of these mutants has, because their line has changed."""
    keys = {mutant.key for mutant in every}
    return [key for reasons in named().values() for key in reasons if key not in keys]


def _around(data: bytes, start: int, stop: int, text: bytes) -> tuple[str, str]:
    """The changed lines before and after the change, each joined to one line and cut if long."""
    first = data.rfind(b"\n", 0, start) + 1
    last = data.find(b"\n", stop)
    both = data[first:last], data[first:start] + text + data[stop:last]
    before, after = (" ".join(re.sub(r"  +#.*", "", x.decode()).split()) for x in both)
    return tuple(x if len(x) <= 200 else x[:200] + "…" for x in (before, after))  # type: ignore[return-value]
