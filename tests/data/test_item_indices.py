"""What is no item index is refused everywhere, by name, never converted; what is one gives the same answer."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.baselines.content import ContentNeighbours
from speeder.baselines.neighbours import ITEM_PAIRS, Neighbours
from speeder.baselines.popularity import Popularity
from speeder.baselines.sasrec.fit import fit_sasrec
from speeder.baselines.sasrec.model import SASRec
from speeder.data.fingerprints import training_hash
from speeder.data.item_indices import item_array, item_indices
from speeder.evaluation.metrics import target_ranks
from speeder.model.explain import explain
from speeder.model.item_pairs import count_pairs
from speeder.model.item_store import seen_table
from speeder.model.processor import SpeederProcessor
from speeder.model.sequences import build_sequence
from speeder.recipes.neighbours import NeighboursConfig
from speeder.serving.sessions import UserSessions
from tests.model.worlds import tiny_model

WRONG = {
    "a fraction": [1.9],
    "a whole float": [1.0],
    "a boolean": [True],
    "bytes": [b"1"],
    "None": [None],
    "a decimal": [Decimal(1)],
    "a ratio": [Fraction(1)],
    "not a number": [float("nan")],
    "infinity": [float("inf")],
    "a complex number": [1j],
    "a numpy float": [np.float32(1)],
    "a numpy boolean": [np.True_],
    "a float tensor": [torch.tensor(1.9)],
    "a boolean tensor": [torch.tensor(True)],
    "a list in the list": [[1]],
    "a float after integers": [2, 3, 1.5],
    "a boolean after integers": [2, 3, False],
    "an array of floats": np.array([1.9, 2.0]),
    "an array of booleans": np.array([True, False]),
    "an array of bytes": np.array([b"1"]),
    "an array of mixed objects": np.array([1, 2.5], dtype=object),
    "a tensor of floats": torch.tensor([1.9]),
    "a tensor of booleans": torch.tensor([True]),
    "bytes as the list": b"\x01\x02",
    "a set as the list": {1, 2},
    "a mapping as the list": {1: 2},
}
RIGHT = {
    "integers": [1, 2, 3],
    "a tuple": (1, 2, 3),
    "a range": range(1, 4),
    "numpy integers": [np.int32(1), np.uint8(2), np.int64(3)],
    "torch integers": [torch.tensor(1), torch.tensor(2, dtype=torch.int32), 3],
    "an int32 array": np.array([1, 2, 3], dtype=np.int32),
    "a uint16 array": np.array([1, 2, 3], dtype=np.uint16),
    "an int64 tensor": torch.tensor([1, 2, 3]),
    "an array of objects": np.array([1, 2, 3], dtype=object),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def _entrances(model):
    """Every public place that takes item indices: name -> a call with a list of them."""
    sasrec = SASRec(20, None).eval()
    none = dict(training_hash="", features_hashes={}, split_hash="")
    pairs = count_pairs([[1, 2]], 20, NeighboursConfig())
    neighbours = Neighbours(NeighboursConfig(), pairs, {}, {ITEM_PAIRS: 1.0}, **none)
    content = ContentNeighbours(torch.eye(20), torch.ones(20, dtype=torch.bool))
    scores = torch.zeros(1, 20)
    processor = SpeederProcessor.__new__(SpeederProcessor)
    processor.config, processor.catalogue = model.config, model.catalogue
    return {
        "indices_of": model.catalogue.indices_of,
        "select": model.catalogue.select,
        "recommend": lambda items: model.recommend([items]),
        "score": lambda items: model.score([items]),
        "sequence": model.sequence,
        "build_sequence": lambda items: build_sequence(items, model.config),
        "a target": lambda items: [build_sequence([1], model.config, target=item) for item in items],
        "the processor": lambda items: processor([items], packed=True),
        "the processor's targets": lambda items: processor([[1]] * len(items), items, packed=True),
        "explain": lambda items: explain(model, items, [4]),
        "items to explain": lambda items: explain(model, [4], items),
        "sessions": lambda items: UserSessions(model, 4096).recommend({"a user": items}),
        "sessions extend": lambda items: UserSessions(model, 4096).extend({"a user": items}),
        "popularity": lambda items: Popularity([items], 20),
        "content": lambda items: content.score([items]),
        "sasrec": lambda items: sasrec.score([items]),
        "neighbours": lambda items: neighbours.score([items]),
        "count_pairs": lambda items: count_pairs([items], 20, NeighboursConfig()),
        "fit_sasrec": lambda items: fit_sasrec([items], 20, epochs=1),
        "training_hash": lambda items: training_hash([items]),
        "target_ranks": lambda items: target_ranks(scores, torch.tensor([0]), [items]),
        "excluded items": lambda items: seen_table([items], 1, torch.device("cpu")),
    }


ENTRANCES = list(_entrances(tiny_model()))


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_index_is_refused(model, entrance, what):
    items = WRONG[what]
    if entrance == "a target" and (isinstance(items, set | dict | bytes) or what == "None"):
        pytest.skip("targets are given one by one, and None is no target")
    with pytest.raises((TypeError, ValueError), match=r"expected .*(list|integers|dimension)"):
        _entrances(model)[entrance](items)


@pytest.mark.parametrize("what", RIGHT)
def test_integers_of_any_library_are_the_same_items(model, what):
    items = RIGHT[what]
    assert model.catalogue.indices_of(items) == item_indices("items", items) == [1, 2, 3]
    assert item_array("items", items).tolist() == [1, 2, 3]
    assert torch.equal(model.score([items]), model.score([[1, 2, 3]]))
    assert model.sequence(items) == model.sequence([1, 2, 3])
    assert [item.item for item in model.recommend([items])[0]] == [
        item.item for item in model.recommend([["id1", "id2", "id3"]])[0]
    ]
    assert training_hash([items]) == training_hash([[1, 2, 3]])


@pytest.mark.parametrize("empty", [[], (), np.array([]), torch.tensor([]), np.array([], dtype=np.int32)])
def test_an_empty_list_of_any_dtype_is_empty(empty):
    assert item_indices("items", empty) == [] and item_array("items", empty).dtype == np.int64


def test_ids_and_indices_may_be_mixed(model):
    assert model.catalogue.indices_of(["id3", 4, np.str_("id5"), np.int64(6)]) == [3, 4, 5, 6]
    assert model.catalogue.indices_of(np.array(["id3", "id4"])) == [3, 4]


def test_a_negative_index_is_no_text_token(model):
    """Index -1 would be the last text token."""
    for call in (lambda: model.sequence([-1]), lambda: model.sequence([1], target=-1)):
        with pytest.raises(ValueError, match="at least 0, got -1"):
            call()


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(-3, 25), st.floats(), st.booleans(), st.binary(), st.decimals(), st.none()),
        max_size=6,
    )
)
def test_exactly_lists_of_integers_in_range_pass(entries):
    catalogue = CATALOGUE
    fits = all(type(entry) is int and 0 <= entry < 20 for entry in entries)
    if fits:
        assert catalogue.indices_of(entries) == entries
    else:
        with pytest.raises((TypeError, ValueError), match="expected item indices"):
            catalogue.indices_of(entries)


CATALOGUE = tiny_model().catalogue


@pytest.mark.parametrize("name", ["input_ids", "labels", "ranks", "cu_seqlens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_the_models_tensors_are_integers(model, name, dtype):
    ids = torch.tensor([[64, 65, 66]])
    arguments = {"input_ids": ids, "ranks": torch.tensor([[0, 1, 2]]), "cu_seqlens": torch.tensor([0, 3])}
    arguments["labels"] = ids
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name}: expected integers, got {dtype}"):
        model(**arguments)


@pytest.mark.parametrize("single", [3, "id3", np.int64(3), torch.tensor(3), np.array(3), b"3", 1.5])
def test_one_item_is_no_history(model, single):
    with pytest.raises(ValueError, match="got a single history"):
        model.recommend([single])
    with pytest.raises(ValueError, match="expected a list of items"):
        UserSessions(model, 4096).recommend({"a": single})
