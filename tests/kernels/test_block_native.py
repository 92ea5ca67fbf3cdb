"""The CPU kernel of our own: what its shapes, strides, threads and its compiler can do to it."""

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import Case

from secateur.cache import cache_folder
from secateur.kernels.block_attention import BlockLayout, block_attention, native
from secateur.kernels.block_attention.compiler import CannotCompile

HERE = pytest.mark.skipif(native.cannot_compile() is not None, reason=str(native.cannot_compile()))


def both(tensors, layout, key_keep=None, **options):
    return [block_attention(*tensors, layout, key_keep=key_keep, backend=b, **options) for b in ("native", "reference")]


@HERE
@pytest.mark.parametrize(
    "change",
    [
        {"block": 1, "queries": 33, "keys": 33},
        {"block": 100, "queries": 250, "keys": 250},
        {"block": 256, "queries": 300, "keys": 300},
        {"block": 64, "queries": 200, "keys": 500, "offset": 300, "size": 64, "batch": 2, "padded": True},
        {"block": 48, "queries": 130, "keys": 170, "causal": False, "size": 256},
        {"block": 64, "queries": 1030, "keys": 1030, "size": 8, "heads": 3, "key_heads": 1, "dead": True},
        {"block": 16, "queries": 77, "keys": 77, "size": 7},
    ],
    ids=str,
)
def test_any_shape_gives_what_the_definition_gives(change):
    case = replace(Case(), **change)
    found, wanted = both(case.tensors(), case.layout(), case.key_keep())
    assert torch.allclose(found, wanted, atol=3e-6)


@HERE
def test_views_of_other_strides_are_read_as_they_are():
    case = Case(heads=4, key_heads=2, queries=70, keys=70, batch=2)
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in case.tensors()]
    assert not tensors[0].is_contiguous()
    found, wanted = both(tensors, case.layout())
    assert torch.allclose(found, wanted, atol=2e-6)
    by_number = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in case.tensors()]
    assert torch.equal(both(by_number, case.layout())[0], found)


@HERE
def test_scores_far_apart_and_none_at_all():
    case = Case(queries=70, keys=70, dead=True)
    query, key, value = case.tensors()
    found, wanted = both((300 * query, key, value), case.layout())
    assert torch.allclose(found, wanted, atol=1e-4)
    assert (found[0, 0, 64:] == 0).all()
    query[0, 0, 3] = torch.nan
    assert both((query, key, value), case.layout())[0][0, 0, 3].isnan().all()


@HERE
def test_the_number_of_threads_changes_not_a_bit():
    case = Case(heads=4, key_heads=2, queries=300, keys=300, batch=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(both(case.tensors(), case.layout())[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A cache of its own, and a compiler that does what it is told and counts how often it compiles."""

    def make(script):
        path = tmp_path / "compiler"
        path.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && {{ echo one; exit 0; }}\necho x >> {tmp_path}/calls\n{script}\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("CXX", str(path))
        return str(path)

    yield make
    native._library.cache_clear()


def calls(tmp_path):
    return len((tmp_path / "calls").read_text().splitlines())


@HERE
def test_it_is_compiled_once_for_all_processes(compiler, tmp_path):
    command = compiler('exec g++ "$@"')
    case = Case()
    assert torch.allclose(*both(case.tensors(), case.layout()), atol=2e-6)
    (kept,) = (cache_folder() / "kernels").iterdir()
    code = f"from secateur.kernels.block_attention import native; print(native.build({command!r}))"
    path = os.pathsep.join(sys.path)
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert Path(again.stdout.strip()) == kept, again.stderr
    assert calls(tmp_path) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no native kernel on Windows")
def test_a_compiler_that_dies_half_way_leaves_nothing_and_is_asked_once(compiler, tmp_path):
    compiler('while [ "$1" != -o ]; do shift; done; echo half > "$2"; echo "out of room" >&2; exit 1')
    case = Case(queries=300, keys=300)
    for _ in range(2):
        with pytest.raises(
            CannotCompile, match="compiler could not compile the native kernel: out of room Use"
        ) as error:
            block_attention(*case.tensors(), case.layout(), backend="native")
        assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match="out of room"):
        found = block_attention(*case.tensors(), case.layout())
    assert torch.equal(found, block_attention(*case.tensors(), case.layout(), backend="gather"))
    assert calls(tmp_path) == 1
    assert list((cache_folder() / "kernels").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no native kernel on Windows")
def test_a_library_that_cannot_be_loaded_is_one_line(compiler):
    compiler('while [ "$1" != -o ]; do shift; done; echo "no library" > "$2"')
    layout = BlockLayout(torch.ones(1, 1, 1, dtype=torch.bool), block=4, queries=4, keys=4)
    with pytest.raises(CannotCompile, match=r"The native kernel could not be built: .*Use the backend 'gather'"):
        block_attention(*[torch.zeros(1, 1, 4, 8)] * 3, layout, backend="native")
