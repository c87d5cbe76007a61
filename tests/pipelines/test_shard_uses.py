"""Shards are needed until all their slides are finished: against a plain recount."""

from hypothesis import given
from hypothesis import strategies as st

from scellst_ray.pipelines.shard_uses import ShardUses

SLIDES, SHARDS = "abcd", ["s0", "s1", "s2", "s3", "s4"]


@given(
    st.lists(st.tuples(st.sampled_from(SLIDES), st.sets(st.sampled_from(SHARDS)))),
    st.permutations(SLIDES),
)
def test_a_shard_goes_with_the_last_slide_that_needs_it(uses, order):
    kept = ShardUses()
    for slide_id, shards in uses:
        kept.add(slide_id, shards)
    needed = {(shard, slide_id) for slide_id, shards in uses for shard in shards}
    assert len(kept) == len({shard for shard, _ in needed})
    for slide_id in order:
        before = {shard for shard, _ in needed}
        needed = {(shard, other) for shard, other in needed if other != slide_id}
        after = {shard for shard, _ in needed}
        assert kept.finished(slide_id) == sorted(before - after)
        assert kept.finished(slide_id) == []
        assert len(kept) == len(after)
    assert not kept
