"""Our own kernel for CPUs (native.cpp), compiled for this machine when it is first needed: fp32, without gradients.

The library is kept in the cache folder under a name that stands for the source, the compiler and the processor, so
another of any of them makes another library. It takes two seconds to make and appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from secateur.cache import cache_folder, scratch_beside, sync
from secateur.errors import SecateurError
from secateur.kernels.block_attention.compiled import compiled
from secateur.kernels.block_attention.compiler import CannotCompile, compiler, no_compiler
from secateur.kernels.block_attention.layout import BlockLayout

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")


def cannot_compile() -> str | None:
    """Why the kernel cannot be built on this machine, or None."""
    if sys.platform == "win32":
        return "the native kernel is compiled with GCC's or Clang's vectors, which Windows' compiler does not have"
    return no_compiler("the native kernel")


def native_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, key_keep: Tensor | None
) -> Tensor:
    """Attention (B, Hq, Q, D) of fp32 tensors on the CPU.

    Raises:
        CannotCompile: the compiler did not manage.
    """
    attend = _library(compiler())
    if isinstance(attend, CannotCompile):
        raise attend
    query, key, value = (t.detach() if t.stride(3) == 1 else t.detach().contiguous() for t in (query, key, value))
    keep = None if key_keep is None else key_keep.contiguous()
    lists = compiled(layout, query.device)
    out = torch.empty(query.shape)
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], *key.shape[2:], layout.block, layout.offset, layout.causal)
    failed = attend(
        *(t.data_ptr() for t in (query, key, value, out)),
        *((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (query, key, value)),
        *sizes,
        *(t.data_ptr() for t in (lists.by_row.starts, lists.by_row.blocks)),
        *(lists.heads, lists.rows, None if keep is None else keep.data_ptr(), scale, torch.get_num_threads()),
    )
    if failed:
        raise SecateurError(f"There is no memory for the attention of {layout.queries} queries.")
    return out


@cache
def _library(command: str) -> Callable[..., int] | CannotCompile:
    """The kernel's function; a failure is kept too, since every layer asks."""
    try:
        function = ctypes.CDLL(str(build(command))).secateur_block_attention
    except CannotCompile as error:
        return error
    except OSError as error:  # the folder cannot be written, or nothing may be run from it
        return CannotCompile(f"The native kernel could not be built: {error}. Use the backend 'gather'.")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        *[pointer] * 7,
        *[number] * 9,
        pointer,
        pointer,
        number,
        number,
        pointer,
        ctypes.c_float,
        number,
    ]
    function.restype = ctypes.c_int
    return function


def build(command: str) -> Path:
    """The library in the cache, compiled unless it is there.

    Raises:
        CannotCompile: the compiler fails. OSError: the cache cannot be written.
    """
    told = _run([command, "--version"])
    about = (SOURCE.read_text(encoding="utf-8"), command, told, *FLAGS, platform.machine(), _processor())
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()[:16]
    target = cache_folder() / "kernels" / f"block_attention_{name}.so"
    if target.exists():
        return target
    with scratch_beside(target) as folder:
        made = folder / target.name
        _run([command, *FLAGS, str(SOURCE), "-o", str(made)])
        sync(made)
        made.replace(target)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"it ended with {done.returncode}").splitlines()[0]
        raise CannotCompile(f"{command[0]} could not compile the native kernel: {said} Use the backend 'gather'.")
    return done.stdout


def _processor() -> str:
    """What this processor can do: libraries made for one must not be run by another that shares the folder."""
    about = Path("/proc/cpuinfo")
    if not about.exists():
        return platform.processor()
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
