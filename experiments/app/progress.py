"""Progress of a run: a bar on a terminal and plain lines elsewhere, both with rate and remaining time."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(label: str, total: int, unit: str = "runs") -> Iterator[Callable[[int], None]]:
    """Show progress. Yields a function to call with the number of units just finished."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, rate="compiling")
            yield lambda done: bar.update(
                task,
                advance=done,
                rate=_rate(bar.tasks[task].completed + done, bar.tasks[task].elapsed, unit),
            )
        return
    start, finished, printed = time.monotonic(), 0, 0.0

    def advance(done: int) -> None:
        nonlocal finished, printed
        finished += done
        now = time.monotonic()
        if finished < total and now - printed < 5:
            return
        printed = now
        remaining = (now - start) / finished * (total - finished)
        rate = _rate(finished, now - start, unit)
        print(f"{label}: {finished}/{total} {unit}, {rate}, {remaining:.0f} s left", file=sys.stderr, flush=True)

    yield advance


def _rate(finished: float, seconds: float | None, unit: str) -> str:
    per_second = finished / max(seconds or 0.0, 1e-9)
    return f"{per_second:.2f} {unit}/s" if per_second >= 1 else f"{1 / max(per_second, 1e-9):.1f} s/{unit[:-1]}"
