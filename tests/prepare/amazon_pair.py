"""A raw pair of Amazon 2018 files that hold a synthetic world: what the three commands of the README start from."""

import gzip
import json
from pathlib import Path

from speeder.data.prepared import PreparedData

DAY = 86_400


def write_amazon_2018(world: PreparedData, folder: Path) -> None:
    """Writes `Toys.json.gz` and `meta_Toys.json.gz`: the world's sequences, and some of what real files hold beside."""
    folder.mkdir(parents=True)
    items, interactions = world.catalogue, world.interactions
    reviews = [
        {
            "overall": 5.0,
            "verified": True,
            "reviewerID": interactions.user_ids[user],
            "asin": items.ids[item],
            "reviewText": "Good.",
            "unixReviewTime": 1_400_000_000 + DAY * int(time),
        }
        for user, item, time in zip(interactions.user, interactions.item, interactions.time, strict=True)
    ]
    # raw files are in no order of time, hold strangers of one review, and repeat lines
    reviews = [*reviews[::-1], *({**reviews[0], "reviewerID": f"once-{n}"} for n in range(20)), *reviews[:5]]
    meta = [
        {"asin": id_, "title": title, "description": [f"<p>{text}</p>"], "category": ["Toys"], "also_buy": []}
        for id_, title, text in zip(items.ids, items.titles, items.texts, strict=True)
    ]
    files = {
        "Toys": [*map(json.dumps, reviews), '{"overall": 5.0, "revie'],
        "meta_Toys": [json.dumps(line) for line in meta],
    }
    for name, lines in files.items():
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
