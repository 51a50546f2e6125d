"""A server of the toy model in a process of its own, so that what it holds can be measured."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.requests_toy import ToyEngine
from tests.served import served

from engram_runtime.server.run import SWITCH_INTERVAL_S

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Running:
    """A server."""

    url: str
    pid: int

    @property
    def resident_mib(self) -> float:
        """Memory of the process and of those it started, in MiB."""
        return sum(_status(pid, "VmRSS") for pid in self._family()) / 1024

    @property
    def peak_mib(self) -> float:
        """The most that the process had, since `reset_peak`."""
        return _status(self.pid, "VmHWM") / 1024

    def reset_peak(self) -> None:
        """Have the peak begin at what is held now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @property
    def descriptors(self) -> int:
        """How many files and sockets are open."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self._family())

    @property
    def threads(self) -> int:
        """How many threads there are."""
        return sum(_status(pid, "Threads") for pid in self._family())

    def _family(self) -> list[int]:
        below = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, below)]


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def toy_server(engine: ToyEngine) -> Iterator[Running]:
    """Serve a toy engine until the end of the block."""
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(engine))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the server didn't start"
        try:
            yield Running(url, process.pid)
            assert process.poll() is None, f"the server ended with {process.returncode}"
        finally:
            process.stdin.close()


def main() -> None:
    """Serve what the first argument says, until standard input ends."""
    engine = ToyEngine(**json.loads(sys.argv[1]))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with TemporaryDirectory() as folder, engine.open(Path(folder)) as opened, served(opened) as url:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
