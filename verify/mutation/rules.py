"""The rules that make mutants: each changes one place of a syntax tree, by one of five operators.

sign
    exchanges + and -, drops a minus, negates a stored value or a constant, reverses a comparison
index
    moves a constant, a pointer, a block or a bound by 1, takes another axis or stride, exchanges
    `//` and `%`, exchanges minimum and maximum, rounds a division down, drops a cast to 64 bits
mask
    drops or negates a mask, takes either branch of a choice, exchanges < and <=, drops or negates
    a condition, leaves out an optional argument
scale
    drops a factor or a divisor, writes * for /, doubles a constant, writes 0 for nan
chunk
    skips the first or the last turn of a loop, writes = for +=, makes a dot ignore its sum, drops
    a call

Some code is not mutated, since no result depends on it:

| code                                                     | skipped by        |
|----------------------------------------------------------|-------------------|
| docstrings, annotations, decorators, `assert`, `raise`   | `visit_…`         |
| lines that only the interpreter runs: `if INTERPRET`     | `visit_If`        |
| warps, stages, tile sizes: arguments, constants, tables  | `KNOBS`, `_knob`  |
| the choice of tiles, the number of rows of a chunk, …    | `LEFT_OUT`        |
"""

from __future__ import annotations

import ast

from .places import Places

KNOBS = {"num_warps", "num_stages", "flatten", "FLATTEN", "non_blocking", "use_fast_accum"}
LEFT_OUT = {
    "the tile of a matmul, the number of its programs, the device, tuned tiles": (
        "arch _arch on_device choose _fastest best key rows_class table has_descriptors "
        "cache_file remembered _device_name multiprocessors _multiprocessors pointer_tile programs "
        "RowShape.of"
    ),
    "the number of rows of a chunk": ("columns fixed_bytes layout cut largest whole_turns"),
    "a cast or `tl.dot` when compiled": "widen narrow dot",
    "a query of what the library supports": "_widens",
}

TURNED = {
    "<": ">",
    "<=": ">=",
    ">": "<",
    ">=": "<=",
    "==": "!=",
    "!=": "==",
    "is": "is not",
    "is not": "is",
}
BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
COMPARISONS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not",
}  # fmt: skip
EXCHANGED = {"tl.minimum": "tl.maximum", "tl.maximum": "tl.minimum", "min": "max", "max": "min"}
ACCESSES = ("load", "store", "atomic_add")


class Visitor(Places):
    """Collects the mutants of a file. `optional`: the arguments that may be left out, by the name
    of the function."""

    def __init__(self, source: str, optional: dict[str, set[str]]) -> None:
        super().__init__(source)
        self.optional = optional
        self.arguments = set[str]()
        self.left_out = {name for names in LEFT_OUT.values() for name in names.split()}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope.append(node.name)
        if not self.left_out & {node.name, ".".join(self.scope)}:
            outer = self.arguments
            self.arguments = {a.arg for a in node.args.args}
            for part in (*node.args.defaults, *node.args.kw_defaults, *node.body):
                if part is not None:
                    self.visit(part)
            self.arguments = outer
        self.scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        for part in node.body:
            self.visit(part)
        self.scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None and not self._knob(node.target, node.value):
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not self._knob(node.targets[0], node.value):
            self.generic_visit(node)

    def _knob(self, target: ast.expr, value: ast.expr) -> bool:
        name = ast.unparse(target)
        size = not self.scope and isinstance(value, ast.Constant | ast.Tuple | ast.BinOp)
        return (
            size
            or name.endswith("_TILES")
            or name in ("workspace", "OPTIONS", "UNALIGNED", "LIBRARY", "INTERPRET")
        )

    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_Raise(self, node: ast.Raise) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and key.value in KNOBS):
                self.visit(value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self.text(node.left), self.text(node.right)
        lists = any(
            isinstance(x, ast.List | ast.Tuple | ast.JoinedStr) for x in (node.left, node.right)
        )
        match node.op:
            case ast.Add() | ast.Sub() if not lists:
                old, new = "+-" if isinstance(node.op, ast.Add) else "-+"
                self.between("sign", node.left, node.right, old, new)
            case ast.Mult() if not lists:
                self.replace("scale", node, left)
                self.replace("scale", node, right)
            case ast.Div():
                self.replace("scale", node, left)
                self.between("scale", node.left, node.right, "/", "*")
            case ast.FloorDiv():
                self.replace("scale", node, left)
                self.between("index", node.left, node.right, "//", "%")
            case ast.Mod():
                self.replace("index", node, left)
                self.between("index", node.left, node.right, "%", "//")
            case ast.BitAnd():
                self.replace("mask", node, left)
                self.replace("mask", node, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        inner = self.text(node.operand)
        if isinstance(node.op, ast.USub):
            self.replace("sign", node, inner)
            if isinstance(node.operand, ast.Constant):
                return
        elif isinstance(node.op, ast.Not):
            self.replace("mask", node, inner)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, float):
            self.replace("scale", node, "1.0" if node.value == 0 else repr(2 * node.value))
            if node.value:
                self.replace("sign", node, f"(-{node.value!r})")
        elif isinstance(node.value, int) and not isinstance(node.value, bool):
            self.replace("index", node, str(node.value + 1))

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            sign = COMPARISONS.get(type(op))
            if sign is not None:
                self.between("sign", left, right, sign, TURNED[sign])
                if sign in BOUNDARY:
                    self.between("mask", left, right, sign, BOUNDARY[sign])
            left = right
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word = " and " if isinstance(node.op, ast.And) else " or "
        for dropped in node.values:
            kept = [self.text(x) for x in node.values if x is not dropped]
            self.replace("mask", node, f"({word.join(kept)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.replace("mask", node, self.text(node.body))
        self.replace("mask", node, self.text(node.orelse))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id.startswith("stride_") and isinstance(node.ctx, ast.Load):
            other = [
                x for x in sorted(self.arguments) if x.startswith(node.id[:-1]) and x != node.id
            ]
            if other:
                self.replace("index", node, other[0])

    def visit_Subscript(self, node: ast.Subscript) -> None:
        match node.slice:
            case ast.Tuple(elts=[ast.Slice(lower=None, upper=None), ast.Constant(value=None)]):
                self.replace("index", node.slice, "None, :")
            case ast.Tuple(elts=[ast.Constant(value=None), ast.Slice(lower=None, upper=None)]):
                self.replace("index", node.slice, ":, None")
            case ast.Slice(lower=lower, upper=upper):
                for bound, change in ((lower, "+ 1"), (upper, "- 1")):
                    if bound is not None and not isinstance(bound, ast.Constant):
                        self.replace("index", bound, f"{self.text(bound)} {change}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func) if not isinstance(node.func, ast.Subscript) else ""
        method = name.rpartition(".")[2]
        if name.startswith("warnings."):
            return
        self._calls(node, name, method)
        if name == "tl.arange":
            self.replace("index", node, f"({self.text(node)} + 1)")
            return
        if name == "float":
            self.replace("scale", node, "0.0")
            return
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in KNOBS:
                if keyword.arg in self.optional.get(method, ()):
                    self._drop(keyword, node)
                self.visit(keyword.value)

    def _calls(self, node: ast.Call, name: str, method: str) -> None:
        """Add the mutants that are specific to the called function."""
        arguments = [self.text(x) for x in node.args]
        if name in ("tl.where", "torch.where"):
            for branch in arguments[1:]:
                self.replace("mask", node, f"({branch})")
        elif name in EXCHANGED and len(node.args) > 1:
            self.replace("index", node.func, EXCHANGED[name])
        elif method == "cdiv":
            self.replace("index", node, f"({arguments[0]} // {arguments[1]})")
        elif name.endswith(".to") and arguments == ["tl.int64"]:
            assert isinstance(node.func, ast.Attribute)
            self.replace("index", node, self.text(node.func.value))
        elif name == "tl.cast" and arguments[1] == "tl.int64":
            self.replace("index", node, arguments[0])
        elif name == "dot":
            self.replace("chunk", node.args[2], f"{arguments[2]} * 0.0")
        elif method in ACCESSES and name.startswith("tl."):
            self.replace("index", node.args[0], f"{arguments[0]} + 1")
            if method == "store":
                self.replace("sign", node.args[1], f"-{arguments[1]}")
            self._mask(node)
        elif method in ACCESSES and isinstance(node.args[0], ast.List):
            for place in node.args[0].elts:
                self.replace("index", place, f"{self.text(place)} + 1")
        for argument in node.args:
            if isinstance(argument, ast.Starred) and ast.unparse(argument.value).endswith(
                ".stride()"
            ):
                self.replace("index", argument.value, f"{self.text(argument.value)}[::-1]")

    def _mask(self, node: ast.Call) -> None:
        given = {keyword.arg: keyword for keyword in node.keywords}
        if "mask" in given:
            start = self.stop(node.args[-1])
            end = self.stop(node) - 1
            end = start + self.data[start:end].rstrip(b", \n").__len__()
            self.add("mask", start, end, "")
            self.replace("mask", given["mask"].value, f"~({self.text(given['mask'].value)})")

    def _drop(self, keyword: ast.keyword, call: ast.Call) -> None:
        start = self.start(keyword.value) - len(f"{keyword.arg}=")
        end = self.stop(keyword.value)
        while self.data[end : end + 1] in b", \n" and end < self.stop(call) - 1:
            end += 1
        self.add("mask", start, end, "")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        lists = isinstance(node.value, ast.List | ast.ListComp)
        signs = {ast.Add: "+=", ast.Sub: "-=", ast.Mult: "*="}
        sign = signs.get(type(node.op))
        if sign is not None and not lists:
            if sign != "*=":
                self.between("sign", node.target, node.value, sign, "-=" if sign == "+=" else "+=")
            self.between("scale" if sign == "*=" else "chunk", node.target, node.value, sign, "=")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.replace("chunk", node, "pass")
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "INTERPRET" in ast.unparse(node.test):
            for part in node.orelse:
                self.visit(part)
            return
        if isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
            self.replace("mask", node.test, f"not {self.text(node.test)}")
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        match node.iter:
            case ast.Call(func=function, args=args) if ast.unparse(function) in (
                "range",
                "tl.range",
                "tl.static_range",
            ):
                texts = [self.text(x) for x in args]
                step = texts[2] if len(texts) == 3 else "1"
                if len(texts) == 1:
                    self.replace("chunk", args[0], f"1, {texts[0]}")
                else:
                    self.replace("chunk", args[0], f"{texts[0]} + {step}")
                bound = args[0 if len(texts) == 1 else 1]
                self.replace("chunk", bound, f"{self.text(bound)} - {step}")
            case _:
                self.replace("chunk", node.iter, f"list({self.text(node.iter)})[1:]")
                self.replace("chunk", node.iter, f"list({self.text(node.iter)})[:-1]")
        self.generic_visit(node)
