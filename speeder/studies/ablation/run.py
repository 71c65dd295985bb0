"""Run a study: every variant with every seed, resumable at any moment, with a report after each finished run.

Several processes may work on one study's folder. Each run has a lock, which its process holds until it ends.
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
from speeder.evaluation.result import Evaluation
from speeder.io.files import read_json, write_json
from speeder.recipes.schema import AUTO, NoStageLeft, Recipe
from speeder.studies.ablation.report import Finished, write_report
from speeder.studies.ablation.study import BASE, Study, Variant, differing_keys
from speeder.studies.evaluate_run import Measure, baselines, evaluate_run, kept_evaluation
from speeder.training.precision import resolve_precision
from speeder.training.run_folder import begun_identity, begun_precision, run_identity
from speeder.training.train import train

_SECONDS = "seconds.json"
_EVALUATED = "model"  # as `evaluate_run` calls a run's finished model
_PAUSE = 2.0  # seconds between checks of runs that other processes make


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
    """Train and evaluate a study's variants; after a stop, the same call resumes.

    Every variant runs with the first seed, then with the second, so a study that is stopped early has compared all
    variants. Each run is an ordinary run folder, `out/<variant>/seed-<n>`. At the end, runs that other processes are
    making are waited for.

    Args:
        study: the base recipe and its variants.
        data: a prepared set.
        out: the study's folder; after every finished run it gets `ablations.json`, `.md` and `.png`.
        seeds: seeds of the runs to make. The report is over all finished seeds.
        only: names of variants or groups to run, with the base. Others that are finished are reported too.
        keep_models: keep the weights of finished runs; by default only each user's rank is kept.
        data_folder: the folder of `data`, recorded in the runs.
        say: called with each line for the user.

    Returns:
        the report as Markdown.

    Raises:
        SpeederError: a variant does not fit the data; or a folder holds a run of another recipe or other data, or an
            unreadable one.
        LeakError: the data leak.
    """
    out, measure = Path(out), Measure(data)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise SpeederError(f"seeds: expected at least one, each once, got {list(seeds)}")
    chosen = study.chosen(list(only))
    recipes = _recipes_for(study, data, only, say)
    chosen = [variant for variant in chosen if variant.name in recipes]
    for name, recipe in recipes.items():  # check every folder before anything is trained
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
                if ours and not keep_models:  # weights are large, and not needed any more
                    shutil.rmtree(run / "model", ignore_errors=True)
            if not ours:
                elsewhere.append((seed, variant))
        if elsewhere == waiting:
            time.sleep(_PAUSE)
        waiting = elsewhere
    return _report(out, finished, measure, rows)


@contextmanager
def _claimed(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock the folder until the end; yields False if another process has it (with `wait`, waits for it instead)."""
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
    """Each variant's recipe over the modalities that the data have, with the same number of steps.

    Left out, unless they are in `only`: variants of missing modalities alone, and variants that equal the base then.
    """
    recipes, reported = {}, set()
    for name, variant in study.variants.items():
        try:
            recipe, notes = variant.recipe.for_modalities(data.catalogue.readable, keep_stages=True)
            if name != BASE and recipe == recipes[BASE]:
                raise NoStageLeft("with these data's modalities it is the same as the base")
        except SpeederError as error:
            if isinstance(error, NoStageLeft) and name != BASE and name not in only:
                say(f"Note: {name} is left out: {error}")
                continue
            raise SpeederError(f"{study.name}: {name}: {error}") from error
        recipes[name] = recipe
        for note in notes:
            if note not in reported:
                say(f"Note ({name}): {note}")
        reported |= set(notes)
    return recipes


def _precision(out: Path, recipes: Mapping[str, Recipe]) -> str:
    """The precision of all runs with `precision: auto`: measured once, so that variants do not differ in it.

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
            f"{out}: holds runs in {' and in '.join(sorted(found))}: remove the runs in one of them, and {path.name} if"
            " it names that one"
        )
    chosen = found.pop() if found else resolve_precision(AUTO)
    write_json(path, {"precision": chosen})
    return chosen


def _seed_of(run: Path) -> int:
    try:
        return int(run.name.removeprefix("seed-"))
    except ValueError:
        raise SpeederError(f"{run}: expected a folder named seed-NUMBER") from None


def _check_same_run(run: Path, recipe: Recipe, data: PreparedData) -> None:
    """Refuse a folder whose run has another recipe or other data than the study's."""
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
        f"{run}: holds a run of {what} than the study's; remove that folder to make the run again, or give another"
        " --out"
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
    """Train or resume, and evaluate."""
    model = read_json(run / "state.json").get("model") if (run / "state.json").exists() else None
    if model and not (run / model).exists():
        raise SpeederError(
            f"{run}: the run is finished, but its evaluation and its weights are gone; remove that folder to make the"
            " run again"
        )
    resumed, started, worked = (run / "recipe.json").exists(), time.monotonic(), time.process_time()
    try:
        model = train(recipe, measure.data, run, resume=resumed, data_folder=data_folder, precision=precision)
    except SpeederError as error:
        raise SpeederError(f"{variant.name}: {error}") from error
    if not (run / _SECONDS).exists():  # the time of an interrupted run is not known
        took = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}
        write_json(run / _SECONDS, {} if resumed else took)
    evaluate_run(run, model, measure)


def _report(out: Path, finished: Finished, measure: Measure, rows: Mapping[str, Evaluation]) -> str:
    """Report all finished runs, including those of earlier calls and of other processes."""
    for name in finished.study.variants:
        for run in filter(_is_finished, _runs(out, name)):
            seed = _seed_of(run)
            if seed not in finished.evaluations.get(name, ()):
                took = read_json(run / _SECONDS) if (run / _SECONDS).exists() else {}
                took |= {"precision": begun_precision(run), "processor": _processor(run)}
                finished.add(name, seed, kept_evaluation(run, _EVALUATED, measure), took)
    return write_report(out, finished, rows)


def _processor(run: Path) -> str | None:
    """The processor of the run's last stage."""
    logs = sorted(run.glob("stages/*/log.json"))
    machine = read_json(logs[-1]).get("machine", {}) if logs else {}
    return f"{machine['processor']}, threads: {machine['threads']}" if "processor" in machine else None
