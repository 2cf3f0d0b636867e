"""What a run must have in common with the checkpoint it goes on from, and which checkpoints are whole.

Trainer restores weights, optimizer, schedule, place in the data and random numbers, and warns where batches differ. Another canvas length
it does not notice, nor data of another length; and from a folder whose writing was interrupted it begins again at step 0, with weights
that have been trained, and says nothing. What is written here beside a checkpoint says what the run was.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

RECORD = "block_diffusion_run.json"  # in every checkpoint of a run
STATE = "trainer_state.json"  # what Trainer writes last
OPTIMIZERS = ("optimizer", "global_step")  # what the names of an optimizer's state begin with: Trainer's and FSDP's, DeepSpeed's
# Not the model's shape or objective: where it came from, which version wrote it, how it is computed here.
PASSED_OVER = {
    "transformers_version", "_name_or_path", "dtype", "architectures", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "auto_mapping", "runtime_config", "use_cache",
}  # fmt: skip


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested mappings as one, by dotted names; what is no JSON becomes text."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, each in value.items():
            if str(key) not in PASSED_OVER and not str(key).endswith("_implementation"):
                found |= flat(each, f"{name}.{key}")
        return found
    return {name: sorted(map(str, value)) if isinstance(value, set | frozenset) else json.loads(json.dumps(value, default=str))}


def record_of(model, args, examples: int | None) -> dict[str, Any]:
    """What a run is, by names: the model's config and objective, its adapters', and what decides which examples a step sees.

    Args:
        model: `DiffusionGemmaForMaskedBlockLM`, or a PEFT model around one.
        args: `transformers.TrainingArguments`.
        examples: how many the training data holds, where that is known.
    """
    found = flat(model.config.to_dict(), "config") | flat(asdict(model.objective), "objective")
    for name, adapter in getattr(model, "peft_config", {}).items():
        found |= flat(adapter.to_dict(), f"adapter {name}")
    return found | {
        "examples": examples, "seed": args.seed, "data_seed": args.data_seed, "batch size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps, "processes": args.world_size,
    }  # fmt: skip


def write_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """By one rename."""
    path = Path(folder, RECORD)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)


def read_json(path: Path) -> Any:
    """None where the file is not there, or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The last of a run's checkpoints in `folder` that was written to its end; None where there is none."""
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal()}
    return next((steps[step] for step in sorted(steps, reverse=True) if read_json(steps[step] / STATE) is not None), None)


def refuse_other(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Raises ValueError where the checkpoint in `folder` is not whole, or one of a run that is not `record`: names, and both values."""
    if read_json(Path(folder, STATE)) is None:
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, whose {STATE} is missing or not whole; expected a checkpoint that was written "
            "to its end: Trainer would begin at step 0"
        )
    if not any(found for begin in OPTIMIZERS for found in Path(folder).glob(f"{begin}*")):
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, which holds no optimizer's state, as `save_only_model` leaves it out; expected "
            "one that does: Trainer would go on with a new optimizer and schedule"
        )
    saved = read_json(Path(folder, RECORD))
    if saved is None:
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, which has no {RECORD}; expected a checkpoint of this class, which says what "
            "run it is of. transformers' own Trainer goes on from it without asking"
        )
    unlike = [name for name in sorted(saved.keys() | record) if saved.get(name, "absent") != record.get(name, "absent")]
    if unlike:
        told = "; ".join(f"`{name}` is {record.get(name, 'absent')!r}, and was {saved.get(name, 'absent')!r}" for name in unlike)
        raise ValueError(f"the run is not that of the checkpoint {str(folder)!r}: {told}. Expected the same run, or a new one")


__all__ = ["RECORD", "last_checkpoint", "record_of", "refuse_other", "write_record"]
