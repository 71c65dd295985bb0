"""Cold start: hold items out from a prepared set, and rank them for a run."""

from __future__ import annotations

from pathlib import Path

from speeder.baselines.content import ContentNeighbours
from speeder.baselines.fit_neighbours import content_modalities, fit_neighbours
from speeder.baselines.neighbours import Neighbours
from speeder.baselines.popularity import Popularity
from speeder.data.fingerprints import training_hash
from speeder.data.prepared import PreparedData
from speeder.evaluation.cold_ranking import evaluate_cold, with_cold_items
from speeder.evaluation.cold_split import ColdItems, check_replaceable, hold_out
from speeder.evaluation.result import COLD_ITEMS, COLD_ONLY, Evaluation, evaluation_file
from speeder.evaluation.scorer import Scorer
from speeder.prepare.features import add_features
from speeder.studies.evaluate_run import (
    EVALUATIONS,
    AskFor,
    ask_here,
    measure_folder,
    model_label,
    write_results,
)


def make_hold_out(
    data_folder: Path, out: Path, share: float = 0.1, seed: int = 0
) -> tuple[PreparedData, ColdItems]:
    """Hold items out from a prepared set, and write `out/warm`, to train on, and `out/cold`.

    Collaborative features are fitted again, on the remaining training part.

    Raises:
        SpeederError: see `hold_out`; or `out` holds anything but an earlier hold-out.
    """
    check_replaceable(out)
    data = PreparedData.load(data_folder)
    warm, cold = hold_out(data, share, seed)
    if "collaborative" in data.catalogue.features:
        warm = add_features(warm, ["collaborative"])
    cold.save(out, warm)
    return warm, cold


def evaluate_cold_run(
    run: Path,
    model: Scorer,
    data: PreparedData,
    data_folder: Path,
    *,
    with_baselines: bool = True,
    ask_for: AskFor = ask_here,
) -> str:
    """Rank the cold items by a run's model, by popularity, by content neighbours and by neighbours.

    Saves each user's ranks in `evaluations/test-cold-items` and `test-cold-only`, and writes the results of both.

    Args:
        ask_for: gives the `UserMap` that runs a model over users.

    Returns:
        tables for the terminal, and where all tables lie.
    """
    cold = ColdItems.beside(data_folder, data)
    models = dict(baselines_for(cold, data)) if with_baselines else {}
    models[model_label(model)] = with_cold_items(model, cold, data)
    rows = {}
    for name, each in models.items():
        file = evaluation_file("model" if each is model else name)
        folders = {
            protocol: run / EVALUATIONS / measure_folder("test", protocol)
            for protocol in (COLD_ITEMS, COLD_ONLY)
        }
        rows[name] = evaluate_cold(each, cold, data, ask=ask_for(folders[COLD_ITEMS] / file, each))
        for protocol, folder in folders.items():
            rows[name][protocol].save(folder / file)
    tables = []
    for protocol in (COLD_ITEMS, COLD_ONLY):
        evaluations: dict[str, Evaluation] = {name: found[protocol] for name, found in rows.items()}
        tables.append(write_results(run, evaluations, measure_folder("test", protocol)))
    return "\n\n".join(tables)


def baselines_for(cold: ColdItems, warm: PreparedData) -> dict[str, Scorer]:
    """Popularity, with a count of 0 for every cold item; content neighbours of the first common modality; and
    neighbours, whose weights are those of the warm items, in no pair of which a cold item is."""
    training = warm.split.training()
    catalogue = warm.catalogue.concat(cold.catalogue)
    rows: dict[str, Scorer] = {Popularity.label: Popularity(training, len(catalogue))}
    name = "text" if "text" in cold.catalogue.features else next(iter(cold.catalogue.features))
    fitted_on = {"training_hash": training_hash(training)}
    neighbours = ContentNeighbours(catalogue.features[name], catalogue.present[name], **fitted_on)
    rows[f"{ContentNeighbours.label} ({name})"] = neighbours
    fitted = fit_neighbours(warm.split, warm.catalogue, content_modalities(warm))
    return rows | {Neighbours.label: fitted.with_items(catalogue)}
