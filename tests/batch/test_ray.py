"""On a real Ray of two CPUs: what its workers make is what this process makes, also where one of them is killed."""

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder.batch.on_ray import OnRay
from speeder.batch.parts import computed
from speeder.batch.recommend import recommend_file
from speeder.errors import SpeederError
from tests.batch.killing_work import failing, killed_once
from tests.model.worlds import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        ray = pytest.importorskip("ray")
        quiet = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
        ray.init(num_cpus=2, object_store_memory=80 << 20, **quiet)
        yield ray
        ray.shutdown()


def test_recommendations_survive_a_killed_worker(ray, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    draw = np.random.default_rng(0)
    items = [[f"id{i}" for i in draw.integers(0, 20, size=length)] for length in draw.integers(1, 9, size=50)]
    pq.write_table(pa.table({"user": [f"u{n}" for n in range(50)], "items": items}), tmp_path / "in.parquet")
    files = (tmp_path / "model", tmp_path / "in.parquet")
    assert recommend_file(*files, tmp_path / "here.parquet", 5, part_rows=8) == 50

    def runner(make, parts, missing):
        return OnRay(workers=1)(partial(killed_once, make, tmp_path / "killed"), parts, missing)

    assert recommend_file(*files, tmp_path / "ray.parquet", 5, part_rows=8, runner=runner) == 50
    assert (tmp_path / "killed").exists(), "no worker was killed"
    ours, theirs = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("here", "ray"))
    assert theirs.select(["user", "items"]) == ours.select(["user", "items"])
    scores = [np.array(table["scores"].to_pylist()) for table in (ours, theirs)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob(".*.parts"))


def test_what_fails_in_a_worker_is_told_in_a_line(ray, tmp_path):
    tables = [pa.table({"row": [1, 2]})]
    with (
        pytest.raises(SpeederError, match=r"^ray: a worker failed: ValueError: no such thing$"),
        computed(tmp_path / "parts", {}, tables, failing, OnRay(), "fail"),
    ):
        pass
