"""The text baselines learn, pack, generate, resume, save and load; each by the trainer and evaluation of Speeder."""

import json

import numpy as np
import pytest
import torch

from speeder.baselines import Popularity
from speeder.baselines.auto import baseline_class, load_recommender
from speeder.baselines.text.base import packs, text_sequence
from speeder.baselines.text.text_prompt import TextPrompt
from speeder.baselines.text.title_generation import TitleGeneration
from speeder.baselines.text.yes_no import YesNo
from speeder.cli.main import main
from speeder.data import ItemCatalogue
from speeder.errors import SpeederError
from speeder.evaluation.candidates import Candidates
from speeder.evaluation.evaluate import evaluate, evaluate_candidates, evaluate_titles
from speeder.evaluation.leaks import LeakError
from speeder.model.sequences import pack_batch
from speeder.model.title_writer import written_title
from speeder.recipes.load import recipe_from_dict
from speeder.training.dataset import TrainingSequences
from speeder.training.train import train
from tests.baselines.text_worlds import NAMES, cycle_world, save_text_backbone, train_with_a_stop

ITEMS = len(NAMES)
STEPS = {"text-prompt": 60, "title-generation": 200, "yes-no": 400}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a backbone and the prepared world."""
    folder = tmp_path_factory.mktemp("text")
    data = cycle_world()
    data.save(folder / "data")
    save_text_backbone(folder / "backbone", data.catalogue.titles)
    return folder


@pytest.fixture(scope="module")
def data():
    return cycle_world()


def recipe_of(place, name, **changes):
    stage = {"name": "only", "steps": STEPS[name], "learning_rate": 2e-3, "backbone_learning_rate": 2e-3}
    stage |= {"train": ["item", "head", "backbone", "embeddings"]} | changes.pop("stage", {})
    settings = {
        "backbone": str(place / "backbone"),
        "baseline": name,
        "supervision": "all" if name == "text-prompt" else "last",
        "precision": "fp32",
        "batch_users": 16,
        "checkpoint_steps": 1000,
        "model": {"max_history": 3 if name == "text-prompt" else 1, "num_candidates": 5},
        "stages": [stage],
    }
    return recipe_from_dict(settings | changes)


@pytest.fixture(scope="module")
def trained(place, data):
    """name -> model, trained once, when first asked for."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = train(recipe_of(place, name), data, place / name, data_folder=place / "data")
        return models[name]

    return get


@pytest.fixture(scope="module")
def candidates(data):
    return Candidates.draw(data.split, "test", ITEMS, 5)


def fresh(place, data, kind=TextPrompt, **config):
    return kind.from_backbone(place / "backbone", data.catalogue, **config)


# ---- learning -----------------------------------------------------------------------------------------------


def test_text_prompt_learns_and_ranks_the_whole_catalogue(trained, data):
    model = trained("text-prompt")
    result = evaluate(model, data.split, resamples=5)
    popular = evaluate(Popularity(data.split.training(), ITEMS), data.split, resamples=5)
    assert result.mean("HR@1", "allowed") > 0.95 > 0.3 > popular.mean("HR@1", "allowed")
    assert model.recommend([["i4", "i5"]], k=1)[0][0].title == "The Grove Path"


def test_title_generation_learns_to_write_the_right_candidate(trained, data, candidates):
    model = trained("title-generation")
    result = evaluate_titles(model, data.split, candidates, data.catalogue.titles, resamples=5)
    popular = evaluate_candidates(
        Popularity(data.split.training(), ITEMS), data.split, candidates, num_items=ITEMS, resamples=5
    )
    assert result.mean("VHR@1") > 0.9 > 0.5 > popular.mean("VHR@1")
    assert result.mean("ValidRatio") >= result.mean("VHR@1")


@pytest.mark.slow
def test_yes_no_learns_to_tell_candidates_apart(trained, data, candidates):
    model = trained("yes-no")
    result = evaluate_candidates(model, data.split, candidates, "sampled", num_items=ITEMS, resamples=5)
    popularity = Popularity(data.split.training(), ITEMS)
    popular = evaluate_candidates(popularity, data.split, candidates, "sampled", num_items=ITEMS)
    assert result.mean("AUC") > 0.95 and result.mean("AUC") > popular.mean("AUC") + 0.2


# ---- text-prompt: packing and supervision -------------------------------------------------------------------


def test_titles_follow_the_configuration(place, data):
    """They are tokenized once, for a tokenizer, a catalogue and a longest title."""
    model = fresh(place, data)
    whole = model.title(1)
    model.config.max_title_tokens = 1
    assert len(model.title(1)) < len(whole)
    model.config.max_title_tokens = 99
    assert model.title(1) == whole


def test_an_instruction_is_read_once_and_the_scores_are_those_of_whole_sequences(place, data):
    model = fresh(place, data, max_history=4, template="Chosen so far:\n{history}Chosen next:\n")
    assert model.shared_prefix == model.pieces[0] != []
    histories = [[1], [5, 6, 7], [2, 9, 0, 3, 8]]
    whole = pack_batch([model.sequence(history) for history in histories])
    states = model.item_queries(model.last_states(**whole))
    expected = (states @ model.item_vectors(model.item_tokens()[0]).T).detach()
    torch.testing.assert_close(model.score(histories), expected, atol=1e-5, rtol=1e-5)


def test_a_packed_batch_scores_as_one_by_one(place, data):
    model = fresh(place, data, max_history=4)
    histories = [[1], [5, 6, 7], [2, 9, 0, 3, 8], [11, 4]]
    alone = torch.cat([model.score([history]) for history in histories])
    torch.testing.assert_close(model.score(histories), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.score([[7, 7, *histories[2]]]), alone[2:3])  # beyond max_history
    top = model.recommend(histories, k=3, exclude_seen=False)
    assert [[item.item for item in row] for row in top] == alone.topk(3).indices.tolist()


@pytest.mark.parametrize("template", ["{history}", "Chosen so far:\n{history}Chosen next:\n"])
def test_every_item_is_asked_for_where_the_title_before_ends(place, data, template):
    """The loss of one dense pass is the mean of the losses of reading each prefix by itself."""
    model = fresh(place, data, template=template, max_history=8)
    history, target = [3, 4, 8, 1], 6
    dense = model.sequence(history, target)
    assert [label - 400 for label in dense.labels if label >= 0] == [4, 8, 1, 6]
    loss = model(**pack_batch([dense], with_labels=True)).loss
    if template == "{history}":  # with a suffix, only the last answer is read after it
        scores = model.score([history[:end] for end in range(1, 5)])
        expected = torch.nn.functional.cross_entropy(scores, torch.tensor([4, 8, 1, 6]))
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    last = model(**pack_batch([model.sequence(history, target, "last")], with_labels=True)).loss
    expected = torch.nn.functional.cross_entropy(model.score([history]), torch.tensor([target]))
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)


def test_reading_costs_the_titles_and_nothing_else(place, data):
    model = fresh(place, data)
    titles = [len(model.title(item)) for item in (3, 4)]
    assert len(model.sequence([3, 4]).ids) == sum(titles)
    assert (
        model.title(3)[-1] == model.title_end and model.tokenizer.decode(model.title(3)) == "The Dune Path\n"
    )
    assert len(fresh(place, data, max_title_tokens=1).title(3)) == 2
    names = [name for name, _ in model.named_parameters()]
    assert not any("experts" in name or "bias" in name.split(".")[0] for name in names)
    assert model.spae.relative_bias is None and model.spae.position_prompts is None


@pytest.mark.parametrize("supervision", ["all", "last"])
def test_every_training_interaction_is_asked_for_once(place, data, supervision):
    model = fresh(place, data, max_history=2)
    examples = model.training_examples(supervision)
    windows = TrainingSequences(data.split.training(), model.config, supervision, **examples)
    asked = [label - 400 for i in range(len(windows)) for label in windows[i].labels if label >= 0]
    assert sorted(asked) == sorted(int(item) for sequence in data.split.training() for item in sequence[1:])


# ---- candidates ---------------------------------------------------------------------------------------------


def test_training_negatives_are_outside_the_training_part_and_the_same_again(place, data):
    model = fresh(place, data, TitleGeneration, num_candidates=5, max_history=2)
    windows = TrainingSequences(
        data.split.training(), model.config, "last", **model.training_examples("last")
    )
    places = []
    for number in range(len(windows)):
        example = windows[number]
        assert example == windows[number]
        text = model.tokenizer.decode(example.ids)
        listed = text.split("Candidates:\n")[1].split("Chosen next:\n")
        titles, answer = listed[0].splitlines(), listed[1].strip()
        assert len(set(titles)) == 5 and answer in titles
        known = {data.catalogue.titles[item] for item in windows.whole[number]}
        assert not known & (set(titles) - {answer})
        places.append(titles.index(answer))
        labels = [label for label in example.labels if label >= 0]
        assert model.tokenizer.decode(labels) == answer + "\n"
    counts = np.bincount(places, minlength=5)
    assert len(places) == 180 and counts.min() > 15, "the target's place says nothing"


def test_yes_no_examples_come_in_pairs(place, data):
    model = fresh(place, data, YesNo, max_history=2)
    windows = TrainingSequences(
        data.split.training(), model.config, "last", **model.training_examples("last")
    )
    assert len(windows) == 2 * len(windows.windows) == 360
    for number in range(0, 40, 2):
        target = data.catalogue.titles[windows.windows[number // 2][-1]]
        texts = [model.tokenizer.decode(windows[number + i].ids).split("Candidate:\n")[1] for i in (0, 1)]
        assert texts[0].startswith(target) and not texts[1].startswith(target)
        answers = [[label for label in windows[number + i].labels if label >= 0] for i in (0, 1)]
        assert answers == [[model.yes], [model.no]]


def test_yes_no_scores_do_not_depend_on_the_pack(place, data):
    model = fresh(place, data, YesNo)
    items = np.array([[1, 2, 3], [9, 0, 4]])
    together = model.score_candidates([[5, 6], [7]], items)
    for row, history in enumerate(([5, 6], [7])):
        for column in range(3):
            alone = model.score_candidates([history], items[row : row + 1, column : column + 1])
            torch.testing.assert_close(together[row, column], alone[0, 0], atol=1e-5, rtol=1e-5)
    sizes = [[len(s.ids) for s in pack] for pack in packs([text_sequence([0] * n) for n in (3, 3, 9, 1)], 7)]
    assert sizes == [[3, 3], [9], [1]]


def test_what_is_written_is_text_as_greedy_decoding_gives_it(place, data):
    """Batched and padded with the cache, or token by token without it; anything may come, valid or not."""
    model = fresh(place, data, TitleGeneration, max_title_tokens=6)
    histories, items = [[1, 2, 3], [4]], np.array([[5, 6, 7], [8, 9, 10]])
    texts = model.generate_titles(histories, items)
    for history, row, text in zip(histories, items, texts, strict=True):
        ids = list(model.prompt(history, row.tolist()))
        start = len(ids)
        while len(ids) < start + 7 and (len(ids) == start or ids[-1] != model.title_end):
            logits = model(torch.tensor([ids]), vocabulary="text").logits
            ids.append(int(logits[0, -1].argmax()))
        assert text == written_title(ids[start:], row.tolist(), model)


def test_a_title_that_the_prompt_had_to_cut_counts_as_written_whole(place):
    long = ItemCatalogue(["a", "b", "c"], ["Path one two three four", "Path one two three five", "Amber"])
    model = TitleGeneration.from_backbone(place / "backbone", long, max_title_tokens=3)
    assert model.title(0) == model.title(1), "cut to the same tokens"
    assert written_title(model.title(0), [0, 2], model) == "Path one two three four"
    assert written_title(model.title(0), [0, 1], model) not in long.titles, "it names neither of two"
    assert written_title([*model.title(2)[:-1]], [0, 2], model) == "Amber"


@pytest.mark.parametrize("kind", [TitleGeneration, YesNo])
def test_no_whole_catalogue_is_ranked(place, data, kind):
    model = fresh(place, data, kind)
    for ask in (lambda: model.score([[1]]), lambda: model.recommend([[1]])):
        with pytest.raises(SpeederError, match="ranks candidates alone"):
            ask()


# ---- training machinery, saving, commands -------------------------------------------------------------------


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(place, data, tmp_path, monkeypatch):
    recipe = recipe_of(place, "title-generation", checkpoint_steps=3, keep_best=False, stage={"steps": 8})
    whole = train(recipe, data, tmp_path / "whole")
    resumed = train_with_a_stop(recipe, data, tmp_path / "stopped", monkeypatch)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["text-prompt", "yes-no"])
def test_lora_trains_the_adapters_alone(place, data, tmp_path, name):
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    recipe = recipe_of(place, name, lora=lora, layers=1, stage={"steps": 2, "train": ["lora"]})
    model = train(recipe, data, tmp_path / "run")
    assert model.config.text_config.num_hidden_layers == 1
    before = fresh(place, data, baseline_class(name), layers=1, lora=lora).state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all("lora_B" in key or "lora_A" in key or "item_embedding" in key for key in changed)
    assert any("lora_B" in key for key in changed)


def test_saved_and_loaded_is_the_same(place, data, trained, tmp_path):
    model = trained("text-prompt")
    loaded = load_recommender(place / "text-prompt" / "model")
    assert type(loaded) is TextPrompt and loaded.training_hash == model.training_hash
    assert torch.equal(loaded.score([[1, 2], [5]]), model.score([[1, 2], [5]]))
    asks = fresh(place, data, YesNo, template="{history}? {candidate}!", max_title_tokens=4)
    asks.save_pretrained(tmp_path / "yes-no")
    again = load_recommender(tmp_path / "yes-no")
    assert again.prompt([1, 2], 3) == asks.prompt([1, 2], 3) and (again.yes, again.no) == (asks.yes, asks.no)
    items = np.array([[3, 4]])
    assert torch.equal(again.score_candidates([[1]], items), asks.score_candidates([[1]], items))
    with pytest.raises(SpeederError, match="expected a 'text-prompt' baseline, got 'yes-no'"):
        TextPrompt.from_pretrained(tmp_path / "yes-no")


def test_a_baseline_is_held_to_what_it_was_trained_on(trained):
    with pytest.raises(LeakError, match="TextPrompt: fitted on"):
        evaluate(trained("text-prompt"), cycle_world(num_users=61).split)


def test_the_commands_serve_baselines(place, trained, capsys):
    trained("text-prompt")
    assert main(["evaluate", str(place / "text-prompt"), "--no-baselines"]) == 0
    assert "\ntext prompt" in capsys.readouterr().out
    assert main(["recommend", str(place / "text-prompt"), "--history", "i1", "i2", "-k", "2"]) == 0
    assert "The Dune Path" in capsys.readouterr().out.splitlines()[0]


def test_protocols_that_a_baseline_cannot_serve_are_refused(place, trained, capsys):
    trained("title-generation")
    run = str(place / "title-generation")
    assert main(["evaluate", run, "--no-baselines"]) == 1
    assert "cannot rank a whole catalogue; evaluate it with --protocol vhr" in capsys.readouterr().err
    assert main(["evaluate", run, "--no-baselines", "--protocol", "sampled", "--negatives", "4"]) == 1
    assert "writes titles and cannot rank" in capsys.readouterr().err
    assert main(["evaluate", run, "--protocol", "vhr"]) == 1  # 19 negatives from 12 items
    assert "expected at most" in capsys.readouterr().err
    assert not list((place / "title-generation").glob("results*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "gpt"}, "baseline: expected one of text-prompt, title-generation, yes-no, got 'gpt'"),
        ({"baseline": "yes-no", "supervision": "all"}, "supervision: expected 'last' for 'yes-no'"),
        (
            {"baseline": "yes-no", "stages": [{"name": "s", "train": ["head"]}]},
            "train: expected some of lora",
        ),
        ({"baseline": None}, "open: expected at least one name"),
    ],
)
def test_wrong_recipes_are_refused(changes, message):
    good = {"baseline": "title-generation", "supervision": "last", "stages": [{"name": "s"}]}
    recipe = recipe_from_dict(good)
    assert recipe.stages[0].train == ["backbone"] and recipe.stages[0].open == []
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(SpeederError, match=message):
        recipe_from_dict(good | changes)


@pytest.mark.parametrize(
    ("kind", "config", "error", "message"),
    [
        (TextPrompt, {"template": "hello"}, SpeederError, "template: expected {history}, each once"),
        (YesNo, {"template": "{candidate} {history}"}, SpeederError, "expected {history}, then {candidate}"),
        (TextPrompt, {"max_title_tokens": 0}, ValueError, "max_title_tokens"),
        (TextPrompt, {"titles": 3}, SpeederError, "unknown setting 'titles'"),
    ],
)
def test_wrong_settings_are_refused(place, data, kind, config, error, message):
    with pytest.raises(error, match=message):
        fresh(place, data, kind, **config)
