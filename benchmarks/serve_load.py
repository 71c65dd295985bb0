"""Many clients at once against `speeder serve` on loopback: errors, rates, latencies, and the server's memory.

    python -m benchmarks.serve_load runs/first --clients 200 --seconds 60

starts a server for the run, loads it, stops it, and prints a table. Clients ask, read the answer, and ask again; with
`--pause` each waits so long in between, as people do. One request in twenty is an explanation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import numpy as np

EXPLAINED = 0.05  # share of requests that ask for an explanation
LONGEST = 30  # items of a history, at most
STARTS_WITHIN = 600  # seconds


@dataclass
class Load:
    """What a load did.

    Attributes:
        statuses: HTTP status -> answers; "error" counts connections that failed.
        seconds: how long it lasted.
        latencies: of recommendations, in seconds, sorted.
        memory_before, memory_after: the server's resident bytes, after a warm-up and at the end.
        batch: mean number of requests that ran together.
        cpu: seconds of processor time that the server took.
    """

    clients: int
    pause: float
    statuses: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    memory_before: float = 0.0
    memory_after: float = 0.0
    batch: float = 0.0
    cpu: float = 0.0

    @property
    def errors(self) -> int:
        """Answers other than 200, and none."""
        return sum(self.statuses.values()) - self.statuses["200"]

    def summary(self) -> dict[str, float | dict]:
        """Figures for a table: latencies in milliseconds, memory in MiB."""
        at = dict(
            zip(("p50", "p90", "p99"), np.quantile(self.latencies or [0], (0.5, 0.9, 0.99)), strict=True)
        )
        return {
            "clients": self.clients,
            "pause s": self.pause,
            "seconds": round(self.seconds, 1),
            "requests": sum(self.statuses.values()),
            "errors": self.errors,
            "requests/s": round(sum(self.statuses.values()) / max(self.seconds, 1e-9), 1),
            **{f"{name} ms": round(1000 * value, 1) for name, value in at.items()},
            "mean batch": round(self.batch, 1),
            "server's CPU ms a request": round(1000 * self.cpu / max(sum(self.statuses.values()), 1), 2),
            "RSS before MiB": round(self.memory_before / 2**20, 1),
            "RSS after MiB": round(self.memory_after / 2**20, 1),
        }


async def run_load(
    address: str, clients: int, seconds: float, pause: float = 0.0, warm_up: float = 3.0
) -> Load:
    """Load a server; answers during the warm-up are not counted, but for errors."""
    load, random_of = Load(clients, pause), random.Random(0)
    async with _connection(address) as http:
        items = await _ids(http)
        seeds = [random_of.random() for _ in range(clients)]
        await asyncio.gather(*(_client(address, items, seed, warm_up, pause, load) for seed in seeds))
        load.statuses = Counter({status: n for status, n in load.statuses.items() if status != "200"})
        load.latencies.clear()
        before = await _metrics(http)
        started = time.monotonic()
        await asyncio.gather(*(_client(address, items, seed, seconds, pause, load) for seed in seeds))
        load.seconds = time.monotonic() - started
        after = await _metrics(http)
    load.latencies.sort()
    load.memory_before, load.memory_after = (m["process_resident_memory_bytes"] for m in (before, after))
    load.cpu = after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
    ran, batches = (
        after[f'speeder_batch_size_{part}{{lane="recommend"}}']
        - before.get(f'speeder_batch_size_{part}{{lane="recommend"}}', 0)
        for part in ("sum", "count")
    )
    load.batch = ran / max(batches, 1)
    return load


def _connection(address: str) -> httpx.AsyncClient:
    """A client's own: a pool shared by 200 of them looks through all its connections at every request."""
    # nothing is encrypted on loopback, so no certificates are loaded
    return httpx.AsyncClient(base_url=address, timeout=120, verify=False, trust_env=False)


async def _client(
    address: str, items: list[str], seed: float, seconds: float, pause: float, load: Load
) -> None:
    async with _connection(address) as http:
        await _ask(http, items, seed, seconds, pause, load)


async def _ask(
    http: httpx.AsyncClient, items: list[str], seed: float, seconds: float, pause: float, load: Load
) -> None:
    draw, until = random.Random(seed), time.monotonic() + seconds
    longest = max(1, min(LONGEST, len(items) - 12))  # of a small catalogue enough must be left to recommend
    await asyncio.sleep(draw.random() * pause)
    while time.monotonic() < until:
        body: dict = {"history": draw.choices(items, k=draw.randint(1, longest))}
        explain = draw.random() < EXPLAINED
        body |= {"items": draw.sample(items, 5)} if explain else {"k": draw.choice((5, 10, 12))}
        began = time.monotonic()
        try:
            answer = await http.post(f"/v1/{'explain' if explain else 'recommend'}", json=body)
            status = str(answer.status_code)
        except httpx.HTTPError as error:
            status = f"error: {type(error).__name__}"
        load.statuses[status] += 1
        if not explain:
            load.latencies.append(time.monotonic() - began)
        if pause:
            await asyncio.sleep(pause * (0.5 + draw.random()))


async def _ids(http: httpx.AsyncClient) -> list[str]:
    """Ids of some items, as searches for single letters find them."""
    found: dict[str, None] = {}
    for letter in string.ascii_lowercase + string.digits:
        answer = await http.get("/v1/items", params={"q": letter})
        found |= dict.fromkeys(item["id"] for item in answer.raise_for_status().json()["items"])
    if len(found) < 13:
        raise SystemExit(f"serve_load: expected at least 13 items to ask about, found {len(found)}")
    return list(found)


async def _metrics(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[:1] not in ("#", "")
    }


@contextmanager
def served(run: Path, *options: str) -> Iterator[str]:
    """The address of `speeder serve RUN`, started here and stopped afterwards."""
    command = [sys.executable, "-m", "speeder.cli", "serve", str(run), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.match(r"(http://\S+) takes requests", line):
                yield found[1]
                break
        else:
            raise SystemExit("serve_load: the server did not start")
    finally:
        process.terminate()
        process.wait(STARTS_WITHIN)


def main() -> None:
    """Start, load, stop, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder or saved recommender")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds between a client's requests")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options, server_options = parser.parse_known_args()
    with served(options.run, *server_options) as address:
        load = asyncio.run(run_load(address, options.clients, options.seconds, options.pause))
    for name, value in (load.summary() | {"statuses": dict(load.statuses)}).items():
        print(f"{name:26} {value}")
    if options.json:
        figures = load.summary() | {"statuses": dict(load.statuses)}
        options.json.write_text(json.dumps(figures | {"latencies": len(asdict(load)["latencies"])}, indent=2))
    if load.errors:
        raise SystemExit("serve_load: some requests failed")


if __name__ == "__main__":
    main()
