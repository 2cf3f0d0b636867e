"""What a checkpoint's tensors say against being loaded as they are, by their names and headers: before a weight is read.

transformers' loading takes the last of two tensors of one name, casts whatever numbers a file holds, and drops what the model has no name
for. Each gives another model than the one that was saved, and nothing is raised.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_utils import load_state_dict

from .safetensors_files import StoredTensor, stored_tensors

PROMPT, CANVAS = "encoder.language_model.", "decoder."  # what names of the two passes' stacks hold
FLOATS = ("F64", "F32", "F16", "BF16", "F8_")  # what safetensors' words for them begin with
WORDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # fmt: skip
SCALES = ("_scale", "_scale_inv")  # ends of names beside FP8 weights, which mean nothing without them


def second_stack(names, equal: Callable[[str, str], bool]) -> None:
    """ValueError where `names` hold a stack of the prompt pass that is not the canvas pass's: in transformers' class two stacks can be
    two models. `equal` compares the tensors of two names."""
    found = {name: name.replace(PROMPT, CANVAS, 1) for name in names if PROMPT in name and not name.endswith("layer_scalar")}
    for name, original in sorted(found.items()):
        if original not in names:
            mapping = r'`key_mapping={r"encoder\.language_model\.(?!layers\.\d+\.layer_scalar)": "decoder."}`'
            raise ValueError(f"the checkpoint holds {name} and no {original}; expected the second, or {mapping}")
        if not equal(name, original):
            raise ValueError(
                f"the checkpoint holds a second stack for the prompt pass: {name} is not {original}; expected one stack, which both passes "
                "share"
            )


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors may be one; at once for one memory."""
    without_numbers = first.is_meta or second.is_meta
    return first.shape == second.shape if without_numbers else torch.equal(first, second)


def second_stack_in(state_dict: Mapping[str, torch.Tensor]) -> None:
    """ValueError: see `second_stack`."""
    second_stack(state_dict, lambda one, other: equal(state_dict[one], state_dict[other]))


def second_head_in(state_dict: Mapping[str, torch.Tensor], head: str, embedding: str, weight: torch.Tensor) -> None:
    """ValueError where a state dict holds two weights for a model whose head and embedding are one, `weight`: the last would count for
    both. What is that weight itself, as accelerate fills a state dict up, is no second one."""
    given = [state_dict[name] for name in (head, embedding) if name in state_dict]
    given = [each for each in given if each.data_ptr() != weight.data_ptr()]
    if len(given) == 2 and not equal(*given):
        raise ValueError(
            f"{head} is not {embedding}, and the model holds one weight for both; expected two that are equal, or a model with "
            "`tie_word_embeddings=False` in its config"
        )


def check_numbers(model: nn.Module, dtypes: Mapping[str, tuple[str, str]]) -> None:
    """ValueError for numbers that need a quantiser to be read. `dtypes`: of each name what holds it, and safetensors' word for it."""
    state = model.state_dict()
    for name, (where, dtype) in dtypes.items():
        if name not in state or not state[name].is_floating_point():
            continue
        scaled = next((name + end for end in SCALES if name + end in dtypes), None) if dtype.startswith("F8_") else None
        if scaled is not None or not dtype.startswith(FLOATS):
            what = f"{scaled} beside it" if scaled else f"{state[name].dtype} in the model"
            raise ValueError(f"{where} holds {name} as {dtype}, with {what}, and the config names no quantisation; "
                             "expected floating-point weights, or the `quantization_config` that they were made with")  # fmt: skip


def renamed(names: Iterable[str], mapping: list) -> dict[str, str]:
    """Each name as `mapping` has it (transformers', with the caller's `key_mapping`), to the name that is stored."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: name for name in names}


def check_unread(held: Iterable[str], missing: Collection[str], unread: Iterable[str]) -> None:
    """ValueError where a checkpoint's tensors that nothing reads are what the model lacks, under other names or in another form, or scales
    of what is read without them: it would be made of random numbers, or of wrong ones, and only a log would say so.

    Args: names of what the model holds, of what the checkpoint has none for, and of what it has beyond the model.
    """
    held = set(held)
    expected = "expected the model's own names, which `key_mapping` gives them, or the `quantization_config` that reads them"
    for name in sorted(unread):
        scaled = next((name.removesuffix(end) for end in SCALES if name.endswith(end)), None)
        if scaled in held:
            raise ValueError(f"the checkpoint holds {name}, which nothing reads, so that {scaled} would go without its scale; {expected}")
        place = name.rpartition(".")[0]
        for lost in missing:
            if name.endswith(f".{lost}") or place == lost.rpartition(".")[0]:
                raise ValueError(f"the checkpoint lacks {lost}, and nothing reads {name}; {expected}")


def check_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor], mapping: list, quantised: bool, where: str) -> None:
    """As `check_files`, for tensors that are there; `where` names what holds them."""
    tensors = {name: state_dict[given] for name, given in renamed(state_dict, mapping).items()}
    second_stack_in(tensors)
    if not quantised:
        check_numbers(model, {name: (where, WORDS.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors.items()})


def check_pickled(model: nn.Module, files: list[str], mapping: list, quantised: bool, weights_only: bool) -> None:
    """As `check_files`, for torch's files (`pytorch_model.bin`), whose tensors are mapped and not read, but for old ones.

    Raises:
        OSError: a file that is none, or not whole.
    """
    found: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            tensors = load_state_dict(path, weights_only=weights_only)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise OSError(f"cannot load {path}: {error}") from error
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{path} and another file both hold {twice[0]}; expected every tensor once")
        found |= tensors
    check_state_dict(model, found, mapping, quantised, Path(files[0]).name)


def check_files(model: nn.Module, files: list[str], mapping: list, quantised: bool) -> None:
    """ValueError for safetensors files that hold a tensor twice, a second stack, or, unless the model is `quantised`, numbers that need
    a quantiser to be read. `mapping`: as in `renamed`."""
    found = stored_tensors(files)
    stored = {name: found[given] for name, given in renamed(found, mapping).items()}

    def read(entry: StoredTensor) -> torch.Tensor:
        with safe_open(entry.file, "pt") as file:
            return file.get_tensor(entry.name)

    second_stack(stored, lambda one, other: torch.equal(read(stored[one]), read(stored[other])))
    if not quantised:
        check_numbers(model, {name: (Path(entry.file).name, entry.dtype) for name, entry in stored.items()})


__all__ = ["check_files", "check_pickled", "check_state_dict", "check_unread", "second_head_in", "second_stack_in"]
