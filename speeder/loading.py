"""Where a Speeder model comes from: a pretrained backbone wrapped afresh, or a saved recommender's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from speeder.config import ATTENTION_NAME, SpeederConfig
from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError

CATALOGUE_FOLDER = "catalogue"


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
    """Wrap a pretrained causal language model as a fresh recommender over a catalogue.

    Args:
        name_or_model: a Hub id, a folder, an asset's name (`smollm2-135m`), or a loaded causal language model,
            which is taken over, not copied.
        catalogue: the items, with at least one modality's features.
        layers: keep only the backbone's first so many layers.
        modalities: which of the catalogue's modalities the model reads; all by default.
        random_weights: keep the backbone's architecture but draw its weights afresh (for ablations).
        config: further arguments of [`SpeederConfig`].

    Returns:
        the model, in evaluation mode, float32 unless the given model is not.

    Raises:
        SpeederError: the backbone cannot be loaded or cut, or the catalogue lacks a modality.
    """
    backbone = name_or_model if isinstance(name_or_model, PreTrainedModel) else load_backbone(name_or_model)
    if layers is not None:
        cut_layers(backbone, layers)
    names = list(catalogue.modalities) if modalities is None else modalities
    unknown = [name for name in names if name not in catalogue.modalities]
    if unknown:
        known = ", ".join(catalogue.modalities) or "none"
        raise SpeederError(f"modalities: expected some of {known}, got {', '.join(unknown)}")
    backbone.set_attn_implementation(ATTENTION_NAME)
    rows = backbone.get_input_embeddings().weight.detach()
    settings = SpeederConfig(
        text_config=backbone.config,
        num_items=len(catalogue),
        num_warm_items=len(catalogue) if config.get("item_embedding") else 0,
        modalities={name: catalogue.modalities[name] for name in names},
        embedding_rms=float(rows.float().pow(2).mean(dim=1).sqrt().mean()),
        **config,
    )
    lora, settings.lora = settings.lora, None
    model = cls(settings)
    if not random_weights:
        model.backbone = backbone
    if lora is not None:
        model.add_lora(lora)
    model.to(rows.dtype)
    model.generation_config = backbone.generation_config
    model.set_catalogue(catalogue)
    return model.eval()


def load_backbone(name: str | Path) -> PreTrainedModel:
    """Load a causal language model in float32 by Hub id, folder or asset name.

    Raises:
        SpeederError: it is not there, or is not a causal language model.
    """
    from speeder.assets import resolve_backbone

    try:
        return AutoModelForCausalLM.from_pretrained(resolve_backbone(str(name)), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise SpeederError(
            f"backbone {str(name)!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone, by Hub id, folder or asset name.

    Raises:
        SpeederError: it has none.
    """
    from speeder.assets import resolve_backbone

    try:
        return AutoTokenizer.from_pretrained(resolve_backbone(str(name)))
    except (OSError, ValueError) as error:
        raise SpeederError(
            f"backbone {str(name)!r} has no tokenizer: {str(error).splitlines()[0]}"
        ) from error


def cut_layers(backbone: PreTrainedModel, layers: int) -> None:
    """Keep the first `layers` decoder layers, in place.

    Raises:
        SpeederError: it has fewer, or keeps its layers elsewhere than in `layers`.
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


def catalogue_folder(name_or_path: str | Path, **kwargs) -> Path:
    """The catalogue's folder of a saved recommender, fetched from the Hub where it is not a local one.

    Raises:
        SpeederError: there is none.
    """
    local = Path(name_or_path) / kwargs.get("subfolder", "")
    if local.is_dir():
        folder = local / CATALOGUE_FOLDER
        if not folder.is_dir():
            raise SpeederError(
                f"{local}: expected the recommender's catalogue in {CATALOGUE_FOLDER}/, found none"
            )
        return folder
    import json

    hub = {
        key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs
    }
    prefix = "/".join(part for part in (kwargs.get("subfolder", ""), CATALOGUE_FOLDER) if part)
    manifest = Path(cached_file(str(name_or_path), f"{prefix}/manifest.json", **hub))
    for file in json.loads(manifest.read_text())["files"]:
        cached_file(str(name_or_path), f"{prefix}/{file}", **hub)
    return manifest.parent
