"""The public names, and what importing them must not bring along: each library is imported where it is first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import speeder
from tests.model.worlds import tiny_model

TRAINING = {"transformers.trainer", "peft", "tensorboard", "tensorboardX"}
PICTURES = {"matplotlib", "PIL.ImageDraw"}
TABLES = {"pyarrow", "pandas", "ray", "faiss"}
OTHERS = {
    "speeder.baselines.bsarec.fit",
    "speeder.baselines.sasrec.fit",
    "speeder.baselines.sequential.fit",
    "speeder.baselines.text.base",
    "speeder.training.train",
    "speeder.studies",
}
WEB = {"fastapi", "uvicorn"}


def imported_by(code: str) -> set[str]:
    """The modules of a fresh process after some code."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("name", speeder.__all__)
def test_every_public_name_is_there_and_listed(name):
    assert getattr(speeder, name).__name__ == name
    assert name in dir(speeder)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'SpeederForCasualLM'"):
        speeder.SpeederForCasualLM  # noqa: B018


def test_the_package_and_the_commands_help_import_no_torch():
    for code in ("import speeder", "from speeder.cli.main import build_parser; build_parser()"):
        assert not {"torch", "transformers", "numpy"} & imported_by(code), code


@pytest.fixture(scope="module")
def base() -> set[str]:
    """What transformers itself imports for `PreTrainedModel`, which is not ours to leave out."""
    return imported_by(
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel"
    )


def test_the_model_imports_nothing_beyond_its_base_class(base):
    ours = imported_by("from speeder import SpeederForCausalLM")
    packages = {name.partition(".")[0] for name in ours - base}
    assert packages <= {"speeder", "speeder_kernels", "xxhash"}, packages


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (
            "from speeder import PreparedData, load_recipe",
            TRAINING | PICTURES | WEB | {"transformers", "ray"},
        ),
        ("from speeder import SpeederProcessor, UserSessions, evaluate", TRAINING | PICTURES | TABLES | WEB),
        ("from speeder import train", PICTURES | WEB | {"ray", "faiss"}),
        # all that `speeder recommend` needs
        (
            "import speeder.cli.recommend; from speeder.baselines.auto import load_model;"
            "from speeder.data.find_run import find_model",
            TRAINING | PICTURES | TABLES | WEB | OTHERS,
        ),
    ],
)
def test_what_a_name_must_not_import(base, code, unwanted):
    assert not unwanted & (imported_by(code) - (base if "transformers" not in unwanted else set()))


def test_recommending_loads_no_more_than_it_uses(base, tmp_path):
    """A saved recommender's catalogue is Parquet: that brings pyarrow, but not pandas with it."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    command = f"main(['recommend', {str(tmp_path / 'model')!r}, '--history', {model.catalogue.ids[1]!r}, '-k', '2'])"
    imported = imported_by(f"from speeder.cli.main import main; assert {command} == 0") - base
    unwanted = TRAINING | PICTURES | WEB | OTHERS | {"pandas", "pyarrow.dataset", "ray", "faiss"}
    assert "pyarrow.parquet" in imported and not unwanted & imported, unwanted & imported
