"""SpeederConfig: the configuration of a Speeder model, saved as its `config.json`."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers renamed the cache's argument and output in 5.24; `forward` takes both names with either release
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ATTENTION_NAME = "spae"  # the name under which SPAE registers with transformers' attention interface
ITEM = "item"  # gate column of the learned per-item embedding
WORDS = "words"  # gate column of the learned word vectors
FITTED = ("collaborative", ITEM)  # modalities that are fitted on interactions, which a new item lacks

NEGATIVES = ("full", "in-batch", "sampled")
EXPERTS = ("mlp", "linear")


class SpeederConfig(PretrainedConfig):
    """Configuration of [`SpeederForCausalLM`].

    The vocabulary is the backbone's `V = text_config.vocab_size` text tokens followed by one id per catalogue
    item: id `V + i` is item `i`.

    Args:
        text_config: the backbone's own configuration (any decoder that transformers' attention interface serves).
        num_items: items in the catalogue, `I`.
        modalities: name -> feature width `F_m`; kept in alphabetical order, which is the order of the gate's columns.
        tokens_per_item: positions that one item takes in the sequence, `K`.
        experts: what maps features to tokens: `"linear"`, a linear map of whitened features beside an MLP that begins
            at zero, whose outputs are normalised before they are mixed; `"mlp"`, that of version 0.1.0.
        expert_hidden_size: width of an expert's hidden layer; None takes the backbone's hidden size.
        words: whether learned vectors of the words of items' texts join the features as one more modality ("words").
        num_words: words and word pairs with a vector.
        word_size: width of a word's vector.
        word_dropout: probability, in training, that a word is left out of all items of a batch.
        history_lookup: whether items are also scored by their likeness to the history's items, see `HistoryLookup`.
        item_embedding: whether a learned embedding per item joins the features as one more modality ("item").
        num_warm_items: items with a row of that embedding; items added later have none.
        warm_items_hash: hash of their ids in order (`ids_hash`): a catalogue must begin with them.
        modality_dropout: probability, in training, that an item is read without one of its modalities.
        cold_dropout: probability, in training, that an item is read like a new item: without the modalities that are
            fitted on interactions (`FITTED`), by its text and picture only. It makes recommendations of new items
            better.
        embedding_rms: root mean square of the backbone's text embedding rows, to which item tokens are scaled.
        initial_logit_scale: factor of the cosine between state and item at the start of training.
        dropout: dropout on the input embeddings and on the states that score items.
        max_history: number of newest items of a history that are read.
        position_prompts: SPAE, absolute: learned prompts by rank, added to item tokens.
        absolute_bias: SPAE, absolute: a learned key-side attention bias per layer, head and rank.
        relative_bias: SPAE, relative: a learned attention bias per layer, head and bucket of rank distance.
        max_rank: number of ranks in the absolute tables; later ranks share the last entry.
        num_distance_buckets: log-spaced buckets of the relative bias.
        max_distance: distance, in items, from which all distances share the last bucket.
        position_proxy_weight: weight of SPAE's position proxy loss in training; 0 turns the task off.
        negatives: negatives of the training loss: `"full"`, the whole catalogue; `"sampled"`, items drawn for each
            batch; `"in-batch"`, the targets of the batch, of all processes. With the last two, features stay in the
            catalogue (memory-mapped, on the CPU), and only the items of a batch are compressed. In evaluation the loss
            is always the full one.
        num_negatives: draws per batch with `"sampled"`; an item that is drawn twice counts once.
        negatives_exponent: `"sampled"` draws an item in proportion to this power of its frequency as a target: 0 is
            uniform, 0.75 word2vec's, 1 by popularity.
        negatives_seed: seed of the draws, which depend on it and on the optimizer step.
        pair_weight: weight of the item pairs in an item's logit (`item_pairs.py`); 0: they are not looked up. Pairs are
            counted by `set_item_pairs`. The training loss is without them: what memorises the training items starves
            what generalises, so the weight is chosen afterwards, on withheld targets.
        lora: arguments of `peft.LoraConfig` for adapters in the backbone; None: no adapters.
        training_hash: hash of the interactions that the model was trained on; evaluation checks it.
        catalogue_hash: hash of the catalogue that the model was saved with (`saved_hash`); loading checks it.
        prompt_prefix, prompt_suffix: token ids of the instruction before and after the history (empty: items only).

    Raises:
        ValueError: an argument is out of its range.
    """

    model_type = "speeder"
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values"]

    text_config: dict | PretrainedConfig | None = None
    num_items: int = 0
    modalities: dict[str, int] | None = None
    tokens_per_item: int = 1
    experts: str = "mlp"
    expert_hidden_size: int | None = None
    words: bool = False
    num_words: int = 0
    word_size: int = 128
    word_dropout: float = 0.0
    history_lookup: bool = False
    item_embedding: bool = False
    num_warm_items: int = 0
    warm_items_hash: str | None = None
    modality_dropout: float = 0.0
    cold_dropout: float = 0.0
    embedding_rms: float = 1.0
    initial_logit_scale: float = 20.0
    dropout: float = 0.0
    max_history: int = 50
    position_prompts: bool = True
    absolute_bias: bool = True
    relative_bias: bool = True
    max_rank: int = 512
    num_distance_buckets: int = 32
    max_distance: int = 512
    position_proxy_weight: float = 0.0
    negatives: str = "full"
    num_negatives: int = 4096
    negatives_exponent: float = 0.0
    negatives_seed: int = 0
    pair_weight: float = 0.0
    lora: dict | None = None
    training_hash: str | None = None
    catalogue_hash: str | None = None
    prompt_prefix: list[int] | None = None
    prompt_suffix: list[int] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # derived from text_config and num_items, see `vocab_size`
        kwargs.pop("vocab_size", None)
        super().__post_init__(**kwargs)
        # JSON files sort their keys: a fixed order keeps the gate's columns the same after loading
        self.modalities = dict(sorted((self.modalities or {}).items()))
        for name in ("prompt_prefix", "prompt_suffix"):
            ids = [] if getattr(self, name) is None else getattr(self, name)
            if not isinstance(ids, list | tuple) or not all(
                type(entry) is int and entry >= 0 for entry in ids
            ):
                raise ValueError(f"{name}: expected a list of text ids, got {ids!r}")
            setattr(self, name, list(ids))
        for name, (least, most) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is None and name == "expert_hidden_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name}: expected an integer >= {least} and <= {most}, got {value!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        for name in ("modality_dropout", "cold_dropout", "dropout", "word_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {getattr(self, name)}")
        if self.experts not in EXPERTS:
            raise ValueError(f"experts: expected one of {', '.join(EXPERTS)}, got {self.experts!r}")
        if self.negatives not in NEGATIVES:
            raise ValueError(f"negatives: expected one of {', '.join(NEGATIVES)}, got {self.negatives!r}")
        if self.negatives_exponent < 0:
            raise ValueError(f"negatives_exponent: expected at least 0, got {self.negatives_exponent}")
        if self.pair_weight < 0:
            raise ValueError(f"pair_weight: expected at least 0, got {self.pair_weight}")
        if self.position_proxy_weight < 0 or self.initial_logit_scale <= 0:
            raise ValueError(
                "position_proxy_weight, initial_logit_scale: expected at least 0 and above 0, "
                f"got {self.position_proxy_weight} and {self.initial_logit_scale}"
            )
        for name, width in self.modalities.items():
            if name == ITEM:
                raise ValueError('modalities: the name "item" is kept for the learned item embedding')
            if name == WORDS and self.words:
                raise ValueError('modalities: the name "words" is kept for the learned word vectors')
            if hasattr(nn.ModuleDict, name) or "." in name:
                raise ValueError(f"modalities: {name!r} cannot be the name of a module")
            if width < 2:  # normalising a single feature leaves nothing of it
                raise ValueError(f"modalities: expected at least 2 features for {name!r}, got {width}")

    @property
    def text_vocab_size(self) -> int:
        """`V`: ids below it are text, id `V + i` is item `i`."""
        return self.text_config.vocab_size

    @property
    def vocab_size(self) -> int:
        """`V + I`, the extended vocabulary."""
        return self.text_config.vocab_size + self.num_items

    @property
    def hidden_size(self) -> int:
        """`H`, the backbone's hidden size, in which items are tokens."""
        return self.text_config.hidden_size

    @property
    def gate_names(self) -> list[str]:
        """Names of the gate's columns: the modalities, "words" if words have vectors, "item" if items have rows."""
        own = [name for name, wanted in ((WORDS, self.words), (ITEM, self.item_embedding)) if wanted]
        return [*self.modalities, *own]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The backbone's configuration with `decoder` (caches are built from it); else this one, since `generate` and
        beam search read the extended `vocab_size` from it."""
        return self.text_config if decoder and not encoder else self


_LARGE = 2**20  # more of any of these is a slip, and would not fit into memory
_WHOLE_NUMBERS = {
    "num_items": (0, 2**31 - 1),
    "num_words": (0, 2**31 - 1),
    "word_size": (1, _LARGE),
    "num_warm_items": (0, 2**31 - 1),
    "tokens_per_item": (1, 1024),
    "expert_hidden_size": (1, _LARGE),
    "max_history": (1, _LARGE),
    "max_rank": (1, _LARGE),
    "max_distance": (1, _LARGE),
    "num_distance_buckets": (2, _LARGE),
    "num_negatives": (1, 2**31 - 1),
    "negatives_seed": (0, 2**63 - 1),
}
_NUMBERS = (
    "modality_dropout",
    "cold_dropout",
    "dropout",
    "word_dropout",
    "embedding_rms",
    "position_proxy_weight",
    "initial_logit_scale",
    "negatives_exponent",
    "pair_weight",
)
AutoConfig.register("speeder", SpeederConfig)
