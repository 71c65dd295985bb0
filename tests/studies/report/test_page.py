"""The page of a real run: it stands alone, shows the run's own figures, and reads well on a phone."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.evaluation.result import Evaluation
from speeder.studies.report.build import write_report
from tests.serving.http.browser import browser
from tests.studies.report.worlds import TITLE, evaluate_run, make_run

VOID = {"meta", "img", "link", "br", "path", "use"}


class Elements(HTMLParser):
    """Every element with its attributes, and all text; an element that is closed wrongly is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    def with_class(self, name):
        return [each for _, each in self.found if name in (each.get("class") or "").split()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("report"))
    evaluate_run(run, "full", "vhr")
    return run


@pytest.fixture(scope="module")
def path(run):
    """The page, and every chart's files in `run/pictures`."""
    assert main(["report", str(run), "--pictures", str(run / "pictures")]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def page(path):
    return Elements(path.read_text(encoding="utf-8"))


def test_nothing_is_loaded_and_nothing_runs(page, path):
    addresses = [
        (attributes[name], tag)
        for tag, attributes in page.found
        for name in ("src", "href", "xlink:href", "srcset", "data", "action")
        if attributes.get(name) is not None
    ]
    assert addresses and all(address.startswith(("#", "data:image/jpeg;base64,")) for address, _ in addresses)
    assert not page.all("script") and not page.all("iframe") and not page.all("link")
    assert not [name for _, each in page.found for name in each if name.startswith("on")]
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"url\((?!#)", text) == [] and "@import" not in text
    policy = next(
        each["content"] for each in page.all("meta") if "Content-Security" in each.get("http-equiv", "")
    )
    assert "default-src 'none'" in policy
    assert path.stat().st_size < 2_000_000


def test_text_is_escaped(page, path):
    assert "<script" not in path.read_text(encoding="utf-8")
    assert f"{TITLE} item-" in page.text  # a title of the catalogue
    assert "<joint>" in page.text  # a stage's name
    labels = [each["aria-label"] for each in page.all("svg")]
    assert any("<joint>" in label for label in labels)


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [each["id"] for _, each in page.found if "id" in each]
    assert len(ids) == len(set(ids))
    inside = [each["href"] for each in page.all("a")] + [each["xlink:href"] for each in page.all("use")]
    assert len(inside) > 10 and {link.removeprefix("#") for link in inside} <= set(ids)
    assert {each["aria-labelledby"] for each in page.all("section")} <= set(ids)


def test_every_chart_is_told_in_words_and_keeps_its_letters(page, path):
    charts = page.all("svg")
    assert len(charts) == 16 and all(
        each["role"] == "img" and len(each["aria-label"]) > 30 for each in charts
    )
    assert all("width" not in each and each["viewbox"] for each in charts)  # as wide as there is room
    body = path.read_text(encoding="utf-8").partition("</style>")[2]
    assert "stroke: var(--c0)" in body and "fill: var(--shade)" in body  # the page's colours, dark or light
    assert not re.findall(r"(?:fill|stroke): #", body)
    for words in ("Training loss (nats)", "Validation NDCG@10", "Optimizer step", "Mean gate weight"):
        assert words in page.text


def test_figures_are_those_of_the_evaluations(run, page):
    for kind, metric in (("test", "NDCG@10"), ("test", "MRR"), ("test-vhr", "VHR@1")):
        for file in ("model", "popularity"):
            cell = Evaluation.load(run / "evaluations" / kind / f"{file}.json").metrics["masked"][metric]
            assert f"{cell.value:.4f}" in page.text
            assert f"[{cell.low:.4f}, {cell.high:.4f}]" in page.text
    slices = Evaluation.load(run / "evaluations" / "test" / "model.json").slices["target popularity"]
    for label, part in slices.items():
        cell = part["metrics"]["masked"]["NDCG@10"]
        assert f"{label} ({part['users']} users)" in page.text
        assert f"[{cell.low:.4f}, {cell.high:.4f}]" in page.text


def test_the_summary_names_recipe_data_machine_and_duration(run, page):
    data = PreparedData.load(run.parent / "data")
    assert data.split.hash() in page.text
    for words in ("batch_users", "precision", "synthetic", "planted attributes", "transformers", "processor"):
        assert words in page.text
    assert "Missing from this report" not in page.text and "3 of 3 stages" in page.text


def test_gates_are_shown_for_items_that_training_never_had(page):
    assert "never in training" in page.text and "9-13 times" in page.text
    shares = [each["aria-label"] for each in page.with_class("shares")]
    assert shares and all(sum(map(int, re.findall(r"(\d+) %", share))) in range(98, 103) for share in shares)


def test_users_have_pictures_and_the_target_is_marked(run, page):
    evaluation = Evaluation.load(run / "evaluations" / "test" / "model.json")
    data = PreparedData.load(run.parent / "data")
    ranks = {
        data.interactions.user_ids[user]: rank
        for user, rank in zip(evaluation.users, evaluation.ranks["masked"], strict=True)
    }
    users = re.findall(r"User (user-\d+)", page.text)
    assert len(users) == 4
    shown = [int(rank) for rank in re.findall(r"at rank (\d+)", page.text)]
    assert shown == [ranks[user] for user in users]
    assert len(page.with_class("target")) == 4  # in the list, or beside it
    pictures = [each["src"] for each in page.all("img")]
    assert pictures and all(each["alt"] == "" for each in page.all("img"))  # the title stands below
    for address in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert picture.format == "JPEG" and picture.width <= 184 and picture.height <= 276


def test_pictures_are_the_files_that_other_documents_use(run, path):
    names = ["training", "gates", "gate_groups", "gate_distribution", "comparison", "slices"]
    names += ["comparison-test-vhr", "slices-test-vhr"]
    folder = run / "pictures"
    assert {each.name for each in folder.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    for name in ("training", "gates", "gate_distribution"):
        assert (folder / f"{name}.png").read_bytes() == (run / "plots" / f"{name}.png").read_bytes()
    assert all(f.read_text(encoding="utf-8").startswith("<?xml") for f in folder.glob("*.svg"))


def test_the_same_run_gives_the_same_page_and_an_error_leaves_it(run, path, tmp_path, monkeypatch):
    again = write_report(run, tmp_path / "again.html")
    assert again.read_bytes() == path.read_bytes() and list(tmp_path.iterdir()) == [again]

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("speeder.studies.report.build.render", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run, again)
    assert again.read_bytes() == path.read_bytes() and list(tmp_path.iterdir()) == [again]


@pytest.mark.parametrize(
    ("width", "shown", "hidden"), [(1280, ".wide", ".narrow"), (390, ".narrow", ".wide")]
)
def test_it_fits_wide_and_phone_narrow(path, width, shown, hidden):
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": 800})
        problems, requests = [], []
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert (
            page.locator(f"{shown} svg").first.is_visible()
            and page.locator(f"{hidden} svg").first.is_hidden()
        )
        images = "[...document.images].every(each => each.complete && each.naturalWidth > 100)"
        assert page.evaluate(images)
        smallest = """Math.min(...[...document.querySelectorAll('.chart svg text')].map(
            each => each.getBoundingClientRect().height).filter(height => height > 0))"""
        assert page.evaluate(smallest) >= 11  # pixels: letters that can be read
        cut = """[...document.querySelectorAll('td, tbody th')].filter(each => each.offsetParent
            && each.getBoundingClientRect().right > innerWidth).length"""
        assert page.evaluate(cut) == 0
        assert not problems and all(url.startswith(("file:", "data:")) for url in requests)
