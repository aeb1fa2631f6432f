"""What a batch-norm over the batch of several processes (SyncBatchNorm) adds: the moments and the sums of all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def joined_moments(mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of the group's values, from those of this process's `count` values, in one
    collective (Chan, Golub, LeVeque 1979, formula 2.1, for many parts at once). A process may have no values at all."""
    if count == 0:
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    local = torch.cat([mean.flatten(), var.flatten(), mean.new_full((1,), count)])
    gathered = local.new_empty(dist.get_world_size(group) * len(local))
    dist.all_gather_into_tensor(gathered, local, group=group)
    means, variances, counts = gathered.view(-1, len(local)).double().split([mean.numel(), var.numel(), 1], 1)
    total = counts.sum()
    joined = (counts * means).sum(0) / total
    deviation = (counts * (variances + (means - joined).square())).sum(0) / total
    return joined.to(mean.dtype).view_as(mean), deviation.to(var.dtype).view_as(var), total.to(mean.dtype)


def summed(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the group's `sums`, in one collective."""
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total
