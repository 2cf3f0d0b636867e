"""A stacked weight whose matrices lie where a checkpoint has them, each in memory of its own.

`MatricesApart` has the shape, the dtype and the name that the stacked weight would have, and no memory of its own: matrices that are
views of a mapped file stay there, and are read when they are used. Taking an expert, copying it and saving it keep the matrices apart.
Whatever else reads it gets a stacked copy, made for the purpose, which is what is then written to; what would write into it itself is
refused, since the change would be lost with a copy.

Knows nothing of modules or files.
"""

import torch
from torch import nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten


class MatricesApart(torch.Tensor):
    """`(E, rows of all projections, K)`, of which each expert's rows are those of its matrices, one below the other.

    Args:
        experts: of each expert its matrices, plain tensors `(rows, K)` on the CPU; alike in shapes and dtype from expert to expert.
    """

    @staticmethod
    def __new__(cls, experts: list[list[torch.Tensor]], requires_grad: bool = False):
        if isinstance(experts, torch.Tensor):  # as Accelerate puts another parameter in the place of one, by its class
            return nn.Parameter(experts, requires_grad)
        first = experts[0]
        shape = (len(experts), sum(map(len, first)), first[0].shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=first[0].dtype, device="cpu")

    def __init__(self, experts: list[list[torch.Tensor]]):
        self.experts = experts

    def stacked(self) -> torch.Tensor:
        """A plain tensor of the same numbers."""
        output = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for place, matrices in zip(output, self.experts, strict=True):
            for rows, matrix in zip(place.split([len(matrix) for matrix in matrices]), matrices, strict=True):
                rows.copy_(matrix)
        return output

    def refuse(self, what: str) -> None:
        """ValueError: what needs memory of this tensor's own."""
        raise ValueError(f"{what} of a weight whose matrices are those of a checkpoint; expected `stack()` of its experts to come first")

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the first matrix: where storages are compared to find tied weights, it tells this one from any other."""
        return self.experts[0][0].untyped_storage()

    # Without memory of its own it cannot be given another's, be shared, or be read by its address.
    data = property(lambda self: self.detach(), lambda self, value: self.refuse("setting `data`"))

    def share_memory_(self):
        self.refuse("`share_memory_`")

    def data_ptr(self):
        self.refuse("`data_ptr`")

    def tolist(self):
        return self.stacked().tolist()

    def numpy(self, **kwargs):
        return self.stacked().numpy(**kwargs)

    def __dlpack__(self, **kwargs):
        return self.stacked().__dlpack__(**kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"MatricesApart({tuple(self.shape)}, dtype={self.dtype})"

    def __setitem__(self, index, value):
        self.refuse("setting items")

    def __deepcopy__(self, memo: dict):
        copied = self.clone()
        memo[id(self)] = copied = nn.Parameter(copied, requires_grad=False) if isinstance(self, nn.Parameter) else copied
        return copied

    def __reduce_ex__(self, protocol):
        """Pickled stacked: whoever loads it needs neither this class nor the checkpoint."""
        plain = self.stacked()
        return (nn.Parameter(plain, requires_grad=False) if isinstance(self, nn.Parameter) else plain).__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (aten.detach.default, aten.alias.default):
            return cls(args[0].experts)
        if function is aten.clone.default:
            return cls([[matrix.clone() for matrix in matrices] for matrices in args[0].experts])
        if function is aten.select.int and args[1] in (0, -3):
            matrices = [matrix.view(torch.uint8) for matrix in args[0].experts[args[2]]]  # torch joins bytes everywhere
            return torch.cat(matrices).view(args[0].dtype)
        given = [*args, *(kwargs or {}).values()]
        names = [argument.name for argument in function._schema.arguments[: len(args)]] + list(kwargs or {})
        writes = {argument.name for argument in function._schema.arguments if argument.alias_info and argument.alias_info.is_write}
        for name, value in zip(names, given, strict=True):
            if name in writes and isinstance(value, cls):
                value.refuse(f"`{function}`")
        args, kwargs = pytree.tree_map_only(cls, cls.stacked, (args, kwargs or {}))
        return function(*args, **kwargs)


def matrices_of(weight: torch.Tensor, expert: int) -> list[torch.Tensor]:
    """Of a stacked weight the matrices, one below the other, that one expert has: those of a checkpoint, or one."""
    return weight.experts[expert] if isinstance(weight, MatricesApart) else [weight[expert]]


__all__ = ["MatricesApart", "matrices_of"]
