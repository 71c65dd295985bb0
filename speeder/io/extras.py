"""How to install the packages of an extra: by their own names, since the `speeder` of PyPI is another project."""

from __future__ import annotations

import shlex
from importlib.metadata import requires

from packaging.requirements import Requirement


def pip_command(extra: str) -> str:
    """`pip install` with the requirements of one of this package's extras."""
    needed = map(Requirement, requires("speeder") or ())
    chosen = [each for each in needed if each.marker is not None and each.marker.evaluate({"extra": extra})]
    options = [f"[{','.join(sorted(each.extras))}]" if each.extras else "" for each in chosen]
    names = [f"{each.name}{more}{each.specifier}" for each, more in zip(chosen, options, strict=True)]
    return shlex.join(["pip", "install", *names])
