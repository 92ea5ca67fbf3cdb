"""What block-sparse attention gains over dense attention in the same run: on a CPU, in a whole prefill, on a GPU.

    python benchmarks/attention_speed.py [--lengths 4096] [--densities 0.1 0.5] [--blocks 64 128] [--repeats 7]
    python benchmarks/attention_speed.py --prefill 8192 [--block 64]         SmolLM2's blocks, random layouts
    python benchmarks/attention_speed.py --gpu [--lengths 4096 16384 65536]  32 heads (8 of keys) of 128, bf16

The bounds, causal, at 4096 tokens, 9 heads of 64 and one thread: 8 times dense at density 0.1, 1.7 times at 0.5; a
prefill of 8192 tokens: 1.8 times at 0.1. On a GPU at 16k and density 0.1: 5 times, and faster than FlexAttention.
Times are the best of the repeats, taken in turns. A busy machine lengthens wall time, CPU time much less.
Writes results/attention_speed.json; parts of earlier runs stay in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from machine import RESULTS, machine, store
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from secateur.kernels.block_attention import BlockLayout, block_attention, blocks_of, choose_backend, refusal

NAME = "secateur_benchmark"
PEAK = {  # bf16 TFLOP/s without sparsity, TB/s: the vendor's data sheets
    "H200": (989.0, 4.8), "H100 PCIe": (756.0, 2.0), "H100": (989.0, 3.35), "A100": (312.0, 2.0), "B200": (2250.0, 8.0),
    "L40S": (362.0, 0.86), "L4": (121.0, 0.3), "A10": (125.0, 0.6), "4090": (165.0, 1.0),
}  # fmt: skip


def random_layout(heads: int, length: int, block: int, density: float, seed: int, device: str = "cpu") -> BlockLayout:
    """Causal; the diagonal, and as many other possible blocks as the density asks for, drawn head by head."""
    generator = torch.Generator().manual_seed(seed)
    shape = blocks_of(block, length, length)
    possible = torch.ones(shape, dtype=torch.bool).tril()
    diagonal = torch.eye(shape[0], dtype=torch.bool)
    others = (possible & ~diagonal).flatten().nonzero()[:, 0]
    count = max(0, round(density * int(possible.sum())) - shape[0])
    keep = diagonal.repeat(heads, 1, 1)
    for head in keep:
        head.view(-1)[others[torch.randperm(len(others), generator=generator)[:count]]] = True
    return BlockLayout(keep.to(device), block, length, length, causal=True)


def in_turns(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Best wall and CPU milliseconds of each, after one run of each to warm up."""
    for run in work.values():
        run()
    best = {name: {"wall_ms": float("inf"), "cpu_ms": float("inf")} for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            best[name]["wall_ms"] = min(best[name]["wall_ms"], 1e3 * wall)
            best[name]["cpu_ms"] = min(best[name]["cpu_ms"], 1e3 * cpu)
    return best


@torch.no_grad()
def on_cpu(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """9 heads of 64 in fp32."""
    rows, table = [], Table("length", "block", "density", "backend", "wall ms", "CPU ms", "times, wall", "times, CPU")
    for length in options.lengths or [4096]:
        tensors = [torch.randn(1, 9, length, 64) for _ in range(3)]
        for block in options.blocks:
            for density in options.densities:
                layout = random_layout(9, length, block, density, seed=0)
                able = [b for b in options.backends if refusal(b, tensors[0], layout) is None]
                work: dict[str, Callable[[], object]] = {"dense": lambda t=tensors: sdpa(*t, is_causal=True)}
                for backend in able:
                    work[backend] = lambda b=backend, x=layout, t=tensors: block_attention(*t, x, backend=b)
                times = in_turns(work, options.repeats)
                for backend, took in times.items():
                    gain = {k.replace("ms", "times"): times["dense"][k] / took[k] for k in took}
                    row = {"length": length, "block": block, "density": layout.density(), "backend": backend}
                    rows.append(row | {"auto": backend == choose_backend(*tensors[:2], layout)} | took | gain)
                    cells = [f"{took['wall_ms']:.1f}", f"{took['cpu_ms']:.1f}"]
                    gains = [f"{gain['wall_times']:.2f}", f"{gain['cpu_times']:.2f}"]
                    table.add_row(str(length), str(block), f"{layout.density():.3f}", backend, *cells, *gains)
    console.print(table)
    return rows


@torch.no_grad()
def prefill(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """SmolLM2's blocks from token ids to hidden states; dense attention is transformers' own choice, SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from secateur.models.load import load

    layouts: list[BlockLayout] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        out = block_attention(query, key, value, layouts[module.layer_idx], scale=scaling, backend=options.backend)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model, _ = load("smollm2", dtype="float32")
    trunk, config, length = model.base_model, model.config, options.prefill
    ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

    def run(implementation: str, density: float | None = None) -> None:
        if density is not None:
            layouts[:] = made[density]
        model.set_attn_implementation(implementation)
        trunk(input_ids=ids, use_cache=False)

    layers, heads = range(config.num_hidden_layers), config.num_attention_heads
    made = {d: [random_layout(heads, length, options.block, d, seed=i) for i in layers] for d in options.densities}
    work: dict[str, Callable[[], object]] = {"dense": lambda: run("sdpa")}
    for d in options.densities:
        work[f"density {d}"] = lambda d=d: run(NAME, d)
    try:
        times = in_turns(work, options.repeats)
    finally:
        model.set_attn_implementation("sdpa")
    rows, table = [], Table("prefill", "block", "wall s", "CPU s", "times, wall", "times, CPU")
    for name, took in times.items():
        gain = {k.replace("ms", "times"): times["dense"][k] / took[k] for k in took}
        rows.append({"length": length, "block": options.block, "what": name} | took | gain)
        cells = [f"{took['wall_ms'] / 1e3:.2f}", f"{took['cpu_ms'] / 1e3:.2f}"]
        table.add_row(
            f"{length}: {name}", str(options.block), *cells, f"{gain['wall_times']:.2f}", f"{gain['cpu_times']:.2f}"
        )
    console.print(table)
    return rows


def on_gpu(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Forward, and forward with backward, against SDPA's flash and cuDNN kernels and FlexAttention."""
    from triton.testing import do_bench

    device = torch.cuda.get_device_name()
    peak = next((p for name, p in PEAK.items() if name in device), None)
    rows = []
    table = Table("length", "block", "density", "backend", "pass", "ms", "times dense", "TFLOP/s", "of roofline", "GiB")
    for length in options.lengths or [4096, 16384, 65536]:
        shapes = ((32, length), (8, length), (8, length))
        tensors = [torch.randn(1, h, n, 128, device="cuda", dtype=torch.bfloat16) for h, n in shapes]
        grown = [t.clone().requires_grad_() for t in tensors]
        weights = torch.randn_like(tensors[0])
        ways: list[tuple[str, int, float, Callable[..., torch.Tensor]]] = []
        for name, kernel in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            ways.append((name, 0, 1.0, lambda *t, k=kernel: _dense(k, *t)))
        for block in options.blocks:
            for density in options.densities:
                layout = random_layout(32, length, block, density, seed=0, device="cuda")
                for backend in ("triton", "flex"):
                    call = lambda *t, b=backend, x=layout: block_attention(*t, x, backend=b)  # noqa: E731
                    ways.append((backend, block, layout.density(), call))
        dense: dict[str, float] = {}
        for name, block, density, call in ways:
            for way, times_flops in (("forward", 1.0), ("both", 3.5)):  # backward multiplies five matrices, not two
                torch.cuda.reset_peak_memory_stats()
                row: dict[str, Any] = {
                    "length": length,
                    "block": block,
                    "density": density,
                    "backend": name,
                    "pass": way,
                }
                try:
                    arguments = (call, tensors) if way == "forward" else (call, grown, weights)
                    ms = do_bench(partial(_run, *arguments), warmup=100, rep=300)
                except (RuntimeError, ValueError) as error:  # a kernel that this card or version does not have
                    rows.append(row | {"error": str(error).partition("\n")[0]})
                    table.add_row(str(length), str(block), f"{density:.2f}", name, way, str(error)[:40], *[""] * 4)
                    continue
                if not block:
                    dense[way] = min(ms, dense.get(way, ms))
                flops = 2 * 32 * 128 * length**2 * density * times_flops
                row |= {"ms": ms, "times_dense": dense.get(way, float("nan")) / ms, "tflops": flops / ms / 1e9}
                row["gib"] = torch.cuda.max_memory_allocated() / 2**30
                share = "?"
                if peak:
                    moved = sum(t.nbytes for t in (*tensors, tensors[0])) * (1 if way == "forward" else 3)
                    floor = max(flops / peak[0] / 1e12, moved / peak[1] / 1e12)
                    row["of_roofline"] = 1e3 * floor / ms
                    share = f"{row['of_roofline']:.0%}"
                rows.append(row)
                cells = [f"{ms:.3f}", f"{row['times_dense']:.2f}", f"{row['tflops']:.0f}", share, f"{row['gib']:.2f}"]
                table.add_row(str(length), str(block or "-"), f"{density:.2f}", name, way, *cells)
        gc.collect()
    console.print(table)
    return rows


def _dense(kernel: SDPBackend, query: Any, key: Any, value: Any) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return sdpa(query, key, value, is_causal=True, enable_gqa=True)


def _run(call: Callable[..., torch.Tensor], tensors: list[torch.Tensor], weights: torch.Tensor | None = None) -> None:
    out = call(*tensors)
    if weights is not None:
        torch.autograd.grad(out, tensors, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; 4096, and 4096 16384 65536 on a GPU")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.5], help="shares of the blocks kept")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--backends", nargs="+", default=["native", "flex", "gather", "reference"], help="on the CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--prefill", type=int, help="tokens of a prefill of SmolLM2, instead of attention alone")
    parser.add_argument("--block", type=int, default=64, help="of the prefill")
    parser.add_argument("--backend", default="auto", help="of the prefill")
    parser.add_argument("--gpu", action="store_true", help="the comparison on a GPU; chosen where there is one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=120)
    if options.prefill:
        part, run = f"prefill_{options.prefill}", prefill
    elif options.gpu or torch.cuda.is_available():
        part, run = "gpu", on_gpu
    else:
        part, run = "cpu", on_cpu
    if part == "gpu" and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and this machine has none")
    rows = run(options, console)
    file = RESULTS / "attention_speed.json"
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.exists() else {}
    parts[part] = {"machine": machine(), "threads": options.threads, "rows": rows}
    console.print(f"written to {store('attention_speed', {'parts': parts})}")


if __name__ == "__main__":
    main()
