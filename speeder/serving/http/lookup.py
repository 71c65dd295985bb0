"""From ids, titles and searches to item indices, and from indices to what clients see."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from speeder.data.catalogue import ItemCatalogue
from speeder.model.choice import Choice, Where
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

    def history(
        self, ids: Sequence[str] | None, titles: Sequence[str] | None, skip: bool = False
    ) -> tuple[list[int], list[str]]:
        """A history's indices, from ids or from titles; and with `skip` the entries that no item has.

        Raises:
            ApiError: 422, an id is unknown, or a title matches no item or several.
        """
        if ids is not None:
            return self.rows(ids, "history", skip)
        found = [self._titled(title, f"titles.{place}", skip) for place, title in enumerate(titles or ())]
        skipped = [title for row, title in zip(found, titles or (), strict=True) if row is None]
        return [row for row in found if row is not None], skipped

    def rows(self, ids: Sequence[str], field: str, skip: bool = False) -> tuple[list[int], list[str]]:
        """The indices of ids; and with `skip` the ids that no item has, which are an error otherwise."""
        known = set(self._catalogue.known(ids)) if skip else set(ids)
        found = [self.row(name, f"{field}.{place}") for place, name in enumerate(ids) if name in known]
        return found, [name for name in ids if name not in known]

    def choice(
        self,
        allow: Sequence[str] | None,
        deny: Sequence[str] | None,
        where: Where | None,
        skip: bool = False,
    ) -> tuple[Choice, list[str]]:
        """The items that may be recommended; and with `skip` the ids of `allow` and `deny` that no item has.

        Raises:
            ApiError: 422, an id is unknown, or the catalogue has no such column.
        """
        allowed, skipped = (None, []) if allow is None else self.rows(allow, "allow", skip)
        denied, more = self.rows(deny or (), "deny", skip)
        for column in where or {}:
            if column not in self._catalogue.columns:
                known = ", ".join(self._catalogue.columns) or "none"
                raise ApiError(422, f"where.{column}", f"a column of the catalogue ({known})", column)
        return Choice.of(self._catalogue, allowed, denied, where), [*skipped, *more]

    def _titled(self, title: str, field: str, skip: bool) -> int | None:
        rows = self._index.resolve(title)
        if len(rows) == 1:
            return rows[0]
        if not rows and skip:
            return None
        if not rows:
            raise ApiError(422, field, "the title of an item", title)
        named = "; ".join(
            f"{shown(self._catalogue.titles[row])} ({self._catalogue.ids[row]})" for row in rows[:_CHOICES]
        )
        count = f"{len(rows)} or more" if len(rows) == MEANT else str(len(rows))
        more = "; ..." if len(rows) > _CHOICES else ""
        raise ApiError(422, field, f"a title of one item, not of {count}: {named}{more}", title)
