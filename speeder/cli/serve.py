"""The command `speeder serve`: its arguments, and what it does."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from speeder.errors import SpeederError
from speeder.serving.http.limits import Limits

SUMMARY = "Serve a recommender: an HTTP API, and a page in the browser to try it."
EXAMPLE = "speeder serve runs/first --port 8000"
NEEDS = ("fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn", "uvloop")

_HELP = {
    "max_history": "items of a posted history",
    "max_k": "items recommended at once",
    "max_explained": "items explained at once",
    "max_query": "characters of a search",
    "max_results": "hits of a search",
    "max_body_bytes": "bytes of a request's body",
    "max_batch": "histories that run together",
    "batch_wait_ms": "milliseconds that an idle model waits for a second request",
    "max_queue": "requests that wait; further ones get 503",
    "max_explain_queue": "explanations that wait",
    "deadline_s": "seconds until a request is given up",
    "max_connections": "open connections",
    "drain_s": "seconds that SIGTERM leaves to load balancers: /readyz says 503, requests are still taken",
    "stuck_s": "seconds of one batch after which /healthz says 503",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder serve`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a saved recommender's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="that the model may use (default: torch's)")
    parser.add_argument("--name", help="what the page calls the model (default: RUN's name)")
    parser.add_argument(
        "--no-pictures", action="store_true", help="show none of the pictures that the catalogue names"
    )
    bounds = parser.add_argument_group("bounds")
    for field in fields(Limits):
        kind = float if isinstance(field.default, float) else int
        option = "--" + field.name.replace("_", "-")
        text = f"{_HELP[field.name]} (default: {field.default:g})"
        bounds.add_argument(option, type=kind, default=field.default, metavar="N", help=text)


def run(options: argparse.Namespace) -> None:
    """Load the recommender and serve it until told to stop.

    Raises:
        SpeederError: the extra is not installed, an option is out of range, or the folder holds no such recommender.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise SpeederError(f"serve: expected pip install 'speeder[serve]', found no {', '.join(missing)}")
    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    if options.threads is not None and options.threads < 1:
        raise SpeederError(f"--threads: expected at least 1, got {options.threads}")
    if not 0 <= options.port <= 65535:
        raise SpeederError(f"--port: expected 0..65535, got {options.port}")
    from speeder.baselines.auto import load_model
    from speeder.data.runs import find_model
    from speeder.model.modeling import SpeederForCausalLM
    from speeder.serving.http.app import create_app
    from speeder.serving.http.server import serve

    folder = find_model(options.run)
    model = load_model(folder)
    if not isinstance(model, SpeederForCausalLM):
        raise SpeederError(f"serve: expected a Speeder recommender, got {type(model).__name__}")
    if not model.config.num_items:
        raise SpeederError(f"serve: expected a recommender with items, found none in {folder}")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    name = options.name or options.run.resolve().name
    app = create_app(model, limits, name=name, threads=options.threads, pictures=not options.no_pictures)
    say = partial(print, flush=True)  # who reads it through a pipe waits for the address
    say(f"{folder}: {len(model.catalogue)} items, modalities {', '.join(model.config.gate_names)}")
    serve(app, options.host, options.port, say)
