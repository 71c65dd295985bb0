"""Claims of the ablations in short: a study of a planted world, where it is known what must help.

That each modality and each form of position reaches the prediction is shown in tests/model.
"""

import json

import pytest

from speeder.baselines.sasrec.model import SASRec
from speeder.data.fingerprints import training_hash
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.sasrec import SASRecConfig
from speeder.studies.ablation.run import ablate
from speeder.studies.ablation.study import study_from_dict
from tests.model.worlds import save_tiny_backbone

FEATURES = ["text", "image", "collaborative"]
RATES = {"learning_rate": 3e-3, "backbone_learning_rate": 3e-3}
# The next item follows from its predecessor's text alone: pictures and collaborative features are noise.
RECIPE = {
    "precision": "fp32",
    "batch_users": 64,
    "keep_best": False,
    "stages": [
        {"name": "text", "open": ["text"], "steps": 30, **RATES},
        {"name": "joint", "open": FEATURES, "steps": 30, **RATES},
    ],
}
STUDY = {
    "base": "recipe.yaml",
    "variants": {
        "MRC": {
            "image": {"tests": "a modality that says nothing", "changes": {"stages.*.open": ["image"]}},
        },
        "MPO": {
            "reversed": {"tests": "noise first", "changes": {"stages.text.open": ["image", "collaborative"]}},
        },
        "supervision": {"last": {"tests": "the last item alone", "changes": {"supervision": "last"}}},
    },
}


@pytest.mark.slow
def test_what_must_help_helps(tmp_path):
    """In the same steps: the telling modality, opened first, with every position asked for."""
    save_tiny_backbone(tmp_path / "backbone")
    recipe = json.dumps(RECIPE | {"backbone": str(tmp_path / "backbone")})  # which is YAML too
    (tmp_path / "recipe.yaml").write_text(recipe)
    world = synthetic_world(num_users=300, follows="text")
    sasrec = SASRec(len(world.catalogue), SASRecConfig(hidden_size=8, heads=1, layers=1))
    sasrec.training_hash = training_hash(world.split.training())
    sasrec.save(tmp_path / "out" / "baselines" / "sasrec")  # beside it, none is fitted
    ablate(study_from_dict(STUDY, "planted", tmp_path), world, tmp_path / "out", (1,))
    found = json.loads((tmp_path / "out" / "ablations.json").read_text())["variants"]
    assert found["base"]["metrics"]["masked"]["HR@10"]["value"] > 0.6
    gaps = {
        name: entry["differences"]["masked"]["NDCG@10"] for name, entry in found.items() if name != "base"
    }
    for name, gap in gaps.items():
        assert gap["high"] < -0.05 and gap["adjusted"] < 0.01, (name, gap)
