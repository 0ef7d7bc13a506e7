"""What autograd, torch.func, copies, files, threads and repeats may expect of the loss and of
PreHead."""

import copy
import io
import itertools
import json
import os
import pickle
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from pre_kernels import PreHead, fused_pre_loss, reference
from pre_kernels.fused.kernels import matmul
from verify import ROOT
from verify.oracle import LEAVES, make

# asked of cuBLAS by torch.use_deterministic_algorithms, and read by torch once
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DATA = ROOT / "tests" / "data"
KERNELS = Path(matmul.__file__).parent
INTERPRETED = type(matmul.matmul_kernel).__name__ == "InterpretedFunction"
CALLS = {  # gradients scaled in the backward; recomputed there, by row and by a mean
    "mean": {"reduction": "mean"},
    "none": {"reduction": "none"},
    "float16": {"reduction": "mean", "dtype": torch.float16},
}


@pytest.fixture(params=CALLS)
def call(request, impl, device):
    """A function of the leaves, and the leaves."""
    case = make(21, leading=(2, 12), d=16, m=8, z=16, device=device, **CALLS[request.param])
    return as_function(case, impl), leaves_of(case)


def as_function(case, impl):
    def function(*leaves):
        tensors = {**case.tensors, **dict(zip(LEAVES, leaves, strict=True))}
        return fused_pre_loss(**tensors, rows=case.rows, **case.options, impl=impl)

    return function


def leaves_of(case):
    return [case.tensors[name].clone().requires_grad_() for name in LEAVES]


def equal(found, wanted):
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def upstream_of(loss):
    return torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape)


def head_and_inputs(seed=0, device="cpu", **options):
    torch.manual_seed(seed)
    head = PreHead(16, 8, 24, **options).to(device)
    return head, torch.randn(2, 9, 16, device=device), torch.randn(2, 9, 24, device=device)


# autograd


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"rows": "index64", "reduction": "sum"},
        {"rows": "index32", "anchor": "compact", "weight": "compact", "loss": "smooth_l1"},
        {"rows": "all", "normalizer": torch.tensor(-3.0), "loss": "mse", "bias": (False, True)},
        {"rows": "mask", "normalizer": 2, "bias": (True, False), "workspace": 1, "leading": (70,)},
        {
            "rows": "mask",
            "anchor": "compact",
            "reduction": "none",
            "weight": "compact",
            "contiguous": False,
        },
    ],
)
def test_gradcheck(options):
    case = make(1, **{"leading": (2, 4), "d": 3, "m": 5, "z": 4, "dtype": torch.float64, **options})
    names = [name for name in LEAVES if case.tensors[name] is not None]
    if options.get("activation") == "relu":  # no kink within a difference
        with torch.no_grad():
            z = torch.nn.functional.linear(
                case.tensors["hidden"], case.tensors["w1"], case.tensors["b1"]
            )
        assert z.abs().min() > 1e-4

    def function(*values):
        tensors = {**case.tensors, **dict(zip(names, values, strict=True))}
        return fused_pre_loss(**tensors, rows=case.rows, **case.options)

    leaves = [case.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=len(leaves[0]) > 9)


def test_upstream_gradients_of_any_layout(call):
    function, leaves = call
    loss = function(*leaves)
    n = loss.numel()
    room = torch.linspace(-2, 2, 4 * n + 2, device=loss.device)
    layouts = (
        [room[3 : 3 + n].view(loss.shape), room[2 : 2 + 2 * n : 2].view(loss.shape)]
        if loss.dim()
        else [room[3]]
    )
    layouts.append(room[1].expand(loss.shape))
    layouts.append(room[:1].expand(5, n)[2].view(loss.shape))
    for upstream in layouts:
        found = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        equal(
            found,
            torch.autograd.grad(loss, leaves, upstream.clone().contiguous(), retain_graph=True),
        )
    ones = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    equal(
        torch.autograd.grad(loss.sum(), leaves, retain_graph=True), ones
    )  # expanded from one element
    # and they do enter
    assert not torch.equal(torch.autograd.grad(loss, leaves, upstream_of(loss) * 3)[1], ones[1])


def test_gradients_of_subsets(call):
    function, leaves = call
    loss = function(*leaves)
    upstream = upstream_of(loss)
    whole = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    for chosen in ((0,), (1,), (2,), (3,), (4,), (1, 4), (0, 3, 2)):
        found = torch.autograd.grad(loss, [leaves[i] for i in chosen], upstream, retain_graph=True)
        equal(found, [whole[i] for i in chosen])


def test_backward_again_adds_the_same(call):
    function, leaves = call
    loss = function(*leaves)
    loss.backward(upstream_of(loss), retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward(upstream_of(loss))
    equal([leaf.grad for leaf in leaves], [2 * grad for grad in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(upstream_of(loss))


def test_a_gradient_is_not_differentiated_in_silence(call):
    """By an input, by the upstream gradient, beside another term: each would be a zero, or a term
    that is missing."""
    function, leaves = call
    loss = function(*leaves)
    upstream = upstream_of(loss).requires_grad_()
    grads = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
    for grad, by in itertools.product(grads, (*leaves, upstream)):
        with pytest.raises(RuntimeError, match="once-differentiable"):
            torch.autograd.grad(
                grad.square().sum() + by.square().sum(), by, allow_unused=True, retain_graph=True
            )
    with pytest.raises(RuntimeError, match="once-differentiable"):
        torch.autograd.functional.hessian(
            lambda w1: function(leaves[0], w1, *leaves[2:]).sum(), leaves[1]
        )


def test_gradients_are_the_callers(call):
    """Those of a retained graph too: what is done to them does not reach the next backward."""
    function, leaves = call
    loss = function(*leaves)
    found = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    wanted = [grad.clone() for grad in found]
    for grad in found:
        grad.zero_()
    equal(torch.autograd.grad(loss, leaves, torch.ones_like(loss)), wanted)


def test_hooks_on_parameters(impl, device):
    head, hidden, anchor = head_and_inputs(device=device)
    hidden.requires_grad_()
    head(hidden, anchor, impl=impl).backward()
    wanted = {name: p.grad.clone() for name, p in head.named_parameters()} | {
        "hidden": hidden.grad.clone()
    }
    seen, stepped, modules = {}, [], []
    head.zero_grad()
    hidden.grad = None
    for name, tensor in (*head.named_parameters(), ("hidden", hidden)):
        tensor.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad.clone()))
        tensor.register_post_accumulate_grad_hook(
            lambda tensor, name=name: stepped.append((name, tensor.grad.clone()))
        )
    head.register_full_backward_pre_hook(lambda module, given: modules.append(given[0]))
    head.register_full_backward_hook(lambda module, inputs, outputs: modules.append(inputs[0]))
    head.w2.register_hook(lambda grad: 2 * grad)
    wanted["w2 twice"] = 2 * wanted["w2"]
    head(hidden, anchor, impl=impl).backward()
    assert seen.keys() == {"w1", "b1", "w2", "b2", "hidden"}
    for name, grads in seen.items():
        equal(grads, [wanted[name]])
    assert sorted(name for name, _ in stepped) == sorted(seen)
    for name, grad in stepped:  # after the hook that doubles
        assert torch.equal(grad, wanted["w2 twice" if name == "w2" else name])
    assert modules[0] == 1
    assert torch.equal(modules[1], wanted["hidden"])


def test_saved_tensors_may_be_packed(call):
    function, leaves = call
    wanted = torch.autograd.grad(function(*leaves).sum(), leaves)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.cpu().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.to(leaves[0].device)):
        loss = function(*leaves)
    equal(torch.autograd.grad(loss.sum(), leaves), wanted)
    assert packed


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(call, reentrant):
    function, leaves = call
    wanted = torch.autograd.grad(function(*leaves).sum(), leaves)
    torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=reentrant).sum().backward()
    equal([leaf.grad for leaf in leaves], wanted)


@pytest.mark.parametrize("transform", ["is_grads_batched", "vmap"])
def test_batched_upstream_gradients(call, transform):
    """The backward runs once under vmap, for several gradients: as the rows of the batch by
    themselves."""
    function, leaves = call
    loss = function(*leaves)
    batch = torch.stack([upstream_of(loss) * factor for factor in (1.0, -2.0, 0.5)])

    def batched(**options):
        if transform == "is_grads_batched":
            return torch.autograd.grad(loss, leaves, batch, is_grads_batched=True, **options)
        return torch.func.vmap(
            lambda upstream: torch.autograd.grad(loss, leaves, upstream, **options)
        )(batch)

    found = batched(retain_graph=True)
    for i, upstream in enumerate(batch):
        equal(
            [grad[i] for grad in found],
            torch.autograd.grad(loss, leaves, upstream, retain_graph=True),
        )
    equal(batched(), found)


# torch.func and forward mode: what works, and what says that it does not


def test_functional_call(impl, device):
    head, hidden, anchor = head_and_inputs(device=device)
    other = {name: (2 * p.detach()).requires_grad_() for name, p in head.named_parameters()}
    loss = torch.func.functional_call(head, other, (hidden, anchor), {"impl": impl})
    wanted = reference.pre_loss(hidden, anchor, *(other[name] for name in ("w1", "b1", "w2", "b2")))
    torch.testing.assert_close(loss, wanted)
    assert all(grad.any() for grad in torch.autograd.grad(loss, list(other.values())))
    assert all(p.grad is None for p in head.parameters())


TRANSFORMS = {
    "grad": lambda loss, hidden: torch.func.grad(loss)(hidden),
    "vjp": lambda loss, hidden: torch.func.vjp(loss, hidden),
    "jvp": lambda loss, hidden: torch.func.jvp(loss, (hidden,), (hidden,)),
    "jacrev": lambda loss, hidden: torch.func.jacrev(loss)(hidden),
    "vmap": lambda loss, hidden: torch.func.vmap(loss)(hidden.expand(3, *hidden.shape)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_is_refused_by_name(transform):
    head, hidden, anchor = head_and_inputs()
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(
                NotImplementedError, match=r"fused_pre_loss: .* torch.func; reference.pre_loss"
            ),
        ):
            TRANSFORMS[transform](lambda hidden: head(hidden, anchor), hidden)
    weights = [p.detach() for p in (head.w1, head.b1, head.w2, head.b2)]
    TRANSFORMS[transform](
        lambda hidden: reference.pre_loss(hidden, anchor, *weights), hidden
    )  # as the message says


def test_forward_mode_is_refused_by_name():
    head, hidden, anchor = head_and_inputs()
    with forward_ad.dual_level():
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(
                    NotImplementedError,
                    match=r"fused_pre_loss: .*forward-mode.* reference.pre_loss",
                ),
            ):
                head(forward_ad.make_dual(hidden, hidden), anchor)
        w2 = forward_ad.make_dual(head.w2.detach(), head.w2.detach())
        with pytest.raises(NotImplementedError, match="forward-mode"):
            fused_pre_loss(hidden, anchor, head.w1, None, w2, None)
        anchored = head(
            hidden, forward_ad.make_dual(anchor, anchor)
        )  # a constant, in either direction
        assert forward_ad.unpack_dual(anchored).tangent is None


# copies and files


def test_copies_have_memory_of_their_own(impl, device):
    head, hidden, anchor = head_and_inputs(device=device, loss="mse", activation="silu")
    head.w2.requires_grad_(False)
    head.eval()
    loss = head(hidden, anchor, impl=impl)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    twins = [
        copy.deepcopy(head),
        pickle.loads(pickle.dumps(head)),
        torch.load(file, weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is PreHead
        assert not twin.training
        assert [p.requires_grad for p in twin.parameters()] == [
            p.requires_grad for p in head.parameters()
        ]
        assert (twin.loss, twin.activation, twin.dim) == ("mse", "silu", 16)
        assert torch.equal(twin(hidden, anchor, impl=impl), loss)
        with torch.no_grad():
            for p in twin.parameters():
                p.fill_(3)
    loss.backward()  # taken before the copies
    assert torch.equal(head(hidden, anchor, impl=impl), loss)
    assert head.w1.grad.any()


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_needs_no_pickle(bias):
    head, hidden, anchor = head_and_inputs(bias=bias)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == (["w1", "b1", "w2", "b2"] if bias else ["w1", "w2"])
    other, *_ = head_and_inputs(seed=1, bias=bias)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(hidden, anchor), head(hidden, anchor))
    with pytest.raises(RuntimeError, match="b1"):
        PreHead(16, 8, 24, bias=not bias).load_state_dict(state, strict=True)


OLD = {
    "head-0.1.0": 0.4392769282
}  # folder, as `handle.save` of that version wrote it: the loss below; never rewritten


@pytest.mark.parametrize("name", OLD)
def test_heads_of_earlier_versions_load_and_mean_the_same(name, impl, device):
    load_file, folder = pytest.importorskip("safetensors.torch").load_file, DATA / name
    config, state = (
        json.loads((folder / "pre_head.json").read_text()),
        load_file(folder / "pre_head.safetensors"),
    )
    shapes = {"w1": (2, 32), "b1": (2,), "w2": (32, 2), "b2": (32,)}
    assert {name: tuple(x.shape) for name, x in state.items()} == shapes
    options = {name: config[name] for name in ("bias", "activation", "loss")}
    head = PreHead(config["dim"], config["hidden_dim"], config["out_dim"], **options).to(device)
    head.load_state_dict(state, strict=True)
    hidden = torch.linspace(-1, 1, 96, device=device).reshape(3, 32)
    loss = head(hidden, hidden.square().flip(0), impl=impl)
    assert loss.item() == pytest.approx(OLD[name], rel=1e-5)


# threads


def cold() -> None:
    """Empty every cache of the package."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "pre_kernels":
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", int)()


def train(seed, impl, device):
    """A few steps with sizes and options of its own: losses, gradients, and where the parameters
    end."""
    options = {"loss": ("cosine", "mse")[seed % 2], "activation": ("gelu", "silu")[seed % 2]}
    generator = torch.Generator().manual_seed(seed)
    head = PreHead(16, 8 + 8 * seed, 24, **options)
    for p in head.parameters():
        p.data.copy_(torch.rand(p.shape, generator=generator) - 0.5)
    head.to(device)
    optimizer, seen = torch.optim.SGD(head.parameters(), lr=0.1), []
    for step in range(3 if INTERPRETED and impl != "torch" else 30):
        n = 5 + 7 * seed + step
        hidden, anchor = (
            torch.randn(n, width, generator=generator).to(device) for width in (16, 24)
        )
        hidden.requires_grad_()
        optimizer.zero_grad()
        loss = head(hidden, anchor, torch.rand(n, generator=generator).to(device) < 0.7, impl=impl)
        loss.backward()
        optimizer.step()
        seen += [loss.detach(), hidden.grad]
    return [*seen, *(p.detach() for p in head.parameters())]


def test_two_models_in_two_threads(impl, device, monkeypatch):
    if (
        INTERPRETED
    ):  # it is no thread's own: one launch at a time, so that all but the launches still overlap
        run, lock = type(matmul.matmul_kernel).run, threading.Lock()

        def one_at_a_time(*arguments, **keywords):
            with lock:
                return run(*arguments, **keywords)

        monkeypatch.setattr(type(matmul.matmul_kernel), "run", one_at_a_time)
    wanted = [train(seed, impl, device) for seed in range(2)]
    found, errors, start = [None, None], [], threading.Barrier(2)

    def work(seed):
        try:
            start.wait()
            found[seed] = train(seed, impl, device)
        except BaseException as error:
            errors.append(error)

    cold()
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert not errors
    for ours, theirs in zip(found, wanted, strict=True):
        equal(ours, theirs)


# repeats


REPEATED = {
    "chunks": {"leading": (210,), "dtype": torch.bfloat16, "workspace": 1},
    "mask": {"leading": (60,)},
    "none": {"leading": (60,), "reduction": "none"},
    "float16, index": {"leading": (60,), "dtype": torch.float16, "rows": "index32"},
}


def results(function, leaves):
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream_of(loss))]


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_bits_every_time(impl, device, name):
    case = make(22, d=32, m=32, z=32, weight="leading", device=device, **REPEATED[name])
    function, leaves = as_function(case, impl), leaves_of(case)
    wanted = results(function, leaves)
    # interpreted, programs run one after another: repeats show no more than memory that is used as
    # it was found
    for repeat in range(2 if INTERPRETED and impl != "torch" else 250):
        litter = [
            torch.full((64 * (1 + repeat % 9), 64), float("nan"), device=device) for _ in range(4)
        ]
        del litter  # into the memory that the next call gets
        equal(results(function, leaves), wanted)


@pytest.mark.parametrize("name", REPEATED)
def test_deterministic_algorithms(impl, device, name):
    """Nothing raises, the bits are those of always, and what torch then puts into fresh memory, NaN
    and the largest integer, reaches no result."""
    case = make(22, d=32, m=32, z=32, weight="leading", device=device, **REPEATED[name])
    function, leaves = as_function(case, impl), leaves_of(case)
    wanted = results(function, leaves)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        equal(results(function, leaves), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_only_atomic_is_one_where_no_two_programs_meet():
    """Each element of a weight's gradient belongs to one program (tests/core/test_memory_safety.py
    watches the stores), and launches follow each other: `atomic_add` by descriptor is there because
    it loads nothing."""
    found = [
        (f.name, w)
        for f in sorted(KERNELS.glob("*.py"))
        for w in re.findall(r"atomic_\w+", f.read_text())
    ]
    assert found == [("weight_grad.py", "atomic_add")]
