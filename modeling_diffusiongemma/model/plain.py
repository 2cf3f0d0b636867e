"""The head and the embedding as they are: whether each is still the plain matrix it was built as, and the soft embedding where not.

What walks the vocabulary in pieces reads weights and calls no module, so it would walk past whatever a user attached to one: a bias,
a hook, another `forward`, a parametrisation, a wrapper, an adapter. `why_not_plain` is the one question that decides, asked once a call
of `generate` and answered from the modules (tests/test_head_as_it_is.py).

The hooks by which Accelerate brings offloaded weights in are known here, and the weights are brought in. Hooks on the embedding see
token ids alone, as in transformers' model; what changes its rows (adapters, parametrisations, wrappers) changes soft embeddings too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import getattr_static
from types import FunctionType, MethodType

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.modules import module as hooks_of_all_modules
from transformers.utils import logging

from generation.call.plan import mixes_adapters

from ..layers.layers import ScaledEmbedding
from .divided import divided_mean, is_divided

logger = logging.get_logger(__name__)
FORWARDS = {kind: kind.forward for kind in (nn.Linear, ScaledEmbedding)}  # before anybody replaces one
COMPILED = "_torchdynamo_orig_callable"  # an attribute of what torch.compile makes of a function
BRINGING = ("AlignDevicesHook", "CpuOffload")  # Accelerate's hooks that move weights and leave values as they are
OURS = {name.split(".")[0] for name in (__name__, mixes_adapters.__module__)}
# Whose functions around a module change no value but for its rounding, or say themselves that a call which they wait for never came.
AROUND = {"torch", "accelerate", "nnsight", "wandb"}
# Whose modules are the same computation at every call, and in every piece of a prompt.
PURE = OURS | {"torch", "accelerate", "transformers", "peft", "bitsandbytes", "torchao", "compressed_tensors", "optimum"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS = 2**16  # of an embedding that are asked for at a time: 369 MB in bfloat16 at 2,816 numbers each


def _bringing_hooks(module: nn.Module) -> list | None:
    """Accelerate's hooks of a module; None where one of them may do more than bring weights in."""
    hook = getattr(module, "_hf_hook", None)
    found = [] if hook is None else list(getattr(hook, "hooks", (hook,)))
    return found if all(type(each).__name__ in BRINGING for each in found) else None


def why_not_plain(module: nn.Module, kind: type[nn.Linear] | type[ScaledEmbedding]) -> str | None:
    """What makes a module that was built as a `kind` more than a product with, or a look into, its `weight`; None where nothing does."""
    if not isinstance(module, kind) or type(module).__call__ is not nn.Module.__call__:
        return f"is a {type(module).__module__}.{type(module).__qualname__}"
    weight = module._parameters.get("weight")
    if weight is None or type(weight) not in (nn.Parameter, torch.Tensor) or weight.layout != torch.strided or weight.dtype not in DTYPES:
        return "holds no plain weight"
    forward = module.forward
    if hasattr(module, "_hf_hook") and getattr(forward, "__wrapped__", None) == vars(module).get("_old_forward"):
        forward = module._old_forward  # which Accelerate's runs
    traced = type(forward).__module__.startswith("nnsight.")
    if traced and kind is ScaledEmbedding:  # it is shown what a call gives, as a hook is
        forward = MethodType(getattr(getattr(forward, "state", None), "original", forward), module)
    given = getattr(forward, "__func__", None) is not FORWARDS[kind] or forward.__self__ is not module
    if given or _bringing_hooks(module) is None:
        return "is traced by nnsight" if traced else "has another `forward`"
    if kind is ScaledEmbedding:
        whole = tuple(weight.shape) == (module.num_embeddings, module.embedding_dim)
        return "has a `max_norm`" if module.max_norm is not None else None if whole else "holds a part of its rows"
    if module.bias is not None:
        return "has a bias"
    return "has hooks" if has_hooks(module, gathering=False) else None


def has_hooks(module: nn.Module, gathering: bool = True) -> bool:
    """Whether a hook is called when `module` itself is; those by which FSDP2 gathers weights count if `gathering`."""
    if hooks_of_all_modules._global_forward_hooks or hooks_of_all_modules._global_forward_pre_hooks:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(gathering or not str(getattr(hook, "__module__", None)).startswith("torch.distributed.fsdp.") for hook in hooks)


def looked_into(module: nn.Module) -> str | None:
    """What there is, inside of a module, that wants to be called as often as it is, and with whole inputs: hooks; or a `forward` that comes
    from no library of modules, which may keep or count what it sees. None where there is nothing."""
    for name, each in module.named_modules():
        if has_hooks(each):
            return "hooks look on"
        given = vars(each).get("_old_forward", vars(each).get("forward", getattr_static(type(each), "forward", None)))
        if packages := made_by(getattr(given, COMPILED, given)) - PURE:
            return f"`{name or type(each).__name__}` has a `forward` of {', '.join(sorted(packages))}"
    return None


def attached(module: nn.Module) -> str | None:
    """What a user attached to a module that only its call would run: hooks, those for gradients where there are gradients, or another
    `forward`, of the module or its class. Those of libraries around modules (FSDP, compiled forms, Accelerate, nnsight) do not count:
    `passed_by` says which there are."""
    if any(map(_user_made, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
        return "a forward hook"
    if torch.is_grad_enabled() and any(map(_user_made, (*module._backward_hooks.values(), *module._backward_pre_hooks.values()))):
        return "a backward hook"
    if _user_made(type(module).forward):
        return f"the `forward` of {type(module).__module__}.{type(module).__qualname__}"
    given = vars(module).get("_old_forward", vars(module).get("forward"))
    given = getattr(given, COMPILED, given)  # torch.compile gives it the name of what it compiled
    as_built = given is None or getattr(given, "__func__", None) is type(module).forward
    return "a `forward` of its own" if not as_built and (_user_made(given) or not made_by(given) & AROUND) else None


def check_called(caller: str, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where something is attached to one of `modules`, by name, none of which `caller` calls. Hooks on all modules there
    are see every other one, and a line says so."""
    of_all = (*hooks_of_all_modules._global_forward_hooks.values(), *hooks_of_all_modules._global_forward_pre_hooks.values())
    if modules and any(map(_user_made, of_all)):
        unseen = " and ".join(f"`{name}`" for name in modules)
        logger.warning_once(f"A hook on all modules does not see {unseen}: {caller} calls what is inside, where it sees everything.")
    for name, module in modules.items():
        if (what := attached(module)) is not None:
            called = "`decoder`, its layers and, for the prompt pass, `encoder.language_model.layers`"
            raise ValueError(f"`{name}` has {what}, and {caller} does not call it; expected hooks and the like on {called}")


def passed_by(module: nn.Module) -> str | None:
    """Which library's form of a module's call counts only where somebody calls it, and what to do instead; None where there is none."""
    compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
    if compiled or hasattr(vars(module).get("forward"), COMPILED):
        return "compiled by torch; expected `compile_config=CompileConfig()` as an argument of `generate`"
    if "_original_forward" in vars(module):
        return "in Accelerate's mixed precision; expected `with accelerator.autocast():` around `generate`"
    return None


def _user_made(function: Callable) -> bool:
    return bool(made_by(function) - PURE - AROUND)


def made_by(function: Callable | None) -> set[str]:
    """The packages that made a function, or an object that is called as one, and all that it says it stands around."""
    if function is None:
        return set()
    found = made_by(getattr(function, "__wrapped__", None))
    if isinstance(function, partial):
        return found | made_by(function.func)
    plain = getattr(function, "__func__", function)
    names = [getattr(plain, "__globals__", {}).get("__name__"), getattr(plain, "__module__", None)]
    if not isinstance(plain, FunctionType):  # which may carry the names of a function
        names.append(type(plain).__module__)
    return found | {name.split(".")[0] for name in names if name} - {"builtins"}


def runs_on(module: nn.Module) -> torch.device:
    """Where a plain module's product is computed: where its weight lies, or where Accelerate brings it."""
    devices = (getattr(each, "execution_device", None) for each in _bringing_hooks(module) or ())
    return next((torch.device(device) for device in devices if device is not None), module.weight.device)


@contextlib.contextmanager
def brought_in(module: nn.Module) -> Iterator[torch.Tensor]:
    """The weight of a plain module; an offloaded one is there for the length of the block."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield module.weight
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def expected_embedding(embedding: nn.Module, probabilities: torch.Tensor) -> torch.Tensor:
    """The mean of the embedding's rows under `probabilities` `(B, C, V)`: `(B, C, D)` in the embedding's dtype.

    A plain embedding is one product with its weight. Any other is asked for the rows of all ids, a piece at a time, so that whatever
    makes them is seen, and takes its gradient.
    """
    if why_not_plain(embedding, ScaledEmbedding) is None:
        with brought_in(embedding) as weight:
            return embedding.expect(probabilities.to(weight.device)).to(probabilities.device)
    if is_divided(embedding):
        return divided_mean(embedding, probabilities)
    total = None
    copies = len(probabilities) if mixes_adapters(embedding) else 1  # each row of the batch has rows of its own then
    ids = torch.arange(probabilities.shape[-1], dtype=torch.int64, device=probabilities.device)
    for piece, weights in zip(ids.split(ROWS), probabilities.split(ROWS, dim=-1), strict=True):
        rows = embedding(piece.expand(copies, -1))  # (1 or B, W, D)
        mean = torch.matmul(weights.to(rows), rows if copies > 1 else rows[0])
        total = mean if total is None else total + mean
    return total.to(probabilities.device)


def conditioning(
    soft_embed: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, rows: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Soft embeddings `(B, C, D)` of self-conditioning logits `(B, C, V)`, or `(C, V)` for each of `rows`; zero where `mask` bool `(B,)` is
    False."""
    soft_embeds = soft_embed(logits if logits.dim() == 3 else logits[None]).expand(rows, -1, -1)
    return soft_embeds if mask is None else soft_embeds * mask.to(soft_embeds)[:, None, None]


__all__ = [
    "attached", "brought_in", "check_called", "conditioning", "expected_embedding", "has_hooks", "looked_into", "made_by", "passed_by",
    "runs_on", "why_not_plain",
]  # fmt: skip
