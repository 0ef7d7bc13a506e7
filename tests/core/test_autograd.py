"""What autograd may expect of the loss and of PreHead: any upstream gradient, subsets of gradients,
repeats, hooks, checkpointing and batches."""

import itertools

import pytest
import torch

from pre_kernels import fused_pre_loss
from verify.oracle import make

from .support import as_function, equal, head_and_inputs, leaves_of, names_of, upstream_of

# The backward scales the gradients of the first call, and recomputes those of the others.
CALLS = {
    "mean": {"reduction": "mean"},
    "none": {"reduction": "none"},
    "float16": {"reduction": "mean", "dtype": torch.float16},
    "norm": {"reduction": "mean", "depth": 3, "norm": "layer"},
    "none, norm": {"reduction": "none", "depth": 3, "norm": "rms"},
}


@pytest.fixture(params=CALLS)
def call(request, impl, device):
    """A function of the leaves, and the leaves."""
    case = make(21, leading=(2, 12), d=16, m=8, z=16, device=device, **CALLS[request.param])
    return as_function(case, impl), leaves_of(case)


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
        {"depth": 3, "norm": "layer"},
        {"depth": 1, "norm": "rms", "rows": "index64", "reduction": "none", "loss": "smooth_l1"},
        {"depth": 3, "norm": "rms", "bias": (False, True), "workspace": 1, "leading": (70,)},
    ],
)
def test_gradcheck(options):
    case = make(1, **{"leading": (2, 4), "d": 3, "m": 5, "z": 4, "dtype": torch.float64, **options})
    names = names_of(case)
    if options.get("activation") == "relu":  # No finite difference may cross the kink.
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
        grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        equal(
            grads,
            torch.autograd.grad(loss, leaves, upstream.clone().contiguous(), retain_graph=True),
        )
    ones = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    # The gradient of a sum is expanded from one element.
    equal(torch.autograd.grad(loss.sum(), leaves, retain_graph=True), ones)
    # This shows that upstream gradients matter.
    assert not torch.equal(torch.autograd.grad(loss, leaves, upstream_of(loss) * 3)[1], ones[1])


def test_gradients_of_subsets(call):
    function, leaves = call
    loss = function(*leaves)
    upstream = upstream_of(loss)
    whole = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    last = len(leaves) - 1  # with a norm its scale or shift
    for chosen in ((0,), (1,), (2,), (3,), (4,), (1, 4), (0, 3, 2), (last,), (last, 0), (1, last)):
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
    """By an input, by the upstream gradient, or beside another term, the result would be zero or
    lack a term."""
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
    """A caller may change gradients, also those of a retained graph: the next backward does not see
    it."""
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
    seen = {}
    stepped = []
    modules = []
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
    for name, grad in stepped:  # This runs after the hook that doubles.
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
    """The backward runs once under vmap, for several gradients, and gives the same as one row at a
    time."""
    function, leaves = call
    loss = function(*leaves)
    batch = torch.stack([upstream_of(loss) * factor for factor in (1.0, -2.0, 0.5)])

    def batched(**options):
        if transform == "is_grads_batched":
            return torch.autograd.grad(loss, leaves, batch, is_grads_batched=True, **options)
        return torch.func.vmap(
            lambda upstream: torch.autograd.grad(loss, leaves, upstream, **options)
        )(batch)

    grads = batched(retain_graph=True)
    for i, upstream in enumerate(batch):
        found = [grad[i] for grad in grads]
        equal(found, [*torch.autograd.grad(loss, leaves, upstream, retain_graph=True)])
    equal(batched(), grads)
