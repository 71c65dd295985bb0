"""A recommender as Hugging Face models are saved and loaded: weights, configuration and catalogue in one folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from speeder.data.catalogue import ItemCatalogue, move_catalogue, saved_hash
from speeder.io.files import replaced_files
from speeder.model.item_pairs import FILES as PAIRS_FILES
from speeder.model.item_pairs import ItemPairs
from speeder.model.loading import (
    CATALOGUE_FOLDER,
    align_weights,
    catalogue_folder,
    check_saved_model,
    optional_file,
    saved_warm_items,
)
from speeder.model.offload import keep_own_parts, own_parts_wait
from speeder.model.popularity import FILE as COUNTS_FILE
from speeder.model.popularity import ItemCounts
from speeder.model.saved_files import check_catalogue_hash, check_loaded, remove_other_weights


class SavingModel(PreTrainedModel):
    """Saving and loading of [`SpeederForCausalLM`], and what transformers sets for training."""

    item_pairs: ItemPairs | None

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        save_catalogue: bool = True,
        **kwargs,
    ) -> None:
        """Save weights, configuration and the catalogue (in `catalogue/`): the whole recommender.

        The folder's old content stays whole until everything is written.

        Raises:
            SpeederError: the disk is full; or `catalogue/` has anything else.
        """
        whole = save_catalogue and self.catalogue is not None and is_main_process
        catalogue = Path(save_directory) / CATALOGUE_FOLDER
        if push_to_hub:  # which uploads the very folder, at the end of super's
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            if is_main_process and save_catalogue and self.item_counts is not None:
                self.item_counts.save(Path(save_directory))
            if is_main_process and save_catalogue:
                self._save_item_pairs(Path(save_directory), Path(save_directory))
            if whole:
                self.catalogue.save(catalogue)
                self.config.catalogue_hash = saved_hash(catalogue)
            super().save_pretrained(save_directory, is_main_process, state_dict, True, *args, **kwargs)
            return
        with replaced_files(save_directory) as temporary:
            if is_main_process and save_catalogue and self.item_counts is not None:
                self.item_counts.save(temporary)
            if whole:
                self.catalogue.save(temporary / CATALOGUE_FOLDER)
                self.config.catalogue_hash = saved_hash(temporary / CATALOGUE_FOLDER)
            super().save_pretrained(temporary, is_main_process, state_dict, False, *args, **kwargs)
            if whole:
                move_catalogue(temporary / CATALOGUE_FOLDER, catalogue)
            if is_main_process and save_catalogue:
                self._save_item_pairs(Path(save_directory), temporary)
            remove_other_weights(Path(save_directory), temporary)

    def _save_item_pairs(self, folder: Path, into: Path) -> None:
        """Write the item pairs; without any, remove those that another model has left in the folder."""
        if self.item_pairs is not None:
            self.item_pairs.save(into)
            return
        for name in PAIRS_FILES:
            (folder / name).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, catalogue: ItemCatalogue | None = None, **kwargs
    ):
        """Load a saved recommender, its catalogue included, from a folder or the Hub. Safetensors only.

        Args:
            catalogue: used instead of the saved one; needed for checkpoints, which have none.

        Raises:
            SpeederError: it is no Speeder model; a file is missing, cut or damaged; the catalogue is not the
                one that it was saved with, or whose item pairs were counted; or `device_map` names several devices that
                compute.
        """
        check_saved_model(pretrained_model_name_or_path, cls.config_class.model_type, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        device_map = kwargs.pop("device_map", None)
        if isinstance(device_map, dict):
            device_map = keep_own_parts(device_map)
        load = partial(
            super().from_pretrained, pretrained_model_name_or_path, *args, output_loading_info=True
        )
        model, info = load(device_map=device_map, **kwargs)
        if getattr(model, "hf_device_map", None):
            placed = keep_own_parts(model.hf_device_map)
            if own_parts_wait(model):  # a map that transformers made
                del model
                model, info = load(device_map=placed, **kwargs)
        check_loaded(pretrained_model_name_or_path, cls.config_class, info, **kwargs)
        align_weights(model)
        if model.config.num_items:
            if catalogue is None:
                folder = catalogue_folder(pretrained_model_name_or_path, **kwargs)
                check_catalogue_hash(folder, model.config.catalogue_hash)
                catalogue = ItemCatalogue.load(folder)
            elif model.config.num_warm_items and model.config.warm_items_hash is None:
                model.config.warm_items_hash = saved_warm_items(
                    pretrained_model_name_or_path, model.config.num_warm_items, **kwargs
                )
            model.set_catalogue(catalogue)
        counts = optional_file(pretrained_model_name_or_path, COUNTS_FILE, **kwargs)
        model.item_counts = None if counts is None else ItemCounts.load(counts)
        files = [optional_file(pretrained_model_name_or_path, name, **kwargs) for name in PAIRS_FILES]
        if found := [file for file in files if file is not None]:
            pairs = ItemPairs.load(found[0].parent)
            pairs.check_catalogue(model.catalogue)
            model.item_pairs = pairs
        return (model, info) if with_info else model

    # transformers 5.24 on, where the old name calls the new one
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(
            self, activation_checkpointing_kwargs: dict | None = None, *args, **kwargs
        ) -> None:
            """As in transformers, without the reentrant variant: SPAE's tables come from outside of every layer."""
            settings = not_reentrant("activation_checkpointing_kwargs", activation_checkpointing_kwargs)
            super().activation_checkpointing_enable(settings, *args, **kwargs)

    else:

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict | None = None, *args, **kwargs
        ) -> None:
            """As in transformers, without the reentrant variant: SPAE's tables come from outside of every layer."""
            settings = not_reentrant("gradient_checkpointing_kwargs", gradient_checkpointing_kwargs)
            super().gradient_checkpointing_enable(settings, *args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> None:
        """Not supported: item ids begin where the text vocabulary ends."""
        raise NotImplementedError(
            "resize the backbone's embeddings before from_backbone: item ids begin after them"
        )


def not_reentrant(name: str, settings: dict | None) -> dict:
    """Settings of `torch.utils.checkpoint`, with the variant that Speeder needs.

    Raises:
        ValueError: they ask for the other.
    """
    if (settings or {}).get("use_reentrant"):
        raise ValueError(f"{name}: expected use_reentrant=False, got True")
    return {**(settings or {}), "use_reentrant": False}
