"""What `speeder describe` says, beside numbers counted by hand."""

import re

import numpy as np
import pytest
import torch

from speeder.data import Interactions, ItemCatalogue, PreparedData
from speeder.data.describe import describe
from speeder.errors import SpeederError
from tests.model.worlds import save_tiny_backbone

# lengths 1, 4, 2: three users of three items
USER, ITEM = [0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 2, 0, 1, 2]


@pytest.fixture
def data() -> PreparedData:
    catalogue = ItemCatalogue(["a", "b", "c"], ["one", "two words", ""], ["one.", "two words and more", ""])
    catalogue = catalogue.with_features("text", torch.ones(3, 5), torch.tensor([True, True, False]))
    interactions = Interactions(np.array(USER), np.array(ITEM), np.arange(7), ["u", "v", "w"])
    counts = {"read": 12, "kept": 7, "dropped": {"not JSON": 5}}
    return PreparedData(catalogue, interactions, {"dataset": "tiny", "interactions": counts})


def values(report: str) -> dict[str, str]:
    """Left column -> right column of every line that has two."""
    pairs = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in report.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def test_sizes_lengths_and_coverage(data: PreparedData) -> None:
    report = describe(data, tokenizer=None)
    found = values(report)
    assert (found["users"], found["items"], found["interactions"]) == ("3", "3", "7")
    assert found["sparsity"] == f"{100 * (1 - 7 / 9):.4f} %"
    assert found["test users"].startswith("1 ")
    assert found["history length"].startswith("1 / 2 / 2.33 / 4 ")
    assert found["interactions per item"].startswith("2 / 2 / 2.33 / 3 ")
    assert re.search(r"1-2 +2 +#{40}\n +3-5 +1 +#{20}\n +6-10 +0\n", report)
    assert found["text"] == "2 of 3 items (66.7%), 5 features"
    assert found["with a title"] == "2 of 3 items (66.7%)"
    assert found["interactions read"] == "12, kept 7" and found["not JSON"] == "5"
    assert "Tokens" not in report


def test_costs_in_tokens(data: PreparedData, tmp_path) -> None:
    save_tiny_backbone(tmp_path)  # its tokenizer makes a token of each word or mark
    found = values(describe(data, str(tmp_path), tokens_per_item=2))
    assert found["an item as its title"] == "1.0 mean, 1 median"  # 1, 2, 0
    assert found["an item as its whole text"] == "2.0 mean, 2 median"  # 2, 4, 0
    assert found["a history as titles"] == "2 median, 4 longest"  # 1, 1 + 2 + 0 + 1, 2
    assert found["a history as whole texts"] == "4 median, 8 longest"
    assert found["an item in Speeder"] == "2" and found["a history in Speeder"] == "4 median, 8 longest"


def test_what_cannot_be_described(data: PreparedData, tmp_path) -> None:
    with pytest.raises(SpeederError, match=r"tokenizer .* cannot be loaded"):
        describe(data, str(tmp_path / "none"))
    empty = PreparedData(data.catalogue, Interactions(*[np.zeros(0, dtype=int)] * 3, []))
    with pytest.raises(SpeederError, match="at least one interaction"):
        describe(empty, None)
