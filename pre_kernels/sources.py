"""Which files a measurement depends on, and a digest of them that only a change of the code
changes.

A result keeps the digest of its kind as `measured`. Where that differs from the digest of the files
that are here, the code has changed since the result was measured.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
CORE = ("loss.py", "head.py", "checks.py", "problem.py", "reference.py", "fused")
# What decides the numbers of the demo, without its texts, plots and progress.
DEMO = ("compare", "evaluate", "model", "scenes", "settings", "text", "threads", "train")
TRAINED = (*CORE, "integrations", *(f"demo/{name}.py" for name in DEMO), "diagnostics/measures")
REAL = ("arm", "evaluate", "llms", "model", "photographs", "scenes", "settings", "text", "train")
REAL_TRAINED = (
    *CORE,
    "integrations",
    *(f"demo/real/{name}.py" for name in REAL),
    "diagnostics/measures",
    "diagnostics/run/callback.py",
    "diagnostics/run/measure.py",
)
# For each kind of result the files and folders of the package that it depends on; CORE for others.
MEASURED = {
    "loss": CORE,
    "workspace": CORE,
    "fuzz": CORE,
    "mutation": CORE,
    "training": (*CORE, "integrations"),
    "diagnostics": ("diagnostics/measures",),
    "demo": TRAINED,
    "evidence": TRAINED,
    "real": REAL_TRAINED,
}


@cache
def digest(kind: str) -> str:
    """12 hex digits of the files that results of `kind` depend on, as they were at the first
    call."""
    text = hashlib.sha256()
    for part in MEASURED.get(kind, CORE):
        path = PACKAGE / part
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            text.update(f"{file.relative_to(PACKAGE).as_posix()}\n".encode())
            text.update(code(file.read_text(encoding="utf-8")).encode())
    return text.hexdigest()[:12]


@cache
def code(source: str) -> str:
    """Python source without its comments, docstrings, white space and the texts of raised errors.

    The column of each statement is kept, since it is part of the meaning. Syntax trees and tokens
    are only asked for positions, so every version of Python returns the same text.
    """
    lines = source.encode().split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    # pieces (start, end, what replaces it), in bytes
    pieces = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            start = starts[row - 1] + len(lines[row - 1].decode()[:column].encode())
            pieces.append((start, start + len(token.string.encode()), b""))
    for node in _nodes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        if isinstance(node, ast.stmt):
            pieces.append((start, start, b"\x00%d\x00" % node.col_offset))
        else:
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            pieces.append((start, end, b""))
    whole = source.encode()
    kept = []
    at = 0
    for start, end, instead in sorted(pieces):
        kept += [whole[at:start], instead]
        at = end
    return "".join(b"".join([*kept, whole[at:]]).decode().split())


def _nodes(tree: ast.Module) -> Iterator[ast.stmt | ast.expr]:
    """Every statement but docstrings, and every text that does not count."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.add(first)
                yield first.value
        if isinstance(node, ast.Raise):
            yield from _texts(node)
        if isinstance(node, ast.stmt) and node not in docstrings:
            yield node


def _texts(node: ast.AST) -> Iterator[ast.expr]:
    """The outermost texts in a node. Those inside a formatted one have no reliable position before
    Python 3.12."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr) or (
            isinstance(child, ast.Constant) and isinstance(child.value, str)
        ):
            yield child
        else:
            yield from _texts(child)
