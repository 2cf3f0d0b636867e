"""What a checkpoint's tensors say against being loaded as they are, by their names and headers: before a weight is read.

transformers' loading takes the last of two tensors of one name, casts whatever numbers a file holds, and drops what the model has no name
for. Each gives another model than the one that was saved, and nothing is raised.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightRenaming, rename_source_key

from .safetensors_files import StoredTensor, stored_tensors

PROMPT, CANVAS = "encoder.language_model.", "decoder."  # what names of the two passes' stacks hold
FLOATS = ("F64", "F32", "F16", "BF16", "F8_")  # what safetensors' words for them begin with
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


def check_state_dict(state_dict: dict[str, torch.Tensor]) -> None:
    """ValueError: see `second_stack`."""
    second_stack(state_dict, lambda one, other: state_dict[one] is state_dict[other] or torch.equal(state_dict[one], state_dict[other]))


def check_files(model: nn.Module, files: list[str], mapping: list, quantised: bool) -> None:
    """ValueError for safetensors files that hold a tensor twice, a second stack, or, unless the model is `quantised`, numbers that need
    a quantiser to be read. `mapping`: transformers', of names, with the caller's `key_mapping`."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    stored = {rename_source_key(name, renamings, [])[0]: entry for name, entry in stored_tensors(files).items()}

    def read(entry: StoredTensor) -> torch.Tensor:
        with safe_open(entry.file, "pt") as file:
            return file.get_tensor(entry.name)

    second_stack(stored, lambda one, other: torch.equal(read(stored[one]), read(stored[other])))
    if quantised:
        return
    state = model.state_dict()
    for name, entry in stored.items():
        if name not in state or not state[name].is_floating_point():
            continue
        scaled = next((name + end for end in SCALES if name + end in stored), None) if entry.dtype.startswith("F8_") else None
        if scaled is not None or not entry.dtype.startswith(FLOATS):
            what = f"{scaled} beside it" if scaled else f"{state[name].dtype} in the model"
            raise ValueError(f"{Path(entry.file).name} holds {name} as {entry.dtype}, with {what}, and the config names no quantisation; "
                             "expected floating-point weights, or the `quantization_config` that they were made with")  # fmt: skip


__all__ = ["check_files", "check_state_dict"]
