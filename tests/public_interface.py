"""What others rely on by name: public names with their parameters, and the commands with their options."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from transformers import PretrainedConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("speeder", "speeder_kernels")
# a line of argparse's help: two spaces, a hyphen, and what the option is called
_OPTION = re.compile(r"^  (-\S.*?)(?: {2,}.*)?$", re.MULTILINE)
_NAME = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
_COMMAND = re.compile(r"^    ([a-z][a-z-]*)(?: {2,}.*)?$", re.MULTILINE)

# What a program calls of the public classes; they have more, for each other.
METHODS = {
    "Interactions": "load save sequences",
    "ItemCatalogue": "load save modalities with_features index_of",
    "LeaveOneOut": "hash histories targets training users",
    "PreparedData": "load save split with_features",
    "Recipe": "for_modalities to_dict",
    "SpeederForCausalLM": "from_backbone from_pretrained save_pretrained forward generate score recommend gates"
    " add_items merge_lora use_item_store",
    "SpeederProcessor": "from_pretrained save_pretrained batch_decode",
    "UserSessions": "extend recommend score history forget clear memory",
}


def speeder_main() -> Callable[[Sequence[str]], int]:
    """The function behind the `speeder` command, wherever `pyproject.toml` says that it lies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["speeder"].partition(":")
    return getattr(importlib.import_module(module), function)


def run_speeder(*arguments: object) -> tuple[int, str, str]:
    """Run a `speeder` command in this process: its exit status, what it printed, and what it told on stderr."""
    printed, told = StringIO(), StringIO()
    with redirect_stdout(printed), redirect_stderr(told):
        try:
            status = speeder_main()([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse's way to end
            status = int(stopped.code or 0)
    return status, printed.getvalue(), told.getvalue()


def command_options(*command: str) -> dict[str, list[str]]:
    """Each option of a command -> the values that it can be chosen from; none where it takes any, or takes none."""
    found: dict[str, list[str]] = {}
    for line in _OPTION.findall(_help(*command)):
        choices = re.search(r"\{(.*?)\}", line)
        names = _NAME.findall(re.sub(r"\{.*?\}", "", line))
        found |= dict.fromkeys(names, sorted(choices[1].split(",")) if choices else [])
    return found


def commands() -> dict[str, dict[str, list[str]]]:
    """Each command of `speeder`, and each of `speeder items` -> its options, as `command_options` gives them."""
    names = [[name] for name in _COMMAND.findall(_help())]
    names += [["items", name] for name in _COMMAND.findall(_help("items"))]
    return {" ".join(name): command_options(*name) for name in names}


def raw_formats() -> list[str]:
    """What `speeder prepare` reads, as argparse lists it for a name that it does not know."""
    _, _, told = run_speeder("prepare", "no-such-format", "--out", "nowhere")
    return re.findall(r"[\w-]+", told.partition("choose from ")[2])


def public_parameters() -> dict[str, list[str]]:
    """Each public name, and each of [`METHODS`] -> its parameters; none where it is a property or takes no names."""
    found: dict[str, list[str]] = {}
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            public, path = getattr(package, name), f"{package.__name__}.{name}"
            found[path] = _parameters(public)
            for method in METHODS.get(name, "").split():
                found[f"{path}.{method}"] = _parameters(getattr(public, method))
    return found


def _parameters(public: object) -> list[str]:
    """The names of a function's parameters, without those that a class takes from another package's."""
    if not callable(public) or (inspect.isclass(public) and issubclass(public, Exception)):
        return []  # a property, or an error, which is only caught
    named = _names(public)
    if inspect.isclass(public) and PretrainedConfig in public.__mro__:
        inherited = set(_names(PretrainedConfig))
        named = [name for name in named if name not in inherited]
    return named


def _names(function: Callable) -> list[str]:
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind not in open_ended and each.name != "self"]


def _help(*command: str) -> str:
    with patch.dict("os.environ", {"COLUMNS": "400", "NO_COLOR": "1"}):  # one line an option, and no colours
        status, text, told = run_speeder(*command, "--help")
    if status:
        raise ValueError(f"speeder {' '.join(command)} --help: expected status 0, got {status}: {told}")
    return text
