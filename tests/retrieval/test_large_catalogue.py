"""`benchmarks.large_catalogue` on 50,000 items: from training to retrieval, and never all items at once."""

import json
import re
from argparse import Namespace

import pytest

from benchmarks import large_catalogue
from speeder.model.mrc import MRC, PIECE

ITEMS = 50_000


@pytest.mark.slow
def test_from_training_to_retrieval_without_ever_compressing_the_whole_catalogue(tmp_path, monkeypatch):
    most, forward = [], MRC.forward

    def counted(self, rows=None):
        most.append(self.num_items if rows is None else len(rows))
        return forward(self, rows)

    monkeypatch.setattr(MRC, "forward", counted)
    settings = dict(items=ITEMS, users=200, width=64, steps=12, negatives=1024, m=16, threads=1, limit=8.0)
    found = {}
    for phase in large_catalogue.PHASES:
        options = Namespace(**settings, out=tmp_path, phase=phase)
        work = {
            "data": large_catalogue.make_data,
            "train": large_catalogue.train_model,
            "shards": large_catalogue.write_shards,
            "queries": large_catalogue.make_queries,
        }
        most.clear()
        found[phase] = work.get(phase, large_catalogue.search)(options)
        assert max(most, default=0) <= PIECE, phase
        if phase in ("queries", "exact", "hnsw", "ivf-pq"):
            assert most in ([], [4]), "tokens come from the shards, but for a few that are compared with them"
    first, last = map(float, re.search(r"loss ([\d.]+) to ([\d.]+)", found["train"]).groups())
    assert last < first
    for kind, thorough in (
        ("hnsw", 0.95),
        ("ivf-pq", 0.5),
    ):  # of a model that hardly knows where its items lie
        recalls = [float(number) for number in re.findall(r"recall@10 ([\d.]+)", found[kind])]
        assert len(recalls) == 3 and recalls[0] < recalls[2] and recalls[2] > thorough, found[kind]
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["items"] == ITEMS and len(manifest["files"]) == 1


@pytest.mark.slow
def test_a_phase_that_needs_more_than_the_limit_fails(tmp_path, capfd):
    """The limit is real: the first phase alone needs more than this."""
    flags = ["--items", "20000", "--users", "50", "--limit", "0.05", "--out", str(tmp_path)]
    assert large_catalogue.main(flags) == 1
    assert "data: exit status" in capfd.readouterr().err
