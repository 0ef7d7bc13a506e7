"""The operators as torch sees them: torch.compile without a graph break, export, fake tensors and
opcheck."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pre_kernels import PreHead, fused_pre_loss
from pre_kernels.check import guarantees
from verify.oracle import make

from ..slow import thinned
from .support import names_of

CALLS = {
    "mask": {"rows": "mask"},
    "index": {"rows": "index64"},
    "all rows": {"rows": "all"},
    "none": {"rows": "mask", "reduction": "none"},
    "none, index": {"rows": "index32", "reduction": "none"},
    "normalizer": {"rows": "mask", "normalizer": torch.tensor(3.0)},
    "weights": {"rows": "mask", "weight": "leading"},
    "compact": {"rows": "mask", "anchor": "compact", "weight": "compact"},
    "capacity": {"rows": "mask", "capacity": 45},
    "chunks": {"rows": "index64", "leading": (300,), "workspace": 1},
    "bfloat16, chunks": {
        "rows": "index64",
        "leading": (300,),
        "workspace": 1,
        "dtype": torch.bfloat16,
    },
    "none, chunks": {
        "rows": "mask",
        "reduction": "none",
        "leading": (300,),
        "workspace": 1,
        "dtype": torch.bfloat16,
    },
    "float16": {"rows": "mask", "dtype": torch.float16},
    "float16, compact": {"rows": "mask", "anchor": "compact", "dtype": torch.float16},
    "compact, frozen": {"rows": "mask", "anchor": "compact", "frozen": ("hidden",)},
    "frozen": {"rows": "mask", "frozen": ("hidden", "b1")},
    "none, frozen": {"rows": "mask", "reduction": "none", "frozen": ("hidden", "b1")},
    "frozen weights": {"rows": "mask", "frozen": ("w1", "w2")},
    "compact, frozen weights": {"rows": "mask", "anchor": "compact", "frozen": ("w1", "w2")},
    "depth 1, norm": {"rows": "index64", "depth": 1, "norm": "rms"},
    "depth 3, norm": {"rows": "mask", "depth": 3, "norm": "layer", "bias": (True, False)},
    "none, depth 3, norm": {"rows": "mask", "depth": 3, "norm": "layer", "reduction": "none"},
    "frozen hidden, norm": {"rows": "all", "depth": 3, "norm": "rms", "frozen": ("hidden", "w1")},
}


@pytest.fixture(autouse=True)
def output_shapes():
    with guarantees.output_shapes():
        yield


def fused(case, impl, tensors, rows):
    return fused_pre_loss(**tensors, rows=rows, **case.options, impl=impl)


def results(function, case, hidden=None, retain_graph=False):
    leaves = [case.tensors[name].requires_grad_(name not in case.frozen) for name in names_of(case)]
    tensors = {**case.tensors, "hidden": leaves[0] if hidden is None else hidden}
    loss = function(tensors, case.rows)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [loss, *torch.autograd.grad((loss * 3).sum(), wanted, retain_graph=retain_graph)]


@pytest.mark.parametrize("name", thinned(CALLS, 3))
def test_compiles_without_a_graph_break(impl, device, name):
    case = make(4, device=device, **CALLS[name])

    def function(tensors, rows):
        tensors = {**tensors, "hidden": tensors["hidden"] * 2}
        return fused_pre_loss(**tensors, rows=rows, **case.options, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, case), results(function, case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("head", [{}, {"depth": 3, "norm": "layer"}])
def test_inductor_takes_other_sizes_and_masks(device, head):
    def function(tensors, rows):
        return fused_pre_loss(**tensors, rows=rows, norm=head.get("norm")).sin()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for seed, leading in enumerate([(3, 17), (5, 20), (2, 9)]):
        case = make(seed, device=device, leading=leading, **head)
        for got, want in zip(results(compiled, case), results(function, case), strict=True):
            torch.testing.assert_close(got, want)


def test_export(device):
    case = make(4, device=device)

    class Loss(torch.nn.Module):
        def forward(self, hidden, anchor, rows):
            rest = {name: case.tensors[name] for name in ("w1", "b1", "w2", "b2")}
            return fused_pre_loss(hidden, anchor, **rest, rows=rows)

    inputs = (case.tensors["hidden"], case.tensors["anchor"], case.rows)
    program = torch.export.export(Loss(), inputs)
    assert "pre_kernels.loss" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs))


@pytest.mark.parametrize(
    ("rows", "options"),
    [("mask", {}), ("all", {}), ("mask", {"depth": 3, "norm": "layer"}), ("all", {"depth": 1})],
)
def test_export_of_a_head_that_is_trained(impl, device, rows, options):
    """The exported program calls the operator in grad mode, with parameters that require grad."""
    case = make(4, device=device, rows=rows)
    head = PreHead(24, 40, **options).to(device)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, hidden, anchor, rows):
            return self.head(hidden, anchor, rows, impl=impl)

    inputs = (case.tensors["hidden"], case.tensors["anchor"], case.rows)
    program = torch.export.export(Loss(), inputs)
    torch.testing.assert_close(program.module()(*inputs), head(*inputs, impl=impl))


class Watching(TorchDispatchMode):
    """A mode that watches operators as FLOP counters do. `seen` has this library's operators, and
    the arguments of each."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pre_kernels":
            self.seen[function] = [
                x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args
            ]
        return function(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    """A mode like that of `torch.set_default_device`."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(getattr(function, "__name__", None))
        return function(*args, **(kwargs or {}))


class Kind(torch.Tensor):
    """A subclass of Tensor that sees operators itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace == "pre_kernels":
            raise RuntimeError(f"Kind has seen {function._schema.name}")
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", ["mask", "none"])
def test_who_looks_at_operators_sees_them(impl, device, call):
    """The call gives the same bits as one that nobody watches."""
    case = make(4, device=device, **CALLS[call])
    function = partial(fused, case, impl)
    names = ("loss", "recompute" if call == "none" else "rescale_")
    wanted = {f"pre_kernels::{name}" for name in names}
    plain = results(function, case)
    with Watching() as watching:
        seen = results(function, case)
    assert {operator._schema.name for operator in watching.seen} == wanted
    with torch.profiler.profile() as profile:
        profiled = results(function, case)
    assert {event.key for event in profile.key_averages()} >= wanted
    for outputs in (seen, profiled):
        assert all(map(torch.equal, plain, outputs))
    with FunctionMode() as mode:
        results(function, case)
    assert "loss" in mode.seen
    case.tensors["w2"] = case.tensors["w2"].detach().as_subclass(Kind)
    with pytest.raises(RuntimeError, match="Kind has seen pre_kernels::loss"):
        results(function, case)


def test_a_graph_from_before_autograd_has_the_operator(impl, device):
    """The graph also takes another mask of more rows."""
    case = make(4, device=device, leading=(60,), selected=0.2, loss="mse", reduction="sum")
    few = case.rows
    many = ~case.rows

    def function(hidden, rows):
        return fused(case, impl, {**case.tensors, "hidden": hidden}, rows)

    with torch.no_grad():
        graph = make_fx(function, pre_dispatch=True)(case.tensors["hidden"], few)
        assert torch.ops.pre_kernels.loss.default in {node.target for node in graph.graph.nodes}
        for rows in (few, many):
            torch.testing.assert_close(
                graph(case.tensors["hidden"], rows), function(case.tensors["hidden"], rows)
            )


class Loss(torch.nn.Module):
    def forward(self, hidden, anchor, w1, w2):
        return fused_pre_loss(hidden, anchor, w1, None, w2, None, impl="torch")


def test_an_exported_program_needs_the_name_imported_where_it_is_loaded(tmp_path):
    """`from pre_kernels import fused_pre_loss` registers the operators."""
    torch.manual_seed(0)
    tensors = tuple(torch.randn(shape) for shape in ((6, 16), (6, 8), (16, 16), (8, 16)))
    torch.export.save(torch.export.export(Loss(), tensors), tmp_path / "loss.pt2")
    torch.save(tensors, tmp_path / "tensors.pt")
    code = "import sys, torch; from pre_kernels import fused_pre_loss; folder = sys.argv[1]; "
    code += "tensors = torch.load(folder + '/tensors.pt', weights_only=True); "
    code += "print(torch.export.load(folder + '/loss.pt2').module()(*tensors).item())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(Loss()(*tensors).item())


@pytest.mark.filterwarnings("ignore")
def test_a_trace_for_torchscript_is_refused(impl, device):
    """A trace would record what the call does with these numbers of rows."""
    case = make(4, device=device, rows="index64")
    with pytest.raises(RuntimeError, match="Tracing a list of bool"):
        torch.jit.trace(
            lambda hidden: fused(case, impl, {**case.tensors, "hidden": hidden}, case.rows),
            (case.tensors["hidden"],),
        )


def test_a_plain_call_spares_the_dispatcher(impl, device, monkeypatch):
    """A small call on a CPU would spend a tenth of its time there."""
    case = make(4, device=device, rows="index64")
    monkeypatch.setattr(torch.ops.pre_kernels, "loss", None)
    monkeypatch.setattr(torch.ops.pre_kernels, "rescale_", None)
    assert len(results(partial(fused, case, impl), case)) == 6


def of_real_calls(case, impl):
    """Return the operators of a call whose graph is retained and of one whose graph is not, with
    their arguments."""
    with Watching() as watching:
        for retain_graph in (True, False):
            results(partial(fused, case, impl), case, retain_graph=retain_graph)
    assert len(watching.seen) == (
        2 if torch.ops.pre_kernels.recompute.default in watching.seen else 3
    )
    yield from watching.seen.items()


@pytest.mark.parametrize(
    "name",
    [
        "mask",
        "index",
        "all rows",
        "none",
        "compact",
        "chunks",
        "bfloat16, chunks",
        "float16",
        "frozen",
        "none, frozen",
        "depth 1, norm",
        "depth 3, norm",
        "none, depth 3, norm",
        "frozen hidden, norm",
    ],
)
def test_opcheck(impl, device, name):
    """All rows are selected, because opcheck compares dH beyond the count, where it is
    undefined."""
    case = make(4, device=device, selected=1.0, **CALLS[name])
    for operator, arguments in of_real_calls(case, impl):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    "name", thinned([name for name, call in CALLS.items() if call["rows"] == "mask"], 3)
)
def test_sizes_that_a_mask_selects(impl, device, name):
    case = make(4, device=device, selected=0.4, **CALLS[name])
    for operator, arguments in of_real_calls(case, impl):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_a_mask_beyond_the_capacity(impl, device):
    case = make(4, device=device, capacity=10, dtype=torch.float32)

    def function(tensors, rows):
        return fused_pre_loss(**tensors, rows=rows, **case.options, impl=impl)

    if impl == "torch":
        with pytest.raises(ValueError, match="capacity: got 10, want at least the"):
            function(case.tensors, case.rows)
        return
    loss, *grads = results(function, case)
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in grads)


def test_a_mask_beyond_the_capacity_is_named_when_debugging(impl, device, monkeypatch):
    monkeypatch.setenv("PRE_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="capacity: got 10, want at least the"):
        fused_pre_loss(
            **make(4, device=device).tensors,
            rows=make(4, device=device).rows,
            capacity=10,
            impl=impl,
        )
