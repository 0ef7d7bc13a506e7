"""Every kernel compiles ahead of time for each GPU, without spills, and with the matrix
instructions that it should use.

The compilation runs in its own process, because it cannot share one with Triton's interpreter,
which the other tests may use.
"""

import json
import os
import subprocess
import sys

import pytest

from verify import ROOT, budgets

KIB = {
    "sm80": 163,
    "sm90": 227,
    "sm100": 227,
    "gfx942": 64,
    "gfx950": 160,
}  # KiB of shared memory that a block may use
DESCRIPTOR = {"matmul_descriptor_kernel", "weight_grad_descriptor_kernel"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("aot") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Status 1 is tested below.
    subprocess.run(
        [sys.executable, "-m", "verify.compile", "--json", str(file)],
        cwd=ROOT,
        env=environment,
        check=False,
    )
    return json.loads(file.read_text())["kernels"]


def test_every_target_is_compiled(kernels):
    names = {kernel["kernel"] for kernel in kernels}
    assert {
        "matmul_kernel",
        "weight_grad_kernel",
        "row_loss_kernel",
        "scatter_kernel",
        "select_kernel",
    } <= names
    newer = DESCRIPTOR | {"quantize_kernel"}
    for target in KIB:
        compiled = {kernel["kernel"] for kernel in kernels if kernel["target"] == target}
        assert compiled >= names - {"invert_kernel"} - (
            set() if target in ("sm90", "sm100") else newer
        )


def test_nothing_spills(kernels):
    assert [kernel["name"] for kernel in kernels if kernel["spills"]] == []


def test_every_kernel_keeps_its_budget_of_instructions(kernels):
    """A GPU issues the instructions of a pass over rows more slowly than its memory moves the
    rows."""
    counted = [(k, budgets.Count(*k["count"])) for k in kernels if k["budget"]]
    assert {k["budget"] for k, _ in counted} == budgets.BUDGETS.keys()
    assert {k["kernel"] for k, _ in counted} == {
        k["kernel"] for k in kernels if k["target"] == "sm90"
    }
    assert [(k["name"], *count) for k, count in counted if count.over(k["budget"])] == []


def test_what_is_counted():
    """The count is the longest loop if there is one, else everything; padding at the end does not
    count."""
    code = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E R0, desc[UR4][R2.64] ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__slow) ;
        /*0028*/               @P1 MUFU.RCP R3, R0 ;
        /*002c*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
        /*0060*/                   NOP;
"""
    assert budgets.count(code, 8) == budgets.Count(8 * 5, 1, 1, 1)
    assert budgets.count(code.replace("(.L_x_0)", "(.L_x_2)"), 8) == budgets.Count(8 * 8, 1, 1, 1)


def test_shared_memory_fits(kernels):
    assert [
        kernel["name"] for kernel in kernels if kernel["shared"] > KIB[kernel["target"]] << 10
    ] == []


def test_half_precision_products_use_the_newest_matrix_instructions(kernels):
    wanted = {"sm80": "mma.sync", "sm90": "wgmma", "sm100": "tcgen05.mma"}
    products = [k for k in kernels if k["dtype"] in ("bf16", "fp16") and k["target"] in wanted]
    aligned = [k for k in products if "unaligned" not in k["name"]]
    assert len(aligned) >= 30
    assert [k["name"] for k in aligned if wanted[k["target"]] not in k["instructions"]] == []


def test_descriptor_kernels_load_in_bulk(kernels):
    by_descriptor = [k for k in kernels if k["kernel"] in DESCRIPTOR]
    assert {k["kernel"] for k in by_descriptor if k["target"] == "sm90"} == DESCRIPTOR
    assert {k["target"] for k in by_descriptor} == {"sm90", "sm100"}
    for tile in ("128x256x64", "128x128x64", "64x128x64"):
        assert {k["kernel"] for k in by_descriptor if tile in k["name"]} == DESCRIPTOR, tile
    assert [
        k["name"] for k in by_descriptor if "cp.async.bulk.tensor" not in k["instructions"]
    ] == []


def test_products_are_issued_ahead(kernels):
    """The next step of a sum has begun while the last one is waited for."""
    products = [k for k in kernels if "wgmma" in k["instructions"] and "unaligned" not in k["name"]]
    assert {k["kernel"] for k in products} > DESCRIPTOR
    assert [k["name"] for k in products if not k["ahead"]] == []


def test_float32_products_are_ieee_unless_tf32_is_allowed(kernels):
    products = [k for k in kernels if k["dtype"] == "fp32"]
    assert {k["precision"] for k in products} == {"ieee", "tf32"}
    for kernel in products:
        if kernel["target"].startswith("sm"):
            assert ("tf32" in kernel["instructions"]) == (kernel["precision"] == "tf32"), kernel[
                "name"
            ]


def test_fusion_to_multiply_and_add_is_asked_for(kernels):
    """Triton warns that its default turns off in 3.10."""
    assert {kernel["fusion"] for kernel in kernels} == {True}
