"""Workers for tests: threads of this process that meet, and a small residual network."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from scellst_ray.models.moco.network import Moco, MocoConfig
from scellst_ray.models.moco.step import Collective

WAIT_S = 60


class Meeting:
    """Threads hand over tensors and all get all of them; a failed one frees all threads."""

    def __init__(self, world_size):
        self.parts = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=WAIT_S)

    def collective(self, rank):
        def all_gather(tensor):
            self.parts[rank] = tensor.clone()
            self.barrier.wait()
            found = list(self.parts)
            self.barrier.wait()
            return found

        def all_reduce(tensor):
            return torch.stack(all_gather(tensor)).sum(0)

        return Collective(rank, len(self.parts), all_reduce, all_gather)


def meet(world_size, function):
    """Call function(collective) in a thread per worker; return results or errors by rank."""
    meeting = Meeting(world_size)

    def work(rank):
        try:
            return function(meeting.collective(rank))
        except (FloatingPointError, ValueError) as error:
            return error
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, range(world_size)))


def tiny_backbone(norm=nn.BatchNorm2d):
    """Return a residual network of a few thousand weights, crops [N, 3, H, W] to [N, 16]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        norm(8),
        nn.ReLU(inplace=True),
        BasicBlock(8, 8, norm_layer=norm),
        BasicBlock(
            8,
            16,
            stride=2,
            downsample=nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), norm(16)),
            norm_layer=norm,
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def tiny_moco(seed=0, dtype=torch.float64, *, norms=True, config=None):
    """Return a small seeded model; without norms a crop's query depends on no other crop."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = tiny_backbone() if norms else tiny_backbone(nn.Identity)
        model = Moco(backbone, 16, config or MocoConfig(projector_dim=12, out_dim=8))
        # Weights that differ between the two encoders, as they do in training.
        model.momentum.apply(
            lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None
        )
    if not norms:
        for head in (model.online.projector, model.momentum.projector, model.predictor):
            for number, layer in enumerate(head):
                if isinstance(layer, nn.BatchNorm1d):
                    head[number] = nn.Identity()
    return model.to(dtype)


def tiny_views(num_crops, seed=0, dtype=torch.float64, px=12):
    """Return two views of crops."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_crops, 3, px, px, generator=generator, dtype=dtype)
    return x, x + 0.5 * torch.randn(x.shape, generator=generator, dtype=dtype)
