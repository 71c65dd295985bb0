"""VHR@1 among 20 candidates serves every kind of model over the very same candidates."""

import json

import yaml

from speeder.cli.main import main
from speeder.prepare.synthetic import synthetic_world
from tests.baselines.text_worlds import save_text_backbone

STAGE = {"name": "only", "open": ["text"], "steps": 2}
RECIPES = {
    "speeder": {"stages": [STAGE | {"titles": 0.5}]},
    "text-prompt": {"baseline": "text-prompt", "stages": [STAGE]},
    "title-generation": {"baseline": "title-generation", "supervision": "last", "stages": [STAGE]},
    "sasrec": {"baseline": "sasrec", "sasrec": {"hidden_size": 8, "heads": 1, "layers": 1, "epochs": 1}},
}
LABELS = ("Speeder", "text prompt", "title generation", "SASRec (cross-entropy)")


def test_every_model_answers_among_the_same_candidates(tmp_path, capsys):
    world = synthetic_world(num_users=24, history=6)
    world.save(tmp_path / "data")
    save_text_backbone(tmp_path / "backbone", world.catalogue.titles)
    runs = [str(tmp_path / name) for name in RECIPES]
    for (name, recipe), run, label in zip(RECIPES.items(), runs, LABELS, strict=True):
        if name != "sasrec":
            sizes = {"batch_users": 8, "precision": "fp32", "model": {"max_history": 4}}
            recipe = recipe | sizes | {"backbone": str(tmp_path / "backbone")}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        what = ["--data", str(tmp_path / "data"), "--recipe", str(tmp_path / f"{name}.yaml")]
        assert main(["train", *what, "--out", run]) == 0
        capsys.readouterr()
        more = ["--answers", "titles"] if name == "speeder" else []
        assert main(["evaluate", run, "--protocol", "vhr", "--no-baselines", *more]) == 0
        assert f"\n{label}" in capsys.readouterr().out
    runs.append(str(tmp_path / "speeder" / "evaluations" / "test-vhr" / "model-titles.json"))
    assert main(["compare", *runs, "--protocol", "vhr", "--out", str(tmp_path / "compared")]) == 0
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert len({model["candidates_hash"] for model in found["models"].values()}) == 1
    assert len(found["tests"]) == 10 and found["metric"] == "VHR@1"
    metrics = {name: model["metrics"]["masked"] for name, model in found["models"].items()}
    for name in set(metrics) - {"title-generation", "model-titles"}:
        assert metrics[name]["ValidRatio"]["value"] == 1, "an item is always one of the candidates"
    for each in metrics.values():
        product = each["ValidRatio"]["value"] * each["HR@1"]["value"]
        assert abs(each["VHR@1"]["value"] - product) < 1e-9
