"""Each assumption about Ray's inside, held against the Ray that is installed."""

import inspect
import logging
import os
import signal
import time
import tomllib
from dataclasses import fields

import pyarrow as pa
import pytest
import ray
from packaging.requirements import Requirement
from ray._private.authentication import authentication_token_setup
from ray.data import DataContext, read_api
from ray.experimental import get_object_locations

from scellst_ray.core.signals import clean_exit_on_sigterm
from scellst_ray.pipelines import ray_internals
from scellst_ray.pipelines.planned_tiles import PlanTiles
from tests.support.paths import ROOT


@pytest.fixture
def context():
    """Put a context of its own in place of the one that all tests share."""
    before, fresh = DataContext.get_current(), DataContext()
    DataContext._set_current(fresh)
    yield fresh
    DataContext._set_current(before)


def test_the_installed_ray_lies_within_the_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = project["optional-dependencies"]["run"]
    (ours,) = (r for r in map(Requirement, run) if r.name == "ray")
    assert ray.__version__ in ours.specifier
    assert any(part.operator == "<" for part in ours.specifier)


def test_the_context_has_what_is_set(context):
    default = DataContext()
    own = {field.name for field in fields(DataContext)}
    assert own > {
        "enable_progress_bars",
        "execution_options",
        "execution_no_progress_timeout_s",
        "target_max_block_size",
        "memory_usage_poll_interval_s",
        "autoscaling_config",
        "max_consecutive_actor_init_deaths",
    }
    assert default.autoscaling_config.actor_pool_util_downscaling_threshold == 0.5
    assert default._max_num_blocks_in_streaming_gen_buffer == 2
    ray_internals.configure_tile_pass(1000)
    assert context.target_max_block_size == 256_000
    assert context.autoscaling_config.actor_pool_util_downscaling_threshold == 0.1
    assert context._max_num_blocks_in_streaming_gen_buffer == 8
    assert context.execution_no_progress_timeout_s == -1
    assert not context.execution_options.preserve_order


def test_ray_data_still_reads_what_is_set():
    from ray.data._internal.actor_autoscaler import default_actor_autoscaler
    from ray.data._internal.execution.operators import actor_pool_map_operator

    pool = inspect.getsource(actor_pool_map_operator)
    assert ray_internals.POOL_WARNING in pool
    assert "_max_num_blocks_in_streaming_gen_buffer" in pool
    assert "max_consecutive_actor_init_deaths" in pool
    scaling = inspect.getsource(default_actor_autoscaler)
    assert "actor_pool_util_downscaling_threshold" in scaling


def test_ray_data_logs_below_its_own_name():
    from ray.data._internal.execution import streaming_executor

    assert streaming_executor.logger.name.startswith("ray.data.")
    logger = logging.getLogger("ray.data")
    before = logger.level
    try:
        ray_internals.hide_ray_data_logs()
        assert not streaming_executor.logger.isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)


def test_ray_init_replaces_the_handler_of_sigterm():
    from ray._private import utils, worker

    assert "set_sigterm_handler(sigterm_handler)" in inspect.getsource(worker.init)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with clean_exit_on_sigterm():
            ours = signal.getsignal(signal.SIGTERM)
            utils.set_sigterm_handler(lambda *_: None)
            assert signal.getsignal(signal.SIGTERM) is not ours
            ray_internals.restore_sigterm_handler()
            assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("num_tiles", [1, 8, 5000])
def test_planned_tiles_are_one_block(num_tiles):
    planner = PlanTiles.__new__(PlanTiles)
    planner.tiles_per_task = num_tiles
    row = {"slide_id": "s", "tile_id": 1, "num_tiles": 9, "uri": "/data/slides/s.svs"}
    table = planner._pad_rows([dict(row) for _ in range(num_tiles)])
    size = ray_internals.block_bytes(num_tiles)
    assert size < table.nbytes < 1.5 * size


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestOnACluster:
    """What only a running Ray shows."""

    def test_nodes_have_ids_addresses_resources_and_labels(self):
        (node,) = ray_internals.live_nodes()
        assert node.node_id == ray.get_runtime_context().get_node_id()
        assert node.address
        assert node.resources["CPU"] == ray_internals.total_resources()["CPU"] == 2
        assert node.resources["memory"] > 0
        (labels,) = (each["Labels"] for each in ray.nodes())
        assert labels[ray_internals.NODE_LABEL] == node.node_id

    def test_a_selector_keeps_work_away_from_nodes(self):
        (node,) = ray_internals.live_nodes()
        elsewhere = ray_internals.select_other_nodes(["0" * 56])
        here = ray_internals.select_other_nodes([node.node_id, "0" * 56])
        task = ray.remote(num_cpus=0)(lambda: "done")
        assert ray.get(task.options(label_selector=elsewhere).remote(), timeout=60) == "done"
        waiting = task.options(label_selector=here).remote()
        assert ray.wait([waiting], timeout=2.0)[0] == []
        ray.cancel(waiting)
        assert ray_internals.select_other_nodes([]) is None

    def test_a_restarted_actor_keeps_its_id(self):
        class Mortal:
            def place(self):
                return (*ray_internals.place_of_actor(), os.getpid())

            def die(self):
                os._exit(1)

        actor = ray.remote(num_cpus=0, memory=2**20, max_restarts=1, max_task_retries=1)(
            Mortal
        ).remote()
        *first, pid = ray.get(actor.place.remote(), timeout=60)
        actor.die.options(max_task_retries=0).remote()
        deadline = time.monotonic() + 60
        while (after := ray.get(actor.place.remote(), timeout=60))[-1] == pid:
            assert time.monotonic() < deadline
        assert list(after[:-1]) == first
        assert first[-1] == 2**20

    def test_only_blocks_beyond_a_size_lie_in_the_object_store(self):
        @ray.remote(num_cpus=0)
        def block(num_bytes):
            return pa.table({"x": pa.array([bytes(num_bytes)], pa.binary())})

        sizes = [ray_internals.INLINE_BYTES * 8 // 10, ray_internals.block_bytes(2) * 6 // 5]
        refs = [block.remote(size) for size in sizes]
        ray.wait(refs, num_returns=2, timeout=60)
        small, large = (get_object_locations(refs)[ref]["node_ids"] for ref in refs)
        assert (len(small), len(large)) == (0, 1)


def test_a_ray_that_forms_no_cluster_has_the_loopback_address(monkeypatch):
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    before = ray.util.get_node_ip_address()
    with ray_internals.listen_on_loopback():
        assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray.util.get_node_ip_address() == before


def test_the_notice_of_a_token_is_hidden_and_its_absence_shown(caplog):
    ray_internals.hide_token_notice()
    ray_internals.hide_token_notice()
    with caplog.at_level(logging.WARNING, authentication_token_setup.__name__):
        authentication_token_setup._warn_token_auth_enabled()
        authentication_token_setup._warn_token_auth_disabled()
    assert {message[:32] for message in caplog.messages} == {"Token authentication is disabled"}


@pytest.mark.usefixtures("local_ray")
def test_a_dataset_has_a_block_a_table_and_starts_no_task(monkeypatch):
    monkeypatch.setattr(read_api, "cached_remote_fn", lambda *_: pytest.fail("starts a task"))
    tables = [pa.table({"slide_id": ["S1"]}), pa.table({"slide_id": ["S2", "S3"]})]
    dataset = ray_internals.dataset_of(iter(tables))
    assert dataset.num_blocks() == 2
    assert [row["slide_id"] for row in dataset.take_all()] == ["S1", "S2", "S3"]
