"""Retrieval through faiss: what each kind of index finds of the exact top k, and what is said of damaged ones."""

import sys

import pytest
import torch

from speeder.cli.main import main
from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.io.files import read_json, write_json
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.queries import Queries
from speeder.retrieval import ann
from speeder.retrieval.ann import KINDS, ItemIndex, build_index, open_store, recall_at_k
from speeder.retrieval.shards import TokenShards, write_token_shards
from tests.model.worlds import tiny_backbone, tiny_model

ITEMS = 3000


@pytest.fixture(scope="module")
def model() -> SpeederForCausalLM:
    """A recommender of items in 60 clusters."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 12, generator=generator)
    features = centres[torch.arange(ITEMS) % 60] + 0.5 * torch.randn(ITEMS, 12, generator=generator)
    catalogue = ItemCatalogue([f"id{i}" for i in range(ITEMS)], features={"text": features})
    return SpeederForCausalLM.from_backbone(tiny_backbone(), catalogue, negatives="sampled")


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory) -> TokenShards:
    return write_token_shards(model, tmp_path_factory.mktemp("ann") / "shards", shard_items=700)


@pytest.fixture(scope="module")
def queries(model) -> torch.Tensor:
    histories = [[user, (7 * user) % ITEMS, (user * user) % ITEMS] for user in range(64)]
    return Queries.cat(model.user_states(histories)).dense


@pytest.fixture(scope="module", params=KINDS)
def index(request, shards, tmp_path_factory) -> ItemIndex:
    return build_index(shards, tmp_path_factory.mktemp("ann") / request.param, request.param, m=16)


def test_an_index_finds_most_of_the_exact_top_k_and_scores_as_the_model(index, shards, queries, monkeypatch):
    exact_scores, exact = shards.topk(queries, 10)
    scores, items = index.topk(queries, 10)
    monkeypatch.setattr(ann, "_SCORED_BYTES", 1)  # a query at a time
    alone = index.topk(queries, 10)
    torch.testing.assert_close(alone[0], scores, atol=1e-5, rtol=1e-5)
    assert alone[1].tolist() == items.tolist()
    assert [len(part) for part in index.topk(queries[:0], 10)] == [0, 0]
    recall = recall_at_k(index, queries, 10)
    overlap = [len({*a} & {*b}) / 10 for a, b in zip(items.tolist(), exact.tolist(), strict=True)]
    assert recall == pytest.approx(sum(overlap) / len(overlap))
    assert recall == 1.0 if index.kind == "exact" else recall > 0.9
    for row in range(len(queries)):
        both = [item for item in items[row].tolist() if item in exact[row].tolist()]
        for item in both:
            torch.testing.assert_close(
                scores[row][items[row] == item], exact_scores[row][exact[row] == item], atol=1e-5, rtol=1e-5
            )
    assert (scores.diff(dim=1) <= 0).all()


def test_looking_at_less_finds_less(index, queries):
    """What would not be seen if the index were passed by."""
    if index.kind == "exact":
        pytest.skip("an exact index looks at all items")
    hasty = ItemIndex(index.folder, index.shards, ef_search=1, nprobe=1, refine=1)
    assert recall_at_k(hasty, queries, 10) < recall_at_k(index, queries, 10)


def test_seen_items_are_left_out_and_queries_that_find_too_few_are_answered_exactly(index, shards, queries):
    seen = shards.topk(queries, 30)[1].sort(dim=1).values.tolist()
    items = index.topk(queries, 5, seen)[1]
    for row, hidden in zip(items.tolist(), seen, strict=True):
        assert len(set(row)) == 5 and not {*row} & {*hidden}
    most = ITEMS - 30
    assert (
        index.topk(queries[:2], most, seen[:2])[1].tolist()
        == shards.topk(queries[:2], most, seen[:2])[1].tolist()
    )
    with pytest.raises(ValueError, match=rf"k: expected 1\.\.{most}"):
        index.topk(queries[:2], most + 1, seen[:2])


def test_the_recommender_recommends_by_an_index(index, model):
    exact = model.recommend([[5, 9], [77]], k=5)
    model.use_item_store(open_store(index.folder))
    try:
        found = model.recommend([[5, 9], [77]], k=5)
    finally:
        model.use_item_store(None)
    for row, right in zip(found, exact, strict=True):
        assert len({item.item for item in row} & {item.item for item in right}) >= 3
        assert row[0].score <= right[0].score + 1e-4


def test_an_index_of_other_tokens_and_damaged_files_are_named(index, shards, tmp_path):
    other = write_token_shards(tiny_model(), tmp_path / "other")
    with pytest.raises(SpeederError, match="built over other tokens"):
        ItemIndex(index.folder, other)
    copy = build_index(shards, tmp_path / "copy", "exact")
    whole = (copy.folder / "index.faiss").read_bytes()
    (copy.folder / "index.faiss").write_bytes(whole[:-9])
    with pytest.raises(SpeederError, match=r"has .* bytes"):
        open_store(copy.folder)
    (copy.folder / "index.faiss").write_bytes(b"x" * len(whole))
    with pytest.raises(SpeederError, match="no readable index"):
        open_store(copy.folder)
    (copy.folder / "index.faiss").unlink()
    with pytest.raises(SpeederError, match="missing"):
        open_store(copy.folder)
    with pytest.raises(SpeederError, match="no manifest"):
        open_store(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lsh", {}, "kind: expected one of"),
        ("hnsw", {"m": 0}, "m: expected at least 1"),
        ("ivf-pq", {"pq_bytes": 5}, "pq_bytes: expected a divisor of the hidden size 32"),
        ("hnsw", {"search": {"ef_search": 0}}, "ef_search: expected"),
        ("ivf-pq", {"nlist": 4000}, "ivf-pq: expected at least 4000 items, got 3000"),
    ],
)
def test_settings_that_do_not_fit_are_named(kind, settings, message, shards, tmp_path):
    with pytest.raises(SpeederError, match=message):
        build_index(shards, tmp_path / "index", kind, **settings)


def test_without_faiss_the_extra_is_named(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SpeederError, match=r"pip install .faiss-cpu"):
        build_index(shards, tmp_path / "index", "exact")


def test_the_commands(model, tmp_path, capsys):
    """From a saved recommender to recommendations by an index; the shards are written once."""
    model.save_pretrained(tmp_path / "model")
    run = str(tmp_path / "model")
    assert main(["index", run, "--kind", "ivf-pq", "--queries", "40", "-k", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"{ITEMS} items" in printed and "recall@5 " in printed and "exact" in printed
    recall = float(printed.split("recall@5 ")[1].split()[0])
    assert 0.8 < recall <= 1.0
    for folder in ("ivf-pq", "shards"):
        command = ["recommend", run, "--index", str(tmp_path / "model" / "index" / folder)]
        assert main([*command, "--history", "id4", "id9", "-k", "3"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3
    assert main([*command, "--histories", "x.parquet", "--out", "y.parquet"]) == 1
    assert "--index: expected" in capsys.readouterr().err
    assert main(["index", run, "-k", "0"]) == 1
    assert "-k: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("way", [True, False], ids=["recorded", "as version 0.1.0 wrote it"])
def test_an_index_that_was_moved_with_its_shards(model, queries, tmp_path, way):
    shards = write_token_shards(model, tmp_path / "run" / "index" / "shards", shard_items=700)
    folder = build_index(shards, tmp_path / "run" / "index" / "exact", "exact").folder
    manifest = read_json(folder / "manifest.json")
    assert manifest["shards_from_index"] == "../shards"
    if not way:
        del manifest["shards_from_index"]
        write_json(folder / "manifest.json", manifest)
    (tmp_path / "run").rename(tmp_path / "moved")
    found = open_store(tmp_path / "moved" / "index" / "exact")
    assert found.shards.folder == tmp_path / "moved" / "index" / "shards"
    assert found.topk(queries[:3], 5)[1].tolist() == shards.topk(queries[:3], 5)[1].tolist()

    (tmp_path / "moved" / "index" / "shards").rename(tmp_path / "away")
    with pytest.raises(SpeederError, match="expected finished token shards"):
        open_store(tmp_path / "moved" / "index" / "exact")
    assert len(ItemIndex(tmp_path / "moved" / "index" / "exact", TokenShards(tmp_path / "away"))) == ITEMS
