"""Every backend that runs here gives what the definition gives, and the others say why not."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, gradients, naive

from secateur.errors import UnknownName, UsageError
from secateur.kernels import block_attention as package
from secateur.kernels.block_attention import block_attention, choose_backend, native, refusal
from secateur.kernels.block_attention import flex as flex_backend
from secateur.kernels.block_attention import gather as gather_backend
from secateur.kernels.block_attention import reference as reference_backend

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.cannot_compile() is not None, reason=str(native.cannot_compile()))
)
LONG = Case(heads=3, key_heads=1, queries=1030, keys=1030, size=16, block=64, dead=True)


def run(case, backend, tensors=None, **options):
    tensors = case.tensors() if tensors is None else tensors
    return block_attention(*tensors, case.layout(), key_keep=case.key_keep(), backend=backend, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "gather", NATIVE])
def test_a_backend_gives_what_entry_by_entry_attention_gives(case, backend):
    wanted = naive(*case.tensors(), case.layout(), case.key_keep())
    assert torch.allclose(run(case, backend).double(), wanted, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_gradients_are_those_of_entry_by_entry_attention(case, backend):
    tensors = case.tensors()
    if case.dead or (case.padded and case.causal):
        assert (naive(*tensors, case.layout(), case.key_keep()) == 0).all(-1).any(), "no query that sees nothing"
    found = gradients(lambda *t: run(case, backend, t), tensors)
    wanted = gradients(
        lambda *t: naive(*t, case.layout(), case.key_keep()).float(), [t.detach().clone() for t in tensors]
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "gather", NATIVE])
def test_a_given_scale_is_used(backend):
    case = CASES[0]
    wanted = naive(*case.tensors(), case.layout(), scale=1.0)
    assert torch.allclose(run(case, backend, scale=1.0).double(), wanted, atol=5e-6)


@pytest.mark.parametrize("backend", ["reference", "gather", NATIVE])
def test_everything_kept_is_dense_attention(backend):
    case = replace(CASES[0], queries=100, keys=100)
    dense = torch.nn.functional.scaled_dot_product_attention(*case.tensors(), is_causal=True)
    found = block_attention(*case.tensors(), case.layout(density=2.0), backend=backend)
    assert torch.allclose(found, dense, atol=1e-6)


def test_slices_and_small_buckets_change_nothing(monkeypatch):
    case = LONG
    whole = run(case, "reference")
    monkeypatch.setattr(reference_backend, "ENTRIES", 1 << 16)
    monkeypatch.setattr(gather_backend, "ENTRIES", 1 << 16)
    assert torch.allclose(run(case, "reference"), whole, atol=1e-6)
    assert torch.allclose(run(case, "gather"), whole, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_nothing_kept_at_all_gives_zeros_and_no_gradient(backend):
    case = CASES[0]
    layout = case.layout()
    nothing = replace(layout, keep=torch.zeros_like(layout.keep))
    for found in gradients(lambda *t: block_attention(*t, nothing, backend=backend), case.tensors()):
        assert (found == 0).all()


@pytest.mark.skipif(flex_backend.cannot_compile() is not None, reason=str(flex_backend.cannot_compile()))
@pytest.mark.parametrize(
    "changes",
    [
        [{"queries": 70, "keys": 70, "dead": True}, {"queries": 130, "keys": 130}],
        pytest.param(
            [{"queries": 40, "keys": 100, "offset": 60}, {"queries": 41, "keys": 75, "offset": 34}],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["whole", "chunks"],
)
def test_flex_gives_what_the_definition_gives_in_one_graph_for_all_lengths(changes):
    graphs = _graphs()
    for change in changes:
        case = Case(heads=6, key_heads=2, size=36, **change)
        with torch.no_grad():
            assert torch.allclose(run(case, "flex"), run(case, "reference"), atol=2e-6), str(case)
    assert _graphs() - graphs <= 1


@pytest.mark.slow
@pytest.mark.skipif(flex_backend.cannot_compile() is not None, reason=str(flex_backend.cannot_compile()))
@pytest.mark.parametrize("case", [*CASES, LONG], ids=str)
def test_flex_gives_what_the_definition_gives_or_says_why_not(case):
    tensors = case.tensors()
    if refusal("flex", tensors[0], case.layout(), case.key_keep()):
        assert case.padded or case.queries == 1
        return
    with torch.no_grad():
        assert torch.allclose(run(case, "flex"), run(case, "reference"), atol=2e-6)


def _graphs():
    import torch._dynamo.utils

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_flex_lists_have_the_shapes_that_its_cpu_kernel_takes_for_granted():
    mask = flex_backend.block_mask(CASES[1].layout(), torch.device("cpu"))
    assert mask.kv_num_blocks.shape == mask.full_kv_num_blocks.shape
    assert mask.kv_num_blocks.stride() == mask.full_kv_num_blocks.stride()
    assert mask.kv_indices.shape == mask.full_kv_indices.shape
    assert mask.kv_indices.stride() == mask.full_kv_indices.stride()
    assert mask.kv_indices.shape[-1] == CASES[1].layout().keep.shape[-1]


def test_flex_masks_share_one_function():
    masks = [flex_backend.block_mask(case.layout(), torch.device("cpu")) for case in (CASES[0], CASES[1], CASES[5])]
    assert len({id(mask.mask_mod) for mask in masks}) == 1


def test_without_a_compiler_two_say_so_and_auto_goes_on(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(package, "LONG", 1024)
    tensors = LONG.tensors()
    for backend in ("flex", "native"):
        with pytest.raises(UsageError, match="needs a C\\+\\+ compiler, and there is no no-such-compiler"):
            run(LONG, backend, tensors)
    assert choose_backend(tensors[0], tensors[1], LONG.layout(density=0.1)) == "gather"


@pytest.mark.parametrize(("module", "dtype"), [(flex_backend, torch.bfloat16), (native, torch.float32)])
def test_a_compiler_that_fails_is_told_and_auto_goes_on(module, dtype, monkeypatch):
    def fails(*args):
        raise package.CannotCompile("It could not be compiled: no headers.")

    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(module, f"{name}_attention", fails)
    monkeypatch.setattr(module, "cannot_compile", lambda: None)
    monkeypatch.setattr(package, "LONG", 1024)
    tensors = LONG.tensors(dtype)
    with pytest.warns(UserWarning, match="no headers"):
        found = block_attention(*tensors, LONG.layout())
    assert torch.equal(found, run(LONG, "gather", tensors))
    assert torch.allclose(found, run(LONG, "reference", tensors), atol=2e-6 if dtype is torch.float32 else 2e-2)
    with pytest.raises(package.CannotCompile):
        run(LONG, name, tensors)


def test_auto_takes_the_backend_that_fits(monkeypatch):
    for module in (flex_backend, native):
        monkeypatch.setattr(module, "cannot_compile", lambda: None)
    case = Case(queries=2048, keys=2048, size=16, block=64)
    query, key, _ = case.tensors()
    sparse, full = case.layout(density=0.1), case.layout(density=2.0)
    keep = torch.ones(1, 2048, dtype=torch.bool)
    assert choose_backend(query, key, sparse) == "native"
    assert choose_backend(query.bfloat16(), key.bfloat16(), sparse) == "flex"
    assert choose_backend(query, key, full) == "reference"
    assert choose_backend(query, key, sparse, keep) == "native"
    assert choose_backend(query.bfloat16(), key.bfloat16(), sparse, keep) == "gather"
    assert choose_backend(query, key, sparse, needs_grad=True) == "gather"
    assert choose_backend(query.double(), key.double(), sparse) == "gather"
    small = CASES[0]
    assert choose_backend(*small.tensors()[:2], small.layout(density=0.1)) == "reference"


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("triton", {}, "runs on CUDA devices, not on cpu"),
        ("triton", {"dtype": torch.float64}, "float16, bfloat16 and float32, not torch.float64"),
        ("native", {"needs_grad": True}, "on a CPU it has no gradients"),
        ("native", {"dtype": torch.bfloat16}, "computes in float32, not torch.bfloat16"),
        ("flex", {"padded": True}, "does not take padding"),
        ("flex", {"needs_grad": True}, "on a CPU it has no gradients"),
        ("flex", {"queries": 1}, "more than one query"),
        ("flex", {"queries": 100, "keys": 90}, "past a ragged end of the keys"),
    ],
)
def test_what_a_backend_cannot_take_is_one_line(backend, change, message):
    pytest.importorskip("triton", reason="Triton is not installed")
    case = replace(CASES[0], **{k: v for k, v in change.items() if k not in ("dtype", "needs_grad")})
    tensors = case.tensors(**{k: v for k, v in change.items() if k in ("dtype", "needs_grad")})
    with pytest.raises(UsageError, match=message) as raised:
        run(case, backend, tensors)
    assert "\n" not in str(raised.value) and "use gather or reference" in str(raised.value)


def test_without_triton_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install triton"):
        run(CASES[0], "triton")


def test_an_unknown_backend_is_offered_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'gather'"):
        run(CASES[0], "gathered")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "takes query \\(B, Hq, Q, D\\)"),
        (lambda q, k, v: (q, k, v[:, :, :5]), "takes query"),
        (lambda q, k, v: (q[..., :8], k, v), "agree in batch and head size"),
        (lambda q, k, v: (q[:, :1], k, v), "heads be a multiple"),
        (lambda q, k, v: (q[:, :, :9], k, v), "64 queries and 64 keys"),
        (lambda q, k, v: (q.repeat(1, 2, 1, 1), k, v), "for 2 heads"),
        (lambda q, k, v: (q.double(), k, v), "share dtype and device"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(change, message):
    case = CASES[0]
    with pytest.raises(UsageError, match=message) as raised:
        block_attention(*change(*case.tensors()), case.layout())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key_keep", [torch.ones(1, 64), torch.ones(2, 64, dtype=torch.bool)])
def test_padding_that_does_not_fit_is_one_line(key_keep):
    with pytest.raises(UsageError, match="'key_keep' of block attention must be bool \\(1, 64\\)"):
        block_attention(*CASES[0].tensors(), CASES[0].layout(), key_keep=key_keep)


def test_chunks_and_single_queries_give_the_rows_of_the_whole():
    case = Case(heads=4, key_heads=2, queries=70, keys=70)
    layout, (q, k, v) = case.layout(), case.tensors()
    whole = block_attention(q, k, v, layout, scale=0.2, backend="reference")
    for start, stop in ((0, 33), (33, 69), (69, 70)):
        rows = slice(start // 16, (stop - 1) // 16 + 1)
        columns = -(-stop // 16)
        part = package.BlockLayout(layout.keep[:, rows, :columns], 16, stop - start, stop, True, start)
        for backend in ("reference", "gather", *["native"] * (native.cannot_compile() is None)):
            found = block_attention(
                q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], part, scale=0.2, backend=backend
            )
            assert torch.allclose(found, whole[:, :, start:stop], atol=1e-6)


def test_importing_the_package_imports_neither_triton_nor_dynamo():
    code = (
        "import sys, secateur, secateur.kernels.block_attention; "
        "print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    )
    path = os.pathsep.join(sys.path)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert found.stdout.strip() == "[]", found.stderr
