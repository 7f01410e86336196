"""What several processes have to agree upon. With one process, all of this does nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def number() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first is 0."""
    return dist.get_rank() if number() > 1 else 0


def dealt(place: int, batch_size: int) -> int:
    """Where a row of this process stands among all rows, which are dealt out in turn, a batch at a time."""
    batch, within = divmod(place, batch_size)
    return (batch * number() + rank()) * batch_size + within


@torch.no_grad()
def sum_over(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes, the same bits in all of them."""
    if number() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.all_reduce(whole)
            if whole is not tensor:
                tensor.copy_(whole)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process the first one's tensors."""
    if number() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_say(yes: bool) -> bool:
    """Whether it is so in every process."""
    return all(objects(yes))


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, `(rows, ...)`, in the order of their ranks; their numbers may differ."""
    if number() == 1:
        return rows
    lengths = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(number())]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def objects(own: T) -> list[T]:
    """What every process hands in, in the order of their ranks."""
    if number() == 1:
        return [own]
    found: list[T | None] = [None] * number()
    dist.all_gather_object(found, own)
    return cast(list[T], found)
