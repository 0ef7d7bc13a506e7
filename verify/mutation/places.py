"""Finds the nodes of a syntax tree in its text, by byte, and collects changes of the text there."""

from __future__ import annotations

import ast

ATOMS = (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript, ast.Tuple, ast.List)


class Places(ast.NodeVisitor):
    """Collects changes as (operator, function, lines of the statement or of its head, start, stop,
    text)."""

    def __init__(self, source: str) -> None:
        self.data = source.encode()
        self.lines = [0]
        for line in self.data.split(b"\n"):
            self.lines.append(self.lines[-1] + len(line) + 1)
        self.found: list[tuple[str, str, tuple[int, int], int, int, str]] = []
        self.scope: list[str] = []
        self.statement = (1, 1)

    def visit(self, node: ast.AST) -> None:
        outer = self.statement
        if isinstance(node, ast.stmt):
            # The head of a function runs on import, but the tests of the function are its tests.
            body = None if isinstance(node, ast.FunctionDef) else getattr(node, "body", None)
            self.statement = (
                node.lineno,
                (body[0].lineno - 1 if body else node.end_lineno or node.lineno),
            )
        super().visit(node)
        self.statement = outer

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.lines[node.lineno - 1] + node.col_offset

    def stop(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        """The text of a node as an operand, in parentheses if it needs them."""
        text = self.data[self.start(node) : self.stop(node)].decode()
        return text if isinstance(node, ATOMS) else f"({text})"

    def replace(self, operator: str, node: ast.expr | ast.stmt, text: str) -> None:
        self.add(operator, self.start(node), self.stop(node), text)

    def between(self, operator: str, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace the operator between two operands."""
        start = self.stop(left) + self.data[self.stop(left) : self.start(right)].index(old.encode())
        self.add(operator, start, start + len(old), new)

    def add(self, operator: str, start: int, stop: int, text: str) -> None:
        self.found.append(
            (operator, ".".join(self.scope) or "module", self.statement, start, stop, text)
        )
