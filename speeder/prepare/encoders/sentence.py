"""Texts to vectors by a Hugging Face model, pooled as in its sentence-transformers files."""

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
)

from speeder.io.assets import resolve
from speeder.prepare.encoders.cache import module_hash
from speeder.prepare.encoders.pretrained import (
    LOADING,
    accepted,
    check_repeatable,
    load_frozen,
    loading,
    model_file,
    model_identity,
    model_json,
    tokenizer_identity,
)

_DEFAULT_MAX_TOKENS = 256
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names of the prompt for what is searched
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "SiLU": nn.SiLU}


class SentenceModel:
    """The result of `SentenceTransformer(name).encode_document(texts)`, for models in that library's layout.

    Texts are cut to `max_seq_length` after the prompt for documents, if there is one. Hidden states are pooled
    (`1_Pooling`), possibly through linear layers (`2_Dense`), and possibly scaled to length 1 (`2_Normalize`). Any
    other model gives the mean of its last hidden states over the first 256 tokens, scaled to length 1. Models with
    other modules or their own code are refused.

    Args:
        name: an asset (`"minilm"`), a folder or a Hub id.
        device: the model's device.

    Raises `SpeederError` if the model cannot be loaded.
    """

    def __init__(self, name: str, device: str = "cpu"):
        folder = resolve(name, "text")
        with loading("text", name):
            modules = _modules(folder)
            inner = {"subfolder": modules[0][1] if modules else ""}
            config = AutoConfig.from_pretrained(folder, **LOADING, **inner)
            # of an encoder with a decoder (T5), the encoder alone
            encodes = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
            model_class = AutoModelForTextEncoding if encodes else AutoModel
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **LOADING, **inner)
            settings = _reading(folder, inner["subfolder"], config)
            self._max_tokens = _max_tokens(settings, self._tokenizer, config, listed=bool(modules))
            self._lower = bool(settings.get("do_lower_case", False))
            self._prompt = _prompt(folder) if modules else ""
            reading = f"{self._max_tokens}:{self._lower}:{self._prompt}:{tokenizer_identity(self._tokenizer)}"
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
            # With padding on the right, a text's tokens have the same positions in every batch.
            self._tokenizer.padding_side = "right"
            model, unused = load_frozen(model_class, folder, **inner)
            self._model = model.to(device)
            pooling = model_json(folder, f"{modules[1][1]}/config.json") if modules else {}
            self._modes = _pooling_modes(pooling, self._prompt)
            self._after = nn.Sequential(*_layers(folder, modules[2:])) if modules else _UnitLength()
            self._after.to(device).eval()
            # a model that needs more than texts fails here, not after hours
            self.width: int = len(check_repeatable(self, ["a", "few words"])[0])
        after = f"{self._modes}:{self._after}:{module_hash(self._after)}"
        self.identity = f"sentence:{reading}:{model_identity(self._model, unused)}:{after}"

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[Tensor]:
        """One `(width,)` row per text."""
        texts = [self._prompt + text for text in texts]
        texts = [text.lower() for text in texts] if self._lower else texts
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        batch = accepted(self._model.forward, batch, self._model.device)
        hidden = self._model(**batch).last_hidden_state
        pooled = [POOLING[mode](hidden, batch["attention_mask"]) for mode in self._modes]
        return list(self._after(torch.cat(pooled, dim=1)))


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)


def _sum(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden * weight[:, :, None].to(hidden.dtype)).sum(dim=1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _sum(hidden, mask) / mask.sum(dim=1, keepdim=True)


def _mean_by_root(hidden: Tensor, mask: Tensor) -> Tensor:
    return _sum(hidden, mask) / mask.sum(dim=1, keepdim=True).sqrt()


def _later_weigh_more(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return _sum(hidden, weight) / weight.sum(dim=1, keepdim=True)


# Hidden states (N, T, H) and the mask (N, T) of 1 for tokens, which come first, and 0 for padding -> (N, H); several
# are put side by side, in this order.
POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _later_weigh_more,
    "lasttoken": _last,
}
_SWITCHES = {  # how older folders spell the modes
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class _UnitLength(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return functional.normalize(rows, dim=1)


def _modules(folder: str) -> list[tuple[str, str]]:
    """Kind and subfolder of each module, `Transformer` and `Pooling` first; empty if no file lists them."""
    listed = model_json(folder, "modules.json") or []
    modules = [(entry["type"].rpartition(".")[2], entry["path"]) for entry in listed]
    kinds = [kind for kind, _ in modules]
    fits = kinds[:2] == ["Transformer", "Pooling"] and set(kinds[2:]) <= {"Dense", "Normalize"}
    if modules and not fits:
        raise ValueError(
            f"expected Transformer, Pooling and perhaps Dense and Normalize, got {', '.join(kinds)}"
        )
    return modules


def _reading(folder: str, subfolder: str, config: PretrainedConfig) -> dict:
    """Settings of how texts are read: `max_seq_length`, `do_lower_case`."""
    files = ["sentence_bert_config.json", f"sentence_{config.model_type}_config.json"]
    found = (model_json(folder, f"{subfolder}/{file}" if subfolder else file) for file in files)
    return next((settings for settings in found if settings), {})


def _max_tokens(settings: dict, tokenizer, config: PretrainedConfig, *, listed: bool) -> int:
    if settings.get("max_seq_length"):
        return settings["max_seq_length"]
    known = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    limits = [
        limit for limit in known if limit and 0 < limit < 1 << 20
    ]  # 1e30 in a tokenizer without a limit
    return min([*limits, *([] if listed and limits else [_DEFAULT_MAX_TOKENS])])


def _prompt(folder: str) -> str:
    """The text before each text: the prompt for documents, or the default prompt, or nothing."""
    settings = model_json(folder, "config_sentence_transformers.json") or {}
    prompts = settings.get("prompts") or {}
    names = [name for name in _DOCUMENT_PROMPTS if prompts.get(name) is not None]
    return prompts.get(names[0] if names else settings.get("default_prompt_name")) or ""


def _pooling_modes(settings: dict | None, prompt: str) -> list[str]:
    settings = settings or {}
    if prompt and not settings.get("include_prompt", True):
        raise ValueError("it leaves its prompt's tokens out of the mean, which is not supported")
    given = settings.get("pooling_mode") or [
        mode for switch, mode in _SWITCHES.items() if settings.get(switch)
    ]
    modes = [given] if isinstance(given, str) else list(given) or ["mean"]
    unknown = [mode for mode in modes if mode not in POOLING]
    if unknown:
        raise ValueError(f"expected pooling by {', '.join(POOLING)}, got {unknown[0]!r}")
    return modes


def _layers(folder: str, modules: list[tuple[str, str]]) -> list[nn.Module]:
    """The modules after the pooling."""
    layers: list[nn.Module] = []
    for kind, path in modules:
        layers += _dense(folder, path) if kind == "Dense" else [_UnitLength()]
    return layers


def _dense(folder: str, path: str) -> list[nn.Module]:
    settings = model_json(folder, f"{path}/config.json") or {}
    activation = settings.get("activation_function", "Tanh").rpartition(".")[2]
    inputs = settings.get("module_input_name", "sentence_embedding")
    if activation not in _ACTIVATIONS or settings.get("use_residual") or inputs != "sentence_embedding":
        raise ValueError(f"its module {path} is of a kind that is not supported")
    weights = model_file(folder, f"{path}/model.safetensors")
    if weights is None:
        raise ValueError(f"its module {path} has no file named model.safetensors")
    linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    linear.load_state_dict({key.removeprefix("linear."): value for key, value in load_file(weights).items()})
    return [linear.float(), _ACTIVATIONS[activation]()]
