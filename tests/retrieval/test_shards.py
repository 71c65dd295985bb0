"""Item tokens in shards: the same recommendations, written to the end after any stop, and no damage goes unnoticed."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from speeder.errors import SpeederError
from speeder.io.files import read_json, write_json
from speeder.model.modeling import SpeederForCausalLM
from speeder.retrieval.shards import TokenShards, write_token_shards
from speeder.serving.sessions import UserSessions
from speeder_kernels import topk_items
from tests.model.worlds import TEXT, tiny_model

HISTORIES = [[1, 2, 3], [4], [7, 19, 0, 5]]


def items(recommended) -> list[list[int]]:
    return [[item.item for item in row] for row in recommended]


@pytest.mark.parametrize("shard_items", [1, 7, 20, 64])
@pytest.mark.parametrize("tokens_per_item", [1, 2])
def test_recommendations_scores_and_logits_are_those_of_tokens_in_memory(
    shard_items, tokens_per_item, tmp_path
):
    model = tiny_model(tokens_per_item=tokens_per_item)
    ids = torch.tensor([[3, TEXT + 4, TEXT + 9]]).repeat_interleave(tokens_per_item, 1)
    calls = [
        lambda: items(model.recommend(HISTORIES, k=5)),
        lambda: items(model.recommend(HISTORIES, k=20, exclude_seen=False)),
        lambda: items(UserSessions(model, 1000).recommend(dict(enumerate(HISTORIES)), k=16).values()),
        lambda: model.score(HISTORIES),
        lambda: UserSessions(model, 1000).score(dict(enumerate(HISTORIES))),
        lambda: model(ids).logits,
    ]
    with torch.no_grad():
        expected = [call() for call in calls]
        shards = write_token_shards(model, tmp_path / "shards", shard_items=shard_items)
        model.use_item_store(shards)
        with pytest.MonkeyPatch.context() as patch:  # nothing is compressed any more
            patch.setattr("speeder.model.mrc.compress_items", None)
            got = [call() for call in calls]
    assert got[:3] == expected[:3]
    for mine, right in zip(got[3:], expected[3:], strict=True):
        torch.testing.assert_close(mine, right)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == -(-20 // shard_items)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(1, 9), queries=st.integers(1, 4), seed=st.integers(0, 9))
def test_top_k_over_shards_is_top_k_over_the_whole(data, k, queries, seed, tmp_path_factory):
    """Ties included (tokens are few different ones), whatever was seen."""
    shards = shards_of_seven(tmp_path_factory)
    seen = data.draw(
        st.lists(st.sets(st.integers(0, 19), max_size=11).map(sorted), min_size=queries, max_size=queries)
    )
    whole = torch.cat([vectors for _, vectors in shards.vectors()])
    states = torch.randn(queries, 32, generator=torch.Generator().manual_seed(seed))
    indptr = torch.tensor([0, *map(len, seen)]).cumsum(0)
    excluded = torch.tensor([item for row in seen for item in row], dtype=torch.int64)
    scores, found = topk_items(states, whole, k, exclude_indptr=indptr, exclude_items=excluded)
    got_scores, got = shards.topk(states, k, seen)
    assert got.tolist() == found.tolist()
    torch.testing.assert_close(got_scores, scores)


_MADE: list[TokenShards] = []


def shards_of_seven(factory) -> TokenShards:
    if not _MADE:
        model = tiny_model()
        for name in model.catalogue.modalities:  # items 0..6 come again as 7..13: equal scores
            features = getattr(model.mrc, f"features_{name}")
            features[7:14], model.mrc.present[7:14] = features[:7].clone(), model.mrc.present[:7].clone()
        _MADE.append(write_token_shards(model, factory.mktemp("shards") / "made", shard_items=7))
    return _MADE[0]


def test_k_that_a_query_cannot_have_is_named(tmp_path_factory):
    shards = shards_of_seven(tmp_path_factory)
    states = torch.randn(2, 32)
    assert shards.topk(states, 17, [[1, 2, 3], []])[1].shape == (2, 17)
    for k in (0, 18):
        with pytest.raises(ValueError, match=r"k: expected 1\.\.17"):
            shards.topk(states, k, [[1, 2, 3], []])
    with pytest.raises(ValueError, match=r"items: expected 0\.\.19"):
        shards.rows(torch.tensor([3, 20]))


def test_dtypes(tmp_path):
    model = tiny_model()
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        shards = write_token_shards(model, tmp_path / name, dtype=name, shard_items=8)
        whole = torch.cat([vectors for _, vectors in shards.vectors()])
        assert whole.dtype == dtype
        with torch.no_grad():
            torch.testing.assert_close(whole, model.item_tokens()[0][:, 0].to(dtype))
        model.use_item_store(shards)
        assert len(model.recommend(HISTORIES, k=3)) == 3
        model.use_item_store(None)
    with pytest.raises(SpeederError, match="dtype: expected one of"):
        write_token_shards(model, tmp_path / "more", dtype="int8")
    with pytest.raises(SpeederError, match="shard_items"):
        write_token_shards(model, tmp_path / "more", shard_items=0)


def test_missing_truncated_and_changed_shards_are_named(tmp_path):
    model, folder = tiny_model(), tmp_path / "shards"
    write_token_shards(model, folder, shard_items=8)
    second = sorted(folder.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-5])
    with pytest.raises(SpeederError, match=f"{second.name} has .* bytes"):
        TokenShards(folder)
    second.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    TokenShards(folder)
    with pytest.raises(SpeederError, match=f"{second.name} has changed"):
        TokenShards(folder, verify=True)
    second.unlink()
    with pytest.raises(SpeederError, match=f"{second.name} is missing"):
        TokenShards(folder)
    shards = write_token_shards(model, folder, shard_items=8)
    with torch.no_grad():
        torch.testing.assert_close(shards.rows(torch.arange(20)).tokens, model.item_tokens()[0])
    (folder / "manifest.json").unlink()
    with pytest.raises(SpeederError, match=r"no manifest\.json"):
        TokenShards(folder)


def test_a_damaged_manifest_is_named(tmp_path):
    write_token_shards(tiny_model(), tmp_path / "shards", shard_items=8)
    path = tmp_path / "shards" / "manifest.json"
    manifest = read_json(path)
    for change, message in (
        ({"format": "other"}, "was expected"),
        ({"items": 30}, "expected shards of"),
        ({"hidden_size": 31}, "expected .* tokens"),
        ({"shard_items": None}, "damaged"),
    ):
        write_json(path, manifest | change)
        with pytest.raises(SpeederError, match=message):
            TokenShards(tmp_path / "shards")


def test_shards_of_other_weights_or_items_are_refused_and_written_anew(tmp_path):
    model = tiny_model()
    shards = write_token_shards(model, tmp_path / "shards", shard_items=8)
    old = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.safetensors")}
    write_token_shards(model, tmp_path / "shards", shard_items=8)
    assert old == {path: path.stat().st_mtime_ns for path in old}, "what is there is kept"
    with torch.no_grad():
        model.mrc.norm_weight.mul_(1.5)
    with pytest.raises(SpeederError, match="with other weights"):
        model.use_item_store(shards)
    model.use_item_store(write_token_shards(model, tmp_path / "shards", shard_items=8))
    other = tiny_model()
    other.set_catalogue(other.catalogue.select([*range(19, -1, -1)]))
    with torch.no_grad():
        other.mrc.norm_weight.mul_(1.5)
    with pytest.raises(SpeederError, match="with other catalogue"):
        other.use_item_store(TokenShards(tmp_path / "shards"))
    write_token_shards(model, tmp_path / "shards", shard_items=5)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 4, "those of eight are gone"
    (tmp_path / "shards" / "notes.txt").touch()
    with pytest.raises(SpeederError, match=r"notes\.txt"):
        write_token_shards(model, tmp_path / "shards")


def test_a_store_ends_with_training_and_with_the_catalogue(tmp_path):
    model = tiny_model()
    shards = write_token_shards(model, tmp_path / "shards", shard_items=8)
    model.use_item_store(shards)
    with pytest.raises(ValueError, match="labels"):
        ids = torch.tensor([[TEXT, TEXT + 1]])
        model(ids, labels=ids)
    model.train().eval()
    assert model.item_store is None
    model.use_item_store(shards)
    model.set_catalogue(model.catalogue.select(range(10)))
    assert model.item_store is None


WRITE = """
import sys, time
from speeder.retrieval import shards
from speeder.model.modeling import SpeederForCausalLM
write = shards._write_shard
def slowly(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(float(sys.argv[3]))
shards._write_shard = slowly
shards.write_token_shards(SpeederForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2], shard_items=3)
"""


@pytest.mark.slow
def test_a_killed_writer_goes_on_where_it_was(tmp_path):
    model, folder = tiny_model(), tmp_path / "shards"
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", WRITE, str(tmp_path / "model"), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, "3"], stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout.readline() == first.stdout.readline() == "written\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    there = {path: path.stat().st_mtime_ns for path in folder.glob("tokens-*")}
    assert len(there) >= 2
    with pytest.raises(SpeederError, match=r"no manifest\.json"):
        TokenShards(folder)
    again = subprocess.run([*command, "0"], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    assert again.stdout.count("written") == 7 - len(there)
    assert there == {path: path.stat().st_mtime_ns for path in there}
    shards = TokenShards(folder, verify=True)
    loaded = SpeederForCausalLM.from_pretrained(tmp_path / "model")
    shards.check(loaded)
    with torch.no_grad():
        whole = torch.cat([vectors for _, vectors in shards.vectors()])
        torch.testing.assert_close(whole, loaded.item_tokens()[0][:, 0])
    with safe_open(next(iter(there)), framework="pt") as file:
        assert file.metadata()["weights"] == shards.identity["weights"]


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    shards = write_token_shards(tiny_model(), tmp_path / "shards", shard_items=10)
    expected, manifest = torch.cat([part for _, part in shards.vectors()]), shards.folder / "manifest.json"
    text = manifest.read_text()
    for number in (1, 0):  # as the last two of 100,001 would be called
        old, new = f"tokens-{number:05}-of-00002", f"tokens-{number + 99_999}-of-100001"
        (shards.folder / f"{old}.safetensors").rename(shards.folder / f"{new}.safetensors")
        text = text.replace(old, new)
    manifest.write_text(text)
    assert torch.equal(torch.cat([part for _, part in TokenShards(shards.folder).vectors()]), expected)
