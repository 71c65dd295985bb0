"""The synthetic world: its rule holds, nothing else tells the answer, and features carry what they should."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speeder.data import PreparedData
from speeder.prepare.encoders.image import ImageEncoder
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.synthetic import MODALITIES, SyntheticWorld, synthetic_world

RULES = [*MODALITIES, "order"]


@pytest.fixture(scope="module", params=RULES)
def world(request: pytest.FixtureRequest) -> SyntheticWorld:
    return synthetic_world(follows=request.param, num_users=400, seed=3)


def target_scores(world: SyntheticWorld, split: str) -> torch.Tensor:
    targets = torch.from_numpy(world.split.targets(split))
    return torch.nn.functional.one_hot(targets, len(world.catalogue)).float()


def test_sequences_are_whole_and_without_repeats(world: SyntheticWorld) -> None:
    sequences = world.interactions.sequences()
    assert len(sequences) == 400 and all(len(set(items.tolist())) == 12 for items in sequences)
    assert not world.cold_items[np.concatenate(world.split.training())].any()
    assert world.cold_items.sum() == 12 and world.cold_users.sum() == 200
    held_out = world.split.targets("validation")
    assert (world.cold_items[held_out] == world.cold_users).all()
    assert not world.cold_items[world.split.targets("test")].any()


def test_the_rule_holds_where_it_is_said_to(world: SyntheticWorld) -> None:
    for split in ("validation", "test"):
        applies = world.rule_applies(split)
        histories, targets = world.split.histories(split), world.groups[world.split.targets(split)]
        for user in np.flatnonzero(applies):
            before = world.groups[histories[user]]
            if world.follows == "order":
                first, second = before[-3:-1]
                assert {first, second} == {0, 1} and targets[user] == (4 if first == 0 else 5)
            else:
                assert targets[user] == (before[-1] + 1) % 6
    assert world.rule_applies("test").all()


def test_no_other_attribute_of_the_history_tells_the_target(world: SyntheticWorld) -> None:
    """For cold users, only the followed attribute of the last item agrees with the target, up to a shift."""
    users = world.cold_users
    last = np.array([history[-1] for history in world.split.histories("test")])[users]
    targets = world.groups[world.split.targets("test")][users]
    driver = None if world.follows == "order" else world.follows
    for name, values in world.attributes.items():
        # Per cold item, not per user: 12 items are 12 independent facts.
        seen = {(item, values[item], group) for item, group in zip(last, targets, strict=True)}
        agreement = max(
            np.mean([(value + shift) % 6 == group for _, value, group in seen]) for shift in range(6)
        )
        if name == driver:
            assert agreement == 1.0
        else:
            assert agreement < 0.75


@pytest.mark.parametrize("follows", MODALITIES)
def test_a_cold_item_cannot_be_guessed_from_those_before(follows: str) -> None:
    world = synthetic_world(follows=follows, num_users=600)
    histories = [h for h, cold in zip(world.split.histories("test"), world.cold_users, strict=True) if cold]
    steps = [(world.groups[history[-1]] - world.groups[history[-2]]) % 6 for history in histories]
    assert max(np.bincount(steps, minlength=6)) / len(steps) < 0.27  # evenly: 1/6


def test_a_bag_of_items_cannot_tell_an_order() -> None:
    world = synthetic_world(follows="order", num_users=400)
    histories, targets = world.split.histories("test"), world.groups[world.split.targets("test")]
    bags = [tuple(np.bincount(world.groups[history[-3:]], minlength=6)) for history in histories]
    for bag in set(bags):
        outcomes = targets[[other == bag for other in bags]]
        assert set(outcomes) == {4, 5} and 0.35 < (outcomes == 4).mean() < 0.65


def test_accuracy_and_bayes_rate_mean_what_they_say(world: SyntheticWorld) -> None:
    assert world.group_accuracy(target_scores(world, "test"), "test") == 1.0
    random = torch.rand(400, 48, generator=torch.Generator().manual_seed(0))
    assert world.group_accuracy(random, "test", users=world.cold_users) < 0.3
    # A model that knows the rule, and nothing more, reaches the Bayes rate within chance.
    rng = np.random.default_rng(0)
    targets, hits = world.split.targets("test"), []
    for user, history in enumerate(world.split.histories("test")):
        likely = (world.groups == world.groups[targets[user]]) & ~world.cold_items
        likely[history] = False
        hits.append(rng.choice(np.flatnonzero(likely)) == targets[user])
    assert abs(np.mean(hits) - world.bayes_hit_rate("test")) < 0.1
    if world.follows == "order":
        with pytest.raises(ValueError, match="no target of the validation split"):
            world.bayes_hit_rate("validation")
    else:
        assert world.group_accuracy(target_scores(world, "validation"), "validation") == 1.0


def nearest_group(features: torch.Tensor, groups: np.ndarray, cold: np.ndarray) -> float:
    """How many cold items are nearest to the mean of their own group's warm items."""
    warm = torch.stack([features[torch.from_numpy((groups == g) & ~cold)].mean(dim=0) for g in range(6)])
    found = torch.cdist(features[torch.from_numpy(cold)], warm).argmin(dim=1).numpy()
    return float((found == groups[cold]).mean())


def test_cheap_features_tell_their_own_attribute_alone(world: SyntheticWorld) -> None:
    for name in MODALITIES:
        own = nearest_group(world.catalogue.features[name], world.attributes[name], world.cold_items)
        assert own == 1.0
        for other in set(MODALITIES) - {name}:
            assert (
                nearest_group(world.catalogue.features[name], world.attributes[other], world.cold_items) < 0.7
            )


def test_real_encoders_tell_cold_items_apart(
    tmp_path: Path, minilm_folder: Path, efficientnet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    world = synthetic_world(
        folder=tmp_path / "pictures",
        text_encoder=TextEncoder(str(minilm_folder)),
        image_encoder=ImageEncoder(str(efficientnet_folder)),
        num_users=10,
    )
    assert world.catalogue.modalities == {"text": 384, "image": 1280, "collaborative": 16}
    for name in ("text", "image"):
        assert world.catalogue.present[name].all()
        assert nearest_group(world.catalogue.features[name], world.attributes[name], world.cold_items) >= 0.9


def test_pictures_are_drawn_and_saved_data_load(tmp_path: Path) -> None:
    world = synthetic_world(folder=tmp_path / "pictures", num_users=10)
    assert len(set(world.catalogue.titles)) == 48
    for path in world.catalogue.images:
        with Image.open(path) as picture:
            assert picture.size == (96, 96) and len(picture.getcolors(96 * 96)) > 1
    world.save(tmp_path / "world")
    loaded = PreparedData.load(tmp_path / "world")
    assert loaded.split.hash() == world.split.hash()


def test_a_seed_makes_one_world() -> None:
    first, same, other = (synthetic_world(num_users=20, seed=seed) for seed in (1, 1, 2))
    assert first.split.hash() == same.split.hash() != other.split.hash()
    assert torch.equal(first.catalogue.features["image"], same.catalogue.features["image"])
    assert first.catalogue.texts == same.catalogue.texts


def test_without_hold_out_every_item_is_warm() -> None:
    world = synthetic_world(held_out=0.0, num_users=300)
    assert not world.cold_items.any() and not world.cold_users.any()
    assert set(np.concatenate(world.split.training())) == set(range(48))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"follows": "smell"}, "follows must be one of"),
        ({"num_items": 10}, "num_items must be at least 36, but got 10"),
        ({"history": 3}, "history must be at least 4"),
        ({"history": 10, "follows": "order"}, "multiple of 4"),
        ({"held_out": 0.7}, r"held_out must be in \[0, 0\.5\)"),
        ({"history": 44}, "history 44 is too long"),
        ({"image_encoder": object()}, "needs a folder"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_world(**arguments)
