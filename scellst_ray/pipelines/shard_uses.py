"""The shards that unfinished slides still need. A shard holds cells of one or many slides."""

from collections.abc import Iterable


class ShardUses:
    """The shards of slides that are not finished; the driver keeps one."""

    def __init__(self) -> None:
        """Start without slides."""
        self._shards_of: dict[str, set[str]] = {}
        self._slides_of: dict[str, set[str]] = {}

    def __len__(self) -> int:
        """Return the number of shards that are needed."""
        return len(self._slides_of)

    def add(self, slide_id: str, shards: Iterable[str]) -> None:
        """Note that these shards hold cells of a slide."""
        for shard in shards:
            self._shards_of.setdefault(slide_id, set()).add(shard)
            self._slides_of.setdefault(shard, set()).add(slide_id)

    def finished(self, slide_id: str) -> list[str]:
        """Note that a slide is finished; return the shards that no slide needs any more."""
        useless = []
        for shard in sorted(self._shards_of.pop(slide_id, ())):
            slides = self._slides_of[shard]
            slides.discard(slide_id)
            if not slides:
                del self._slides_of[shard]
                useless.append(shard)
        return useless
