"""The FastAPI application of one loaded recommender."""

# No `from __future__ import annotations`: request classes are made with the server's bounds, and FastAPI reads them
# from the routes' annotations.

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from speeder import __version__
from speeder.model.modeling import SpeederForCausalLM
from speeder.serving.http import schemas
from speeder.serving.http.batcher import Batcher, Closed, Lane, QueueFull
from speeder.serving.http.engine import Engine, ExplainJob, RecommendJob
from speeder.serving.http.errors import ApiError, Problems, add_error_handlers
from speeder.serving.http.limits import Limits
from speeder.serving.http.lookup import Lookup
from speeder.serving.http.metrics import Metrics
from speeder.serving.http.middleware import Gate

RECOMMEND, EXPLAIN = "recommend", "explain"
EXPLAIN_BATCH = 4  # explanations between two batches of recommendations
_PAGE = Path(str(files("speeder.serving.http") / "page"))
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problems, "description": description}
    for status, description in {
        404: "no such item",
        413: "the body is too large",
        422: "a field is wrong",
        503: "too many requests wait; Retry-After says when to try again",
        504: "no answer in time",
    }.items()
}


def create_app(
    model: SpeederForCausalLM,
    limits: Limits | None = None,
    *,
    name: str = "Speeder",
    threads: int | None = None,
    pictures: bool = True,
) -> FastAPI:
    """The application that serves a recommender.

    From now on only the application may use the model: one thread, started with it, runs the model.

    Args:
        model: with its catalogue.
        limits: limits of requests, batches and queues.
        name: the model's name on the page.
        threads: number of threads for the model; None keeps torch's.
        pictures: whether to show pictures that the catalogue names and that are on this machine.

    Returns:
        the application; the server reads `app.state.metrics` and sets `app.state.draining`.
    """
    limits = limits or Limits()
    metrics, lookup = Metrics(), Lookup(model.catalogue, pictures)
    engine = Engine(model, threads)
    wait = limits.batch_wait_ms / 1000
    lanes = [
        Lane(RECOMMEND, engine.recommend, limits.max_batch, limits.max_queue, wait),
        Lane(EXPLAIN, engine.explain, EXPLAIN_BATCH, limits.max_explain_queue),
        Lane("warm-up", lambda jobs: [engine.warm_up() for _ in jobs], 1, 1),
    ]
    batcher = Batcher(lanes, metrics)
    for lane in (RECOMMEND, EXPLAIN):
        metrics.watch_queue(lane, lambda lane=lane: batcher.depth(lane))
    metrics.items.set(len(model.catalogue))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        await asyncio.wrap_future(batcher.submit("warm-up", None))
        metrics.ready.set_function(lambda: float(ready()))
        yield
        await asyncio.to_thread(batcher.close, limits.deadline_s)

    app = FastAPI(
        title="Speeder",
        version=__version__,
        description="Recommendations by a language model in which an item is one token.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        servers=[{"url": "."}],  # relative to openapi.json, so that it holds behind any prefix
    )
    app.add_middleware(Gate, limits=limits, metrics=metrics)
    add_error_handlers(app)
    app.state.draining, app.state.metrics, app.state.limits = False, metrics, limits
    Requests = schemas.request_models(limits)

    def ready() -> bool:
        return not app.state.draining and batcher.healthy(limits.stuck_s)

    async def understood(body: Any, skip: bool = False) -> tuple[list[int], list[str]]:
        if body.titles is None:
            return lookup.history(body.history, None, skip)
        # searches take a large catalogue long
        return await asyncio.to_thread(lookup.history, None, body.titles, skip)

    async def run(request: Request, lane: str, job: object) -> Any:
        """A job's result. The job is cancelled at the deadline, or when the client disconnects."""
        try:
            future = asyncio.wrap_future(batcher.submit(lane, job))
        except QueueFull as error:
            metrics.refused.labels(lane, "queue").inc()
            retry = {"Retry-After": str(error.retry_after)}
            raise ApiError(503, "server", "room in the queue", "a full queue", retry) from None
        except Closed:
            raise ApiError(
                503, "server", "a running server", "one that stops", {"Retry-After": "5"}
            ) from None
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waited = {future, gone}
            await asyncio.wait(waited, timeout=limits.deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            reason = "client" if gone.done() else "deadline"
            metrics.refused.labels(lane, reason).inc()
            if reason == "client":
                raise ApiError(499, "connection", "an open one", "a closed one")
            raise ApiError(504, "server", f"an answer within {limits.deadline_s:g} s", "none in time")
        finally:
            future.cancel()
            gone.cancel()

    @app.post("/v1/recommend", tags=["recommend"], responses=_REFUSALS)
    async def recommend(body: Requests.recommend, request: Request) -> schemas.Recommendations:
        """The best next items after a history, of ids or of titles."""
        skip = body.unknown == "skip"
        history, skipped = await understood(body, skip)
        choice, more = await asyncio.to_thread(lookup.choice, body.allow, body.deny, body.where, skip)
        if body.fallback is not None and model.item_counts is None:
            raise ApiError(422, "fallback", "null: this recommender has no training counts", body.fallback)
        if not history and body.fallback is None:
            got = f"{len(skipped)} unknown" if skipped else "0 entries"
            raise ApiError(422, "titles" if body.titles else "history", "at least 1 entries", got)
        job = RecommendJob(tuple(history), body.k, body.exclude_seen, choice)
        left = choice.left(job.hidden(), len(model.catalogue))
        if body.k > left:
            raise ApiError(422, "k", f"at most {left}, the items that are left", body.k)
        found = await run(request, RECOMMEND, job)
        return schemas.Recommendations(
            items=[schemas.Recommended(**lookup.item(r.item), score=r.score) for r in found],
            history=[schemas.Item(**lookup.item(row)) for row in history],
            read=min(len(history), model.config.max_history),
            skipped=[*skipped, *more],
            fallback=None if history else body.fallback,
        )

    @app.post("/v1/explain", tags=["recommend"], responses=_REFUSALS)
    async def explain(body: Requests.explain, request: Request) -> schemas.Explanations:
        """Why items have their scores: the modalities' shares, and the effect of each history item on the score."""
        history, _ = await understood(body)
        items = [lookup.row(entry, f"items.{i}") for i, entry in enumerate(body.items)]
        found = await run(request, EXPLAIN, ExplainJob(tuple(history), tuple(items)))
        return schemas.Explanations(
            items=[
                schemas.Explained(
                    **lookup.item(one.item),
                    score=one.score,
                    gates=one.gates,
                    history=[schemas.Effect(id=e.id, title=e.title, change=e.change) for e in one.history],
                )
                for one in found
            ]
        )

    @app.get("/v1/items", tags=["items"], responses={422: _REFUSALS[422]})
    def search(
        q: Annotated[str, Query(description="words, or prefixes of words", max_length=limits.max_query)],
        limit: Annotated[int, Query(ge=1, le=limits.max_results)] = min(10, limits.max_results),
    ) -> schemas.Found:
        """Items by title (or id), best first."""
        return schemas.Found(items=[schemas.Item(**lookup.item(row)) for row in lookup.search(q, limit)])

    @app.get(
        "/v1/pictures/{item:path}",
        tags=["items"],
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, 404: _REFUSALS[404]},
    )
    def picture(item: str) -> Response:
        """An item's picture, small."""
        jpeg = lookup.pictures.jpeg(lookup.row(item, "item", 404))
        if jpeg is None:
            raise ApiError(404, "item", "one with a picture", item)
        return Response(jpeg, media_type="image/jpeg", headers={"cache-control": "public, max-age=86400"})

    @app.get("/v1/model", tags=["server"])
    def about() -> schemas.About:
        """The model and the server's limits."""
        return schemas.About(
            name=name,
            items=len(model.catalogue),
            modalities=model.config.gate_names,
            reads=model.config.max_history,
            max_history=limits.max_history,
            max_k=min(limits.max_k, len(model.catalogue)),
            max_explained=limits.max_explained,
            pictures=lookup.pictures.any(),
        )

    @app.head("/healthz", include_in_schema=False)  # which some probes ask for
    @app.get("/healthz", tags=["server"], responses={503: {"model": schemas.State}})
    async def healthz() -> JSONResponse:
        """Liveness: if this fails, restart the process."""
        well = batcher.healthy(limits.stuck_s)
        return JSONResponse({"status": "ok" if well else "the model is stuck"}, 200 if well else 503)

    @app.head("/readyz", include_in_schema=False)  # which some probes ask for
    @app.get("/readyz", tags=["server"], responses={503: {"model": schemas.State}})
    async def readyz() -> JSONResponse:
        """Readiness: whether to send requests here."""
        status = "stopping" if app.state.draining else "ready" if ready() else "the model is stuck"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", tags=["server"], response_class=Response)
    def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_PAGE / "docs.html")

    app.mount("/static/swagger", StaticFiles(directory=_swagger_folder()))
    app.mount("/static", StaticFiles(directory=_PAGE))
    return app


async def _disconnected(request: Request) -> None:
    """Return once the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _swagger_folder() -> Path:
    """Swagger UI's files, from the package fastapi-offline."""
    return Path(find_spec("fastapi_offline").submodule_search_locations[0]) / "static"
