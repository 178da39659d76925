"""Load on a service by `wrk`, a load generator in C that costs the machine less than clients in Python do.

Absent wherever it is not installed (Debian's package wrk); `benchmarks.service_load` then asks with clients of its own.
It counts failures and times answers; what stands in them it does not read.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARES = (0.5, 0.95, 0.99)
MARK = "measured:"
LUA = """
local bodies = {BODIES}
local turn = 0
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
request = function()
  turn = turn % #bodies + 1
  return wrk.format(nil, nil, nil, bodies[turn])
end
done = function(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format("MARK %d %d %d", summary.requests, failed, summary.duration))
  for _, share in ipairs({SHARES}) do io.write(string.format(" %d", latency:percentile(100 * share))) end
  io.write("\\n")
end
"""


@dataclass(frozen=True)
class Driven:
    """What the clients of one run saw.

    Attributes:
        answers: received.
        failed: refused, broken off, late, or with a status of 400 and above.
        span: seconds of the run.
        quantiles: seconds within which a share of the answers came, by share.
        processor: seconds of processor time of the service's process.
    """

    answers: int
    failed: int
    span: float
    quantiles: Mapping[float, float]
    processor: float = 0.0
    wrong: None = None
    """Nobody looked."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.span

    def quantile(self, share: float) -> float:
        """Seconds within which `share` of the answers came; one of SHARES."""
        return self.quantiles[share]


def found() -> str | None:
    """The program, where there is one."""
    return shutil.which("wrk")


def drive(url: str, bodies: Sequence[str], clients: int, seconds: float) -> Driven:
    """So many clients for so many whole seconds, each posting the next body as soon as it has its answer.

    Raises:
        RuntimeError: there is no wrk, or it ended without figures.
    """
    program = found()
    if program is None:
        raise RuntimeError("wrk is not installed; apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(lua(bodies), encoding="utf-8")
        command = [program, "-t1", f"-c{clients}", f"-d{round(seconds)}s", "--timeout", "30s", "-s", str(script), url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if done.returncode or line is None:
        raise RuntimeError(f"wrk ended with exit code {done.returncode}: {done.stderr or done.stdout}")
    return read(line)


def lua(bodies: Sequence[str]) -> str:
    """The script that wrk runs."""
    quoted = ", ".join(json.dumps(body) for body in bodies)  # of printable ASCII: a string in JSON is one in Lua
    shares = ", ".join(map(str, SHARES))
    return LUA.replace("MARK", MARK).replace("{SHARES}", f"{{{shares}}}").replace("{BODIES}", f"{{{quoted}}}")


def read(line: str) -> Driven:
    """The figures of the line that the script prints: counts, then microseconds."""
    answers, failed, span, *quantiles = (int(word) for word in line.removeprefix(MARK).split())
    seconds = (microseconds / 1e6 for microseconds in quantiles)
    return Driven(answers, failed, span / 1e6, dict(zip(SHARES, seconds, strict=True)))
