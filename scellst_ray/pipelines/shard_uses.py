"""Which slides still need which shards: one has the cells of a task, so of one slide or many."""

from collections.abc import Iterable


class ShardUses:
    """The shards of slides that are not finished; a driver keeps it."""

    def __init__(self) -> None:
        """Begin without slides."""
        self._shards_of: dict[str, set[str]] = {}
        self._slides_of: dict[str, set[str]] = {}

    def __len__(self) -> int:
        """Return how many shards are needed."""
        return len(self._slides_of)

    def add(self, slide_id: str, shards: Iterable[str]) -> None:
        """Take note of shards with cells of a slide."""
        for shard in shards:
            self._shards_of.setdefault(slide_id, set()).add(shard)
            self._slides_of.setdefault(shard, set()).add(slide_id)

    def finished(self, slide_id: str) -> list[str]:
        """Take note that a slide is finished; return the shards that none needs any more."""
        useless = []
        for shard in sorted(self._shards_of.pop(slide_id, ())):
            slides = self._slides_of[shard]
            slides.discard(slide_id)
            if not slides:
                del self._slides_of[shard]
                useless.append(shard)
        return useless
