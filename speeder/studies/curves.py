"""A run's logs as curves over the steps of all its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TrainingCurves:
    """The curves of a run's stages over the steps of all stages, for `speeder.studies.charts`.

    Attributes:
        stages: stage -> "loss", and "NDCG@10" where it was measured -> points.
        gates: modality -> points; empty for a model without item tokens.
        spans: stage -> its first and last step.
    """

    stages: dict[str, dict[str, list[tuple[int, float]]]]
    gates: dict[str, list[tuple[int, float]]]
    spans: dict[str, tuple[int, int]]

    def in_order(self, modalities: Sequence[str]) -> TrainingCurves:
        """The same curves, with the gates of these modalities first, in this order; logs have no order."""
        names = dict.fromkeys([name for name in modalities if name in self.gates] + list(self.gates))
        return replace(self, gates={name: self.gates[name] for name in names})


def training_curves(logs: Mapping[str, list[dict]]) -> TrainingCurves:
    """The curves of stages' logs, as `stage_logs` reads them."""
    curves, gates, spans, start = {}, {}, {}, 0
    for name, log in logs.items():
        losses = [(start + entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        ranking = [(start + entry["step"], entry["eval_NDCG@10"]) for entry in log if "eval_NDCG@10" in entry]
        curves[name] = {"loss": losses, **({"NDCG@10": ranking} if ranking else {})}
        for entry in log:
            for key, value in entry.items():
                if key.startswith("gate/"):
                    gates.setdefault(key.removeprefix("gate/"), []).append((start + entry["step"], value))
        end = start + max(entry["step"] for entry in log)
        spans[name] = (start, end)
        start = end
    return TrainingCurves(curves, gates, spans)
