"""The claims of docs/results.md in short, on real films, texts and weights. Costs are in test_bench.py."""

import pytest

from speeder.baselines.popularity import Popularity
from speeder.evaluation.compare import compare
from speeder.evaluation.evaluate import evaluate
from speeder.prepare.pipeline import prepare_ml100k
from speeder.recipes.schema import Recipe, Stage
from speeder.training.train import train


@pytest.mark.slow
def test_a_minute_of_training_ranks_better_than_popularity_and_each_stage_adds_to_it(
    ml100k_folder, smollm2_folder, minilm_folder, tmp_path
):
    data = prepare_ml100k(tmp_path / "data", source=ml100k_folder, modalities=("text", "collaborative"))
    stages = [
        Stage("text", open=["text"], steps=6),
        Stage("+collaborative", open=["text", "collaborative"], steps=14),
        Stage("joint", open=["text", "collaborative", "item"], steps=30),
    ]
    recipe = Recipe(
        stages=stages,
        backbone=str(smollm2_folder),
        layers=2,
        batch_users=48,
        ema_decay=0.9,
        model={"max_history": 50, "item_embedding": True, "position_proxy_weight": 0.05, "dropout": 0.2},
    )
    found = {}
    train(
        recipe,
        data,
        tmp_path / "run",
        on_stage=lambda stage, model: found.update({stage.name: evaluate(model.eval(), data.split)}),
    )
    found["popularity"] = evaluate(Popularity(data.split.training(), len(data.catalogue)), data.split)
    pairs = {(pair.first, pair.second): pair for pair in compare(found)}
    assert pairs["joint", "popularity"].difference.low > 0.01
    assert pairs["text", "joint"].difference.high < 0
    assert found["+collaborative"].mean("NDCG@10") > found["text"].mean("NDCG@10")
