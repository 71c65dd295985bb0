"""The demo: recommendations at once and after each stage, and the same words after a stop at any moment."""

import re

import pytest
import yaml

from speeder.data import ItemCatalogue, PreparedData
from speeder.errors import SpeederError
from speeder.prepare.synthetic import synthetic_world
from speeder.studies import demo as demo_module
from speeder.studies.demo import demo
from tests.model.worlds import save_tiny_backbone

RECIPE = {
    "precision": "fp32",
    "batch_users": 16,
    "checkpoint_steps": 2,
    "log_steps": 2,
    "model": {"item_embedding": True},
    "stages": [
        {"name": "text", "open": ["text"], "steps": 4},
        {"name": "+image", "open": ["text", "image"], "steps": 4},
        {"name": "joint", "open": ["text", "collaborative", "item"], "steps": 4},
    ],
}


class Stop(Exception):
    """Ctrl-C, or the power goes."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny backbone and a recipe."""
    folder = tmp_path_factory.mktemp("demo")
    save_tiny_backbone(folder / "backbone")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"backbone": str(folder / "backbone")}))
    return folder


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """A world of 40 users in MovieLens' place, without pictures; nothing is fetched."""
    world = synthetic_world(num_users=40, history=8)
    items = world.catalogue

    def with_features(*names: str) -> PreparedData:
        kept = {name: items.features[name] for name in names}
        catalogue = ItemCatalogue(items.ids, items.titles, items.texts, features=kept)
        return PreparedData(catalogue, world.interactions, world.manifest)

    def prepare(folder, posters, on_text):
        on_text(with_features("text"))
        with_features("text", "collaborative").save(folder)
        return PreparedData.load(folder)

    monkeypatch.setattr(demo_module, "prepare_ml100k", prepare)
    monkeypatch.setattr(demo_module, "fetch", lambda name: None)


def run(place, name: str, stop_at: str | None = None) -> list[str]:
    """What a demo says, without the times; it is stopped before it says what begins so."""
    lines: list[str] = []

    def say(text: str) -> None:
        for line in text.splitlines():
            line = re.sub(r"^\[ *\d+ s\] ", "", line).replace(str(place / name), "OUT")
            if stop_at is not None and line.startswith(stop_at):
                raise Stop
            lines.append(line)

    demo(place / name, recipe=place / "recipe.yaml", say=say)
    return lines


@pytest.fixture(scope="module")
def told(place):
    """What the demo says that nobody stops; made by the first test that asks for it."""
    kept: list[str] = []

    def get() -> list[str]:
        kept.extend(run(place, "whole") if not kept else [])
        return kept

    return get


def test_something_is_recommended_before_anything_is_trained(place, told):
    lines = told()
    heads = [line for line in lines if re.search(r"test NDCG@10 0\.\d{4}$", line)]
    assert [head.partition(":")[0] for head in heads] == [
        "First recommendations, from titles and genres alone (nothing is trained yet)",
        "Speeder after text",
        "Speeder after joint",
    ]
    first = lines.index(heads[0])
    training = next(n for n, line in enumerate(lines) if line.startswith("Training Speeder"))
    assert first < training < lines.index(heads[1])
    shown = lines[first + 1 : training]
    assert any("films, the last:" in line for line in shown) and any("held out" in line for line in shown)
    assert sum("For user" in line for line in lines) == 3, "the same users each time"
    assert any(line.startswith("Note: stage '+image' is left out") for line in lines)


def test_the_table_holds_what_was_shown(place, told):
    lines = told()
    start = next(n for n, line in enumerate(lines) if line.startswith("   ") and "NDCG@10, 95 %" in line)
    rows = [re.split(r"  +", line)[0] for line in lines[start + 1 :]]
    order = ["popularity", "content neighbours", "neighbours", "SASRec (cross-entropy)", "Speeder after text"]
    assert [row for row in rows if row in order][: len(order)] == order
    for head in (line for line in lines if line.startswith("Speeder after") and "test NDCG@10" in line):
        name, value = head.split(": test NDCG@10 ")
        assert any(name in row and value in row for row in lines[start:]), head
    assert (place / "whole" / "report.html").exists() and (place / "whole" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "First recommendations",
        "Speeder after text",  # measured, and not yet shown
        "Speeder after joint",
        "Results",
    ],
)
def test_a_stopped_demo_goes_on_and_tells_the_same(place, told, moment):
    name = re.sub(r"\W", "", moment)
    with pytest.raises(Stop):
        run(place, name, moment)
    again, whole = run(place, name), told()

    def results(lines: list[str]) -> list[str]:
        """Without what is said of work that a demo that goes on has done already."""
        return [line for line in lines if line and not line.startswith("Encoding")]

    assert results(again) == results(whole)


def test_a_finished_demo_says_it_all_again(place, told):
    whole = told()
    again = run(place, "whole")
    assert [line for line in again if line] == [
        line for line in whole if line and not line.startswith("Encoding")
    ]


def test_posters_need_a_folder_of_their_own(place, told):
    told()
    with pytest.raises(SpeederError, match="holds a demo without posters"):
        demo(place / "whole", posters=place, recipe=place / "recipe.yaml", say=lambda text: None)
