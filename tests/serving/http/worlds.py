"""Small recommenders to serve, with titles and pictures as they occur, and servers that listen on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from speeder.data.catalogue import ItemCatalogue
from speeder.model.modeling import SpeederForCausalLM
from speeder.serving.http.app import create_app
from speeder.serving.http.server import build_server
from tests.model.worlds import tiny_backbone

MARKUP = '<img src=x onerror="document.title=1"> & <b>bold</b>'
TITLES = [
    "Toy Story (1995)", "Star Wars (1977)", "Star Trek: First Contact (1996)", "Usual Suspects, The (1995)",
    "Amélie (2001)", "Les Misérables (1998)", "Les Misérables (2012)", MARKUP, "", "Heat (1995)",
    "2001: A Space Odyssey (1968)", "Monty Python's Life of Brian (1979)", "Braveheart (1995)", "Fargo (1996)",
    "A Very Long Title That Goes On and On, Whatever the Width of the Screen May Be, Until Nobody Reads It (1999)",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft (1950)", "Alien (1979)",
    "Aliens (1986)", "Blade Runner (1982)", "Seven (1995)", "Jaws (1975)", "Rear Window (1954)", "M (1931)",
    "Ran (1985)",
]  # fmt: skip
STARTS_WITHIN = 180  # seconds: importing torch takes a busy machine long


def ids(count: int = len(TITLES)) -> list[str]:
    """External ids, one of which needs quoting in a path."""
    return ["a/b?c=1 d" if row == 4 else f"i{row}" for row in range(count)]


def served_catalogue(pictures: Path | None = None) -> ItemCatalogue:
    """The titles above, with features; every third item has a picture where a folder for them is given."""
    count, generator = len(TITLES), torch.Generator().manual_seed(3)
    images: list[str | None] = [None] * count
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for row in range(0, count, 3):
            images[row] = str(pictures / f"{row}.png")
            Image.new("RGB", (400, 600), (10 * row, 90, 200 - 8 * row)).save(images[row])
    features, present = {}, {}
    for name, width in {"text": 7, "image": 5, "collaborative": 4}.items():
        there = torch.rand(count, generator=generator) > 0.25
        present[name] = there if name != "text" else torch.ones(count, dtype=torch.bool)
        features[name] = torch.randn(count, width, generator=generator) * present[name][:, None]
    return ItemCatalogue(ids(), TITLES, images=images, features=features, present=present)


def served_model(pictures: Path | None = None, **config) -> SpeederForCausalLM:
    """A recommender over that catalogue whose weights are all stirred, so that every part counts."""
    config = {
        "max_history": 8,
        "prompt_prefix": [5, 6],
        "prompt_suffix": [7],
        "item_embedding": True,
    } | config
    model = SpeederForCausalLM.from_backbone(tiny_backbone(), served_catalogue(pictures), **config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@contextmanager
def listening(model: SpeederForCausalLM, limits=None, **options) -> Iterator[str]:
    """The address of a server in a thread of this process, on loopback."""
    app = create_app(model, limits, **options)
    started = threading.Event()
    server = build_server(app, started.set)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert started.wait(60)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


class ServerProcess:
    """`speeder serve` in a process of its own."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "speeder.cli", "serve", str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.output: list[str] = []
        self.address = ""
        guard = threading.Timer(STARTS_WITHIN, self.process.kill)
        guard.start()
        for line in self.process.stdout:
            self.output.append(line)
            if "takes requests" in line:
                self.address = line.split()[0]
                break
        guard.cancel()
        assert self.address, "".join(self.output)

    def stop(self, how: signal.Signals = signal.SIGTERM, within: float = 60) -> int:
        """Signal it, and return its exit status."""
        self.process.send_signal(how)
        try:
            self.output.append(self.process.communicate(timeout=within)[0])
        finally:
            self.process.kill()
        return self.process.returncode

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.stop()
