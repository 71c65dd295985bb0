"""What an installed wheel must hold beside Python files."""

import re
import subprocess
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


def test_make_demo_installs_no_tool_of_development():
    """`make demo` installs the package's own dependencies, and the extra `dev` is `make test`'s alone."""
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    needed, tools = (
        {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}
        for requirements in (project["dependencies"], project["optional-dependencies"]["dev"])
    )
    assert not needed & tools
    assert {"pytest", "ruff", "import-linter", "triton", "playwright"} <= tools
    plan = {
        target: subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True)
        for target in ("demo", "test")
    }
    assert "dev.txt" not in plan["demo"].stdout and "dev.txt" in plan["test"].stdout
    assert plan["test"].stdout.count("-e .") == 1, "the compiled libraries are built once"
