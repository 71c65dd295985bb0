"""How the tests call g++ and nvcc.

By SPEEDER_COMPILER_LAUNCHER (ccache, say), as setup.py does. Callers run it in a folder with `csrc` and name files from
there, so that a clone at another path gives the compilers, and so the launcher, the same words.
"""

from __future__ import annotations

import os
import shlex


def launcher() -> list[str]:
    return shlex.split(os.environ.get("SPEEDER_COMPILER_LAUNCHER", ""))


def cxx() -> list[str]:
    """The C++ compiler, for one file at a time (`-c`): launchers do not keep what is linked."""
    return [*launcher(), os.environ.get("CXX", "g++")]


def nvcc(program: str = "nvcc") -> list[str]:
    return [*launcher(), program]
