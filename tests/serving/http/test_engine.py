"""Requests that run together get what each would get alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.serving.http.batcher import Batcher, Lane
from speeder.serving.http.engine import Engine, ExplainJob, RecommendJob
from tests.serving.http.worlds import TITLES, served_model

ITEMS = len(TITLES)


@pytest.fixture(scope="module")
def engine():
    return Engine(served_model())


@st.composite
def jobs(draw):
    history = tuple(draw(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=12)))
    exclude = draw(st.booleans())
    left = ITEMS - len(set(history)) * exclude
    return RecommendJob(history, draw(st.integers(1, left)), exclude)


@settings(max_examples=30, deadline=None)
@given(together=st.lists(jobs(), min_size=1, max_size=9))
def test_a_batch_is_its_requests_one_by_one(engine, together):
    """Of any lengths, any k up to all that is left, with and without seen items, more than are read among them."""
    model = engine.model
    for job, found in zip(together, engine.recommend(together), strict=True):
        alone = model.recommend([job.history], job.k, exclude_seen=job.exclude_seen)[0]
        assert len(found) == job.k
        scores = [item.score for item in found]
        assert scores == pytest.approx([item.score for item in alone], abs=1e-4)
        every = model.score([job.history])[0]
        assert scores == pytest.approx([float(every[item.item]) for item in found], abs=1e-4)  # each its own
        assert len({item.item for item in found}) == job.k
        assert not (job.exclude_seen and {item.item for item in found} & set(job.history))


def test_explanations_are_the_librarys(engine):
    from speeder.model.explain import explain

    together = [ExplainJob((1, 2, 3), (4, 5)), ExplainJob((9,), (1,))]
    found = engine.explain(together)
    assert found == [explain(engine.model, job.history, job.items) for job in together]


def test_scores_that_are_no_numbers_are_not_handed_out():
    model = served_model()
    with torch.no_grad():
        model.item_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="number"):
        Engine(model).recommend([RecommendJob((1,), 3, True)])
    with pytest.raises(ValueError, match="not finite"):
        Engine(model).explain([ExplainJob((1, 2), (3,))])


def test_a_request_that_the_model_refuses_leaves_its_mates_their_results(engine):
    good = [RecommendJob((row, row + 1), 3, True) for row in range(5)]
    batcher = Batcher([Lane("recommend", engine.recommend, max_batch=8, capacity=9, max_wait=600)])
    futures = [
        batcher.submit("recommend", job) for job in [*good[:2], RecommendJob((999,), 1, True), *good[2:]]
    ]
    batcher.start()
    batcher.close(60)
    with pytest.raises(ValueError, match="999"):
        futures.pop(2).result(0)
    for job, future in zip(good, futures, strict=True):
        alone = engine.recommend([job])[0]
        assert [item.item for item in future.result(0)] == [item.item for item in alone]
