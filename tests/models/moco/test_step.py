import copy
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scellst_ray.models.moco.lars import new_moco_optimiser
from scellst_ray.models.moco.network import MocoConfig
from scellst_ray.models.moco.step import collapse, moco_step, process_group
from scellst_ray.models.moco.sync_norm import convert
from tests.support.workers import meet, tiny_moco, tiny_views

LR, MOMENTUM = 0.5, 0.9


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread, so that sums have the same order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def split(views, sizes):
    """Cut a pair of views into micro-batches."""
    return list(zip(*(view.split(sizes) for view in views), strict=True))


def run(model, steps, collective=None, name="lars", **options):
    """Take steps, each on a list of micro-batches; return results, gradients and final state."""
    if collective is not None:
        convert(model, collective.all_reduce, collective.world_size)
    optimiser = new_moco_optimiser(name, model)
    kept = []
    optimiser.register_step_pre_hook(
        lambda *_: kept.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    )
    results = [
        moco_step(
            model, optimiser, views, lr=LR, momentum=MOMENTUM, collective=collective, **options
        )
        for views in steps
    ]
    return results, kept, {n: v.clone() for n, v in model.state_dict().items()}


def assert_same(found, expected, **close):
    """Check that loss and gradients of each step, final weights and final statistics are equal."""
    for result, other in zip(found[0], expected[0], strict=True):
        assert result.loss == pytest.approx(other.loss, rel=1e-9)
        assert result.grad_norm == pytest.approx(other.grad_norm, rel=1e-7)
    torch.testing.assert_close(found[1], expected[1], **close)
    torch.testing.assert_close(found[2], expected[2], **close)


def paper_steps(model, steps, *, momentum_first):
    """Take the steps of Algorithm 1, with torch's cross entropy; return the losses.

    With momentum_first the momentum encoder moves as in the published code: after the queries and
    before the keys, by the weights of the previous step.
    """
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)

    def ctr(q, k):
        tau = model.config.temperature
        return 2 * tau * F.cross_entropy(q @ k.T / tau, torch.arange(len(q)))

    def move():
        for p, online in zip(model.momentum.parameters(), model.online.parameters(), strict=True):
            p.data = MOMENTUM * p.data + (1 - MOMENTUM) * online.data

    losses = []
    for x1, x2 in steps:
        q1, q2 = (F.normalize(model.predictor(model.online(x)[1]), dim=1) for x in (x1, x2))
        if momentum_first:
            move()
        with torch.no_grad():
            k1, k2 = (F.normalize(model.momentum(x)[1], dim=1) for x in (x1, x2))
        loss = ctr(q1, k2) + ctr(q2, k1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if not momentum_first:
            move()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("momentum_first", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_steps_equal_algorithm_1_in_either_order_of_the_momentum_update(
    temperature, momentum_first
):
    model = tiny_moco(config=MocoConfig(12, 8, temperature=temperature))
    model.momentum.load_state_dict(model.online.state_dict())
    twin = copy.deepcopy(model)
    steps = [tiny_views(7, seed) for seed in range(4)]
    expected = paper_steps(twin, steps, momentum_first=momentum_first)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=9.0)
    found = [moco_step(model, optimiser, [views], lr=LR, momentum=MOMENTUM).loss for views in steps]
    assert found == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(
        dict(model.online.state_dict()), dict(twin.online.state_dict()), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("counts", [(4, 4), (5, 1, 2), (8, 0)])
def test_workers_equal_one_process_on_the_joined_batch(counts):
    steps = [tiny_views(sum(counts), seed) for seed in range(3)]
    expected = run(tiny_moco(), [[views] for views in steps])
    models = [tiny_moco() for _ in counts]
    found = meet(
        len(counts),
        lambda mine: run(
            models[mine.rank], [[split(views, counts)[mine.rank]] for views in steps], mine
        ),
    )
    for worker in found:
        assert_same(worker, expected, rtol=1e-6, atol=1e-9)


def gloo_worker(rank, folder):
    """Take steps on half of each batch in a process, then a step on a batch with a NaN."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    mine, model = process_group(), tiny_moco()
    steps = [[split(tiny_views(8, seed), (4, 4))[rank]] for seed in range(2)]
    found = run(model, steps, mine)
    before = [p.detach().clone() for p in model.parameters()]
    views = [v.clone() for v in tiny_views(4, rank)]
    if rank:
        views[1][2, 0, 0, 0] = math.nan
    message = ""
    try:
        run(model, [[tuple(views)]], mine)
    except FloatingPointError as error:
        message = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    torch.save((found[1:], [r.loss for r in found[0]], message, same), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_gloo_processes_equal_one_and_stop_together(tmp_path, monkeypatch):
    if Path("/sys/class/net/lo").exists():
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    # A server imports torch once and forks both processes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.models"])
    workers = [context.Process(target=gloo_worker, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    results, gradients, state = run(tiny_moco(), [[tiny_views(8, seed)] for seed in range(2)])
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    for rank in (0, 1):
        found, losses, message, same = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert losses == pytest.approx([result.loss for result in results], rel=1e-9)
        torch.testing.assert_close(found[0], gradients, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[1], state, rtol=1e-6, atol=1e-9)
        assert "loss is nan" in message
        assert same


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_micro_batches_change_nothing_where_no_norm_looks_at_them(name):
    steps = [tiny_views(8, seed) for seed in range(3)]
    expected = run(tiny_moco(norms=False), [[views] for views in steps], name=name)
    for sizes in ([4, 4], [2, 2, 2, 2], [5, 3]):
        found = run(tiny_moco(norms=False), [split(views, sizes) for views in steps], name=name)
        assert_same(found, expected, rtol=1e-6, atol=1e-8)
    models = [tiny_moco(norms=False) for _ in range(2)]
    for worker in meet(
        2,
        lambda mine: run(
            models[mine.rank],
            [split(split(views, 4)[mine.rank], 2) for views in steps],
            mine,
            name=name,
        ),
    ):
        assert_same(worker, expected, rtol=1e-6, atol=1e-8)


def test_micro_batches_with_norms_follow_the_loop_written_out():
    model = tiny_moco()
    twin = copy.deepcopy(model)
    parts = split(tiny_views(8), [4, 4])
    (result,), (gradients,), _ = run(model, [parts])
    twin.train()
    k1, k2 = (torch.cat([twin.keys(part[view]) for part in parts]) for view in (0, 1))
    for number, (x1, x2) in enumerate(parts):
        labels = torch.arange(4) + 4 * number
        loss = F.cross_entropy(twin.queries(x1) @ k2.T, labels, reduction="sum")
        loss = loss + F.cross_entropy(twin.queries(x2) @ k1.T, labels, reduction="sum")
        (loss * 2 / 8).backward()
    expected = [p.grad for p in twin.parameters() if p.requires_grad]
    torch.testing.assert_close(gradients, expected)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    assert result.grad_norm == pytest.approx(norm.item())


# Losses of 20 steps of `golden_losses`, from one core of an x86-64 machine.
# fmt: off
GOLDEN = [
    6.141348, 5.809173, 5.7122, 5.536196, 5.756768, 5.610212, 5.50657, 5.545536,
    5.62896, 5.440739, 5.123839, 5.364969, 5.111924, 5.061898, 4.978949, 4.717105,
    4.616247, 4.426461, 4.09935, 3.994822,
]
# fmt: on


def golden_model():
    model = tiny_moco(5, torch.float32, config=MocoConfig(24, 16, temperature=0.5))
    return model.to(memory_format=torch.channels_last)


def golden_losses(num_steps=20):
    """Train a small network with LARS for `num_steps` steps on four batches, in float32."""
    model = golden_model()
    optimiser = new_moco_optimiser("lars", model)
    batches = [[tiny_views(16, seed, torch.float32)] for seed in range(4)]
    losses = [
        moco_step(model, optimiser, batches[step % 4], lr=20.0, momentum=0.9).loss
        for step in range(num_steps)
    ]
    return losses, model.state_dict()


def test_twenty_golden_steps():
    losses, _ = golden_losses()
    assert losses == pytest.approx(GOLDEN, rel=2e-4)
    assert losses[-1] < losses[0] - 1


def test_steps_are_bitwise_reproducible():
    (losses, state), (again, same) = golden_losses(6), golden_losses(6)
    assert losses == again
    assert all(torch.equal(state[name], same[name]) for name in state)


def test_bfloat16_stays_near_float32():
    # Each step starts from the same weights. Steps are so large that two trainings diverge, and how
    # far depends on the rounding of the processor.
    for num_steps in range(4):
        _, state = golden_losses(num_steps)
        model = golden_model()
        model.load_state_dict(state)
        views = [tiny_views(16, num_steps, torch.float32)]
        step = {"lr": 20.0, "momentum": 0.9, "precision": "bfloat16"}
        rough = moco_step(model, new_moco_optimiser("lars", model), views, **step)
        assert rough.loss == pytest.approx(GOLDEN[num_steps], abs=0.1)
        assert all(v.dtype != torch.bfloat16 for v in model.state_dict().values())


def test_a_gradient_that_is_not_finite_is_named_and_stops_the_step():
    model = tiny_moco()
    optimiser = new_moco_optimiser("lars", model)
    views = [tiny_views(4)]
    moco_step(model, optimiser, views, lr=LR, momentum=MOMENTUM)
    before = [p.detach().clone() for p in model.parameters()]
    handle = model.online.projector[0].weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(FloatingPointError, match=r"1 tensors, online\.projector\.0\.weight") as e:
        moco_step(model, optimiser, views, lr=LR, momentum=MOMENTUM)
    assert "Lower the learning rate" in str(e.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    handle.remove()
    moco_step(model, optimiser, views, lr=LR, momentum=MOMENTUM)


def test_one_workers_nan_stops_all_workers_with_weights_as_they_were():
    models = [tiny_moco() for _ in range(3)]
    before = copy.deepcopy(models[0])

    def work(mine):
        views = tiny_views(4, mine.rank)
        if mine.rank == 1:
            views[0][0] = math.inf
        return run(models[mine.rank], [[views]], mine)

    for error, model in zip(meet(3, work), models, strict=True):
        assert isinstance(error, FloatingPointError)
        assert "stopped before the step" in str(error)
        for a, b in zip(before.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_large_gradient_is_no_reason_to_stop():
    model = tiny_moco(dtype=torch.float32)
    model.predictor[3].weight.register_hook(lambda g: g.sign() * 1e30)
    optimiser = new_moco_optimiser("lars", model)
    result = moco_step(
        model, optimiser, [tiny_views(4, dtype=torch.float32)], lr=LR, momentum=MOMENTUM
    )
    # Gradients of two views add up or cancel.
    assert 1e30 < result.grad_norm <= 2e30 * math.sqrt(12 * 8)


def test_what_does_not_fit_together_is_refused():
    model = tiny_moco()
    optimiser = new_moco_optimiser("lars", model)
    x, y = tiny_views(4)
    for views in ([], [(x, y[:3])]):
        with pytest.raises(ValueError, match="expected at least one micro-batch"):
            moco_step(model, optimiser, views, lr=LR, momentum=MOMENTUM)
    with pytest.raises(ValueError, match="precision is 'float16'"):
        moco_step(model, optimiser, [(x, y)], lr=LR, momentum=MOMENTUM, precision="float16")
    models = [tiny_moco() for _ in range(2)]
    parts = [[(x, y)], split((x, y), 2)]
    for error in meet(2, lambda mine: run(models[mine.rank], [parts[mine.rank]], mine)):
        assert isinstance(error, ValueError)
        assert "workers hold [1, 2] micro-batches" in str(error)


def test_collapse_of_known_vectors():
    generator = torch.Generator().manual_seed(0)
    spread, rank = collapse(torch.randn(4000, 32, generator=generator))
    assert spread == pytest.approx(1, abs=0.02)
    assert 28 < rank <= 32
    assert collapse(torch.ones(50, 16)) == (pytest.approx(0, abs=1e-6), 1)
    # A line through the origin has two opposite unit vectors.
    line = torch.linspace(-1, 1, 40)[:, None] * torch.randn(1, 16, generator=generator)
    assert collapse(line)[1] == pytest.approx(1, abs=1e-4)
    # Four orthogonal directions, equally often, are a simplex: it fills 3 dimensions evenly.
    assert collapse(torch.eye(64)[:4].repeat(10, 1))[1] == pytest.approx(3, abs=1e-4)
    assert collapse(torch.eye(4).repeat(30, 1))[1] == pytest.approx(3, abs=1e-4)
    assert all(math.isnan(v) for v in collapse(torch.empty(0, 4)))


def test_the_report_tells_a_collapsed_encoder_from_one_that_is_not():
    model, dead = tiny_moco(), tiny_moco()
    for p in dead.momentum.backbone[3].parameters():
        p.data.zero_()
    for p in dead.momentum.backbone[4].parameters():
        p.data.zero_()
    dead.momentum.backbone[4].bn2.bias.data.fill_(1.0)
    (alive,), _, _ = run(model, [[tiny_views(16)]])
    (collapsed,), _, _ = run(dead, [[tiny_views(16)]])
    assert alive.embedding_spread > 0.1
    assert alive.embedding_rank > 3
    assert collapsed.embedding_spread < 1e-3
    assert collapsed.embedding_rank == 1
    assert collapsed.key_rank <= alive.key_rank
