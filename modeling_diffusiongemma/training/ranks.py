"""What ranks that share one model's weights must agree on.

Where weights are sharded (FSDP2, FSDP, DeepSpeed's ZeRO-3), every pass gathers them from all ranks: a pass that one rank does and another
does not ends in a hang or an abort. So no number of passes may depend on a rank's own rows or random numbers; where it must, as in
generation, ranks that are finished do passes for those that are not (`in_step`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

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


def check_gathering(model: nn.Module) -> None:
    """Raises ValueError for losses of a model whose head and embedding FSDP2 gathers together, in a torch before 2.13: its hooks gather
    them for the first call of either, and not again before each was called, however often that is. A head called twice in a row, as here,
    then meets weights that were given back, in the middle of a backward pass."""
    if torch.__version__ >= (2, 13):  # torch compares versions, not strings
        return
    from torch.distributed.fsdp import FSDPModule

    together = (model.get_input_embeddings(), model.get_output_embeddings())
    states = [each._get_fsdp_state() for each in together if isinstance(each, FSDPModule)]
    if len(states) == 2 and states[0] is states[1]:
        raise ValueError(f"`torch` is {torch.__version__}; expected 2.13 or newer for losses of a model that FSDP2 shards")


def largest(count: int, groups: list, device: torch.device) -> int:
    """The largest `count` of all ranks in `groups`, which all have to ask; `count` itself where there are none."""
    if not groups:
        return count
    found = torch.tensor(count, dtype=torch.int64, device=device)
    for group in groups:
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
    return int(found)


def same_draws(model: nn.Module) -> None:
    """Gives ranks between which `model` is divided by tensor parallelism the random state of the first of them: they compute the same rows,
    and what they draw must be the same. Ranks that are not divided keep theirs."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return
    group = (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()
    device = torch.device(mesh.device_type)
    state = torch.get_rng_state().to(device)
    distributed.broadcast(state, distributed.get_global_rank(group, 0), group)
    torch.set_rng_state(state.cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state().to(device)
        distributed.broadcast(state, distributed.get_global_rank(group, 0), group)
        torch.cuda.set_rng_state(state.cpu())


def _check_gathered(stacks: Sequence[nn.Module], inside: set[nn.Module], groups: list) -> None:
    """What `stacks` hold beside the modules of their layers, `inside`, must be whole on every rank."""
    from torch.distributed.tensor import DTensor

    ranks = set(distributed.get_process_group_ranks(groups[0]))
    for stack in stacks:
        for name, module in stack.named_modules():
            for each, parameter in () if module in inside else module.named_parameters(recurse=False):
                # Weights that tensor parallelism divides stay so: their mesh has other ranks.
                if isinstance(parameter, DTensor) and ranks <= set(parameter.device_mesh.mesh.flatten().tolist()):
                    raise ValueError(
                        f"`{name}.{each}` is sharded by FSDP2 and not gathered for `generate`; expected a call of "
                        "`torch.distributed.fsdp.register_fsdp_forward_method(model, 'generate')` after `fully_shard(model)`, and "
                        "`reshard_after_forward=False` for what is sharded beside the layers"
                    )


@contextlib.contextmanager
def in_step(model: nn.Module, stacks: Sequence[nn.Module], one_pass: Callable[[], object]) -> Iterator[None]:
    """A context in which a pass through one of `stacks` waits until every rank does one. At its end this rank does `one_pass` after the
    other until all ranks have come to theirs, whatever was raised here. Ranks of tensor parallelism, which do the same passes anyway, draw
    the same from here on (`same_draws`). Without either nothing happens.

    What FSDP2 shards beside the layers is gathered once, at the beginning: what lies between two passes then gathers nothing, and passes
    of all kinds gather the same.

    Args:
        stacks: modules with `layers`, through which their calls run in order.
        one_pass: a small pass through embedding, one of them and head.

    Raises:
        ValueError: weights beside the layers that are not gathered, or are given back after every use.
    """
    same_draws(model)
    groups = gathering_groups(model)
    if not groups:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    inside = {module for stack in stacks for layer in stack.layers for module in layer.modules()}
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    units, sharded = [unit for unit in units if unit is not model and unit not in inside], bool(units)
    if not sharded:  # by FSDP or ZeRO-3, whose units are others
        yield
        return

    def wait(*_) -> None:
        _check_gathered(stacks, inside, groups)
        largest(1, groups, next(model.parameters()).device)

    for unit in units:
        unit.unshard()
    _check_gathered(stacks, inside, groups)
    hooks = [stack.register_forward_pre_hook(wait) for stack in stacks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while largest(0, groups, next(model.parameters()).device):
            one_pass()
        one_pass()  # a unit gives nothing back before all of its modules have run
        for unit in units:
            unit.reshard()


__all__ = ["check_gathering", "gathering_groups", "in_step", "largest", "same_draws"]
