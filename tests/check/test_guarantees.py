"""Host syncs, graphs and breaks are found where they are, by stand-ins for what only a GPU has."""

from contextlib import contextmanager

import pytest
import torch

from pre_kernels import fused_pre_loss, reference
from pre_kernels.check import cases, guarantees
from pre_kernels.check.device import Cpu
from pre_kernels.check.rule import Case

TINY = cases.Shape("tiny", 2, 160, 100, 128, 96, 64, "")


def tiny(rows="index"):
    return cases.case(TINY, torch.float32, torch.device("cpu"), rows)


@pytest.mark.parametrize("rows", ["index", "mask"])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_a_graph_is_replayed_on_other_rows(rows, frozen):
    """A stand-in for a CUDA graph replays the rows as they are then, or wrongly those of its
    capture."""
    case = tiny(rows)
    step = cases.step(fused_pre_loss, case)
    then = Case(case.tensors, case.rows.clone(), upstream=case.upstream)

    def capture(step):
        got = step()
        again = cases.step(fused_pre_loss, then) if frozen else step

        def replay():
            for kept, new in zip(got, again(), strict=True):
                kept.copy_(new)

        return replay, got

    outcome, _ = guarantees.graph(Cpu(), step, case, capture)
    assert outcome == (
        "captured, but its gradients differ once the rows have changed"
        if frozen
        else guarantees.CAPTURED
    )
    assert torch.equal(case.rows, then.rows)
    if rows == "mask":
        assert 0 < guarantees.other_rows(case.rows).sum() < case.rows.sum()


def test_a_graph_with_other_gradients():
    case = tiny()
    step = cases.step(fused_pre_loss, case)
    wrong = tuple(x * 1.01 for x in step())
    assert guarantees.graph(Cpu(), step, case, lambda step: (lambda: None, wrong))[0] == (
        "captured, but its gradients differ"
    )


def test_a_break_is_told():
    def breaks(**arguments):
        torch._dynamo.graph_break()
        return reference.pre_loss(**arguments)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        guarantees.fullgraph(breaks, tiny(), "aot_eager")


def test_a_compiled_call_with_other_gradients():
    def wrong(**arguments):
        return reference.pre_loss(**arguments) * (1.01 if torch.compiler.is_compiling() else 1)

    assert "gradients differ" in guarantees.fullgraph(wrong, tiny(), "aot_eager")


def test_a_wait_is_told():
    class Strict(Cpu):
        @contextmanager
        def syncs_forbidden(self):
            seen.append("forbidden")
            yield
            seen.append("allowed")

    seen = []

    def call(**arguments):
        seen.append("call")
        if seen[-2:] == ["forbidden", "call"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return reference.pre_loss(**arguments)

    assert guarantees.sync(Strict(), reference.pre_loss, tiny()) == "no sync"
    with pytest.raises(RuntimeError, match="synchronizing"):
        guarantees.sync(Strict(), call, tiny())
