"""A lane carries torch's modes with it and leaves its frames in order."""

from __future__ import annotations

import contextvars

import pytest
import torch

from secateur.coroutines import Lane, _modes

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")


def run_all(*lanes: Lane) -> None:
    while any(lane.place is not None for lane in lanes):
        for lane in lanes:
            if lane.place is not None:
                lane.resume()


def test_modes_belong_to_a_lane() -> None:
    seen: list[tuple[bool, bool, torch.dtype, bool]] = []

    def note() -> None:
        kind = "cpu"
        seen.append(
            (torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
             torch.is_autocast_cache_enabled())
        )  # fmt: skip

    def changes() -> None:
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.set_autocast_cache_enabled(False)
        Lane.current().pause("here")
        note()
        Lane.current().pause("there")
        note()

    def plain() -> None:
        note()
        Lane.current().pause("here")
        note()

    outside = _modes()
    lanes = Lane({}, changes), Lane({}, plain)
    for lane in lanes:
        lane.resume()
        assert _modes() == outside
    run_all(*lanes)
    assert _modes() == outside
    assert (
        seen[1] == seen[3] == (False, True, torch.float16, False)
        or seen.count((False, True, torch.float16, False)) == 2
    )
    assert len(seen) == 4 and len(set(seen)) == 2


def test_a_lane_shows_its_input_only_while_it_waits() -> None:
    x = torch.ones(2)

    def job() -> None:
        Lane.current().pause("layer", x, torch.tensor([1]))
        Lane.current().pause("block")

    lane = Lane({}, job)
    assert lane.place is None
    lane.resume()
    assert (lane.place, lane.x is x, lane.rows.tolist()) == ("layer", True, [1])
    lane.resume()
    assert (lane.place, hasattr(lane, "x"), lane.rows) == ("block", False, None)
    lane.resume()
    assert lane.place is None


def test_context_variables_stay_inside() -> None:
    seen: list[str] = []
    token = VARIABLE.set("caller")

    def job(name: str) -> None:
        assert VARIABLE.get() == "caller"
        VARIABLE.set(name)
        Lane.current().pause("here")
        seen.append(VARIABLE.get())

    lanes = [Lane({}, lambda name=name: job(name)) for name in "ab"]
    for lane in lanes:
        lane.resume()
    run_all(*lanes)
    assert seen == ["a", "b"] and VARIABLE.get() == "caller"
    VARIABLE.reset(token)


def test_ending_runs_the_frames_way_out_and_gives_the_modes_back() -> None:
    left: list[str] = []

    def job() -> None:
        try:
            with torch.autocast("cpu", dtype=torch.float16), torch.set_grad_enabled(False):
                Lane.current().pause("here")
        finally:
            torch.set_grad_enabled(False)  # a careless way out
            left.append("frame")

    outside = _modes()
    waiting, fresh, done = Lane({}, job), Lane({}, job), Lane({}, lambda: None)
    waiting.resume()
    done.resume()
    for lane in (waiting, fresh, done, waiting):
        lane.end()
    assert left == ["frame"] and _modes() == outside


def test_an_error_inside_reaches_the_caller() -> None:
    def job() -> None:
        torch.set_grad_enabled(False)
        raise ZeroDivisionError

    outside, lane = _modes(), Lane({}, job)
    with pytest.raises(ZeroDivisionError):
        lane.resume()
    assert _modes() == outside and lane.place is None
