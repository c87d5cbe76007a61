"""Checks of every node of a cluster, before work starts: does it have what the run needs?

Each node answers in one small task without a CPU slot. A node that does not answer in time is
reported, and the run starts without its answer.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scellst_ray import storage
from scellst_ray.pipelines.ray_internals import live_nodes
from scellst_ray.pipelines.session import Cluster
from scellst_ray.preflight.checks import (
    SHOWN_SLIDES,
    FoundSlides,
    Problem,
    find_slides,
    stop_or_warn,
)
from scellst_ray.preflight.nodes import (
    Facts,
    NodeRequirements,
    node_facts,
    problems_of_node,
    versions,
    write_probe,
)
from scellst_ray.slides.manifest import SlideRow

# Seconds for an answer: a node starts a process and may fetch weights from object storage.
ANSWER_S = 300.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        node_id: Ray's id of the node.
        name: Its address and the start of its id, for messages.
        num_gpus: Number of GPUs that Ray counts on it.
    """

    node_id: str
    name: str
    num_gpus: int


def asked_for(
    out: str, weights: Iterable[tuple[str | None, str | None]] = (), *, gpus: bool = False
) -> NodeRequirements:
    """Return the requirements that the nodes of a run must meet.

    Args:
        out: The run's folder.
        weights: Pairs of a setting and the digest found for it. Only files are asked for.
        gpus: Whether networks run on GPUs.
    """
    files = tuple((w, d) for w, d in weights if w and d and d.startswith("sha256:"))
    return NodeRequirements(out=out, weights=files, gpus=gpus)


def check_before_run(
    asked: NodeRequirements,
    cluster: Cluster,
    slides: Sequence[SlideRow] = (),
    *,
    imported: bool = False,
    timeout_s: float = ANSWER_S,
) -> tuple[str, ...]:
    """Stop a run that cannot succeed; otherwise warn of slides and nodes with problems.

    Args:
        asked: Requirements of nodes; this function adds a probe and slides.
        cluster: The resources of the cluster.
        slides: Slides that still need work.
        imported: Whether each slide needs a file of imported nuclei.
        timeout_s: Seconds a node may take to answer.

    Returns:
        Ids of nodes to leave out. Their disk has no room for the largest slide, and the disk of
        another node has room.

    Raises:
        ValueError: the run as a whole has problems; the message lists each on a line.
    """
    found = find_slides(slides, imported=imported)
    of_nodes = node_problems(asked, cluster, found, timeout_s)
    stop_or_warn([*of_nodes, *found.problems], logger)
    unfit = {problem.node_id for problem in of_nodes if problem.node_id}
    if unfit >= {node.node_id for node in working_nodes()}:
        return ()
    return tuple(sorted(unfit))


def node_problems(
    asked: NodeRequirements, cluster: Cluster, found: FoundSlides, timeout_s: float = ANSWER_S
) -> list[Problem]:
    """Return the problems of the cluster and of its nodes."""
    problems = []
    if asked.gpus and not cluster.num_gpus:
        text = "gpus is true, and the cluster has none; add nodes with GPUs, or set gpus to false"
        problems.append(Problem(text, stops=not cluster.may_grow))
    if asked.out is not None:
        try:
            probe = write_probe(asked.out, keep=True)
        except OSError as error:
            text = f"output: {error}; give an --out that can be written"
            return [*problems, Problem(text)]
        asked = replace(asked, probe=probe)
    asked = replace(asked, slides=tuple(found.local[:SHOWN_SLIDES]))
    sent = time.time()
    try:
        answers = ask_nodes(asked, timeout_s)
    finally:
        if asked.probe is not None:
            storage.remove_tree(asked.probe)
    span = (sent, time.time())
    for node, answer in answers:
        if isinstance(answer, str):
            problems.append(Problem(f"node {node.name}: {answer}", stops=False))
        else:
            gpus = node.num_gpus if asked.gpus else 0
            largest = found.largest_remote
            of_node = problems_of_node(node.name, answer, versions(), span, gpus, largest)
            if answer.get("cache_free", largest) < largest:
                of_node = [replace(p, node_id=None if p.stops else node.node_id) for p in of_node]
            problems += of_node
    return problems


def ask_nodes(asked: NodeRequirements, timeout_s: float) -> list[tuple[Node, Facts | str]]:
    """Return the answer of each node that takes work, or why it gave none."""
    nodes = working_nodes()
    if len(nodes) == 1 and _is_here(nodes[0]):
        # The only node is that of this process, which has read the weights already.
        return [(nodes[0], node_facts(replace(asked, weights=())))]
    refs = {_send(asked, node): node for node in nodes}
    ready, late = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    answers: list[tuple[Node, Facts | str]] = []
    for ref in ready:
        try:
            answers.append((refs[ref], ray.get(ref)))
        except ray.exceptions.RayError as error:
            answers.append((refs[ref], f"could not be asked ({_first_line(error)}); was it lost?"))
    for ref in late:
        ray.cancel(ref, force=True)
        text = f"did not answer in {timeout_s:g} s; it may be lost, or overloaded"
        answers.append((refs[ref], text))
    return sorted(answers, key=lambda answer: answer[0].name)


def working_nodes() -> list[Node]:
    """Return the nodes that are alive and take work, so no head without CPUs."""
    nodes = []
    for node in live_nodes():
        if node.resources.get("CPU") or node.resources.get("GPU"):
            name = f"{node.address} ({node.node_id[:8]})"
            nodes.append(Node(node.node_id, name, int(node.resources.get("GPU", 0))))
    return nodes


def _is_here(node: Node) -> bool:
    return node.node_id == ray.get_runtime_context().get_node_id()


def _send(asked: NodeRequirements, node: Node) -> "ray.ObjectRef[Facts]":
    place = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(node_facts)
    return task.options(scheduling_strategy=place).remote(asked)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]
