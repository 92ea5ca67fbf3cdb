"""The Triton kernels on every case, as JSON: run by a process of its own, since the interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/kernels/triton_runs.py cpu          python tests/kernels/triton_runs.py cuda
"""

import json
import sys
from dataclasses import replace

import torch
from attention_cases import CASES, Case, gradients, naive

from secateur.kernels.block_attention import block_attention

SINK = Case(heads=2, key_heads=1, queries=192, keys=192, size=16)  # a first column that all rows use: in segments
WITH_GRADIENTS = (1, 3, 4, 6, 8)  # of the cases: groups, padding, dead rows, offsets, one pattern for all heads
ONE = Case(queries=1, keys=300, offset=200, batch=2)  # one query, long enough for several parts
RUNS = (  # case, dtype, with gradients, density
    *((case, "float32", i in WITH_GRADIENTS, 0.5) for i, case in enumerate(CASES)),
    (SINK, "float32", True, 0.0),
    (CASES[8], "float16", True, 0.5),
    (CASES[9], "bfloat16", True, 0.5),
    (CASES[11], "bfloat16", False, 0.5),
    (replace(ONE, heads=4, padded=True, grouped=True), "float32", False, 0.5),
    (replace(ONE, dead=True), "float32", False, 0.5),
)


def name(run):
    case, dtype, with_gradients, density = run
    return f"{case}-{dtype}{'-gradients' * with_gradients}{'-sink' * (density == 0)}"


def errors(run, device):
    """The largest error of the output and of each gradient, against the definition in float64."""
    case, dtype, with_gradients, density = run
    tensors = case.tensors(getattr(torch, dtype), device)
    layout, keep = case.layout(density), case.key_keep(device)
    exact = [t.detach().double().cpu() for t in tensors]

    def attention(*tensors):
        return block_attention(*tensors, layout, key_keep=keep, backend="triton")

    if not with_gradients:
        found, wanted = [attention(*tensors)], [naive(*exact, layout, keep)]
    else:
        found, wanted = gradients(attention, tensors), gradients(lambda *t: naive(*t, layout, keep), exact)
        if case is SINK:
            again = gradients(attention, tensors)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not the same twice"
    return [(a.double().cpu() - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name(run): errors(run, sys.argv[1]) for run in RUNS}))
