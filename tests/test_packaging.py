"""What an installed wheel must hold beside Python files."""

from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

from speeder_kernels.dispatch import OLDEST_TRITON

ROOT = Path(__file__).resolve().parent.parent


def test_every_data_file_is_packaged():
    """A recipe that no pattern names would be there in an editable install and missing from a wheel."""
    patterns = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]["package-data"]
    for package in ("speeder", "speeder_kernels"):
        found = {
            path
            for path in (ROOT / package).rglob("*")
            if path.suffix in (".yaml", ".yml", ".json", ".txt", ".html", ".css", ".js", ".svg", ".j2")
        }
        named = {path for pattern in patterns.get(package, []) for path in (ROOT / package).glob(pattern)}
        assert found == named
    assert ROOT / "speeder" / "recipes" / "ml-100k.yaml" in {*(ROOT / "speeder").glob("recipes/*.yaml")}


def test_the_extra_asks_for_a_triton_that_is_not_refused():
    extras = read_configuration(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert extras["triton"] == ["triton>=" + ".".join(map(str, OLDEST_TRITON))]
