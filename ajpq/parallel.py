"""Several processes that train one network, one per GPU, as `torchrun` and `accelerate launch` start them.

Every process runs the same script and reads the same batches in the same order; `training.fit` gives each its part of
every batch, and adds gradients up over the processes (synchronous data parallelism). Nothing but torch.distributed is
needed: both launchers set the variables that it reads, and `accelerate.Accelerator` joins by it, too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from ajpq.errors import AjpqError
from ajpq.launched import launched


def join() -> torch.device:
    """Join the processes that a launcher started, before anything else; the device of this process: its GPU where there
    are GPUs. Does nothing but tell the device in a process that was started alone or has joined. Raises AjpqError if
    there are GPUs, but fewer than processes."""
    here = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", here) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if here >= torch.cuda.device_count():
            raise AjpqError(
                f"every process needs a GPU of its own, but process {here} of this machine finds "
                f"{torch.cuda.device_count()}; launch as many processes as there are GPUs"
            )
        torch.cuda.set_device(device)
    if launched() > 1 and not _joined():
        dist.init_process_group()  # gloo for tensors in memory, nccl for those on GPUs
    return device


def leave() -> None:
    """The end of what `join` began, at the end of a script."""
    if _joined():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one to write files and to print."""
    return int(os.environ.get("RANK", 0)) == 0 if not _joined() else dist.get_rank() == 0


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give all processes the parameters and buffers of the main one; all must call it. Alone, it does nothing."""
    if _joined():
        for tensor in model.state_dict().values():
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


def draw_alike() -> None:
    """Give all processes the state of the main one's random generator (of tensors in memory), from which unseeded
    loaders draw their order; all must call it. Alone, it does nothing."""
    if _joined():
        state = torch.get_rng_state().to(_meeting_place())
        dist.broadcast(state, src=0)
        torch.set_rng_state(state.cpu())


@dataclass(frozen=True)
class Team:
    """The processes that train together. Every method must be called by all of them; alone, they do nothing."""

    rank: int
    size: int

    @classmethod
    def of_launched(cls) -> Team:
        """Raises AjpqError if several processes run and have not joined: each would train for itself and write the same
        files."""
        if _joined():
            return cls(dist.get_rank(), dist.get_world_size())
        if launched() > 1:
            raise AjpqError(
                f"processes that are launched together train together, but {launched()} were launched and this one has "
                "not joined; call ajpq.parallel.join() first, or unset WORLD_SIZE for trainings of their own"
            )
        return cls(0, 1)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """The rows of a batch that are this process's; parts differ by a row at most. Raises AjpqError if there are
        fewer rows than processes."""
        if len(rows) < self.size:
            raise AjpqError(
                f"a batch must have an image for every process, but one has {len(rows)} images for {self.size} "
                "processes; use larger batches, drop the incomplete last one, or launch fewer processes"
            )
        return rows.tensor_split(self.size)[self.rank] if self.size > 1 else rows

    def agree_on(self, name: str, value: int) -> None:
        """Raise AjpqError, in all processes, unless they have the same value."""
        if self.size > 1:
            ends = torch.tensor([value, -value], device=_meeting_place())
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            if ends[0] != -ends[1]:
                raise AjpqError(
                    f"all processes must have the same {name}, but they have {-ends[1].item()} to {ends[0].item()}; "
                    "put the checkpoint where every process can read it, and give all the same batches"
                )

    @torch.no_grad()
    def add_up(self, parameters: Sequence[Tensor], model: nn.Module, share: float, *numbers: float) -> list[float]:
        """Sums over processes of gradients, in place, and of numbers, which are returned; running statistics become
        their mean weighted by `share`, which adds up to 1. A parameter without a gradient in every process stays so."""
        if self.size == 1:
            return list(numbers)
        norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
        running = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        mine = [0.0 if p.grad is None else 1.0 for p in parameters]
        tensors = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        extra = torch.tensor([*mine, *numbers], dtype=tensors[0].dtype, device=tensors[0].device)
        flat = torch.cat([*(t.reshape(-1) for t in tensors), *(t.reshape(-1) * share for t in running), extra])
        dist.all_reduce(flat)
        *found, extra = flat.split([t.numel() for t in (*tensors, *running, extra)])
        for tensor, values in zip((*tensors, *running), found, strict=True):
            tensor.copy_(values.view_as(tensor))
        extra = extra.tolist()
        for p, tensor, seen in zip(parameters, tensors, extra, strict=False):
            p.grad = tensor if seen else None
        return extra[len(mine) :]


def _meeting_place() -> torch.device:
    """Where tensors must be to be exchanged by any kind of group."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
