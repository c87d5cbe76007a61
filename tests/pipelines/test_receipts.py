"""Where the stages of a pass are put, on clusters of all sizes."""

import pytest

from scellst_ray.pipelines.receipts import _place
from scellst_ray.pipelines.session import Cluster
from scellst_ray.stages.make import stage_groups

GIB = 2**30
FOUR = [("read",), ("network",), ("find",), ("embed", "write")]


@pytest.mark.parametrize("num_cpus", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("num_gpus", [1, 2, 8])
def test_every_pool_gets_its_first_actors(cells_spec, num_cpus, num_gpus):
    cluster = Cluster(num_cpus, num_gpus, (256 * GIB,), num_cpus)
    for segmenter in ("hematoxylin", "cellvit"):
        for encoder in ("imagenet", "none"):
            spec = type(cells_spec)(
                **vars(cells_spec) | {"segmenter": segmenter, "encoder": encoder}
            )
            groups = stage_groups(spec, gpus=True)
            places = [_place(g, groups, None, cluster, 2 * GIB, gpus=True) for g in groups]
            most = [p.pool.max_size for p in places]
            cpus = sum(n * p.num_cpus for n, p in zip(most, places, strict=True))
            gpus = sum(n * p.num_gpus for n, p in zip(most, places, strict=True))
            assert cpus <= max(1, num_cpus / 2), "half of the nodes may be lost"
            assert gpus <= num_gpus
            assert all(
                p.pool.max_size >= p.pool.initial_size >= p.pool.min_size >= 1 for p in places
            )
            assert all(p.pool.min_size == num_gpus for p in places if p.num_gpus)


def test_readers_and_finders_are_there_for_every_gpu_from_the_start(cells_spec):
    spec = type(cells_spec)(**vars(cells_spec) | {"segmenter": "cellvit", "encoder": "tokens"})
    groups = stage_groups(spec, gpus=True)
    read = groups[0]
    for num_cpus, num_gpus, first in [(64, 8, 8), (16, 32, 8), (2, 1, 1)]:
        cluster = Cluster(num_cpus, num_gpus, (1024 * GIB,), num_cpus)
        place = _place(read, groups, None, cluster, 2 * GIB, gpus=True)
        assert place.pool.initial_size == first


@pytest.mark.parametrize(
    ("nodes", "workers"),
    [((80,), 16), ((5,), 1), ((6, 6, 6, 6), 4), ((3, 3, 9), 2)],
)
def test_as_many_cpu_workers_as_each_node_holds(nodes, workers):
    cluster = Cluster(16, 0, tuple(n * GIB for n in nodes), 16)
    groups = [("read", "network", "find", "embed", "write")]
    place = _place(groups[0], groups, None, cluster, int(4.3 * GIB), gpus=False)
    assert place.pool.min_size == place.pool.max_size == workers


@pytest.mark.parametrize(
    ("nodes", "gpus", "groups", "workers", "needed"),
    [
        ((4, 4), False, [("read", "find", "embed", "write")], None, 1),
        ((11,), False, [("read", "find", "embed", "write")], 3, 3),
        ((16,), True, FOUR, None, 4),
    ],
)
def test_too_little_memory_is_said_and_not_waited_for(nodes, gpus, groups, workers, needed, caplog):
    memory = tuple(n * GIB for n in nodes)
    arguments = (groups[0], groups, workers)
    with pytest.raises(ValueError, match=rf"{needed} worker.s. of 5\.0 GiB are needed"):
        _place(*arguments, Cluster(8, 1, memory, 8), 5 * GIB, gpus=gpus)
    # A cluster with an autoscaler may yet get the nodes.
    _place(*arguments, Cluster(8, 1, memory, 8, may_grow=True), 5 * GIB, gpus=gpus)
    assert "waiting for it to grow" in caplog.text


def test_two_networks_never_share_a_gpu_while_another_has_none(cells_spec):
    spec = type(cells_spec)(**vars(cells_spec) | {"segmenter": "cellvit"})
    groups = stage_groups(spec, gpus=True)
    cluster = Cluster(16, 4, (256 * GIB,), 16)
    network, embed = (
        _place(names, groups, None, cluster, 2 * GIB, gpus=True)
        for names in groups
        if names[0] in ("network", "embed")
    )
    # Ray fills a GPU before it takes the next one.
    assert 2 * network.num_gpus > 1
    # Where half of the GPUs are lost, those left hold all that embed.
    assert network.num_gpus + 2 * embed.num_gpus == pytest.approx(1)
    assert network.pool.max_size == embed.pool.max_size == 4
