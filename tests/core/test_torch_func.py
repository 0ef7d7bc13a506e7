"""torch.func and forward mode: some uses work, and the others raise by name."""

import pytest
import torch
from torch.autograd import forward_ad

from pre_kernels import fused_pre_loss, reference

from .support import head_and_inputs


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
                NotImplementedError, match=r"fused_pre_loss: .* torch.func; use reference.pre_loss"
            ),
        ):
            TRANSFORMS[transform](lambda hidden: head(hidden, anchor), hidden)
    weights = [p.detach() for p in (head.w1, head.b1, head.w2, head.b2)]
    # The reference can be transformed, as the message says.
    TRANSFORMS[transform](lambda hidden: reference.pre_loss(hidden, anchor, *weights), hidden)


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
        # An anchor is a constant, in either direction.
        anchored = head(hidden, forward_ad.make_dual(anchor, anchor))
        assert forward_ad.unpack_dual(anchored).tangent is None
