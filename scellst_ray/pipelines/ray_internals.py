"""The functions that rely on internals of Ray, or on what its documentation does not promise.

Each function names its assumption. tests/pipelines/test_ray_internals.py tests every assumption,
and pyproject.toml bounds the version of Ray: raise that bound only with these tests green.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray.data import DataContext

from scellst_ray.core.signals import catch_sigterm

# Results up to this size travel with a message and lie in no object store.
INLINE_BYTES = 100 * 2**10
# Bytes that the row of a tile takes in a block, at least.
TILE_BYTES = 256
# Blocks that a planning task may have ready before anybody fetches them.
PLANNED_AHEAD = 8
# Bytes of the path of Ray's temporary folder. Ray makes sockets below it, in a folder that is named
# after time and process; the path of a socket has at most 107 bytes.
LONGEST_TEMP_DIR = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
NODE_LABEL = "ray.io/node-id"
TOKEN_NOTICE = "Token authentication is enabled for this Ray cluster."  # noqa: S105 - no token
POOL_WARNING = "The minimum number of concurrent actors"


class LiveNode(NamedTuple):
    """A node that is alive.

    Attributes:
        node_id: Ray's id of the node.
        address: Its IP address.
        resources: Amounts that Ray hands out on the node: CPU, GPU, and memory in bytes.
    """

    node_id: str
    address: str
    resources: dict[str, float]


def live_nodes() -> list[LiveNode]:
    """Return the nodes that are alive.

    Assumption: `ray.nodes()` has the keys Alive, NodeID, NodeManagerAddress and Resources.
    """
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        LiveNode(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
        for node in nodes
        if node["Alive"]
    ]


def total_resources() -> dict[str, float]:
    """Return the resources of all nodes together.

    Assumption: `ray.cluster_resources()` has the keys CPU and GPU, and lacks those of count 0.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def select_other_nodes(node_ids: Sequence[str]) -> dict[str, str] | None:
    """Return the label selector of all nodes but these; None if all may be used.

    Assumption: Ray labels every node with `ray.io/node-id`, and a selector may say `!in(a,b)`.
    """
    return {NODE_LABEL: f"!in({','.join(node_ids)})"} if node_ids else None


class ActorPlace(NamedTuple):
    """The actor that a process runs.

    Attributes:
        actor_id: Ray's id of the actor.
        node_id: Ray's id of its node.
        memory: Bytes that the actor declares; None if it declares none.
    """

    actor_id: str
    node_id: str
    memory: float | None


def place_of_actor() -> ActorPlace:
    """Return the actor that this process runs.

    Assumption: an actor that Ray restarts keeps its id, so its processes share a note. Its assigned
    resources hold the declared memory.
    """
    context = ray.get_runtime_context()
    resources = context.get_assigned_resources()  # type: ignore[no-untyped-call]
    return ActorPlace(
        str(context.get_actor_id()), context.get_node_id(), resources.get("memory", None)
    )


def restore_sigterm_handler() -> None:
    """Set our handler of SIGTERM again, after Ray has been initialised.

    Assumption: `ray.init` replaces the handler by its own, which ends the process three seconds
    after SIGTERM, whether or not the clean-up is done.
    """
    catch_sigterm()


@contextmanager
def listen_on_loopback() -> Iterator[None]:
    """Let a Ray that starts inside the `with` listen on the loopback address alone.

    Assumption: a Ray that may form no cluster, as on macOS, gives its node the address 127.0.0.1.
    The processes of such a node listen on that address, and else on all addresses.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def hide_ray_data_logs() -> None:
    """Show nothing of Ray Data below errors: the commands show their own progress.

    Assumption: all its log lines, those of progress bars included, come from logger `ray.data`.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def hide_token_notice() -> None:
    """Do not show that Ray's token is used, as it is by default; that it is not used is shown.

    Assumption: the logger below writes it, and the line begins with TOKEN_NOTICE.
    """
    logger = logging.getLogger(authentication_token_setup.__name__)
    if _is_no_token_notice not in logger.filters:
        logger.addFilter(_is_no_token_notice)


def _is_no_token_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(TOKEN_NOTICE)


def dataset_of(tables: Iterable[pa.Table]) -> ray.data.Dataset:
    """Return a dataset with one block a table.

    `ray.data.from_arrow` would start a task for each table, to count its rows.

    Assumption: `from_blocks` does all in this process. Ray keeps it for developers.
    """
    dataset: ray.data.Dataset = ray.data.from_blocks(list(tables))
    return dataset


def block_bytes(tiles_per_task: int) -> int:
    """Return the bytes at which Ray Data shall cut blocks, so that a task's tiles are one block.

    Work on a planned block must run where its slides were planned, since they are cached there.

    Assumption: Ray Data cuts blocks by bytes alone. It sends work to the node of a block only if
    the block lies in the object store, so beyond 100 KiB.
    """
    return max(INLINE_BYTES, TILE_BYTES * tiles_per_task)


def padding_bytes(tiles_per_task: int, num_bytes: int) -> int:
    """Return how many bytes a block of planned tiles needs to be one block.

    Assumption: a block ends once it is larger than `block_bytes`. One that is more than half larger
    is cut again.

    Args:
        tiles_per_task: Tiles a task takes at a time.
        num_bytes: Bytes of the block without padding.
    """
    return max(0, block_bytes(tiles_per_task) * 6 // 5 - num_bytes)


def hide_progress_bars() -> None:
    """Show no progress bars of Ray Data.

    Assumption: DataContext.enable_progress_bars decides it.
    """
    DataContext.get_current().enable_progress_bars = False


def configure_slide_pass() -> None:
    """Set Ray Data's context for a pass with one row a slide.

    Assumption: these attributes of DataContext have the meaning that is written next to each.
    """
    hide_progress_bars()
    context = DataContext.get_current()
    # Blocks may come in any order.
    context.execution_options.preserve_order = False
    # Seconds without a finished block after which a run fails; -1: never. A large slide, or a block
    # of dense tiles on a slow CPU, can take half an hour.
    context.execution_no_progress_timeout_s = -1


def configure_tile_pass(tiles_per_task: int) -> None:
    """Set Ray Data's context for the pass over the tiles.

    Assumption: these attributes of DataContext have the meaning that is written next to each.
    """
    configure_slide_pass()
    context = DataContext.get_current()
    # Bytes at which blocks are cut.
    context.target_max_block_size = block_bytes(tiles_per_task)
    # Seconds between measurements of a worker's memory; None: none. Ray Data would also measure it
    # before and after each task, and nothing uses the result.
    context.memory_usage_poll_interval_s = None
    # Share of busy actors below which a pool shrinks, by default 0.5. Tasks come to readers and
    # finders in bursts: by default every other task would end and start a process.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.1
    # Blocks of a task that wait to be fetched before the task is paused. Blocks are fetched ten
    # times a second. Only planners have more than one block a task.
    context._max_num_blocks_in_streaming_gen_buffer = PLANNED_AHEAD  # noqa: SLF001
    # Workers in a row that may die while they start, before the run fails. The fault may pass once.
    context.max_consecutive_actor_init_deaths = 2
    # Ray Data warns of every cohort with fewer tasks than actors.
    warnings.filterwarnings("ignore", message=POOL_WARNING)
