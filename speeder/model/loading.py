"""Loads backbones and saved recommenders, and wraps a backbone as a new recommender."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from speeder.data.catalogue import ItemCatalogue
from speeder.data.fingerprints import ids_hash
from speeder.errors import SpeederError
from speeder.io.files import read_json, recover_folder
from speeder.model.config import ATTENTION_NAME, SpeederConfig
from speeder.model.packing import cu_seqlens
from speeder.model.saved_files import check_weight_files
from speeder.model.words import fit_vocabulary

CATALOGUE_FOLDER = "catalogue"
ALIGNMENT = 64  # bytes, where torch lays fresh tensors on a CPU


def from_backbone(
    cls,
    name_or_model: str | Path | PreTrainedModel,
    catalogue: ItemCatalogue,
    *,
    layers: int | None = None,
    modalities: list[str] | None = None,
    random_weights: bool = False,
    **config,
):
    """Wrap a pretrained causal language model as a new recommender over a catalogue.

    Args:
        name_or_model: a Hub id, a folder, an asset's name (`smollm2-135m`), or a loaded causal language model, which is
            used itself, not copied.
        catalogue: the items, with at least one modality's features.
        layers: keep only this many of the backbone's first layers.
        modalities: the catalogue's modalities that the model reads; all by default.
        random_weights: keep the backbone's architecture but initialise its weights (for ablations).
        config: further arguments of [`SpeederConfig`].

    Returns:
        the model, in evaluation mode, float32 unless the given model is not.

    Raises:
        SpeederError: the backbone cannot be loaded or cut, has offloaded weights, or computes something that Speeder
            does not support (such as state beside attention); the catalogue lacks a modality; or a setting is unknown.
        ValueError: a setting is out of its range.
    """
    kinds = (cls.config_class, PretrainedConfig)
    every, inherited = ({f.name for f in dataclasses.fields(kind)} for kind in kinds)
    unknown = sorted(set(config) - (every - inherited - DERIVED))
    if unknown:
        known = ", ".join(sorted(every - inherited - DERIVED))
        raise SpeederError(f"from_backbone: unknown setting {unknown[0]!r}; known: {known}")
    backbone = name_or_model if isinstance(name_or_model, PreTrainedModel) else load_backbone(name_or_model)
    if any(weight.is_meta for weight in backbone.parameters()):
        raise SpeederError(
            "backbone: expected all weights in memory, got some that are offloaded; save the recommender first, and "
            "load it with device_map"
        )
    if layers is not None:
        cut_layers(backbone, layers)
    names = list(catalogue.modalities) if modalities is None else modalities
    unknown = [name for name in names if name not in catalogue.modalities]
    if unknown:
        known = ", ".join(catalogue.modalities) or "none"
        raise SpeederError(f"modalities: expected some of {known}, got {', '.join(unknown)}")
    expected = probe_logits(backbone)
    backbone.set_attn_implementation(ATTENTION_NAME)
    settings = cls.config_class(
        text_config=backbone.config,
        num_items=len(catalogue),
        num_warm_items=len(catalogue) if config.get("item_embedding") else 0,
        modalities={name: catalogue.modalities[name] for name in names},
        **config,
    )
    lora, settings.lora = settings.lora, None
    vocabulary = fit_vocabulary(catalogue.readable_texts()) if settings.words else None
    if vocabulary is not None:
        settings.num_words = len(vocabulary[0])
        if settings.num_words == 0:
            raise SpeederError("words: expected a word that two items have, but no two texts share one")
    model = cls(settings)
    fresh, model.backbone = model.backbone, backbone
    rows = backbone.get_input_embeddings().weight
    model.to(rows.device, rows.dtype)
    check_probe(model, backbone, expected)
    if random_weights:
        model.backbone = fresh.to(rows.device, rows.dtype)
    if lora is not None:
        model.add_lora(lora)
    words = model.backbone.get_input_embeddings().weight.detach().float()
    settings.embedding_rms = float(words.pow(2).mean(dim=1).sqrt().mean())
    model.generation_config = backbone.generation_config
    align_weights(model)
    model.mrc.fit(catalogue, vocabulary)
    model.set_catalogue(catalogue)
    return model.eval()


# What from_backbone works out itself.
DERIVED = {
    "text_config",
    "num_items",
    "num_warm_items",
    "num_words",
    "warm_items_hash",
    "modalities",
    "embedding_rms",
    "training_hash",
    "catalogue_hash",
}
PROBE_LENGTHS = (3, 5)  # of the two short texts that a backbone is held to


def probe_ids(backbone: PreTrainedModel) -> torch.Tensor:
    """The two short texts end to end: `(T,)` ids, all different and past the usual special tokens."""
    return torch.arange(9, 9 + sum(PROBE_LENGTHS), device=backbone.device) % backbone.config.vocab_size


@torch.no_grad()
def probe_logits(backbone: PreTrainedModel) -> torch.Tensor:
    """A backbone's own logits for two short texts, read one by one: `(T, V)` float32."""
    backbone.eval()
    texts = probe_ids(backbone).split(PROBE_LENGTHS)
    return torch.cat([backbone(input_ids=text[None], use_cache=False).logits[0].float() for text in texts])


@torch.no_grad()
def check_probe(model, backbone: PreTrainedModel, expected: torch.Tensor) -> None:
    """Compare a wrapped backbone's logits with its own, so that an unsupported one is refused.

    Raises:
        SpeederError: the logits differ by more than the dtype's rounding.
    """
    ids = probe_ids(backbone)
    packed = cu_seqlens(torch.tensor(PROBE_LENGTHS, device=ids.device))
    model.eval()
    try:
        got = model(ids[None], cu_seqlens=packed, vocabulary="text").logits[0, :, : expected.shape[1]]
        gap = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise SpeederError(
            f"{type(backbone).__name__} cannot be served: {str(error).splitlines()[0]}"
        ) from error
    if not gap < (1e-3 if model.dtype == torch.float32 else 0.1):
        raise SpeederError(
            f"{type(backbone).__name__} cannot be served: wrapped, its text logits differ by {gap:.2g} of their size "
            "(it computes something beside attention between tokens, or scales its logits)"
        )


def load_backbone(name: str | Path) -> PreTrainedModel:
    """Load a causal language model in float32 by Hub id, folder or asset name.

    Raises:
        SpeederError: it is missing, or is not a causal language model.
    """
    from speeder.io.assets import resolve_backbone

    try:
        # no pickles, and no code but transformers' own
        return AutoModelForCausalLM.from_pretrained(
            resolve_backbone(str(name)),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise SpeederError(
            f"backbone {str(name)!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone, by Hub id, folder or asset name.

    Raises:
        SpeederError: it has none.
    """
    from speeder.io.assets import resolve_backbone

    try:
        return AutoTokenizer.from_pretrained(resolve_backbone(str(name)), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SpeederError(
            f"backbone {str(name)!r} has no tokenizer: {str(error).splitlines()[0]}"
        ) from error


def cut_layers(backbone: PreTrainedModel, layers: int) -> None:
    """Keep the first `layers` decoder layers, in place.

    Raises:
        SpeederError: it has fewer, or its layers are not in `layers`.
    """
    decoder, config = backbone.get_decoder(), backbone.config
    if not hasattr(decoder, "layers"):
        raise SpeederError(
            f"layers: {type(backbone).__name__} keeps its layers under another name; it cannot be cut"
        )
    if not 1 <= layers <= len(decoder.layers):
        raise SpeederError(f"layers: expected 1..{len(decoder.layers)} for this backbone, got {layers}")
    decoder.layers = decoder.layers[:layers]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers


@torch.no_grad()
def align_weights(model: nn.Module) -> None:
    """Lay weights and buffers at multiples of 64 bytes, as fresh ones are: a loaded model computes what the saved did.

    Loaded ones are views of the file's memory map, at any multiple of 4 bytes, and MKL rounds some float32 products by
    where their operands lie. What lies well stays as it is; the rest is copied, one tensor at a time.
    """
    for parameter in model.parameters():
        if _lies_askew(parameter):
            parameter.data = parameter.data.clone()  # the same parameter, so that tied ones stay tied
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if _lies_askew(buffer):  # another tensor: this one, a view, would keep the file's map
                module._buffers[name] = buffer.clone()


def _lies_askew(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return plain and tensor.data_ptr() % ALIGNMENT != 0


def check_saved_model(name_or_path: str | Path, model_type: str, **kwargs) -> None:
    """Refuse a local folder with another kind of model, before its weights are read.

    Args:
        model_type: the expected `model_type` of `config.json`.

    Raises:
        SpeederError: its `config.json` names another `model_type`, or a file of weights is missing or cut.
    """
    folder = Path(name_or_path) / kwargs.get("subfolder", "")
    path = folder / "config.json"
    if path.is_file() and (kind := read_json(path).get("model_type")) != model_type:
        wanted = "Speeder" if model_type == SpeederConfig.model_type else model_type
        raise SpeederError(
            f"{folder}: expected a {wanted} model, got one of type {kind!r}; see from_backbone"
        )
    if path.is_file() and not kwargs.get("variant") and kwargs.get("state_dict") is None:
        check_weight_files(folder)


def catalogue_folder(name_or_path: str | Path, **kwargs) -> Path:
    """The catalogue's folder of a saved recommender, downloaded from the Hub if it is not local.

    Raises:
        SpeederError: there is none.
    """
    local = Path(name_or_path) / kwargs.get("subfolder", "")
    if local.is_dir():
        folder = recover_folder(local / CATALOGUE_FOLDER)
        if not folder.is_dir():
            raise SpeederError(
                f"{local}: expected the recommender's catalogue in {CATALOGUE_FOLDER}/, found none"
            )
        return folder
    hub = _hub_arguments(kwargs)
    prefix = "/".join(part for part in (kwargs.get("subfolder", ""), CATALOGUE_FOLDER) if part)
    try:
        manifest = Path(cached_file(str(name_or_path), f"{prefix}/manifest.json", **hub))
        for file in read_json(manifest)["files"]:
            cached_file(str(name_or_path), f"{prefix}/{file}", **hub)
    except OSError as error:
        raise SpeederError(
            f"{name_or_path}: its catalogue cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return manifest.parent


def saved_warm_items(name_or_path: str | Path, count: int, **kwargs) -> str | None:
    """`ids_hash` of the first `count` items of a saved recommender's own catalogue; None if it has none."""
    try:
        folder = catalogue_folder(name_or_path, **kwargs)
    except SpeederError:  # a checkpoint
        return None
    return ids_hash(ItemCatalogue.load(folder).ids[:count])


def optional_file(name_or_path: str | Path, name: str, **kwargs) -> Path | None:
    """A file of a saved recommender, downloaded from the Hub if it is not local; None if it has none."""
    local = Path(name_or_path) / kwargs.get("subfolder", "")
    if local.is_dir():
        return local / name if (local / name).is_file() else None
    found = cached_file(
        str(name_or_path),
        name,
        subfolder=kwargs.get("subfolder", ""),
        _raise_exceptions_for_missing_entries=False,
        **_hub_arguments(kwargs),
    )
    return None if found is None else Path(found)


def _hub_arguments(kwargs: dict) -> dict:
    return {
        key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs
    }
