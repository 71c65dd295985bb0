"""The weight of the item pairs in a trained model's scores, chosen on the validation items.

No other part is trained on them: the training loss cannot set this balance, as what memorises the training items would
starve what generalises.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from speeder.data.interactions import Split
from speeder.evaluation.metrics import metric_values
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.streamed_ranking import ranks_by_weight

STEPS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # in units of the logit scale: dense scores are scale × cosine
_MOST_USERS = 10_000  # evenly spaced


def choose_pair_weight(model: SpeederForCausalLM, split: Split) -> dict[str, Any]:
    """Find the weight with the best NDCG@10 of the validation items among all items, seen ones masked.

    Among equals the smallest is chosen. The model is not changed.

    Returns:
        `pair_weight`, the chosen one, and `tried`: for each weight its `pair_weight` and `NDCG@10`.

    Raises:
        SpeederError: the model has no item pairs.
    """
    histories, targets = split.histories("validation"), split.targets("validation")
    users = np.linspace(0, len(histories) - 1, min(len(histories), _MOST_USERS)).astype(np.int64)
    weights = [step * float(model.logit_scale.detach().exp()) for step in STEPS]
    ranks = ranks_by_weight(model, [histories[user] for user in users], targets[users], weights)
    tried = [
        {"pair_weight": weight, "NDCG@10": float(metric_values(found, "NDCG@10").mean())}
        for weight, found in zip(weights, ranks, strict=True)
    ]
    best = max(tried, key=lambda each: each["NDCG@10"])
    return {"pair_weight": best["pair_weight"], "tried": tried}
