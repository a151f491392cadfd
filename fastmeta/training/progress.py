"""How far something is, for whoever waits for it."""

import sys
import time
from typing import TextIO


class Progress:
    """One line that is written over on a terminal; about twenty-five lines otherwise.

    It counts ``what``, a ``"step"`` of ``episodes`` or an ``"episode"``, from ``done`` to ``total``. Nothing is shown in the first ``quiet``
    seconds.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, episodes: int = 1, quiet: float = 0, file: TextIO | None = None,
                 enabled: bool = True):
        self.what, self.total, self.first, self.episodes, self.quiet, self.enabled = what, total, done, episodes, quiet, enabled
        self.file = file or sys.stdout
        self.started, self.tty = time.perf_counter(), self.file.isatty()
        self.printed = done

    def show(self, done: int, text: str) -> None:
        seconds = time.perf_counter() - self.started
        if not self.enabled or seconds < self.quiet or not (self.tty or done == self.total or done - self.printed >= self.total / 25):
            return
        self.printed = done
        rate = (done - self.first) / seconds
        left = round((self.total - done) / rate)
        print(f"{chr(13) if self.tty else ''}{self.what} {done}/{self.total}  {text}  {rate * self.episodes:.1f} episodes/s  "
              f"{left // 60}:{left % 60:02d} left ", end="" if self.tty else "\n", file=self.file, flush=True)

    def note(self, text: str) -> None:
        if self.enabled:
            print(f"{chr(10) if self.tty else ''}{text}", file=self.file, flush=True)

    def end(self) -> None:
        """Leave the line, if there is one."""
        if self.enabled and self.tty and self.printed > self.first:
            print(file=self.file, flush=True)
