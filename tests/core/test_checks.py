"""Every wrong argument raises, by name, before any work."""

import pytest
import torch

from pre_kernels import PreHead, fused_pre_loss
from pre_kernels.checks import LOSSES
from verify.oracle import make

X = torch.randn


def arguments(**changes):
    """Return a right call for hidden (2, 3, 4), m = 5, z = 6, with some arguments replaced."""
    call = {
        "hidden": X(2, 3, 4),
        "anchor": X(2, 3, 6),
        "w1": X(5, 4),
        "b1": X(5),
        "w2": X(6, 5),
        "b2": X(6),
        "rows": None,
    }
    return {**call, **changes}


WRONG = [
    # Each case has an argument, the changes, the error, and what its message says was wanted.
    ("hidden", {"hidden": [[1.0]]}, TypeError, "want a torch.Tensor"),
    ("hidden", {"hidden": X(4)}, ValueError, "want (..., d)"),
    ("hidden", {"hidden": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "float16, bfloat16"),
    ("hidden", {"hidden": X(2, 3, 0)}, ValueError, "at least 1"),
    ("hidden", {"hidden": X(2, 3, 4).to_sparse()}, TypeError, "dense"),
    ("hidden", {"hidden": torch.empty(2, 3, 4, device="meta")}, TypeError, "dense"),
    ("anchor", {"anchor": X(6)}, ValueError, "hidden's leading shape"),
    ("anchor", {"anchor": X(3, 2, 6)}, ValueError, "(2, 3, 6)"),
    ("anchor", {"anchor": X(5, 6)}, ValueError, "(6, 6)"),
    ("anchor", {"anchor": X(2, 3, 6).to("meta")}, TypeError, "dense"),
    ("anchor", {"anchor": torch.ones(2, 3, 6, dtype=torch.int32)}, TypeError, "float16, bfloat16"),
    ("anchor", {"anchor": X(3, 6), "rows": torch.tensor([0, 1])}, ValueError, "(2, 6)"),
    (
        "anchor",
        {"anchor": X(3, 6), "rows": torch.eye(2, 3) > 0},
        ValueError,
        "each of the 2 selected rows",
    ),
    ("w1", {"w1": X(5, 3)}, ValueError, "d = 4"),
    ("w1", {"w1": X(5)}, ValueError, "(m, d)"),
    ("w1", {"w1": X(5, 4).double()}, TypeError, "hidden's dtype torch.float32"),
    ("b1", {"b1": X(6)}, ValueError, "(m,) = (5,)"),
    ("b1", {"b1": X(5).half()}, TypeError, "hidden's dtype"),
    ("w2", {"w2": X(5, 6)}, ValueError, "(6, 5)"),
    ("w2", {"w2": None, "w3": X(6, 5)}, TypeError, "want a torch.Tensor"),
    ("w1", {"w2": None, "b2": None, "b1": None}, ValueError, "(z, d), z as anchor's last"),
    ("b2", {"w1": X(6, 4), "b1": None, "w2": None}, ValueError, "a bias without a w2"),
    ("b3", {"b3": X(6)}, ValueError, "a bias without a w3"),
    ("w3", {"w3": X(6, 7), "b2": None}, ValueError, "(z, m2), z as anchor's last dimension"),
    ("w2", {"w2": X(7, 3), "w3": X(6, 7)}, ValueError, "(m2, m) with m = 5 as w1's first"),
    ("b2", {"w2": X(7, 5), "w3": X(6, 7)}, ValueError, "(m2,) = (7,)"),
    ("b3", {"w2": X(7, 5), "b2": None, "w3": X(6, 7), "b3": X(7)}, ValueError, "(z,) = (6,)"),
    ("norm", {"norm": "batch"}, ValueError, "'layer', 'rms'"),
    ("norm_weight", {"norm_weight": X(4)}, ValueError, "norm=None, want norm='layer' or 'rms'"),
    ("norm_bias", {"norm": "rms", "norm_bias": X(4)}, ValueError, "want norm='layer'"),
    ("norm_weight", {"norm": "rms", "norm_weight": X(5)}, ValueError, "(d,) = (4,)"),
    ("norm_bias", {"norm": "layer", "norm_bias": X(4).half()}, TypeError, "hidden's dtype"),
    ("norm_eps", {"norm": "rms", "norm_eps": -1.0}, ValueError, "finite number"),
    ("norm_eps", {"norm": "rms", "norm_eps": "small"}, TypeError, "want a number"),
    ("b2", {"b2": X(6, 1)}, ValueError, "(z,) = (6,)"),
    ("b2", {"b2": 0.0}, TypeError, "want a torch.Tensor"),
    ("rows", {"rows": [0, 1]}, TypeError, "want a torch.Tensor"),
    ("rows", {"rows": torch.ones(6, dtype=torch.bool)}, ValueError, "(2, 3)"),
    ("rows", {"rows": torch.ones(2, 3)}, TypeError, "int32 or int64"),
    ("rows", {"rows": torch.tensor([[0]])}, ValueError, "(N,)"),
    ("rows", {"rows": torch.tensor([0, 6])}, ValueError, "0..5"),
    ("rows", {"rows": torch.tensor([-1, 2])}, ValueError, "0..5"),
    ("rows", {"rows": torch.tensor([2, 2, 3])}, ValueError, "3 indices of which 2 are distinct"),
    ("rows", {"rows": torch.arange(300) - 1}, ValueError, "indices in -1..298, want 0..5"),
    (
        "rows",
        {"rows": torch.arange(300) % 6},
        ValueError,
        "300 indices of which 6 are distinct, want no duplicates",
    ),
    ("loss", {"loss": "l2"}, ValueError, ", ".join(map(repr, LOSSES))),
    ("activation", {"activation": "tanh"}, ValueError, "'gelu_tanh'"),
    ("reduction", {"reduction": "average"}, ValueError, "'mean', 'sum', 'none'"),
    ("row_weight", {"row_weight": 2.0}, TypeError, "want a torch.Tensor"),
    ("row_weight", {"row_weight": torch.ones(6, dtype=torch.int64)}, TypeError, "float16"),
    ("row_weight", {"row_weight": X(5)}, ValueError, "(6,)"),
    (
        "row_weight",
        {"row_weight": X(3), "rows": torch.eye(2, 3) > 0},
        ValueError,
        "each of the 2 selected rows",
    ),
    ("row_weight", {"row_weight": X(6).requires_grad_()}, TypeError, "detach"),
    ("normalizer", {"normalizer": "6"}, TypeError, "a number or a 0-d tensor"),
    ("normalizer", {"normalizer": True}, TypeError, "a number or a 0-d tensor"),
    ("normalizer", {"normalizer": X(1)}, ValueError, "0-d"),
    ("normalizer", {"normalizer": 10**400}, ValueError, "finite"),
    ("normalizer", {"normalizer": float("nan")}, ValueError, "finite"),
    ("normalizer", {"normalizer": torch.tensor(3.0, requires_grad=True)}, TypeError, "detach"),
    ("normalizer", {"normalizer": 3, "reduction": "sum"}, ValueError, "reduction='sum'"),
    ("normalizer", {"normalizer": 3, "reduction": "none"}, ValueError, "reduction='none'"),
    ("impl", {"impl": "cuda"}, ValueError, "'auto', 'triton', 'blas', 'torch'"),
    ("capacity", {"capacity": 3}, ValueError, "a mask"),
    ("capacity", {"capacity": 0, "rows": torch.eye(2, 3) > 0}, ValueError, "positive int"),
    ("capacity", {"capacity": 1, "rows": torch.eye(2, 3) > 0}, ValueError, "at least the 2 rows"),
    ("precision", {"precision": "fp4"}, ValueError, "'fp8' or None"),
    ("precision", {"precision": "fp8"}, TypeError, "bfloat16"),
    ("workspace", {"workspace": 0}, ValueError, "positive int"),
    ("workspace", {"workspace": 1.5}, TypeError, "positive int"),
]


@pytest.mark.parametrize(("name", "changes", "error", "wanted"), WRONG)
def test_wrong_argument(name, changes, error, wanted):
    with pytest.raises(error) as raised:
        fused_pre_loss(**arguments(**changes))
    assert str(raised.value).startswith(f"{name}: ")
    assert wanted in str(raised.value)


def test_the_right_call_is_right():
    assert fused_pre_loss(**arguments()).isfinite()


def test_distributed_tensors_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("hidden", "w1"):
            call = arguments()
            call[name] = distribute_tensor(call[name], mesh)
            with pytest.raises(TypeError, match=f"{name}: got a DTensor"):
                fused_pre_loss(**call)
    finally:
        torch.distributed.destroy_process_group()


def test_triton_says_why_it_cannot_run(monkeypatch):
    with pytest.raises(RuntimeError, match=r"impl: got 'triton'.*float64"):
        fused_pre_loss(**make(0, dtype=torch.float64).tensors, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"impl: got 'triton'.*not on a GPU"):
        fused_pre_loss(**arguments(), impl="triton")
    monkeypatch.setattr("pre_kernels.loss.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        fused_pre_loss(**arguments(), impl="triton")


def test_mixed_dtypes_are_right_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_pre_loss(**arguments(hidden=X(2, 3, 4).bfloat16())).dtype == torch.float32
        with pytest.raises(TypeError, match=r"w1: got dtype torch\.float64"):
            fused_pre_loss(**arguments(w1=X(5, 4).double()))


def test_a_weight_for_each_row_reads_as_selection_order_first():
    """With N = R both readings fit integer rows, and (N,) is the documented one."""
    call = arguments(hidden=X(4, 4), anchor=X(4, 6), rows=torch.tensor([3, 1, 0, 2]))
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0])
    losses = fused_pre_loss(**call, row_weight=weight, reduction="none")
    assert losses.nonzero().tolist() == [[0]]


HEAD = [
    ("dim", (0,), {}, ValueError),
    ("dim", (4.0,), {}, TypeError),
    ("hidden_dim", (4, -1), {}, ValueError),
    ("out_dim", (4, 4, "8"), {}, TypeError),
    ("activation", (4,), {"activation": "swish"}, ValueError),
    ("loss", (4,), {"loss": "cos"}, ValueError),
    ("dtype", (4,), {"dtype": torch.int8}, TypeError),
    ("dtype", (4,), {"dtype": "float16"}, TypeError),
    ("dtype", (4,), {"dtype": torch.float8_e4m3fn}, TypeError),
]


@pytest.mark.parametrize(("name", "positional", "keywords", "error"), HEAD)
def test_wrong_head(name, positional, keywords, error):
    with pytest.raises(error, match=f"^{name}: "):
        PreHead(*positional, **keywords)
