"""On a real Ray of two CPUs: what its workers make is what this process makes, also where one of them is killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from speeder.errors import SpeederError
from speeder.io.parts import computed
from speeder.io.ray import OnRay
from speeder.prepare.encoders.text import TextEncoder
from speeder.serving.recommend_file import recommend_file
from tests.io.killing_work import failing, killed_once
from tests.io.small_run import asked, evaluated, save_run, save_world
from tests.model.worlds import tiny_model
from tests.prepare.encoders.test_in_parts import TEXTS, files
from tests.prepare.encoders.tiny import save_bert

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread():
    """As Ray's workers have: with another number of threads MKL rounds some products otherwise."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")  # no longer: where Ray runs, addresses are not tried, as other tests expect
def ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray = pytest.importorskip("ray")
        quiet = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
        ray.init("local", num_cpus=2, object_store_memory=80 << 20, **quiet)
        yield ray
        ray.shutdown()


@pytest.fixture
def dying(tmp_path):
    """One worker of a real Ray, which is killed once, after it has worked on its second part."""

    def runner(make, parts, missing):
        return OnRay(workers=1)(partial(killed_once, make, tmp_path / "killed"), parts, missing)

    yield runner
    assert (tmp_path / "killed").exists(), "no worker was killed"


def save_histories(path, users):
    draw = np.random.default_rng(0)
    items = [
        [f"id{i}" for i in draw.integers(0, 20, size=length)] for length in draw.integers(1, 9, size=users)
    ]
    pq.write_table(pa.table({"user": [f"u{n}" for n in range(users)], "items": items}), path)


def assert_same_recommendations(ours, theirs):
    ours, theirs = pq.read_table(ours), pq.read_table(theirs)
    assert theirs.select(["user", "items"]) == ours.select(["user", "items"])
    scores = [np.array(table["scores"].to_pylist()) for table in (ours, theirs)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-6)


def test_recommendations_survive_a_killed_worker(ray, tmp_path, dying):
    tiny_model().save_pretrained(tmp_path / "model")
    save_histories(tmp_path / "in.parquet", 50)
    paths = (tmp_path / "model", tmp_path / "in.parquet")
    assert recommend_file(*paths, tmp_path / "here.parquet", 5, part_rows=8) == 50
    assert recommend_file(*paths, tmp_path / "ray.parquet", 5, part_rows=8, runner=dying) == 50
    assert_same_recommendations(tmp_path / "here.parquet", tmp_path / "ray.parquet")
    assert not list(tmp_path.glob(".*.parts"))


def test_ranks_survive_a_killed_worker(ray, tmp_path, dying):
    data = save_world(tmp_path)
    runs = [tmp_path / "here", tmp_path / "ray"]
    models = [save_run(run, data, tmp_path / "data") for run in runs]
    one = {"protocol": "full", "with_baselines": False}
    expected = evaluated(runs[0], models[0], data, **one)
    found = evaluated(runs[1], models[1], data, **one, ask_for=asked(runs[1], tmp_path / "data", dying))
    assert found == expected and list(found) == ["model.json"]


@pytest.mark.exact
def test_encoded_features_survive_a_killed_worker(ray, tmp_path, dying):
    torch.manual_seed(0)
    save_bert(tmp_path / "bert")
    expected, _ = TextEncoder(str(tmp_path / "bert")).encode(TEXTS, cache=tmp_path / "one")
    found, _ = TextEncoder(str(tmp_path / "bert"), runner=dying).encode(TEXTS, cache=tmp_path / "parts")
    assert torch.equal(found, expected)
    assert files(tmp_path / "one") == files(tmp_path / "parts"), "nothing is lost or doubled"


def test_a_killed_driver_is_gone_on_with(ray, tmp_path):
    """The command is killed with kill -9 while a worker of a cluster that lives on works for it."""
    tiny_model().save_pretrained(tmp_path / "model")
    save_histories(tmp_path / "in.parquet", 6 * 1024)
    out, address = tmp_path / "ray.parquet", ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "speeder.cli", "recommend", tmp_path / "model", "-k", "5"]
    command += ["--histories", tmp_path / "in.parquet", "--out", out, "--ray", address, "--ray-workers", "1"]
    command, until = [*map(str, command)], time.monotonic() + 240

    def done():
        return len(list(tmp_path.glob(".ray.parquet.parts/*/output/*.parquet")))

    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not done() and first.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    told = first.communicate()[0].decode()
    assert first.returncode == -signal.SIGKILL and 0 < done() < 6 and not out.exists(), told
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and "of 6 parts are done" in again.stderr, again.stderr
    recommend_file(tmp_path / "model", tmp_path / "in.parquet", tmp_path / "here.parquet", 5)
    assert_same_recommendations(tmp_path / "here.parquet", out)
    assert not list(tmp_path.glob(".*.parts"))


def test_what_fails_in_a_worker_is_told_in_a_line(ray, tmp_path):
    tables = [pa.table({"row": [1, 2]})]
    with (
        pytest.raises(SpeederError, match=r"^ray: a worker failed: ValueError: no such thing$"),
        computed(tmp_path / "parts", {}, tables, failing, OnRay(), "fail"),
    ):
        pass
