"""The Triton kernels: their numbers (interpreted, or on a GPU if there is one), and what the compiler makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_runs

pytest.importorskip("triton", reason="Triton is not installed")

CUDA = torch.cuda.is_available()
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 6e-2}
SHARED_MEMORY = 101376  # bytes: what every card from sm_80 on lets a program have
POINTERS = {
    **dict.fromkeys(("lse", "delta", "acc_parts", "highest_parts", "total_parts", "parts_k", "parts_v"), "*fp32"),
    **dict.fromkeys(("starts", "full", "blocks", "order", "items"), "*i32"),
    "key_keep": "*u8",
}
DATA = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = ("forward", "decode", "query_gradient", "key_gradient")


@pytest.fixture(scope="module")
def measured():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if not CUDA:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, triton_runs.__file__, "cuda" if CUDA else "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("run", triton_runs.RUNS, ids=triton_runs.name)
def test_kernels_give_what_the_definition_gives(run, measured):
    for error in measured[triton_runs.name(run)]:
        assert error < TOLERANCE[run[1]]


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_runs_in_half_precision_are_not_exact(measured):
    halves = [name for name in measured if "float16" in name]
    assert halves and all(max(measured[name]) > 1e-6 for name in halves), "the inputs were not in half precision"


def compiled(kernel, dtype, size, architecture, block=64, padding=False):
    """One variant, compiled for a GPU that need not be there, with the tile that the launcher would take."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from secateur.kernels.block_attention import triton as launcher

    function = getattr(launcher, f"{kernel}_kernel")
    group = () if kernel == "key_gradient" else (4,)
    tile = getattr(launcher, f"{kernel}_tile")(block, size, dtype, *group)
    constants = {
        "GROUP": 4, "D": size, "DPAD": launcher.padded(size), "BLOCK": block, "CAUSAL": True, "KEEP": padding,
        "INTERPRETED": False, "SEGMENTS": 16, **tile.constants,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        number = "fp32" if "scale" in name else "i32"
        signature[name] = "constexpr" if name in constants else POINTERS.get(name, number)
        signature[name] = f"*{SHORT[dtype]}" if name in DATA else signature[name]
        if signature[name].startswith("*") or name.startswith("stride"):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=tile.options)


def check(kernel, dtype, size, architecture, **changes):
    made = compiled(kernel, dtype, size, architecture, **changes)
    assert made.metadata.shared <= SHARED_MEMORY
    assert made.asm["cubin"]
    ptx = made.asm["ptx"]
    # the 16 rows of a single query are too few for a warp group: they go to the older instruction
    wanted = "wgmma.mma_async" if architecture >= 90 and kernel != "decode" else "mma.sync"
    assert (wanted in ptx) == (dtype != torch.float32), "exact fp32 goes without tensor cores, halves go with them"
    if dtype == torch.float32:
        assert "tf32" not in ptx


@pytest.mark.parametrize(
    ("kernel", "dtype", "size", "architecture"),
    [
        ("forward", torch.bfloat16, 64, 90),
        ("key_gradient", torch.float16, 32, 80),
        ("decode", torch.bfloat16, 128, 90),
    ],
)
def test_kernels_compile_to_tensor_core_instructions(kernel, dtype, size, architecture):
    check(kernel, dtype, size, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("size", [32, 36, 64, 80, 128])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_variant_compiles(kernel, dtype, size, architecture):
    check(kernel, dtype, size, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"block": 16}, {"block": 128}, {"block": 256}, {"padding": True}], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_blocks_and_padding_compile(kernel, changes):
    if changes.get("block") == 16 and kernel == "key_gradient":
        made = compiled(kernel, torch.bfloat16, 128, 80, **changes)
        assert made.metadata.shared <= SHARED_MEMORY and "mma.sync" in made.asm["ptx"]
    else:
        check(kernel, torch.bfloat16, 128, 80, **changes)
