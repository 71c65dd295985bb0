"""From ids, titles and searches to item indices, and from indices to what clients see."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from speeder.data.catalogue import ItemCatalogue
from speeder.serving.http.errors import ApiError, shown
from speeder.serving.http.pictures import Pictures
from speeder.serving.http.search import MEANT, TitleIndex

_CHOICES = 5  # items listed in the error about an ambiguous title


class Lookup:
    """A catalogue as clients see it; safe for several threads at once."""

    def __init__(self, catalogue: ItemCatalogue, pictures: bool = True):
        self._catalogue = catalogue
        self._index = TitleIndex(catalogue)
        self.pictures = Pictures(catalogue, pictures)

    def item(self, row: int) -> dict[str, str | None]:
        """An item's `id`, `title` and `picture`."""
        external = self._catalogue.ids[row]
        path = f"v1/pictures/{quote(external, safe='')}" if self.pictures.there(row) else None
        return {"id": external, "title": self._catalogue.titles[row], "picture": path}

    def row(self, external: str, field: str, status: int = 422) -> int:
        """The index of an id; `ApiError`, with the field, if there is no such item."""
        try:
            return self._catalogue.index_of(external)
        except KeyError:
            raise ApiError(status, field, "the id of an item", external) from None

    def search(self, query: str, limit: int) -> list[int]:
        """Indices of the items that a query finds, best first."""
        return self._index.search(query, limit)

    def history(self, ids: Sequence[str] | None, titles: Sequence[str] | None) -> list[int]:
        """A history's indices, from ids or from titles.

        Raises:
            ApiError: 422, an id is unknown, or a title matches no item or several.
        """
        if ids is not None:
            return [self.row(external, f"history.{place}") for place, external in enumerate(ids)]
        return [self._titled(title, f"titles.{place}") for place, title in enumerate(titles or ())]

    def _titled(self, title: str, field: str) -> int:
        rows = self._index.resolve(title)
        if len(rows) == 1:
            return rows[0]
        if not rows:
            raise ApiError(422, field, "the title of an item", title)
        named = "; ".join(
            f"{shown(self._catalogue.titles[row])} ({self._catalogue.ids[row]})" for row in rows[:_CHOICES]
        )
        count = f"{len(rows)} or more" if len(rows) == MEANT else str(len(rows))
        more = "; ..." if len(rows) > _CHOICES else ""
        raise ApiError(422, field, f"a title of one item, not of {count}: {named}{more}", title)
