"""Run a study: every variant with every seed, resumable at any moment, with a report after each finished run.

Several processes may work on one study's folder: each run has a lock, which its process holds for as long as it lives.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.evaluation import Evaluation
from speeder.io.files import read_json, write_json
from speeder.recipes.schema import AUTO, NoStageLeft, Recipe
from speeder.studies.ablation.report import Finished, write_report
from speeder.studies.ablation.study import BASE, Study, Variant, differing_keys
from speeder.studies.evaluate_run import Measure, baselines, evaluate_run, kept_evaluation
from speeder.training.precision import resolve_precision
from speeder.training.run import train
from speeder.training.run_folder import begun_identity, begun_precision, run_identity

_SECONDS = "seconds.json"
_EVALUATED = "model"  # as `evaluate_run` calls a run's finished model
_PAUSE = 2.0  # seconds between looks at runs that other processes make


def ablate(
    study: Study,
    data: PreparedData,
    out: str | Path,
    seeds: Sequence[int] = (1, 2, 3),
    *,
    only: Sequence[str] = (),
    keep_models: bool = False,
    data_folder: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Train and evaluate a study's variants; stopped at any moment, the same call goes on where it was.

    Runs go by seeds: every variant with the first seed, then with the second, so that a study which is stopped early
    has compared all variants. Each run is an ordinary run folder, `out/<variant>/seed-<n>`. A run that another process
    is making is waited for in the end.

    Args:
        study: what to vary.
        data: a prepared set.
        out: the study's folder; holds `ablations.json`, `.md` and `.png` after every finished run.
        seeds: of the runs to make. The report is over all seeds that are finished.
        only: names of variants or groups; the base is always among them. Others that are finished are reported too.
        keep_models: keep finished runs' weights; by default each user's rank alone is kept.
        data_folder: where `data` lies, noted in the runs.
        say: takes each line for the user.

    Returns:
        the report as Markdown.

    Raises:
        SpeederError: a variant does not fit the data, or a folder holds a run of another recipe or of other data, or
            one that cannot be read.
        LeakError: the data leak.
    """
    out, measure = Path(out), Measure(data)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise SpeederError(f"seeds: expected at least one, each once, got {list(seeds)}")
    chosen = study.chosen(list(only))
    recipes = _recipes_for(study, data, only, say)
    chosen = [variant for variant in chosen if variant.name in recipes]
    for name, recipe in recipes.items():  # nothing is trained before every folder was seen to fit
        for run in _runs(out, name):
            _check_same_run(run, replace(recipe, seed=_seed_of(run)), data)
    with _claimed(out / "baselines", wait=True):
        rows = baselines(out, measure)
        precision = _precision(out, recipes)
    finished = Finished(study)
    plan = [(seed, variant) for seed in seeds for variant in chosen]
    waiting, total = plan, len(plan)
    while waiting:
        elsewhere = []
        for seed, variant in waiting:
            run = out / variant.name / f"seed-{seed}"
            with _claimed(run) as ours:
                if ours and not _is_finished(run):
                    number = plan.index((seed, variant)) + 1
                    say(f"\n[{number} of {total}] {variant.name}, seed {seed}: {variant.tests}")
                    recipe = replace(recipes[variant.name], seed=seed)
                    _run(run, variant, recipe, measure, data_folder, precision)
                    _report(out, finished, measure, rows)
                if ours and not keep_models:  # weights are large, and nothing here needs them again
                    shutil.rmtree(run / "model", ignore_errors=True)
            if not ours:
                elsewhere.append((seed, variant))
        if elsewhere == waiting:
            time.sleep(_PAUSE)
        waiting = elsewhere
    return _report(out, finished, measure, rows)


@contextmanager
def _claimed(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the folder is this process's own until the end, or another's; with `wait` it is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _runs(out: Path, variant: str) -> list[Path]:
    return sorted(out.glob(f"{variant}/seed-*"), key=_seed_of)


def _recipes_for(
    study: Study, data: PreparedData, only: Sequence[str], say: Callable[[str], None]
) -> dict[str, Recipe]:
    """Each variant's recipe over the modalities that the data have, all with as many steps as before.

    Variants that tell nothing then are left out, unless they were asked for by name: those of missing modalities alone,
    and those that are the base.
    """
    recipes, told = {}, set()
    for name, variant in study.variants.items():
        try:
            recipe, notes = variant.recipe.for_modalities(list(data.catalogue.modalities), keep_stages=True)
            if name != BASE and recipe == recipes[BASE]:
                raise NoStageLeft("with these data's modalities it is the same as the base")
        except SpeederError as error:
            if isinstance(error, NoStageLeft) and name != BASE and name not in only:
                say(f"Note: {name} is left out: {error}")
                continue
            raise SpeederError(f"{study.name}: {name}: {error}") from error
        recipes[name] = recipe
        for note in notes:
            if note not in told:
                say(f"Note ({name}): {note}")
        told |= set(notes)
    return recipes


def _precision(out: Path, recipes: Mapping[str, Recipe]) -> str:
    """What all runs compute in whose recipe leaves it open: chosen by the machine once, for a difference between
    variants must not be one of precision.

    Raises:
        SpeederError: finished runs differ in it.
    """
    path = out / "precision.json"
    found = {
        begun_precision(run)
        for name, recipe in recipes.items()
        for run in (_runs(out, name) if recipe.precision == AUTO else ())
    } - {None}
    if path.exists():
        found.add(read_json(path)["precision"])
    if len(found) > 1:
        raise SpeederError(
            f"{out}: holds runs in {' and in '.join(sorted(found))}: remove those of one, and {path.name} where it"
            " names that one"
        )
    chosen = found.pop() if found else resolve_precision(AUTO)
    write_json(path, {"precision": chosen})
    return chosen


def _seed_of(run: Path) -> int:
    try:
        return int(run.name.removeprefix("seed-"))
    except ValueError:
        raise SpeederError(f"{run}: expected a folder of the name seed-NUMBER") from None


def _check_same_run(run: Path, recipe: Recipe, data: PreparedData) -> None:
    """Refuse a folder whose run is not the one that the study asks for."""
    if not (run / "recipe.json").exists():
        return
    began, wanted = begun_identity(run), run_identity(recipe, data)
    if began == wanted:
        return
    what = "other data"
    if began.get("recipe") != wanted["recipe"]:
        try:
            keys = differing_keys(began["recipe"], wanted["recipe"])
        except (KeyError, TypeError):
            keys = []
        what = f"another recipe ({', '.join(keys) or 'not readable'})"
    raise SpeederError(
        f"{run}: holds a run of {what} than the study asks for; remove that folder and the run is made anew, "
        "or give another --out"
    )


def _is_finished(run: Path) -> bool:
    return (run / "evaluations" / "test" / f"{_EVALUATED}.json").exists()


def _run(
    run: Path,
    variant: Variant,
    recipe: Recipe,
    measure: Measure,
    data_folder: str | Path | None,
    precision: str,
) -> None:
    """Train, or go on training, and evaluate."""
    model = read_json(run / "state.json").get("model") if (run / "state.json").exists() else None
    if model and not (run / model).exists():
        raise SpeederError(
            f"{run}: was finished, but neither its evaluation nor its weights are there any more; remove that "
            "folder and the run is made anew"
        )
    resumed, started, worked = (run / "recipe.json").exists(), time.monotonic(), time.process_time()
    try:
        model = train(recipe, measure.data, run, resume=resumed, data_folder=data_folder, precision=precision)
    except SpeederError as error:
        raise SpeederError(f"{variant.name}: {error}") from error
    if not (run / _SECONDS).exists():  # of a run that was stopped, no one has counted them all
        took = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}
        write_json(run / _SECONDS, {} if resumed else took)
    evaluate_run(run, model, measure)


def _report(out: Path, finished: Finished, measure: Measure, rows: Mapping[str, Evaluation]) -> str:
    """Over all runs that are finished by now, those of earlier calls and of other processes too."""
    for name in finished.study.variants:
        for run in filter(_is_finished, _runs(out, name)):
            seed = _seed_of(run)
            if seed not in finished.evaluations.get(name, ()):
                took = read_json(run / _SECONDS) if (run / _SECONDS).exists() else {}
                took |= {"precision": begun_precision(run), "processor": _processor(run)}
                finished.add(name, seed, kept_evaluation(run, _EVALUATED, measure), took)
    return write_report(out, finished, rows)


def _processor(run: Path) -> str | None:
    """What the run's last stage ended on."""
    logs = sorted(run.glob("stages/*/log.json"))
    machine = read_json(logs[-1]).get("machine", {}) if logs else {}
    return f"{machine['processor']}, threads: {machine['threads']}" if "processor" in machine else None
