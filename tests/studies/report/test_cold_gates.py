"""The gate of items that were held out, in the page of a run that was measured on them."""

import re

import numpy as np

from speeder.cli.main import main
from speeder.data import ItemCatalogue, PreparedData
from speeder.evaluation.cold_split import ColdItems
from speeder.prepare.synthetic import synthetic_world
from speeder.studies.report.build import write_report
from speeder.studies.report.contents import read_run
from tests.model.worlds import save_tiny_backbone
from tests.studies.report.worlds import RECIPE


def test_held_out_items_are_a_group_of_their_own(tmp_path):
    world = synthetic_world(num_users=40, history=8)
    items = world.catalogue
    content = {name: items.features[name] for name in ("text", "image")}
    catalogue = ItemCatalogue(items.ids, items.titles, items.texts, features=content)
    PreparedData(catalogue, world.interactions, world.manifest).save(tmp_path / "data")
    held = tmp_path / "held"
    assert main(["items", "hold-out", "--data", str(tmp_path / "data"), "--out", str(held)]) == 0
    save_tiny_backbone(tmp_path / "backbone")
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(backbone=tmp_path / "backbone").replace(", collaborative", ""))
    assert main(["train", "--data", str(held / "warm"), "--recipe", str(recipe), "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--protocol", "cold-items"]) == 0
    text = write_report(run).read_text(encoding="utf-8")
    cold = ColdItems.beside(held / "warm", PreparedData.load(held / "warm"))
    row = re.search(r"held out</th><td[^>]*>(\d+)</td>(.*?)</tr>", text, re.DOTALL)
    assert int(row[1]) == len(cold.catalogue)
    weights = [float(value) for value in re.findall(r"<b>([\d.]+)</b>", row[2])]
    assert len(weights) == 3 and weights[-1] == 0.0  # no learned embedding
    assert np.isclose(sum(weights), 1.0, atol=0.002)
    for words in ("New items, among all", "New items, among themselves", "content neighbours (text)"):
        assert words in text
    contents = read_run(run)
    assert list(contents.evaluations) == ["test-cold-items", "test-cold-only"]
    assert [len(rows) for rows in contents.evaluations.values()] == [4, 4]
