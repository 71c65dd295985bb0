"""Evaluates a run and writes its results: tables, plots, example recommendations, gate weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speeder.baselines.bsarec.model import BSARec
from speeder.baselines.fit_neighbours import content_modalities, fit_neighbours, fits
from speeder.baselines.neighbours import Neighbours
from speeder.baselines.popularity import Popularity
from speeder.baselines.sasrec.model import SASRec
from speeder.baselines.sequential.base import SequentialModel
from speeder.data.fingerprints import training_hash
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.candidates import Candidates
from speeder.evaluation.evaluate import evaluate, evaluate_candidates, evaluate_titles
from speeder.evaluation.leaks import LeakError, check_features, check_model_features, check_split
from speeder.evaluation.result import COLD_ITEMS, PROTOCOLS, Evaluation, evaluation_file
from speeder.evaluation.scorer import Scorer
from speeder.evaluation.tables import comparison_latex, comparison_table, terminal_table
from speeder.evaluation.users import UserMap, in_this_process
from speeder.io.files import write_json, write_text
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.title_writer import TitleWriter
from speeder.recipes.load import bsarec_settings_for, settings_for
from speeder.recipes.sasrec import SASRecConfig
from speeder.studies.charts import plot_comparison, plot_gate_distribution, plot_gates, plot_training
from speeder.studies.curves import training_curves
from speeder.training.run_folder import stage_logs
from speeder.training.sequential import fit_on_split

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations"


VHR_NEGATIVES, SAMPLED_NEGATIVES = 19, 20  # as LLaRA and MLLM-MSR draw them


AskFor = Callable[[Path, Scorer], UserMap]
"""The file of an evaluation and its model -> the `UserMap` that runs the model over users."""


def ask_here(file: Path, model: Scorer) -> UserMap:
    """Run every model in this process."""
    return in_this_process


@dataclass(frozen=True)
class Measure:
    """How models are evaluated: targets, protocol and candidates.

    `candidates` is None if the whole catalogue is ranked. `ask_for` gives the `UserMap` of a model. The constructor
    checks the data for leaks (`LeakError`): the split against the interactions, and what the features were fitted on.
    """

    data: PreparedData
    split: str = "test"
    protocol: str = "full"
    candidates: Candidates | None = None
    ask_for: AskFor = ask_here

    def __post_init__(self) -> None:
        check_split(self.data.split, self.data.interactions)
        check_features(self.data)

    @property
    def task(self) -> dict:
        """The task of evaluations by this measure; see `Evaluation.task`."""
        drawn = self.candidates
        return {
            "protocol": self.protocol,
            "split": self.split,
            "split_hash": self.data.split.hash(),
            "num_items": len(self.data.catalogue),
            "num_ranked": None if drawn is None else drawn.negatives.shape[1] + 1,
            "candidates_hash": None if drawn is None else drawn.hash(),
        }

    @property
    def folder(self) -> str:
        """The name of this kind of evaluation in files and folders; see `measure_folder`."""
        count = self.candidates.negatives.shape[1] if self.candidates else None
        return measure_folder(
            self.split, self.protocol, count, self.candidates.seed if self.candidates else 0
        )

    def __call__(self, model: Scorer, ask: UserMap = in_this_process) -> Evaluation:
        """Evaluate a model: by ranking, or by the titles that it writes if it only writes titles.

        Raises:
            SpeederError: the model cannot be evaluated by this protocol.
            LeakError: the model has other features than the data's; or see `evaluate`.
        """
        check_model_features(model, self.data)
        if self.candidates is None:
            if not getattr(model, "ranks_catalogue", True):
                raise SpeederError(
                    f"{type(model).__name__} cannot rank a whole catalogue; evaluate it with --protocol vhr"
                    + ("" if hasattr(model, "generate_titles") else " or sampled")
                )
            return evaluate(model, self.data.split, self.split, ask=ask)
        if hasattr(model, "generate_titles"):
            if self.protocol != "vhr":
                raise SpeederError(
                    f"{type(model).__name__} writes titles and cannot rank; evaluate it with --protocol vhr"
                )
            titles = self.data.catalogue.titles
            return evaluate_titles(model, self.data.split, self.candidates, titles, ask=ask)
        num_items = len(self.data.catalogue)
        return evaluate_candidates(
            model, self.data.split, self.candidates, self.protocol, num_items=num_items, ask=ask
        )


def check_protocol(
    protocol: str, negatives: int | None = None, seed: int = 0, answers: str = "ranking"
) -> None:
    """Refuse an option that the protocol does not use.

    Raises:
        SpeederError: the protocol is unknown, or it does not use `negatives`, `seed` or `answers`.
    """
    if protocol not in PROTOCOLS:
        raise SpeederError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if negatives is not None and protocol != "sampled":
        raise SpeederError(f"negatives: expected none with the protocol {protocol!r}, got {negatives}")
    if seed and protocol not in ("vhr", "sampled"):
        raise SpeederError(f"candidates-seed: expected none with the protocol {protocol!r}, got {seed}")
    if answers != "ranking" and protocol != "vhr":
        raise SpeederError(f"answers: expected 'ranking' with the protocol {protocol!r}, got {answers!r}")


def measure_folder(split: str, protocol: str, negatives: int | None = None, seed: int = 0) -> str:
    """The folder name of a kind of evaluation, such as "test", "test-vhr", "test-sampled-99" or "test-vhr-seed3"."""
    if protocol == "full":
        return split
    if protocol == COLD_ITEMS and split != "test":
        raise SpeederError(f"split: expected 'test' with the protocol {protocol!r}, got {split!r}")
    unusual = protocol == "sampled" and negatives not in (None, SAMPLED_NEGATIVES)
    return f"{split}-{protocol}" + (f"-{negatives}" if unusual else "") + (f"-seed{seed}" if seed else "")


def measure_for(
    run: Path,
    data: PreparedData,
    split: str = "test",
    protocol: str = "full",
    negatives: int | None = None,
    seed: int = 0,
    ask_for: AskFor = ask_here,
) -> Measure:
    """The measure of a protocol, with its candidate file in `run/candidates`, which is drawn if it is missing.

    Args:
        negatives: negatives per user for "sampled" (20 by default); "vhr" always has 19.
        ask_for: gives the `UserMap` of a model.

    Raises:
        SpeederError: see `check_protocol`; or the file is damaged, or of other candidates.
        LeakError: the file was not drawn over the whole catalogue, or the data leak.
    """
    check_protocol(protocol, negatives, seed)
    if protocol == "full":
        return Measure(data, split, ask_for=ask_for)
    count = VHR_NEGATIVES if protocol == "vhr" else SAMPLED_NEGATIVES if negatives is None else negatives
    path = run / "candidates" / f"{split}-{count}-seed{seed}.json"
    if path.exists():
        candidates = Candidates.load(path)
        named = (candidates.split, candidates.negatives.shape[1], candidates.seed)
        if named != (split, count, seed):
            raise SpeederError(
                f"{path}: expected {split} candidates, {count} per user, of seed {seed}, got {named}"
            )
        if candidates.num_items != len(data.catalogue):
            raise LeakError(
                f"{path}: drawn over {candidates.num_items} items, but the catalogue has {len(data.catalogue)}; "
                "remove the file to draw candidates again"
            )
    else:
        candidates = Candidates.draw(data.split, split, len(data.catalogue), count, seed)
        candidates.save(path)
    return Measure(data, split, protocol, candidates, ask_for)


def _evaluation_path(run: Path, name: str, measure: Measure) -> Path:
    return run / EVALUATIONS / measure.folder / evaluation_file(name)


def evaluate_once(run: Path, name: str, model: Scorer, measure: Measure, *, mend: bool = False) -> Evaluation:
    """Evaluate under a name, or read the evaluation that the run folder already has of this task.

    The name must identify one model of this run, such as a finished stage's.

    Args:
        mend: evaluate again if the file cannot be read. Only if `model` is certainly the one of that name: a finished
            run has its earlier stages' evaluations, but not their models.

    Raises:
        SpeederError: the file cannot be read, unless `mend`.
    """
    path = _evaluation_path(run, name, measure)
    if path.exists():
        try:
            known = Evaluation.load(path)
        except SpeederError as error:
            if not mend:
                raise
            log.warning("%s; evaluating again", error)
        else:
            if known.task == measure.task:
                return known
    return _evaluated(path, model, measure)


def _evaluated(path: Path, model: Scorer, measure: Measure) -> Evaluation:
    evaluation = measure(model, measure.ask_for(path, model))
    evaluation.save(path)
    return evaluation


def kept_evaluation(run: Path, name: str, measure: Measure) -> Evaluation:
    """The evaluation that the run folder has under a name, for models that no longer exist.

    Raises:
        SpeederError: it is missing, damaged or of another task.
    """
    path = _evaluation_path(run, name, measure)
    if not path.exists():
        raise SpeederError(
            f"{path} is missing, and the model {name!r} was not kept: train again in another folder"
        )
    known = Evaluation.load(path)
    if known.task != measure.task:
        raise SpeederError(f"{path}: was made with other data or another protocol than this evaluation")
    return known


def evaluate_run(run: Path, model: Scorer, measure: Measure, name: str = "model") -> Evaluation:
    """Evaluate a run's finished model, and save each user's ranks in `evaluations/`, where `compare` finds them.

    Args:
        name: the file's name; `compare` looks for "model".
    """
    return _evaluated(_evaluation_path(run, name, measure), model, measure)


def evaluate_answers(
    run: Path, model: Scorer, measure: Measure, answers: str = "ranking"
) -> dict[str, Evaluation]:
    """The rows of a run's model: by ranking, and with `answers="titles"` also by the titles that it writes.

    Raises:
        SpeederError: the model was not trained to write titles; see `TitleWriter.of_run`.
    """
    models = {"model": model}
    only_writes = hasattr(model, "generate_titles")  # a baseline, which is always evaluated by its titles
    if answers == "titles" and not only_writes:
        models["model-titles"] = TitleWriter.of_run(run, model)
    return {model_label(each): evaluate_run(run, each, measure, name) for name, each in models.items()}


def baselines(
    run: Path,
    measure: Measure,
    *,
    with_neighbours: bool = True,
    with_sasrec: bool = True,
    with_bsarec: bool = False,
) -> dict[str, Evaluation]:
    """Popularity, neighbours, a cross-entropy SASRec and, if asked for, BSARec, fitted on the training part.

    All but popularity are saved in `run/baselines` and not fitted again for the same data. Neighbours have their
    default settings, SASRec and BSARec the bundled ones that suit the data.

    Args:
        with_neighbours, with_sasrec, with_bsarec: not for a run of that very kind. BSARec takes long.
    """
    training = measure.data.split.training()
    models: list[Scorer] = [Popularity(training, len(measure.data.catalogue))]
    if with_neighbours:
        models.append(_neighbours(run, measure.data))
    rows = {model.label: evaluate_once(run, model.label, model, measure, mend=True) for model in models}
    for kind, settings, wanted in (  # slow, so they come last
        (SASRec, settings_for, with_sasrec),
        (BSARec, bsarec_settings_for, with_bsarec),
    ):
        if wanted:
            model = _sequential(kind, settings(training), run, measure.data)
            rows[kind.label] = evaluate_once(run, kind.label, model, measure, mend=True)
    return rows


def _neighbours(run: Path, data: PreparedData) -> Neighbours:
    """Neighbours with the default settings, kept in the run folder."""
    folder = run / "baselines" / "neighbours"
    if (folder / "config.json").exists():
        kept = Neighbours.load(folder)
        if fits(kept, data):
            return kept
    for file in (run / EVALUATIONS).glob(f"*/{evaluation_file(Neighbours.label)}"):
        file.unlink()  # of other features, which an evaluation does not tell
    model = fit_neighbours(data.split, data.catalogue, content_modalities(data))
    model.save(folder)
    return model


def _sequential(
    kind: type[SequentialModel], config: SASRecConfig, run: Path, data: PreparedData
) -> SequentialModel:
    """SASRec or BSARec, stopped by the validation ranking, kept in the run folder.

    After a stop it resumes from its last epoch.
    """
    folder = run / "baselines" / kind.name
    model = kind.load(folder) if (folder / "config.json").exists() else None
    fits = model is not None and (model.training_hash, model.num_items) == (
        training_hash(data.split.training()),
        len(data.catalogue),
    )
    if not fits:
        checkpoint = folder / "checkpoint.safetensors"
        model = fit_on_split(kind, data, config, checkpoint)
        model.save(folder)
        checkpoint.unlink(missing_ok=True)
    return model


def model_label(model: Scorer) -> str:
    """The name of a model's row in tables."""
    return getattr(model, "label", "Speeder")


def write_results(run: Path, evaluations: Mapping[str, Evaluation], kind: str = "test") -> str:
    """Write `results.md`, `.tex`, `.json` and `plots/comparison.png` into a run folder.

    Args:
        evaluations: name -> evaluation, in the order of the table's rows.
        kind: the measure's folder; unless "test", it is part of the files' names, as in `results-test-vhr.md`.

    Returns:
        a table for the terminal, and where all tables lie.
    """
    suffix = "" if kind == "test" else f"-{kind}"
    for ending, text in (
        ("md", comparison_table(evaluations) + "\n"),
        ("tex", comparison_latex(evaluations)),
    ):
        write_text(run / f"results{suffix}.{ending}", text)
    # each user's ranks lie in evaluations/
    summary = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    write_json(run / f"results{suffix}.json", summary)
    metric = next(iter(evaluations.values())).main_metric
    plot_comparison(evaluations, run / "plots" / f"comparison{suffix}.png", metric)
    all_tables = run / f"results{suffix}.md"
    return f"{terminal_table(evaluations)}\n\nAll tables, with seen items allowed and by slices of users: {all_tables}"


def write_training_plots(out: Path, run: Path, model: SpeederForCausalLM) -> None:
    """Write `training.png` and, for a model with gates, `gates.png` and `gate_distribution.png` into `out/plots`."""
    curves = training_curves(stage_logs(run))
    if not any(stage["loss"] for stage in curves.stages.values()):  # neighbours: nothing was trained
        return
    plot_training(curves.stages, out / "plots" / "training.png")
    if not curves.gates:  # a baseline without item tokens
        return
    present = model.mrc.presence()
    weights = {name: values[present[name]].numpy() for name, values in model.gates().items()}
    gates = curves.in_order(list(weights)).gates  # one colour per modality in all pictures
    plot_gates(gates, out / "plots" / "gates.png", curves.spans)
    plot_gate_distribution(weights, out / "plots" / "gate_distribution.png")


def gate_table(model: SpeederForCausalLM) -> str:
    """Mean gate weight of each modality over all items, and over the items that have it, as a Markdown table."""
    present = model.mrc.presence()
    lines = [
        "| modality | items that have it | mean gate, all items | mean gate, items that have it |",
        "|---|---|---|---|",
    ]
    for name, weights in model.gates().items():
        own = weights[present[name]]
        lines.append(f"| {name} | {len(own)} | {weights.mean():.3f} | {own.mean() if len(own) else 0:.3f} |")
    return "\n".join(lines)


def item_title(data: PreparedData, item: int) -> str:
    """An item's title, or what it is called without one."""
    return data.catalogue.titles[item] or f"item {data.catalogue.ids[item]}"


def example_recommendations(model: SpeederForCausalLM, data: PreparedData, users: int = 3, k: int = 5) -> str:
    """A few test users' newest items, recommendations and next item, by title."""
    histories, targets = data.split.histories("test"), data.split.targets("test")
    # evenly spaced over the users
    chosen = np.linspace(0, len(histories) - 1, users + 2).astype(int)[1:-1]
    lines = []
    for row, recommended in zip(chosen, model.recommend([histories[i] for i in chosen], k), strict=True):
        user = data.interactions.user_ids[data.split.users("test")[row]]
        last = [item_title(data, i) for i in histories[row][-5:]]
        lines.append(f"User {user} ({len(histories[row])} items), last: " + "; ".join(last))
        for place, item in enumerate(recommended, 1):
            hit = "   <- next item" if item.item == targets[row] else ""
            lines.append(f"  {place}. {item_title(data, item.item)}{hit}")
        lines.append(f"  next item: {item_title(data, targets[row])}")
    return "\n".join(lines)
