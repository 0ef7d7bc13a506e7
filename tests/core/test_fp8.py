"""`precision="fp8"`: float8 rows, their scales, loss and gradients, and a training that ends where
bfloat16 ends."""

import itertools

import pytest
import torch

from pre_kernels import PreHead, fused_pre_loss, reference
from pre_kernels.fused.kernels.activation import apply_activation, apply_activation_grad
from pre_kernels.fused.kernels.quantize import Quantized, quantize_weight
from pre_kernels.fused.kernels.row_loss import row_loss
from pre_kernels.fused.kernels.rows import gather
from pre_kernels.loss import fp8_unavailable
from verify import oracle
from verify.oracle import make, run

from ..slow import thinned

# A gradient may have this relative RMS error, because e4m3 has three bits of mantissa.
ERROR = 0.1


@pytest.fixture(autouse=True)
def _needs_float8(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("float8 with a scale for each row needs sm_90")


def check_quantized(quantized, rows):
    """Compare with torch's own rounding of rows ÷ scale, where a scale brings the row's largest
    element to 448."""
    largest = rows.abs().amax(1)
    torch.testing.assert_close(quantized.scales, (largest / 448).clamp_min(1e-30))
    want = (rows / quantized.scales[:, None]).to(torch.float8_e4m3fn).float()
    got = quantized.values.float()
    # A quotient in the middle between two values may be rounded to either.
    assert ((got - want).abs() <= want.abs() / 8 + 2**-9).all()
    assert (got == want).float().mean() > 0.999


@pytest.mark.parametrize("width", [16, 144, 5008])
def test_each_pass_leaves_float8_rows(device, width):
    x = torch.randn(21, width, device=device) * torch.logspace(-6, 4, 21, device=device)[:, None]
    x[3] = 0
    x[:, 5] *= 1e-4  # These elements are subnormal beside the largest.
    index = torch.randperm(21, device=device)
    room = Quantized.empty(x, 21, width)
    gather(x, None, index=index, quantized=room)
    check_quantized(room, x[index])
    g = torch.empty_like(x)
    apply_activation(x, g, "silu", quantized=room)
    check_quantized(room, g)
    dz = x.clone()
    apply_activation_grad(g, dz, "gelu", quantized=room)
    check_quantized(room, dz)
    dp = x.clone()
    row_loss(dp, g, None, loss="mse", grad=True, quantized=room)
    check_quantized(room, dp)


@pytest.mark.parametrize("bad", thinned([None, float("nan"), float("inf")], 3))
def test_weights_in_both_layouts(device, bad):
    """Weights are quantised as gathered rows or columns would be, over several strips and turns,
    and at edges."""
    w1, w2 = (
        torch.randn(1040, 144, device=device).bfloat16(),
        torch.randn(48, 1040, device=device).bfloat16(),
    )
    w1[:, 3] = 0
    w2[17] *= 1e-4
    if bad is not None:
        w2[40, 1030] = bad
    for w, columns in itertools.product([w1, w2], [False, True]):
        got = quantize_weight(w, columns)
        for quantized, rows in zip(got, (w, w.t() if columns else None), strict=True):
            assert (quantized is None) is (rows is None)
            if rows is not None:
                want = Quantized.empty(rows, *rows.shape)
                gather(rows, None, quantized=want)
                torch.testing.assert_close(
                    quantized.scales, want.scales, rtol=0, atol=0, equal_nan=True
                )
                values, wanted = quantized.values.float(), want.values.float()
                torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(device, bad):
    x = torch.randn(4, 32, device=device)
    room = Quantized.empty(torch.empty(0, device=device), 4, 32)
    x[2, 7] = bad
    gather(x, None, quantized=room)
    assert not (room.values.float() * room.scales[:, None])[2, 7].isfinite()
    assert room.values.float()[[0, 1, 3]].isfinite().all()


@pytest.mark.usefixtures("row_scales")
@pytest.mark.parametrize(
    "options", [{}, {"loss": "mse"}, {"reduction": "none"}, {"workspace": 1}, {"rows": "all"}]
)
def test_loss_and_gradients(device, options):
    workspace = {"workspace": options.pop("workspace")} if "workspace" in options else {}
    shape = {"leading": (3, 100), "d": 64, "m": 96, "z": 48}
    case = make(3, dtype=torch.bfloat16, device=device, upstream=0.37, **shape, **options)
    truth = run(reference.pre_loss, case, torch.float64)
    got = run(
        lambda **arguments: fused_pre_loss(**arguments, precision="fp8", impl="blas", **workspace),
        case,
    )
    plain = run(lambda **arguments: fused_pre_loss(**arguments, impl="blas", **workspace), case)
    for name, value in got.items():
        error = (value.double() - truth[name]).norm() / truth[name].norm()
        assert error < ERROR, name
        if name != "loss":
            assert not torch.equal(value, plain[name])  # The matmuls were in float8.


@pytest.mark.usefixtures("row_scales")
def test_inputs_are_left_alone(device):
    """All rows of a slice need no copy other than the float8 one."""
    case = make(3, dtype=torch.bfloat16, device=device, rows="all", leading=(20,), d=64, m=96, z=48)
    around = torch.randn(20, 128, device=device).bfloat16()
    before = around.clone()
    case.tensors["hidden"] = around[:, 32:96]
    run(lambda **arguments: fused_pre_loss(**arguments, precision="fp8", impl="blas"), case)
    assert torch.equal(around, before)


@pytest.mark.usefixtures("row_scales")
def test_frozen_inputs(device):
    shape = {"leading": (3, 20), "d": 64, "m": 96, "z": 48}
    for name in oracle.LEAVES:
        rest = tuple(other for other in oracle.LEAVES if other != name)
        case = make(3, dtype=torch.bfloat16, device=device, frozen=rest, **shape)
        got = run(
            lambda **arguments: fused_pre_loss(**arguments, precision="fp8", impl="blas"), case
        )
        truth = run(reference.pre_loss, case, torch.float64)
        assert (got[name].double() - truth[name]).norm() / truth[name].norm() < ERROR


@pytest.mark.slow
@pytest.mark.usefixtures("row_scales")
def test_a_training_ends_where_bfloat16_ends(device):
    """The anchors are a fixed function of the hidden states, which the predictor can learn."""
    ends = {}
    for precision in (None, "fp8"):
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(64, 64, generator=generator)
        torch.manual_seed(1)
        head = PreHead(64, 128).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            hidden = torch.randn(128, 64, generator=generator).to(device)
            anchor = (hidden.cpu() @ mix).relu().to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = head(hidden, anchor, precision=precision, impl="blas")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends[precision] = sum(losses[-10:]) / 10
        assert losses[0] > -0.1
    assert ends[None] < -0.85
    assert abs(ends["fp8"] - ends[None]) < 0.01


def test_bad_input(device):
    case = make(0, dtype=torch.bfloat16, device=device, d=64, m=96, z=48)
    for impl in ("torch", "triton"):
        with pytest.raises(ValueError, match="precision: got 'fp8' with impl="):
            fused_pre_loss(**case.tensors, precision="fp8", impl=impl)
    for widths in ({"d": 24}, {"m": 8208}, {"z": 40}):
        case = make(0, dtype=torch.bfloat16, device=device, **{"d": 64, "m": 96, "z": 48, **widths})
        with pytest.raises(
            ValueError, match=r"precision: got 'fp8' with widths .*multiples of 16 up to 8192"
        ):
            fused_pre_loss(**case.tensors, precision="fp8", impl="blas")


def test_hardware_without_float8_is_named(device, monkeypatch):
    monkeypatch.setattr("pre_kernels.loss.fp8_unavailable", lambda _: "A100 is older than sm_90")
    case = make(0, dtype=torch.bfloat16, device=device, d=64, m=96, z=48)
    with pytest.raises(
        RuntimeError, match=r"precision: got 'fp8', which cannot run here: A100 is older"
    ):
        fused_pre_loss(**case.tensors, precision="fp8")


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_float8_is_for_sm90_and_newer(monkeypatch, capability, runs):
    """Triton does not compile float8 for sm_80."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.version, "hip", None)
    assert (fp8_unavailable(torch.device("cuda")) is None) is runs
