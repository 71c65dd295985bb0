"""`speeder serve`: arguments and work."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from speeder.errors import SpeederError
from speeder.io.extras import pip_command
from speeder.serving.http.limits import Limits

SUMMARY = "Serve a recommender: an HTTP API, and a web page to try it."
EXAMPLE = "speeder serve runs/first --port 8000"
NEEDS = ("fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn", "uvloop")

_HELP = {
    "max_history": "items per posted history",
    "max_filter": "ids in each of a request's allow and deny lists",
    "max_k": "items recommended per request",
    "max_explained": "items explained per request",
    "max_query": "characters per search query",
    "max_results": "hits per search",
    "max_body_bytes": "bytes per request body",
    "max_batch": "histories per batch",
    "batch_wait_ms": "milliseconds that an idle model waits for a second request",
    "max_queue": "waiting requests; further ones get 503",
    "max_explain_queue": "waiting explanations; further ones get 503",
    "deadline_s": "seconds after which a request gets 504",
    "max_connections": "open connections",
    "drain_s": "seconds after SIGTERM in which requests are still accepted, while /readyz answers 503",
    "stuck_s": "seconds of one batch after which /healthz answers 503",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder serve`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a saved recommender's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the model (default: torch's)")
    parser.add_argument("--name", help="the model's name on the page (default: RUN's name)")
    parser.add_argument("--no-pictures", action="store_true", help="do not show the catalogue's pictures")
    bounds = parser.add_argument_group("limits")
    for field in fields(Limits):
        kind = float if isinstance(field.default, float) else int
        option = "--" + field.name.replace("_", "-")
        text = f"{_HELP[field.name]} (default: {field.default:g})"
        bounds.add_argument(option, type=kind, default=field.default, metavar="N", help=text)


def run(options: argparse.Namespace) -> None:
    """Load the recommender and serve it until stopped.

    Raises:
        SpeederError: the extra is not installed, an option is out of range, or the folder holds no such recommender.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise SpeederError(f"serve: found no {', '.join(missing)}: {pip_command('serve')}")
    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    if options.threads is not None and options.threads < 1:
        raise SpeederError(f"--threads: expected at least 1, got {options.threads}")
    if not 0 <= options.port <= 65535:
        raise SpeederError(f"--port: expected 0..65535, got {options.port}")
    from speeder.baselines.auto import load_model
    from speeder.data.find_run import find_model
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
    say = partial(print, flush=True)  # a reader on a pipe waits for the address
    say(f"{folder}: {len(model.catalogue)} items, modalities {', '.join(model.config.gate_names)}")
    serve(app, options.host, options.port, say)
