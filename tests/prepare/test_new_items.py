"""New items, from real tables and pictures: added all or none, recommended at once, and nothing else changes."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from speeder.cli.main import main
from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.processor import SpeederProcessor
from speeder.prepare.encoders.image import ImageEncoder
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.new_items import add_items, encode_items, read_items, without_added
from tests.io.killing import killed_at
from tests.model.worlds import TEXT, save_tiny_backbone, tiny_backbone
from tests.prepare.encoders.tiny import save_bert, save_clip

TEXTS = ["dogs", "cats", "bank", "robbery Heat", "title dogs", "bank cats"]
HISTORIES = [[0, 1], [3, 4, 2]]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEEDER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny encoders, a recommender that reads what they make beside fitted features, and a few pictures."""
    folder = tmp_path_factory.mktemp("items")
    save_bert(folder / "bert")
    save_clip(folder / "clip")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 200 - 20 * number, 90)).save(pictures / f"{number}.png")
    images = [str(pictures / f"{number}.png") for number in range(5)] + [None]
    catalogue = ItemCatalogue([f"old{i}" for i in range(6)], [f"Old {i}" for i in range(6)], TEXTS, images)
    catalogue = catalogue.with_features("text", *text_encoder(folder).encode(TEXTS))
    catalogue = catalogue.with_features("image", *image_encoder(folder).encode(images)[:2])
    catalogue = catalogue.with_features("collaborative", torch.randn(6, 4))
    model = SpeederForCausalLM.from_backbone(tiny_backbone(), catalogue, item_embedding=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "saved" / "model")
    return folder


def text_encoder(place):
    return TextEncoder(str(place / "bert"))


def image_encoder(place):
    return ImageEncoder(str(place / "clip"))


def encoders(place):
    return {"text_encoder": text_encoder(place), "image_encoder": image_encoder(place)}


@pytest.fixture
def folder(place, tmp_path):
    """A recommender's folder that a test may change."""
    shutil.copytree(place / "saved", tmp_path / "saved")
    return tmp_path / "saved" / "model"


ROWS = [
    {"id": "new1", "title": "Heat", "text": "bank robbery", "image": "6.png"},
    {"id": "new2", "title": "dogs, cats", "text": "", "image": None},
    {"id": "new3", "title": "", "text": "", "image": "7.png"},
]


def write_table(path, rows=ROWS):
    """The rows as a table of the kind that the name says."""
    names = list(rows[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        cells = [",".join(f'"{row[name] or ""}"' for name in names) for row in rows]
        path.write_text("\n".join([",".join(names), *cells]) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_added_items_are_recommended_and_read_and_old_scores_stay(place, folder, tmp_path, suffix):
    before = SpeederForCausalLM.from_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    table = write_table(tmp_path / f"new{suffix}")
    added = add_items(folder, table, images=place / "pictures", **encoders(place))
    assert added.ids == ["new1", "new2", "new3"] and added.titles == ["Heat", "dogs, cats", ""]
    assert added.texts[0] == "Heat. bank robbery."
    assert added.present["text"].tolist() == [True, True, False]
    assert added.present["image"].tolist() == [True, False, True]
    assert (folder / "model.safetensors").read_bytes() == weights
    after = SpeederForCausalLM.from_pretrained(folder)
    assert after.config.num_items == len(after.catalogue) == 9
    torch.testing.assert_close(after.score(HISTORIES)[:, :6], before.score(HISTORIES))
    assert {item.id for item in after.recommend([["old0"]], k=8)[0]} >= {"new1", "new2", "new3"}
    with_new = after.score([["old0", "new1"], ["new3", "old2"]])
    assert with_new.isfinite().all() and not torch.allclose(with_new[0], after.score([["old0"]])[0])
    gates = after.gates()
    for name in ("collaborative", "item"):
        assert not gates[name][6:].any() and gates[name][:6].all()
    torch.testing.assert_close(gates["text"][7], torch.tensor(1.0))


def test_an_added_item_is_the_token_of_its_content(place, folder, tmp_path):
    """Two rows of one text and picture score alike; another text scores otherwise."""
    rows = [{"id": name, "title": title, "image": "6.png"} for name, title in ("aA", "bA", "cB")]
    rows = [row | {"title": {"A": "Heat", "B": "dogs"}[row["title"]]} for row in rows]
    add_items(folder, write_table(tmp_path / "new.csv", rows), images=place / "pictures", **encoders(place))
    scores = SpeederForCausalLM.from_pretrained(folder).score(HISTORIES)[:, 6:]
    torch.testing.assert_close(scores[:, 0], scores[:, 1])
    assert not torch.allclose(scores[:, 0], scores[:, 2])


def test_files_and_memory_agree(place, folder, tmp_path):
    table = write_table(tmp_path / "new.csv")
    model = SpeederForCausalLM.from_pretrained(folder)
    items, _ = read_items(table, place / "pictures", model.catalogue)
    added = encode_items(items, model.config.modalities, **encoders(place), known=model.catalogue)
    assert model.add_items(added) == range(6, 9)
    add_items(folder, table, images=place / "pictures", **encoders(place))
    torch.testing.assert_close(
        SpeederForCausalLM.from_pretrained(folder).score(HISTORIES), model.score(HISTORIES)
    )


def test_out_leaves_the_old_one_as_it_is(place, folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    table = write_table(tmp_path / "new.csv")
    add_items(folder, table, out=tmp_path / "with", images=place / "pictures", **encoders(place))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(SpeederForCausalLM.from_pretrained(tmp_path / "with").catalogue) == 9
    with pytest.raises(SpeederError, match="cannot save to"):
        add_items(folder, table, out=tmp_path / "with", images=place / "pictures", **encoders(place))


def test_a_processor_knows_them_too(place, folder, tmp_path):
    save_tiny_backbone(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokenizer" / name, folder / name)
    table = write_table(tmp_path / "new.csv")
    add_items(folder, table, images=place / "pictures", **encoders(place))
    processor = SpeederProcessor.from_pretrained(folder)
    assert processor([["old1", "new2"]])["input_ids"].tolist() == [[TEXT + 1, TEXT + 7]]
    assert processor.config.vocab_size == TEXT + 9 and processor.decode([TEXT + 7]) == "<dogs, cats>"


FAULTS = [
    (
        [{"id": "a", "title": "Heat"}, {"id": "a", "title": "dogs"}],
        "line 3: the id 'a' is also in .*line 2",
    ),
    (
        [{"id": "a", "title": "Heat"}, {"id": "old3", "title": "x"}],
        "line 3: the recommender has .*'old3' already",
    ),
    (
        [{"id": "a", "title": "Heat"}, {"id": "b", "title": ""}],
        "line 3: the item has no title or text nor picture",
    ),
    ([{"id": "", "title": "Heat"}], "line 2: no item id"),
    ([{"sku": "a", "title": "Heat"}], "has no column 'item' or .*; it names sku, title"),
    ([{"id": "a", "colour": "red"}], "expected a column title, text or image"),
    ([{"id": "a", "title": "x", "image": "99.png"}], "line 2: there is no picture .*99.png"),
    ([{"id": "a", "title": "x", "image": "../0.png"}], "line 2: the picture '../0.png' lies outside"),
    ([{"id": "a", "title": "x", "image": "torn.png"}], "line 2: .*torn.png is not a readable picture"),
]


@pytest.mark.parametrize(("rows", "message"), FAULTS, ids=[message[:30] for _, message in FAULTS])
def test_a_wrong_table_is_refused_by_its_row_and_nothing_changes(place, folder, tmp_path, rows, message):
    pictures = place / "pictures"
    (pictures / "torn.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SpeederError, match=message):
        add_items(folder, write_table(tmp_path / "new.csv", rows), images=pictures, **encoders(place))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(os.listdir(folder.parent)) == ["model"]


def test_broken_lines_and_empty_tables_are_refused(place, folder, tmp_path):
    (tmp_path / "broken.csv").write_text("id,title\na,Heat\nb,dogs,cats\n")
    with pytest.raises(SpeederError, match="line 3: wrong number of fields"):
        add_items(folder, tmp_path / "broken.csv", **encoders(place))
    (tmp_path / "broken.csv").write_bytes("id,title\na,Käse\n".encode("latin-1"))
    with pytest.raises(SpeederError, match=r"line 2: not UTF-8 \(save the file as UTF-8\)"):
        add_items(folder, tmp_path / "broken.csv", **encoders(place))
    (tmp_path / "empty.csv").write_text("id,title\n")
    with pytest.raises(SpeederError, match="lists no item"):
        add_items(folder, tmp_path / "empty.csv", **encoders(place))
    with pytest.raises(SpeederError, match=r"row 1: .*already"):
        add_items(
            folder, write_table(tmp_path / "x.parquet", [{"id": "old0", "title": "x"}]), **encoders(place)
        )


def test_another_encoder_is_refused_even_of_the_same_width(place, folder, tmp_path):
    torch.manual_seed(9)
    save_bert(tmp_path / "other")
    table = write_table(tmp_path / "new.csv", [{"id": "a", "title": "Heat"}])
    with pytest.raises(
        SpeederError, match=r"gives other features than the recommender's; use --text-encoder"
    ):
        add_items(folder, table, text_encoder=str(tmp_path / "other"))
    with pytest.raises(SpeederError, match="gives 32 features, but the recommender reads 16"):
        words = f"backbone:{save_tiny_backbone(tmp_path / 'words')}"
        add_items(folder, table, text_encoder=words)


class Recorded:
    """An encoder whose answers are known: processes that are killed need no threads of their own."""

    name = "recorded"

    def __init__(self, known, width):
        self.known, self.width = known, width

    def encode(self, texts):
        rows = [self.known.get(text, torch.ones(self.width)) for text in texts]
        return torch.stack(rows), torch.tensor([bool(text) for text in texts])


def test_killed_at_any_moment_the_recommender_loads_with_all_or_none(place, folder, tmp_path):
    catalogue = ItemCatalogue.load(folder / "catalogue")
    encoder = Recorded(dict(zip(catalogue.texts, catalogue.features["text"].clone(), strict=True)), 16)
    table = write_table(tmp_path / "new.csv", [{"id": "a", "title": "Heat"}, {"id": "b", "title": "dogs"}])
    wanted = SpeederForCausalLM.from_pretrained(folder).score(HISTORIES)
    sizes, touch = [], 0
    while killed_at(touch, lambda: add_items(folder, table, text_encoder=encoder)):
        model = SpeederForCausalLM.from_pretrained(folder)
        sizes.append(len(model.catalogue))
        torch.testing.assert_close(model.score(HISTORIES)[:, :6], wanted)
        shutil.rmtree(folder)
        shutil.copytree(place / "saved" / "model", folder)
        touch += 1
    assert set(sizes) == {6, 8} and sizes == sorted(sizes), (
        "killed before the end, and after the items came in"
    )
    assert len(SpeederForCausalLM.from_pretrained(folder).catalogue) == 8


def test_the_command_line(place, folder, tmp_path, capsys):
    table = write_table(tmp_path / "new.csv", [{"id": "fresh", "title": "Heat"}])
    command = ["items", "add", "--model", str(folder), "--items", str(table)]
    assert main([*command, "--text-encoder", str(place / "bert")]) == 0
    assert "1 items added, with text (1)" in capsys.readouterr().out
    assert main(["recommend", str(folder), "--history", "fresh", "-k", "6"]) == 0
    assert main(["recommend", str(folder), "--history", "old0", "-k", "6"]) == 0
    assert "fresh" in capsys.readouterr().out.split("\n", 6)[-1]
    assert main([*command, "--text-encoder", str(place / "bert")]) == 1
    assert "has an item of the id 'fresh' already" in capsys.readouterr().err


def test_an_evaluation_leaves_added_items_out(place, folder, tmp_path):
    trained = ItemCatalogue.load(folder / "catalogue")
    wanted = SpeederForCausalLM.from_pretrained(folder).score(HISTORIES)
    table = write_table(tmp_path / "new.csv", [{"id": "a", "title": "Heat"}])
    add_items(folder, table, text_encoder=text_encoder(place))
    model = SpeederForCausalLM.from_pretrained(folder)
    assert without_added(model, trained) == 1 and without_added(model, trained) == 0
    torch.testing.assert_close(model.score(HISTORIES), wanted)
