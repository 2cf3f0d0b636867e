"""What ranks that share one model's weights must agree on.

Where weights are sharded (FSDP2, FSDP, DeepSpeed's ZeRO-3), every pass gathers them from all ranks: a pass that one rank does and another
does not ends in a hang or an abort. So no number of passes may depend on a rank's own rows or random numbers.
"""

import torch
from torch import distributed, nn


def gathering_groups(model: nn.Module) -> list:
    """The groups of ranks that have to do the passes of `model` together; none where every rank holds all it needs."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # not in every build of torch
    from torch.distributed.tensor import DTensor

    modules, parameters = list(model.modules()), list(model.parameters())
    if any(isinstance(module, FSDPModule) for module in modules):
        meshes = (parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor))
        return next((mesh.get_all_groups() for mesh in meshes), [])
    partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)  # ZeRO-3's mark
    whole = not partitioned and not any(isinstance(module, FullyShardedDataParallel) for module in modules)
    return [] if whole else [distributed.group.WORLD]


def largest(count: int, groups: list, device: torch.device) -> int:
    """The largest `count` of all ranks in `groups`, which all have to ask; `count` itself where there are none."""
    if not groups:
        return count
    found = torch.tensor(count, dtype=torch.int64, device=device)
    for group in groups:
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
    return int(found)


__all__ = ["gathering_groups", "largest"]
