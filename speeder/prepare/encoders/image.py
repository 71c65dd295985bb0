"""Pictures to feature vectors, by EfficientNet-Lite0 or any Hugging Face vision model such as CLIP."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from speeder.io.assets import resolve
from speeder.io.assets_convert import EFFICIENTNET_LITE0
from speeder.io.files import read_json
from speeder.io.pictures import read_rgb
from speeder.prepare.encoders.cache import FeatureCache, content_key, encode_cached, module_hash
from speeder.prepare.encoders.efficientnet_lite import EfficientNetLite0
from speeder.prepare.encoders.pretrained import (
    LOADING,
    accepted,
    check_repeatable,
    load_frozen,
    loading,
    model_identity,
)

if TYPE_CHECKING:
    from speeder.io.parts import Runner

# Vision towers of models that also have a text tower. Each gives its family's usual image embedding: CLIP's projection
# into the space shared with texts, SigLIP's attention-pooled output (already in the shared space).
_TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
}
_PROJECTED = _TOWERS["clip"]


def _speckled(height: int, width: int) -> Image.Image:
    """A picture in which no two patches are equal."""
    values = np.arange(height * width * 3) * 97 % 251
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))


def efficientnet_pixels(picture: Image.Image) -> Tensor:
    """`(3, 224, 224)` float32: shorter side resized to 224 (bicubic), centre cut out, `(byte - 127) / 128`.

    The normalisation is that of the weights' training. The standard crop would drop the outer eighth of the picture
    too; it is kept, since a poster's or a product's border has information.
    """
    square = ImageOps.fit(picture, (EFFICIENTNET_LITE0["image_size"],) * 2, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().sub_(127.0).div_(128.0)


class ImageEncoder:
    """One frozen vision model.

    Args:
        name: `"efficientnet-lite0"` (1,280 features), a folder, or a Hub id. A model that projects pictures
            into a space shared with texts (CLIP, SigLIP) gives that projection; any other its pooled output
            (DINO's and ViT's is their first token's), or else the mean of its last hidden states. Features are
            as the model gives them, not scaled to length 1.
            device: the model's device.
            batch_size: pictures per batch; None: 4 on a CPU, where small batches stay in its caches, else 64.
            runner: encodes the pictures elsewhere, such as an `OnRay`, whose workers load the model too and find the
                pictures under the same paths; None: in this process.

    Raises `SpeederError` if the model cannot be loaded.
    """

    def __init__(
        self,
        name: str = "efficientnet-lite0",
        *,
        device: str = "cpu",
        batch_size: int | None = None,
        runner: "Runner | None" = None,
    ):
        folder = resolve(name, "image")
        self.name, self.runner = name, runner
        self._device = torch.device(device)
        self.batch_size = batch_size or (4 if self._device.type == "cpu" else 64)
        config = Path(folder) / "config.json"
        if config.is_file() and read_json(config).get("model_type") == EFFICIENTNET_LITE0["model_type"]:
            self._processor = None
            self._model = EfficientNetLite0.load(folder).to(self._device, memory_format=torch.channels_last)
            self.width = EFFICIENTNET_LITE0["num_features"]
            identity = f"224-bicubic-centre:{module_hash(self._model)}"
        else:
            with loading("image", name):
                self._load(folder)
                rows = check_repeatable(self._compute, [_speckled(64, 64), _speckled(40, 72)])
            self.width = len(rows[0])
            processor = f"{type(self._processor).__name__}:{self._processor.to_json_string()}"
            identity = f"{processor}:{model_identity(self._model, self._unused)}"
        self.identity = f"image-3:{content_key(identity)}"

    def _load(self, folder: str) -> None:
        # the configuration first: so a missing model and a missing processor give different errors
        config = AutoConfig.from_pretrained(folder, **LOADING)
        # Pillow's, as in these models' training: torchvision, if it is installed, resizes differently
        self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **LOADING)
        model_class, options = AutoModel, {}
        if config.model_type in _TOWERS:  # half of the weights belong to the text tower
            model_class, options = (
                getattr(transformers, _TOWERS[config.model_type]),
                {"config": config.vision_config},
            )
            if hasattr(config, "projection_dim"):  # which the whole model's settings decide
                config.vision_config.projection_dim = config.projection_dim
        elif _PROJECTED in (config.architectures or []):
            model_class = getattr(transformers, _PROJECTED)
        model, self._unused = load_frozen(model_class, folder, **options)
        self._model = model.to(self._device)

    def encode(
        self, images: Sequence[str | None], *, cache: str | Path | None = None, progress: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, str]]:
        """`N` picture paths -> `(N, width)` float32, the `(N,)` bool mask of those present, and the broken ones.

        None is absent, with zeros. So is a picture that cannot be read; `{path: reason}` names it. `cache` is a
        folder; None is the user's cache.
        """
        keys: list[str | None] = []
        broken: dict[str, str] = {}
        for path in images:
            try:
                keys.append(None if path is None else content_key(Path(path).read_bytes()))
            except OSError as error:
                broken[path] = error.strerror or str(error)
                keys.append(None)

        store, description = FeatureCache(self.identity, cache), f"pictures ({self.name})"
        costs = [0] * len(keys)
        if self.runner is not None:
            from speeder.prepare.encoders.in_parts import encode_in_parts

            paths = [path and os.path.abspath(path) for path in images]
            encode_in_parts(self, store, paths, keys, costs, self.runner, description)
        features, present = encode_cached(
            store,
            keys,
            costs,
            lambda positions: self.compute([images[position] for position in positions], broken),
            width=self.width,
            batch_size=self.batch_size,
            description=description,
            progress=progress,
        )
        reasons = {keys[row]: broken[path] for row, path in enumerate(images) if path in broken and keys[row]}
        for row, path in enumerate(images):  # a copy of a broken picture is broken for the same reason
            if keys[row] in reasons:
                broken[path] = reasons[keys[row]]
        return features, present, broken

    def compute(self, paths: list[str], broken: dict[str, str] | None = None) -> list[Tensor | None]:
        """One batch: a `(width,)` row per picture; None for one that cannot be read, with the reason in `broken`."""
        pictures = []
        for path in paths:
            try:
                pictures.append(read_rgb(Path(path).read_bytes()))
            except (ValueError, OSError) as error:
                pictures.append(None)
                if broken is not None:
                    broken[path] = str(error)
        rows = iter(self._compute([picture for picture in pictures if picture is not None]))
        return [None if picture is None else next(rows) for picture in pictures]

    @torch.inference_mode()
    def _compute(self, pictures: list[Image.Image]) -> list[Tensor]:
        if not pictures:
            return []
        if self._processor is None:
            pixels = torch.stack([efficientnet_pixels(picture) for picture in pictures])
            return list(self._model.features(pixels.to(self._device, memory_format=torch.channels_last)))
        embed = getattr(self._model, "get_image_features", self._model.forward)
        pixels = self._processor(images=pictures, return_tensors="pt")
        output = embed(**accepted(embed, pixels, self._device))
        if isinstance(output, Tensor):
            return list(output)
        for name in ("image_embeds", "pooler_output"):
            if getattr(output, name, None) is not None and not (name == "pooler_output" and self._unused):
                return list(output[name].flatten(1))
        # Without the pooler's weights, the first token is the model's output.
        states = output.last_hidden_state
        return list(states[:, 0] if self._unused else states.mean(dim=1))
