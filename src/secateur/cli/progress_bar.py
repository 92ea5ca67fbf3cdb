"""How far a long step is: a bar on a terminal, elsewhere a line every tenth; nothing for two seconds."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

QUIET = 2.0  # seconds a step may last before anything is drawn


class ProgressBar:
    """A `secateur.progress.Progress` for as long as the `with` block lasts; it writes to standard error.

    A step begins when the whole changes or the work done falls back; its estimate counts from there.

    >>> with ProgressBar() as progress:
    ...     progress(1, 2, "pruning")  # within two seconds: silence
    """

    def __init__(self) -> None:
        self._total = self._done = -1
        self._begun = 0.0
        self._said = 0  # tenths that have a line
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._drawn = sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, done: int, total: int, what: str) -> None:
        if total != self._total or done < self._done:
            self._close()
            self._total, self._begun, self._said = total, time.monotonic(), 0
        self._done = done
        spent = time.monotonic() - self._begun
        if spent < QUIET or total <= 0:
            return
        if self._drawn:
            self._draw(done, total, what)
        else:
            self._line(done, total, what, spent)
        if done >= total:
            self._close()

    def _draw(self, done: int, total: int, what: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("about"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, description=what)

    def _line(self, done: int, total: int, what: str, spent: float) -> None:
        tenth = 10 * done // total
        if tenth <= self._said:
            return
        self._said = tenth
        left = f", about {duration(spent * (total - done) / done)} left" if done < total else ""
        print(f"{what}: {100 * done // total} %{left}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
        self._total = self._done = -1


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(3.21), duration(95), duration(7300)
    ('3.2 s', '1 min 35 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
