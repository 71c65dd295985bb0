"""Requests and responses. Request classes are made at run time, since they state the server's limits."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from speeder.model.choice import FALLBACKS, UNKNOWN
from speeder.serving.http.limits import Limits

MAX_TITLES = 50  # each is a search; longer histories come as ids
_MAX_ID = 512  # characters of an id or a title in a request


class Item(BaseModel):
    """An item of the catalogue; `picture` is a path relative to the server's root, null where there is none."""

    id: str
    title: str
    picture: str | None


class Recommended(Item):
    """An item with its score, a logit that is comparable within one answer."""

    score: float


class Recommendations(BaseModel):
    """Recommendations for `history`, as its ids or titles were resolved; the model read its newest `read` items.

    `skipped` are ids and titles that no item has, with `"unknown": "skip"`. `fallback` is `"popularity"` where nothing
    was left to read: scores are then counts of training.
    """

    items: list[Recommended]
    history: list[Item]
    read: int
    skipped: list[str]
    fallback: str | None


class Found(BaseModel):
    """Hits of a search, best first."""

    items: list[Item]


class Effect(BaseModel):
    """How far an item's score falls without one entry of the history; null for the only entry."""

    id: str
    title: str
    change: float | None


class Explained(Item):
    """Why an item has its score: the modalities' shares of its token, and the effect of each history item."""

    score: float
    gates: dict[str, float]
    history: list[Effect]


class Explanations(BaseModel):
    """One explanation per requested item, in the same order."""

    items: list[Explained]


class About(BaseModel):
    """The model, and the server's limits."""

    name: str
    items: int
    modalities: list[str]
    reads: int
    max_history: int
    max_k: int
    max_explained: int
    pictures: bool


class State(BaseModel):
    """The server's liveness or readiness."""

    status: str


@dataclass(frozen=True)
class RequestModels:
    """The classes of request bodies, with a server's limits."""

    recommend: type[BaseModel]
    explain: type[BaseModel]


def request_models(limits: Limits) -> RequestModels:
    """Classes whose schema states the limits, so that OpenAPI documents them and pydantic enforces them."""
    entry = Annotated[str, Field(min_length=1, max_length=_MAX_ID)]

    class History(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)  # neither "5" nor 5.0 nor true is the number 5

        history: Annotated[
            list[entry] | None,
            Field(description="item ids, oldest first", min_length=1, max_length=limits.max_history),
        ] = None
        titles: Annotated[
            list[entry] | None,
            Field(
                description="in place of `history`: titles, oldest first, each of which must match one item",
                min_length=1,
                max_length=min(MAX_TITLES, limits.max_history),
            ),
        ] = None

        @model_validator(mode="after")
        def one_of_two(self):
            if (self.history is None) == (self.titles is None):
                raise ValueError("exactly one of history and titles")
            return self

    class RecommendRequest(History):
        model_config = ConfigDict(json_schema_extra={"examples": [{"history": ["50", "172", "133"], "k": 5}]})

        k: Annotated[int, Field(description="number of items", ge=1, le=limits.max_k)] = 10
        exclude_seen: Annotated[bool, Field(description="leave out every item of the history")] = True
        history: Annotated[
            list[entry] | None,
            Field(
                description="item ids, oldest first; empty for a new user, with `fallback`",
                max_length=limits.max_history,
            ),
        ] = None
        allow: Annotated[
            list[entry] | None,
            Field(description="ids: recommend these alone", min_length=1, max_length=limits.max_filter),
        ] = None
        deny: Annotated[
            list[entry] | None,
            Field(description="ids: never recommend these", max_length=limits.max_filter),
        ] = None
        where: Annotated[
            dict[entry, Annotated[list[str], Field(min_length=1, max_length=limits.max_filter)]] | None,
            Field(
                description="column of the catalogue: values, one of which an item must have", max_length=20
            ),
        ] = None
        unknown: Annotated[
            Literal[UNKNOWN], Field(description="what becomes of ids and titles that no item has")
        ] = "error"
        fallback: Annotated[
            Literal[FALLBACKS] | None, Field(description="what is recommended where no history is left")
        ] = None

    class ExplainRequest(History):
        model_config = ConfigDict(
            json_schema_extra={"examples": [{"history": ["50", "172"], "items": ["181"]}]}
        )

        items: Annotated[
            list[entry],
            Field(description="ids of the items to explain", min_length=1, max_length=limits.max_explained),
        ]

    return RequestModels(RecommendRequest, ExplainRequest)
