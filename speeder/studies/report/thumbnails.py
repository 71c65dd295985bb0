"""Small pictures inside the page, within a limit of bytes."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

from speeder.io.pictures import small_jpeg

_SIZE = (184, 276)  # pixels: twice what a page shows, for screens that have them
_QUALITY = 74


@dataclass
class Thumbnails:
    """Items' pictures as `data:` addresses: small, and encoded again from pixels.

    Attributes:
        budget: most bytes of all addresses together; further pictures are left out.
        broken: path -> why a file cannot be shown.
        left_out: number of pictures beyond the budget.
        used: bytes so far.
    """

    budget: int = 3_000_000
    broken: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    used: int = 0
    _made: dict[str, str | None] = field(default_factory=dict)

    def address(self, path: str | None) -> str | None:
        """The address of a file's picture; None without a path, or if it is broken or beyond the budget."""
        if path is None:
            return None
        if path not in self._made:
            self._made[path] = self._make(path)
        made = self._made[path]
        if made is not None and self.used + len(made) > self.budget:
            self.left_out += 1
            return None
        self.used += len(made or "")
        return made

    def _make(self, path: str) -> str | None:
        try:
            jpeg = small_jpeg(path, _SIZE, _QUALITY)
        except (OSError, ValueError) as error:
            self.broken[path] = str(error) or type(error).__name__
            return None
        return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
