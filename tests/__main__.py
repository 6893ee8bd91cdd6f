"""`python -m tests`: what is built once, then all tests in three pytest processes at once, since those with a cluster mostly wait.

The cluster's are told line by line as they run. The others take what processor time is left, and are told as a whole: at once
when they fail, else at the end. Pytest's own closing lines come last, and any exit code but 0 fails.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time

from tests.cluster import build
from tests.cluster.shell import REPO, CommandFailed

CLUSTER = ["tests/component", "tests/chaos", "tests/e2e", "--verbose"]
OTHERS = (["tests/trainer", "tests/local"], ["tests/unit", "tests/serving", "--cov", "--cov-report=term"])
SLOWEST = "--durations=25"
_CLOSING = re.compile(r"=+ .* in [\d.]+s.* =+")


class Part:
    """One pytest process."""

    def __init__(self, words: list[str], *, nice: int, live: bool) -> None:
        self.name = ", ".join(word.removeprefix("tests/") for word in words if not word.startswith("-"))
        self.live, self.closing = live, ""
        self._lines: list[str] = []
        command = ["nice", "-n", str(nice), sys.executable, "-m", "pytest", *words, SLOWEST]
        self.process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if _CLOSING.fullmatch(line.strip()):
                self.closing = line.strip()
            elif self.live:
                print(line, end="", flush=True)
            else:
                self._lines.append(line)

    def tell(self) -> None:
        """Print what was not printed yet, in one piece."""
        self._reader.join(10)  # what a test left behind may hold the pipe open
        lines, self._lines = self._lines, []
        if lines:
            sys.stdout.write(f"\n----- {self.name} -----\n{''.join(lines)}-----\n")
            sys.stdout.flush()


def main(cluster: list[str] = CLUSTER, others: tuple[list[str], ...] = OTHERS, nice: int = 3) -> int:
    """Run all, and return the first exit code that is not 0."""
    running: list[Part] = []

    def stop(*_: object) -> None:
        for part in running:
            part.process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal tells them, too: they clean up and end, also where nobody else heeds it
    running += [Part(cluster, nice=0, live=True), *(Part(words, nice=nice, live=False) for words in others)]
    told: list[Part] = []
    while left := [part for part in running if part not in told]:
        over = [part for part in left if part.process.poll() is not None]
        for part in over if over == left else [part for part in over if part.process.returncode]:
            part.tell()
            told.append(part)
        time.sleep(0.2)
    for part in running:
        print(f"{part.name}: exit code {part.process.returncode}\n{part.closing}", flush=True)
    return next((abs(part.process.returncode) for part in running if part.process.returncode), 0)


if __name__ == "__main__":
    try:
        build.everything()
    except CommandFailed as failed:
        sys.exit(f"{failed}")
    sys.exit(main())
