"""A small run that was trained, with pictures, evaluated by several protocols; what reports are made of in tests."""

from pathlib import Path

from PIL import Image

from speeder.cli.main import main
from speeder.data import ItemCatalogue, PreparedData
from speeder.prepare.synthetic import synthetic_world
from speeder.studies.evaluate_run import baselines, measure_for
from tests.model.worlds import save_tiny_backbone

TITLE = "<script>alert(1)</script> & $x_1$ \"quoted\" 'film'"

RECIPE = """
backbone: {backbone}
precision: fp32
batch_users: 16
checkpoint_steps: 2
log_steps: 1
model: {{item_embedding: true}}
stages:
  - {{name: text, open: [text], steps: 4}}
  - {{name: +image, open: [text, image], steps: 4}}
  - {{name: <joint>, open: [text, image, collaborative, item], steps: 4}}
"""


def make_run(folder: Path, num_users: int = 40) -> Path:
    """`folder/run`, trained on `folder/data`; every item's title is `TITLE` and its id, every second has a picture."""
    world = synthetic_world(num_users=num_users, history=8)
    items, pictures = world.catalogue, folder / "pictures"
    pictures.mkdir(parents=True)
    images = []
    for row, name in enumerate(items.ids):
        path = pictures / f"{name}.png"
        Image.new("RGB", (300, 450), (5 * row % 256, 90, 255 - 5 * row % 256)).save(path)
        images.append(str(path) if row % 2 else None)
    titles = [f"{TITLE} {name}" for name in items.ids]
    catalogue = ItemCatalogue(items.ids, titles, items.texts, images, items.features, items.present)
    PreparedData(catalogue, world.interactions, world.manifest).save(folder / "data")
    save_tiny_backbone(folder / "backbone")
    (folder / "recipe.yaml").write_text(RECIPE.format(backbone=folder / "backbone"))
    arguments = ["--data", folder / "data", "--recipe", folder / "recipe.yaml", "--out", folder / "run"]
    assert main(["train", *map(str, arguments)]) == 0
    return folder / "run"


def evaluate_run(run: Path, *protocols: str) -> None:
    """Evaluate by each protocol, beside popularity and neighbours."""
    data = PreparedData.load(run.parent / "data")
    for protocol in protocols:
        assert main(["evaluate", str(run), "--no-baselines", "--protocol", protocol]) == 0
        baselines(run, measure_for(run, data, protocol=protocol), with_sasrec=False)
