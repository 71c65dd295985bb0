"""Numbers about a prepared data set: sizes, history lengths, modalities, and tokens per item."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from speeder.data.catalogue import ItemCatalogue
from speeder.data.prepared import PreparedData
from speeder.data.temporal_split import TemporalSplit, as_date
from speeder.errors import SpeederError

_EDGES = (1, 3, 6, 11, 21, 51, 101, 201, 501)  # where the bins of the history lengths start
_BAR = 40
_BATCH = 1024


def describe(data: PreparedData, tokenizer: str | None = "smollm2-135m", tokens_per_item: int = 1) -> str:
    """A readable report of a data set.

    Args:
        tokenizer: an asset's name, a folder or a Hub id; None leaves out the section on tokens.
        tokens_per_item: Speeder's tokens per item.

    Raises `SpeederError` if the data are empty or the tokenizer cannot be loaded.
    """
    catalogue, interactions = data.catalogue, data.interactions
    if not len(interactions):
        raise SpeederError("data: expected at least one interaction, got none")
    lengths = np.bincount(interactions.user, minlength=len(interactions.user_ids))
    popularity = np.bincount(interactions.item, minlength=len(catalogue))
    cells = len(interactions.user_ids) * len(catalogue)
    sections = [
        _table(
            [
                ("data set", str(data.manifest.get("dataset", "unknown"))),
                ("users", f"{len(lengths):,}"),
                ("items", f"{len(catalogue):,}"),
                ("interactions", f"{len(interactions):,}"),
                ("sparsity", f"{100 * (1 - len(interactions) / cells):.4f} %"),
                *split_facts(data),
                ("history length", _spread(lengths)),
                ("interactions per item", _spread(popularity)),
            ]
        ),
        "Users by history length\n" + _histogram(lengths),
        "Modalities\n" + _table([*_coverage(catalogue)]),
    ]
    dropped = [*_dropped(data.manifest)]
    if dropped:
        sections.append("Dropped while reading\n" + _table(dropped))
    if tokenizer is not None:
        sections.append(
            f"Tokens ({tokenizer})\n" + _table(_token_costs(data, lengths, tokenizer, tokens_per_item))
        )
    return "\n\n".join(sections)


def split_facts(data: PreparedData) -> list[tuple[str, str]]:
    """How the interactions are split, and what each part has; of a temporal split also what it leaves out."""
    split, facts = data.split, [("split", data.split.title)]
    if not isinstance(split, TemporalSplit):
        return [*facts, ("test users", f"{len(split.users('test')):,} (at least 3 interactions)")]
    training = split.training()
    lengths = np.array([len(items) for items in training])
    seen = np.bincount(np.concatenate(training), minlength=len(data.catalogue)) > 0
    first, second = as_date(split.validation_from), as_date(split.test_from)
    spans = [f"from {first} to {second}", f"from {second} on"]
    facts += [
        (
            "training",
            f"{lengths.sum():,} interactions ({lengths.sum() / len(data.interactions):.1%}) of"
            f" {np.count_nonzero(lengths):,} users",
        ),
    ]
    user, time = data.interactions.user, data.interactions.time
    periods = {
        "validation": (time >= split.validation_from) & (time < split.test_from),
        "test": time >= split.test_from,
    }
    for span, (name, period) in zip(spans, periods.items(), strict=True):
        targets = split.targets(name)
        facts.append(
            (
                f"{name} users",
                f"{len(targets):,} of {len(np.unique(user[period])):,} with interactions {span} (the others"
                f" have none before); the targets of {np.count_nonzero(~seen[targets]):,} are unseen in training",
            )
        )
    facts.append(
        ("items unseen in training", f"{np.count_nonzero(~seen):,}; they stay candidates and targets")
    )
    return facts


def _spread(values: np.ndarray) -> str:
    numbers = f"{values.min():,} / {np.median(values):g} / {values.mean():.2f} / {values.max():,}"
    return f"{numbers} (min / median / mean / max)"


def _histogram(lengths: np.ndarray) -> str:
    counts = np.histogram(lengths, bins=[*_EDGES, np.inf])[0]
    bounds = zip(_EDGES, [*_EDGES[1:], None], strict=True)
    names = [f"{low}-{high - 1}" if high else f"{low}+" for low, high in bounds]
    most = max(counts.max(), 1)
    return "\n".join(
        f"  {name:>9} {count:>12,}  {'#' * -(-_BAR * int(count) // int(most))}".rstrip()
        for name, count in zip(names, counts, strict=True)
    )


def _coverage(catalogue: ItemCatalogue) -> Iterator[tuple[str, str]]:
    for name, width in catalogue.modalities.items():
        present = int(catalogue.present[name].sum())
        yield (
            name,
            f"{present:,} of {len(catalogue):,} items ({present / len(catalogue):.1%}), {width} features",
        )
    titled = sum(bool(title) for title in catalogue.titles)
    yield "with a title", f"{titled:,} of {len(catalogue):,} items ({titled / len(catalogue):.1%})"


def _dropped(manifest: dict) -> Iterator[tuple[str, str]]:
    for part in ("interactions", "items"):
        record = manifest.get(part)
        if isinstance(record, dict) and isinstance(record.get("dropped"), dict):
            yield f"{part} read", f"{record.get('read', 0):,}, kept {record.get('kept', 0):,}"
            for reason, lines in record["dropped"].items():
                yield f"  {reason}", f"{lines:,}"


def _token_costs(
    data: PreparedData, lengths: np.ndarray, name: str, tokens_per_item: int
) -> list[tuple[str, str]]:
    """Tokens of an item and of a history: as titles, as whole texts, and in Speeder."""
    tokenizer = _load_tokenizer(name)
    rows, interactions = [], data.interactions
    for kind, texts in (("title", data.catalogue.titles), ("whole text", data.catalogue.texts)):
        costs = _count_tokens(tokenizer, texts)
        histories = np.bincount(interactions.user, weights=costs[interactions.item], minlength=len(lengths))
        rows.append((f"an item as its {kind}", f"{costs.mean():.1f} mean, {np.median(costs):g} median"))
        rows.append(
            (f"a history as {kind}s", f"{np.median(histories):,.0f} median, {histories.max():,.0f} longest")
        )
    rows.append(("an item in Speeder", f"{tokens_per_item}"))
    speeder = lengths * tokens_per_item
    rows.append(("a history in Speeder", f"{np.median(speeder):,.0f} median, {speeder.max():,} longest"))
    return rows


def _load_tokenizer(name: str):
    from transformers import AutoTokenizer

    from speeder.io.assets import resolve

    try:
        return AutoTokenizer.from_pretrained(resolve(name, "backbone"), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SpeederError(
            f"the tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def _count_tokens(tokenizer, texts: list[str]) -> np.ndarray:
    """`(I,)` float64: tokens of each text, without special tokens."""
    counts = np.zeros(len(texts))
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        encoded = tokenizer(batch, add_special_tokens=False)["input_ids"]
        counts[start : start + len(batch)] = [len(ids) for ids in encoded]
    return counts


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
