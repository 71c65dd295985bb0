"""Frozen Hugging Face models: loading (safetensors only, none of their code is run) and identity."""

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from speeder.errors import SpeederError
from speeder.model.loading import align_weights
from speeder.prepare.encoders.cache import module_hash

log = logging.getLogger(__name__)

LOADING = {"trust_remote_code": False}  # None would ask on the terminal
_FAILURES = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)


@contextmanager
def loading(kind: str, name: str) -> Iterator[None]:
    """Turns what is raised on a model that cannot be loaded into one `SpeederError`; `kind` is `"text"`, say.

    transformers' warnings about unused weights are suppressed: an image encoder does not use a text tower.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except SpeederError:
        raise
    except _FAILURES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpeederError(f"the {kind} encoder {name!r} cannot be loaded: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_frozen(model_class: type, folder: str, **options: object) -> tuple[PreTrainedModel, set[str]]:
    """A model in evaluation mode and float32, and the names of its pooler's weights if the files have none.

    Such a pooler is random, and must not be used. Raises `ValueError` if any other weight is missing.

    Args:
        model_class: its `from_pretrained` is called with `folder` (or a Hub id) and `options`.
    """
    model, report = model_class.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **LOADING, **options
    )
    missing = set(report["missing_keys"])
    needed = sorted(key for key in missing if "pooler" not in key.split("."))
    if needed:
        raise ValueError(f"its files lack the weights {needed[0]} ({len(needed)} in all)")
    align_weights(model)
    return model.eval(), missing


def check_repeatable(compute: Callable[[list], list[Tensor]], inputs: list) -> list[Tensor]:
    """The result of `compute`, after a check that it is one vector per input, and the same every time.

    Raises `ValueError` if it is not: some models return patches, others mask them at random.
    """
    rows, again = compute(inputs), compute(inputs)
    if len(rows) != len(inputs) or any(row.dim() != 1 for row in rows):
        raise ValueError("it does not return one vector per input")
    if not all(
        torch.allclose(row, other, rtol=1e-3, atol=1e-5) for row, other in zip(rows, again, strict=True)
    ):
        raise ValueError("it returns other vectors each time")
    return rows


def model_identity(model: PreTrainedModel, unused: set[str]) -> str:
    """The identity of a model's computation: its weights, without `unused` ones, and its configuration."""
    return f"{module_hash(model, unused)}:{json.dumps(_settings(model.config), sort_keys=True, default=str)}"


def _settings(config: PretrainedConfig) -> dict:
    """A configuration without entries about its origin."""
    origin = ("_name_or_path", "transformers_version", "architectures")
    return {key: value for key, value in config.to_diff_dict().items() if key not in origin}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """The identity of a tokenizer's output; compute it before the first use, which changes the tokenizer."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps([tokenizer.init_kwargs, tokenizer.get_vocab()], sort_keys=True, default=str)


def accepted(call: Callable, inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The inputs that a model's method accepts, on the device."""
    known = inspect.signature(call).parameters
    return {name: value.to(device) for name, value in inputs.items() if name in known}


def model_file(folder: str, file: str) -> Path | None:
    """One file of a model in a folder or on the Hub; None if the model has no such file.

    Without a connection, a file that was never downloaded counts as missing, with a warning. Raises `OSError` if
    nothing of the model is available.
    """
    if Path(folder).is_dir():
        path = Path(folder) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(folder, file))
    except LocalEntryNotFoundError:
        held = (try_to_load_from_cache(folder, known) for known in ("config.json", "modules.json"))
        if not any(isinstance(path, str) for path in held):
            raise OSError(
                "it is neither a folder nor in the Hub's cache, and the Hub cannot be reached"
            ) from None
        if try_to_load_from_cache(folder, file) is not _CACHED_NO_EXIST:
            log.warning("%s: no connection to check for %s, which is assumed to be missing", folder, file)
        return None
    except EntryNotFoundError:
        return None


def model_json(folder: str, file: str) -> dict | list | None:
    """The content of a model's JSON file; None where there is no such file."""
    path = model_file(folder, file)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))
