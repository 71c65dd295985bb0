"""Speeder writes titles: in a planted world it learns to, from the candidates and the history that it is shown."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import speeder.training.train
from speeder.cli.main import main
from speeder.data import ItemCatalogue, PreparedData
from speeder.data.interactions import Interactions
from speeder.errors import SpeederError
from speeder.evaluation.candidates import Candidates
from speeder.evaluation.evaluate import evaluate_candidates, evaluate_titles
from speeder.evaluation.written_titles import named_candidate
from speeder.model.sequences import build_sequence
from speeder.model.title_prompts import MAX_TITLE_TOKENS, TitleExamples, TitlePrompts
from speeder.model.title_writer import TitleWriter
from speeder.recipes.load import bundled_recipe, load_recipe, recipe_from_dict
from speeder.recipes.schema import TITLE_TEMPLATE
from speeder.training.dataset import TrainingSequences
from speeder.training.run_folder import stage_logs
from speeder.training.train import train
from tests.baselines.text_worlds import NAMES, save_text_backbone, train_with_a_stop
from tests.model.worlds import tiny_model

GROUPS, KINDS = NAMES[:8], ("Path", "Gate", "Hall", "Mill", "Bridge", "Tower")
ITEMS = len(GROUPS) * len(KINDS)
TEXT = 400  # text tokens of the backbone
RATE = {"learning_rate": 3e-3, "backbone_learning_rate": 3e-3}


def group_world(num_users: int = 480) -> PreparedData:
    """Users take five of the six items of one group, in any order.

    Two items of the group are thus left beside a test history, and only the candidates tell which of them may come.
    """
    titles = [f"The {group} {kind}" for group in GROUPS for kind in KINDS]
    group, kind = np.divmod(np.arange(ITEMS), len(KINDS))
    features = np.concatenate([np.eye(len(GROUPS))[group], np.eye(len(KINDS))[kind]], axis=1)
    rng = np.random.default_rng(0)
    items = [user % len(GROUPS) * len(KINDS) + rng.permutation(len(KINDS))[:5] for user in range(num_users)]
    users, times = np.repeat(np.arange(num_users), 5), np.tile(np.arange(5), num_users)
    names = [f"u{user}" for user in range(num_users)]
    catalogue = ItemCatalogue([f"i{item}" for item in range(ITEMS)], titles)
    data = PreparedData(catalogue, Interactions(users, np.concatenate(items), times, names))
    features = torch.from_numpy(features).float()
    return data.with_features("text", features, made_by="the world", training_hash=None)


@pytest.fixture(scope="module")
def data():
    return group_world()


@pytest.fixture(scope="module")
def place(tmp_path_factory, data):
    """A folder with a backbone and the prepared world."""
    folder = tmp_path_factory.mktemp("titles")
    data.save(folder / "data")
    save_text_backbone(folder / "backbone", data.catalogue.titles)
    return folder


def recipe_of(place, titles=0.75, **changes):
    parts = ["experts", "gate", "head", "spae", "backbone", "embeddings"]
    stage = {"name": "titles", "open": ["text"], "train": parts, "titles": titles, **RATE, "steps": 300}
    kept = {"backbone": str(place / "backbone"), "precision": "fp32", "batch_users": 32, "log_steps": 50}
    kept |= {"checkpoint_steps": 1000, "model": {"max_history": 4}}
    return recipe_from_dict(kept | {"stages": [stage | changes.pop("stage", {})]} | changes)


@pytest.fixture(scope="module")
def run(place, data):
    """A run folder of a Speeder that learned to write titles and to rank."""
    train(recipe_of(place), data, place / "run", data_folder=place / "data")
    return place / "run"


@pytest.fixture(scope="module")
def writer(run):
    return TitleWriter.of_run(run, speeder.training.train.SpeederForCausalLM.from_pretrained(run / "model"))


@pytest.fixture(scope="module")
def candidates(data):
    return Candidates.draw(data.split, "test", ITEMS, 19)


@pytest.fixture(scope="module")
def prompts(place, data):
    config = tiny_model(max_history=3).config
    config.text_config.vocab_size, config.num_items = TEXT, ITEMS
    tokenizer = AutoTokenizer.from_pretrained(place / "backbone")
    return TitlePrompts(tokenizer, config, data.catalogue, TITLE_TEMPLATE)


# ---- it learns --------------------------------------------------------------------------------------------------


def test_written_titles_are_valid_and_hit_and_ranking_stays(writer, data, candidates):
    written = evaluate_titles(writer, data.split, candidates, data.catalogue.titles, resamples=5)
    assert written.fitted_on == "the split's training part"
    # without the candidates, one of the two items that are left can be guessed: 0.5; without the history, 0.05
    assert written.mean("ValidRatio") > 0.75 and written.mean("VHR@1") > 0.55
    ranked = evaluate_candidates(writer.model, data.split, candidates, num_items=ITEMS, resamples=5)
    assert ranked.mean("VHR@1") > 0.6


def test_an_answer_is_one_of_the_listed_and_follows_the_history(writer, data, candidates):
    histories, listed = data.split.histories("test"), candidates.listed(data.split.targets("test"))
    titles = data.catalogue.titles

    def answers(histories, listed):
        texts = writer.generate_titles(histories, listed)
        return [
            named_candidate(text, [titles[item] for item in row])
            for text, row in zip(texts, listed, strict=True)
        ]

    def in_group(histories, listed, places):
        """Answers in the history's group, of those that could be."""
        groups = [history[0] // len(KINDS) for history in histories]
        hits = [
            place is not None and row[place] // len(KINDS) == group
            for place, row, group in zip(places, listed, groups, strict=True)
        ]
        return np.mean(hits)

    told = in_group(histories, listed, answers(histories, listed))
    others = histories[1:] + histories[:1]  # of the next group
    untold = in_group(histories, listed, answers(others, listed))
    assert told > 0.6 and untold < 0.2, "the history does not reach the answer"
    shown, never = listed[:, ::2], listed[:, 1::2]
    named = [place is not None for place in answers(histories, never)]
    unseen = [
        named_candidate(text, [titles[item] for item in row]) is not None
        for text, row in zip(writer.generate_titles(histories, shown), never, strict=True)
    ]
    assert np.mean(named) > 2 * np.mean(unseen), "the candidates do not reach the answer"


def test_what_is_written_is_what_greedy_decoding_without_a_cache_gives(writer, data, candidates):
    """Padded batches, the cache and the ranks of a prompt agree with one prompt at a time, read anew for each token."""
    histories = [data.split.histories("test")[0][:n] for n in (0, 1, 4)]
    listed = candidates.listed(data.split.targets("test"))[:3]
    texts = writer.generate_titles(histories, listed)
    end = writer.prompts.title_end
    for history, row, text in zip(histories, listed, texts, strict=True):
        prompt = writer.prompts.sequence(history, row)
        new: list[int] = []
        while len(new) < MAX_TITLE_TOKENS + 1 and new[-1:] != [end]:
            ids = torch.tensor([prompt.ids + new])
            ranks = torch.tensor([prompt.ranks + [-1] * len(new)], dtype=torch.int32)
            new.append(int(writer.model(ids, ranks=ranks, vocabulary="text").logits[0, -1].argmax()))
        assert writer.prompts.tokenizer.decode(new).strip() == text.strip()


# ---- prompts and examples ---------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, ITEMS - 1), max_size=6),
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=20),
    st.integers(0, ITEMS - 1),
    st.sampled_from([1, 2]),
)
@settings(max_examples=50, deadline=None)
def test_a_prompt_is_one_token_an_item_and_asks_for_the_title_alone(prompts, history, listed, target, k):
    prompts.config.tokens_per_item = k
    example = prompts.sequence(history, listed, target)
    read = history[-3:]
    items = [token - TEXT for token in example.ids if token >= TEXT]
    assert items == [item for item in [*read, *listed] for _ in range(k)]
    # what comes before the template's first words is a ranking sequence's own beginning
    if read:
        plain = build_sequence(read, prompts.config)
        assert (example.ids[: len(read) * k], example.ranks[: len(read) * k]) == (plain.ids, plain.ranks)
    title = prompts.title(target)
    text = prompts.tokenizer.decode([token for token in example.ids if token < TEXT])
    assert text == f"\nCandidates:\n\nChosen next:\n{prompts.catalogue.titles[target]}\n"
    start = len(example.ids) - len(title)
    assert example.labels == [-100] * start + title and example.ids[start:] == title
    assert [rank for rank in example.ranks if rank >= 0] == [
        r for r in range(len(read)) for _ in range(k)
    ] + [len(read)]
    assert example.ranks[start - 1] == len(read) and example.ranks[len(read) * k] == -1
    assert prompts.sequence(history, listed).ids == example.ids[:start]


def test_examples_are_drawn_anew_in_each_epoch_and_the_same_again(prompts, data):
    prompts.config.tokens_per_item = 1
    plain = TrainingSequences(data.split.training(), prompts.config, "all")

    def epoch(number, share=0.5, seed=1, stream="stage"):
        examples = TitleExamples(plain, share, prompts, seed, stream)
        examples.set_epoch(number)
        return [examples[index] for index in range(len(examples))]

    first = epoch(0)
    assert len(first) == len(plain) and first == epoch(0)
    for other in (epoch(1), epoch(0, seed=2), epoch(0, stream="other")):
        assert sum(a != b for a, b in zip(first, other, strict=True)) > len(first) / 3
    kinds, places = [], []
    for example, whole in zip(first, plain.whole, strict=True):
        items = [token - TEXT for token in example.ids if token >= TEXT]
        if len(example.ids) == len(items):
            kinds.append("ranking")
            assert items == whole.tolist()
            continue
        asked = [label for label in example.labels if label >= 0]
        target = next(item for item in range(ITEMS) if prompts.title(item) == asked)
        history = sum(rank >= 0 for rank in example.ranks) - 1
        if not history:
            kinds.append("naming")
            assert items == [target]
            continue
        kinds.append("choosing")
        listed = items[history:]
        assert items[:history] == whole[:history].tolist() and target == whole[history]
        assert len(set(listed)) == 20 and set(listed) & set(whole.tolist()) == {target}
        places.append(listed.index(target))
    counts = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert counts == pytest.approx({"ranking": 0.5, "naming": 0.25, "choosing": 0.25}, abs=0.08)
    assert np.bincount(places, minlength=20).max() < len(places) / 5, "the target's place says nothing"


def test_without_titles_nothing_is_drawn(place, data, tmp_path, monkeypatch):
    monkeypatch.setattr(speeder.training.train, "TitleExamples", None)
    monkeypatch.setattr(speeder.training.train, "TitlePrompts", None)
    recipe = recipe_of(place, titles=0, stage={"steps": 1})
    train(recipe, data, tmp_path / "run")
    stage = recipe.to_dict()["stages"][0]
    assert not {"titles", "batch_users"} & set(stage) and "title_template" not in recipe.to_dict()
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_an_interrupted_run_draws_the_same_examples(place, data, tmp_path, monkeypatch):
    """Stopped within its second epoch."""
    recipe = recipe_of(place, stage={"steps": 8, "batch_users": 160}, checkpoint_steps=4)
    whole = train(recipe, data, tmp_path / "whole")
    resumed = train_with_a_stop(recipe, data, tmp_path / "stopped", monkeypatch)
    last = stage_logs(tmp_path / "whole")["titles"][-1]
    assert (last["step"], last["epoch"]) == (8, pytest.approx(8 / 3)), (
        "three batches of the stage's own size a pass"
    )
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-5, rtol=1e-4, msg=name)


# ---- recipes and the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titles": 1.5}, "stage 'titles': titles: expected at most 1, got 1.5"),
        ({"titles": True}, "titles: expected a number, got True"),
        ({"stage": {"batch_users": 0}}, "stage 'titles': batch_users: expected at least 1, got 0"),
        (
            {"baseline": "title-generation", "supervision": "last"},
            "stage 'titles': titles: expected 0 for the baseline 'title-generation', got 0.75",
        ),
    ],
)
def test_wrong_shares_are_refused(place, changes, message):
    with pytest.raises(SpeederError, match=message):
        recipe_of(place, **changes)


@pytest.mark.parametrize(
    "template", ["{history}", "{candidates} {history}", "{history}{history}{candidates}"]
)
def test_a_wrong_template_is_refused_before_there_is_a_run(place, data, tmp_path, template):
    with pytest.raises(SpeederError, match=r"title_template: expected {history}, then {candidates}.* got"):
        train(recipe_of(place, title_template=template), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_bundled_recipe_keeps_its_titles_whatever_modalities_there_are():
    recipe = load_recipe(bundled_recipe("ml-100k-titles"))
    assert recipe.stages[-1].titles > 0
    fewer, _ = recipe.for_modalities(["text"])
    assert fewer.stages[-1].titles == recipe.stages[-1].titles
    ranking = load_recipe(bundled_recipe("ml-100k-mlp"))
    own = {"stages": recipe.stages, "checkpoint_steps": recipe.checkpoint_steps}
    assert ranking.stages == recipe.stages[:-1] and replace(ranking, **own) == recipe


def test_the_command_measures_both_answers_in_rows_of_their_own(run, place, tmp_path, capsys):
    assert main(["evaluate", str(run), "--protocol", "vhr", "--answers", "titles", "--no-baselines"]) == 0
    printed = capsys.readouterr().out
    assert "\nSpeeder " in printed and "\nSpeeder (titles)" in printed
    found = json.loads((run / "results-test-vhr.json").read_text())
    valid = {name: each["metrics"]["masked"]["ValidRatio"]["value"] for name, each in found.items()}
    assert (
        list(valid) == ["Speeder", "Speeder (titles)"] and valid["Speeder"] == 1 > valid["Speeder (titles)"]
    )
    kept = run / "evaluations" / "test-vhr"
    assert main(["compare", str(run), str(kept / "model-titles.json"), "--protocol", "vhr"]) == 0
    assert "| run | model-titles |" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--answers", "titles"]) == 1
    assert "answers: expected 'ranking' with the protocol 'full', got 'titles'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "expected a recipe with 'titles' above 0 in a stage, got none"),
        ({"baseline": "text-prompt"}, "expected 'ranking' for text prompt, which writes no titles"),
    ],
)
def test_models_that_never_learned_to_write_are_refused(place, tmp_path, capsys, recipe, message):
    plain = recipe_of(place, titles=0, stage={"steps": 1}, **recipe).to_dict()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    what = ["--data", str(place / "data"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main(["train", *what, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    ask = ["evaluate", str(tmp_path / "run"), "--protocol", "vhr", "--no-baselines"]
    assert main([*ask, "--answers", "titles"]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("results*")), "no table is left"
