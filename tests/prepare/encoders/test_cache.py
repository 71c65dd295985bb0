"""The feature cache: each content once, whatever is interrupted or broken."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speeder.prepare.encoders.cache import (
    FeatureCache,
    content_key,
    encode_cached,
    module_hash,
    zeros_on_disk,
)

WIDTH = 3


def feature(text: str) -> torch.Tensor:
    return torch.tensor([float(int(content_key(text)[n * 4 : n * 4 + 4], 16)) for n in range(WIDTH)])


def encode(folder: Path, texts: list[str | None], asked: list[str], fail_after: int | None = None) -> tuple:
    def compute(positions: list[int]) -> list[torch.Tensor | None]:
        if fail_after is not None and len(asked) >= fail_after:
            raise KeyboardInterrupt
        asked.extend(texts[position] for position in positions)
        return [None if texts[position] == "broken" else feature(texts[position]) for position in positions]

    return encode_cached(
        FeatureCache("toy", folder),
        [None if text is None else content_key(text) for text in texts],
        [len(text or "") for text in texts],
        compute,
        width=WIDTH,
        batch_size=2,
        description="toys",
        progress=False,
    )


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.none() | st.sampled_from(["broken", *"abcdefghij"]), max_size=12))
def test_rows_are_right_and_each_content_is_encoded_once(
    texts: list[str | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    asked: list[str] = []
    features, present = encode(folder, texts, asked)
    assert features.shape == (len(texts), WIDTH) and features.dtype == torch.float32
    assert sorted(asked) == sorted({text for text in texts if text is not None})
    for row, text in enumerate(texts):
        assert present[row] == (text not in (None, "broken"))
        assert torch.equal(features[row], feature(text) if present[row] else torch.zeros(WIDTH))
    again: list[str] = []
    second, _ = encode(folder, texts, again)
    assert torch.equal(second, features) and set(again) <= {"broken"}


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(1000)]
    first: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, texts, first, fail_after=600)
    rest: list[str] = []
    features, present = encode(tmp_path, texts, rest)
    assert present.all() and torch.equal(features, torch.stack([feature(text) for text in texts]))
    assert len(first) == 600 and sorted(first + rest) == sorted(texts)


def test_broken_shards_are_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a", "b"]
    encode(tmp_path, texts, [])
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])
    asked: list[str] = []
    _, present = encode(tmp_path, texts, asked)
    assert present.all() and sorted(asked) == texts and "broken cache file" in caplog.text
    asked.clear()
    encode(tmp_path, texts, asked)  # the good shard took the broken one's place
    assert asked == []


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that holds a tensor's numbers, "" where they lie in memory without one."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return "".join(name)
    raise AssertionError("the tensor's memory is not mapped at all")


def test_rows_lie_on_disk(tmp_path: Path) -> None:
    """Both those that were just encoded and those of an earlier run, and what is made of them."""
    texts = [f"text {number}" for number in range(700)]
    features, _ = encode(tmp_path, texts, [])
    assert str(tmp_path) in mapped_file(features)
    for cache in (FeatureCache("toy", tmp_path), fresh := FeatureCache("other", tmp_path)):
        if cache is fresh:
            cache.add({content_key(text): feature(text) for text in texts[:3]})
        row = cache[content_key(texts[2])]
        assert torch.equal(row, feature(texts[2])) and mapped_file(row).endswith(".safetensors")
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".safetensors"}  # the matrix's own file has no name any more


def test_a_matrix_that_the_disk_cannot_hold_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: a map that finds no room when it is written to kills the process."""

    def no_room(descriptor: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, 5 * 7 * 4)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space left"):
        zeros_on_disk(5, 7, tmp_path)
    assert not list(tmp_path.iterdir())


def test_encoders_do_not_share_rows(tmp_path: Path) -> None:
    FeatureCache("one", tmp_path).add({content_key("a"): torch.ones(WIDTH)})
    assert content_key("a") in FeatureCache("one", tmp_path)
    assert content_key("a") not in FeatureCache("two", tmp_path)


def test_a_module_hash_sees_every_weight() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    before = module_hash(module)
    assert module_hash(module) == before
    for tensor in module.state_dict().values():
        old = tensor.clone()
        tensor.add_(1)
        assert module_hash(module) != before
        tensor.copy_(old)
    assert module_hash(module) == before
