"""`speeder bench`: what is counted is counted right, and the command measures, writes, goes on. No time is judged."""

import json
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from speeder.cli.main import main
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.model.loading import load_tokenizer
from speeder.model.sequences import pack_batch
from speeder.prepare.readers.ml100k import read_ml100k
from speeder.prepare.synthetic import synthetic_world
from speeder.studies.bench import chart, machine, run, systems
from speeder.studies.bench.flops import (
    attention_flops,
    catalogue_flops,
    lookup_flops,
    pair_flops,
    training_flops,
)
from speeder.studies.bench.profile import group_of
from speeder.studies.bench.rates import row
from speeder.studies.bench.report import verdicts
from speeder.studies.bench.run import MAIN, Plan, _rounds
from speeder.studies.bench.systems import SYSTEMS, TRAINING_TOKENS, System
from speeder.studies.bench.workload import LONGEST, Workload, choose_users
from speeder.studies.charts import saved_figure
from tests.baselines.text_worlds import save_text_backbone
from tests.model.worlds import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny backbone and prepared data."""
    folder = tmp_path_factory.mktemp("bench")
    data = synthetic_world(num_items=90, num_users=16, history=9)
    data.save(folder / "data")
    save_text_backbone(folder / "backbone", data.catalogue.titles)
    return folder


@pytest.fixture(scope="module")
def data(place) -> PreparedData:
    return PreparedData.load(place / "data")


def system(name, place, data, workload=MAIN) -> System:
    made = System(name, data, workload, str(place / "backbone"), layers=2, precision="bf16")
    made.prepare()
    return made


# ---- what is counted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_flops_of_a_step_are_those_of_its_products(name, place, data):
    """But for attention, the look-up, item logits and sums of word vectors, which PyTorch's counter cannot see."""
    measured = system(name, place, data, Workload(history=5))
    sequences = [measured._dataset[number] for number in range(6)]
    counter = FlopCounterMode(display=False)
    measured.for_training()
    with counter:
        measured.model(**pack_batch(sequences, with_labels=True)).loss.backward()
    parts = training_flops(measured.model, sequences)
    unseen = {part: parts.pop(part, 0) for part in ("attention", "history look-up", "item logits")}
    sums = 0
    if name == "speeder":
        sums = 2 * 2 * len(measured.model.mrc.words.item_ids) * measured.model.config.word_size
    assert counter.get_total_flops() + sums == sum(parts.values())
    assert unseen["attention"] > 0
    assert (unseen["item logits"] > 0) == (name in ("speeder", "text-prompt"))


def test_flops_of_attention_and_item_logits_are_those_of_plain_products(place, data):
    model = system("speeder", place, data, Workload(history=5)).model
    text = model.config.text_config
    heads, length = text.num_attention_heads, 12
    width = text.hidden_size // heads
    q, k, v = torch.randn(3, heads, length, width, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = (q @ k.transpose(1, 2)).softmax(-1) @ v
    whole = text.num_hidden_layers * forward.get_total_flops()  # above the diagonal too
    assert attention_flops(model, [length]) * 2 * length == whole * (length + 1)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    states, table = torch.randn(7, 64, requires_grad=True), torch.randn(90, 64, requires_grad=True)
    with FlopCounterMode(display=False) as logits:
        (states @ table.T).sum().backward()
    history = model.sequence([1, 2, 3, 4, 5, 6, 7], 8)  # of which the newest five are read
    assert training_flops(model, [history])["item logits"] == logits.get_total_flops() * 5 // 7


@pytest.mark.parametrize("experts", ["mlp", "linear"])
def test_flops_of_item_tokens(experts):
    """PyTorch's counter cannot see the weighted sums of word vectors."""
    model = tiny_model(experts=experts, words=True, history_lookup=True, tokens_per_item=2)
    sums = 2 * len(model.mrc.words.item_ids) * model.config.word_size
    for training in (False, True):
        with FlopCounterMode(display=False) as counter:
            tokens = model.mrc()[0]
            if training:
                tokens.sum().backward()
        assert counter.get_total_flops() + sums * (1 + training) == catalogue_flops(model, training)
    step = training_flops(model, [model.sequence([1, 2, 3], 4)])
    assert step["history look-up"] == 3 * 2 * sum(range(1, 8)) * model.config.hidden_size


@pytest.mark.parametrize("name", ["speeder", "yes-no"])
def test_flops_of_an_answer(name, place, data):
    measured = system(name, place, data, Workload(history=5))
    measured.rank([2])  # makes the item tokens, which are then kept
    with FlopCounterMode(display=False) as counter:
        measured.rank([0, 1])
    model, lengths = measured.model, [length for user in (0, 1) for length in measured.prompt_lengths(user)]
    layers = model.config.text_config.num_hidden_layers
    attention = attention_flops(model, lengths) * (layers - 1) // layers + pair_flops(model) * sum(lengths)
    unseen = attention + lookup_flops(model) * sum(lengths)
    if name == "speeder":
        unseen += 2 * len(lengths) * model.config.hidden_size * len(data.catalogue)  # in `topk_items`
    # the last layer's queries of tokens that are not read, and the keys and values once more of those that are
    last = model.backbone.get_decoder().layers[-1].self_attn
    again = 2 * (last.q_proj.weight.numel() * sum(lengths) + 2 * last.k_proj.weight.numel() * len(lengths))
    assert counter.get_total_flops() + unseen == measured.rank_flops([0, 1]) + again


@pytest.mark.parametrize("workload", [MAIN, Workload(history=4), Workload(history=None), Workload(history=3, text=40)],
                         ids=lambda workload: workload.name)  # fmt: skip
def test_tokens_an_item_are_the_tokenizers(workload, place, data):
    measured = system("text-prompt", place, data, workload)
    tokenizer = load_tokenizer(place / "backbone")
    users = choose_users(data, workload)
    items = np.concatenate([history[-workload.max_history :] for history in users.histories])
    if workload.text:
        assert {len(measured.model.title(item)) for item in range(len(data.catalogue))} == {workload.text + 1}
    else:
        counts = [len(tokenizer(data.catalogue.titles[item])["input_ids"]) + 1 for item in items]
        assert measured.tokens_an_item() == pytest.approx(np.mean(counts))
    read = measured.tokens_an_item() * len(items) / len(users.histories)
    assert measured.mean_prompt == pytest.approx(read)  # text-prompt reads titles and nothing else
    ours = system("speeder", place, data, workload)
    assert ours.tokens_an_item() == 1 and ours.mean_prompt == pytest.approx(len(items) / len(users.histories))


def test_users_are_the_same_for_all_and_histories_as_long_as_asked(data):
    for workload in (Workload(history=4), Workload(history=30), Workload(history=None)):
        users, again = choose_users(data, workload), choose_users(data, workload)
        for items, same in zip(
            users.histories + users.training, again.histories + again.training, strict=True
        ):
            assert items.tolist() == same.tolist()
        if workload.history:
            assert {len(items) for items in users.histories} == {workload.history}
            assert {len(items) for items in users.training} == {workload.history + 1}
        for history, listed in zip(users.histories, users.candidates, strict=True):
            assert not set(listed[1:].tolist()) & set(history.tolist()) and len(set(listed.tolist())) == len(
                listed
            )
    known = {tuple(history.tolist()) for history in data.split.histories("test")}
    assert {tuple(items.tolist()) for items in choose_users(data, Workload(history=None)).histories} <= known
    own = choose_users(data, Workload(history=30))
    assert {tuple(items[-8:].tolist()) for items in own.histories} <= known and own.filled == pytest.approx(
        22 / 30
    )


@pytest.mark.parametrize("tokens", [1, TRAINING_TOKENS])  # one example a batch, and many
@pytest.mark.parametrize("name", ["title-generation", "yes-no", "text-prompt"])
def test_a_rate_does_not_depend_on_which_examples_were_drawn(name, tokens, place, data, monkeypatch):
    """LLaRA's examples have histories of one item up to the longest; a batch counts by its flops."""
    monkeypatch.setattr(systems, "TRAINING_TOKENS", tokens)
    measured = system(name, place, data, Workload(history=None) if name == "text-prompt" else MAIN)
    sequences = [measured._dataset[number] for number in range(len(measured._dataset))]
    lengths = [len(sequence.ids) for sequence in sequences]
    assert max(lengths) > 1.5 * min(lengths)
    every = training_flops(measured.model, sequences)
    once = every.pop("item tokens", 0)
    for batch in measured.batches:
        drawn = [sequences[number] for number in batch.examples]
        assert sum(len(sequence.ids) for sequence in drawn) == batch.tokens
        assert sum(training_flops(measured.model, drawn).values()) == batch.flops
        assert tokens == 1 or batch.tokens == pytest.approx(min(tokens, sum(lengths)), rel=0.15)
        of_the_mean = once + len(drawn) * sum(every.values()) / len(sequences)
        assert batch.prompts / batch.flops == pytest.approx(len(drawn) / of_the_mean, rel=1e-6)
        if name != "text-prompt":  # one target a prompt, or a pair of prompts
            assert batch.targets == pytest.approx(batch.prompts / (2 if name == "yes-no" else 1))
    claimed = sum(batch.prompts for batch in measured.batches)
    assert claimed == pytest.approx(sum(len(batch.examples) for batch in measured.batches), rel=0.2)
    alike = len({tuple(batch.examples) for batch in measured.batches}) == 1
    assert alike == (len(measured.batches[0].examples) == len(sequences)), (
        "alike only where they are all there is"
    )


def test_windows_ask_for_each_of_their_items(place, data):
    dense = system("speeder", place, data).batches[0]
    assert dense.targets == pytest.approx(LONGEST * len(dense.examples))


def test_a_title_is_written_as_long_as_titles_are(place, data):
    measured = system("title-generation", place, data)
    tokenizer = load_tokenizer(place / "backbone")
    mean = np.mean([len(ids) for ids in tokenizer(data.catalogue.titles)["input_ids"]])
    ids = torch.tensor([[5, 6, 7]])
    written = measured.model.generate(
        ids, vocabulary="text", max_new_tokens=33, eos_token_id=1, pad_token_id=1
    )
    assert written.shape[1] - 3 == 1 + round(mean)


# ---- the claim, without a clock --------------------------------------------------------------------------------


def test_real_titles_cost_ten_times_the_tokens_and_flops(smollm2_folder, ml100k_folder, tmp_path):
    """MovieLens-100K, histories of 50, in the words of SmolLM2; flops as on its first four layers."""
    real = AutoConfig.from_pretrained(smollm2_folder, num_hidden_layers=4)
    AutoTokenizer.from_pretrained(smollm2_folder).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    narrow = LlamaConfig(vocab_size=real.vocab_size, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(narrow).save_pretrained(tmp_path)
    films = read_ml100k(ml100k_folder)
    catalogue = films.catalogue.with_features("text", torch.randn(len(films.catalogue), 384))
    data = PreparedData(catalogue, films.interactions, films.manifest)
    tokens, flops = {}, {}
    for name in ("speeder", "text-prompt", "title-generation"):
        measured = System(name, data, MAIN, str(tmp_path), layers=1, precision="bf16")
        measured.prepare()
        batch = measured.batches[0]
        tokens[name] = batch.tokens / batch.targets
        with torch.device("meta"):  # as wide as the real one, without its numbers
            settings = measured.model.config.to_dict() | {"text_config": real}
            wide = type(measured.model)(type(measured.model.config)(**settings))
        wide._catalogue = catalogue  # whose features a model without numbers cannot read
        if name == "speeder":
            wide.mrc.words.set_texts(measured.model.mrc.words.read(catalogue.readable_texts()))
        parts = training_flops(wide, [measured._dataset[example] for example in batch.examples])
        flops[name] = sum(parts.values()) / batch.targets
    for cost in (tokens, flops):
        assert cost["text-prompt"] >= 10 * cost["speeder"]
        assert cost["title-generation"] >= 50 * cost["speeder"]


# ---- the command -----------------------------------------------------------------------------------------------


def command(place, out, *more):
    settings = [
        "--data",
        place / "data",
        "--out",
        out,
        "--backbone",
        place / "backbone",
        "--layers",
        1,
        "--threads",
        1,
    ]
    settings += ["--histories", 50, "--descriptions", "--budget", 2]
    return main(["bench", *map(str, settings), *map(str, more)])


def test_the_command_measures_writes_and_goes_on(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "_SIZES", ((256, 256, 256),))  # no product that takes long
    out = tmp_path / "out"
    assert command(place, out, "--systems", "speeder", "text-prompt") == 0
    first = json.loads((out / "results.json").read_text())
    assert set(first["points"]) == {MAIN.name, Workload(history=None).name}
    for point in first["points"].values():
        for name, measured in point["systems"].items():
            found = row(measured, point["peak"])
            assert min(found.targets, found.prompts, found.users, found.p50, found.p99, found.share) > 0, name
            assert min(measured["memory"].values()) > 0
            assert measured["first"] > 0 and not measured["left_out"]
    profile = first["points"][MAIN.name]["systems"]["speeder"]["profile"]
    assert sum(profile.values()) == pytest.approx(1) and profile["matrix products"] > 0
    assert len(verdicts(first, MAIN.name)) == 4  # three against text-prompt, and the share of the peak
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert all(
        words in text for words in ("| Speeder | 1 | 50 |", "title-generation", "share of the GEMM peak")
    )
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")

    labels = []

    @contextmanager
    def looked_at(path, width, height):
        with saved_figure(path, width, height) as figure:
            yield figure
            figure.draw_without_rendering()
            labels.extend(label.get_text() for axes in figure.axes for label in axes.get_yticklabels())

    monkeypatch.setattr(chart, "saved_figure", looked_at)
    chart.plot_bench(first, tmp_path / "again.png")
    assert labels and all(re.fullmatch(r"[\d,.e+-]+", label) for label in labels), labels

    # a point that is missing is measured, the others stay
    own = first["points"].pop(Workload(history=None).name)
    (out / "results.json").write_text(json.dumps(first))
    asked = []
    monkeypatch.setattr(
        run, "measure_point", lambda plan, folder, point, seconds, precision: asked.append(point) or own
    )
    assert command(place, out, "--systems", "speeder", "text-prompt") == 0
    assert asked == [Workload(history=None)]
    second = json.loads((out / "results.json").read_text())
    assert second["points"] == first["points"] | {asked[0].name: own}
    assert command(place, out, "--systems", "speeder") == 1
    assert "a bench of the same settings" in capsys.readouterr().err
    elsewhere = second | {"machine": second["machine"] | {"processor": "Another"}}
    (out / "results.json").write_text(json.dumps(elsewhere))
    assert command(place, out, "--systems", "speeder", "text-prompt") == 1
    assert "begun on another machine (processor Another, here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--systems", "speeder", "bert4rec"], "--systems: expected speeder and some of .* got 'bert4rec'"),
        (["--systems", "yes-no"], "--systems: expected speeder and some of .* got yes-no"),
        (["--histories", "0"], "--histories: expected at least 1, got 0"),
        (["--descriptions", "20", "-3"], "--descriptions: expected at least 1, got -3"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--budget", "0"], "--budget: expected seconds above 0, got 0"),
        (["--histories", "200"], "a catalogue of more items than a history of 200, got 90"),
        (["--layers", "9", "--systems", "speeder"], "layers: expected 1..2"),
        (["--data", "{tmp}/none"], "does not hold a prepared data set"),
    ],
)
def test_mistakes_get_one_line(more, message, place, tmp_path, capfd):
    assert command(place, tmp_path / "out", *[word.format(tmp=tmp_path) for word in more]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("speeder: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out" / "results.json").exists()


# ---- turns and budgets -----------------------------------------------------------------------------------------


class Clockless:
    """A worker that says what it was asked, and takes no time."""

    def __init__(self, name: str):
        self.name, self.asked = name, []

    def ask(self, question: str, **arguments):
        self.asked.append(arguments["task"])
        return [{"seconds": 1.0, "users": 1}]


def test_what_would_take_too_long_is_left_out_and_said_so():
    quick, slow = Clockless("speeder"), Clockless("yes-no")
    measured = {
        name: {"samples": {}, "left_out": {}, "flops": flops, "ranked_users": users}
        for name, flops, users in (
            ("speeder", {"batch": 10, "single": 1}, 5),
            ("yes-no", {"batch": 5000, "single": 5000}, 1),
        )
    }
    _rounds([quick, slow], measured, ("batch", "single"), 60, 10, 100.0)
    assert set(measured["speeder"]["samples"]) == {"batch", "single"} and not measured["speeder"]["left_out"]
    assert not slow.asked and not measured["yes-no"]["samples"]
    assert measured["yes-no"]["left_out"] == {"batch": 50.0, "single": 50.0}


def test_without_time_each_is_still_measured_once():
    worker = Clockless("speeder")
    flops = {"batch": 1, "single": 1}
    found = {"samples": {}, "left_out": {}, "flops": flops, "ranked_users": 1}
    _rounds([worker], {"speeder": found}, ("batch", "single"), 0.0, 10, 1.0)
    assert set(worker.asked) == {"single"}, "a batch of one user is a single user"
    assert found["samples"]["batch"] == found["samples"]["single"] != []


def test_a_plan_starts_with_the_main_point():
    points = Plan(histories=(200, 10, 50), descriptions=(100, 20)).points
    assert points[0] == MAIN and len(points) == len(set(points)) == 6
    with pytest.raises(SpeederError, match="layers"):
        Plan(layers=0)


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::mm", "matrix products"),
        ("speeder::spae_attention_backward_kernel", "attention"),
        ("speeder::item_cross_entropy", "item cross-entropy"),
        ("speeder::pack_tokens", "item tokens"),
        ("aten::_fused_adamw_", "optimizer and clipping"),
        ("Optimizer.step#AdamW.step", "optimizer and clipping"),
        ("aten::silu_backward", "norms and elementwise"),
        ("aten::bernoulli_", "dropout"),
        ("aten::copy_", "copies and casts"),
        ("data preparation", "data preparation"),
        ("autograd::engine::evaluate_function: MulBackward0", "autograd's bookkeeping"),
    ],
)
def test_groups_of_a_profile(operator, group):
    assert group_of(operator) == group
