"""A loaded checkpoint as the console's commands use it."""

import argparse
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from generation.arguments import ARGUMENTS
from generation.call.configuration import DIFFUSION_FIELDS, PRESETS, DiffusionGenerationConfig
from generation.call.settings import resolve_config
from generation.constraints.languages import ToolCalls
from generation.watch.watcher import Watcher

from .arguments import MODEL_TYPE, UsageError
from .placement import loading_arguments
from .tools import check_told, read_answer
from .watch import Watch


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """`--preset`, `--max-new-tokens` and `--set` as arguments of `generate`, refused here if they cannot be honoured."""
    given = dict(args.settings)
    if len(given) < len(args.settings):
        names = [name for name, _ in args.settings]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"`--set {twice}=...` is given twice; expected each setting once")
    if args.max_new_tokens is not None:
        if "max_new_tokens" in given:
            raise UsageError("`--max-new-tokens` and `--set max_new_tokens=...` are both given; expected one")
        given["max_new_tokens"] = args.max_new_tokens
    if "return_dict_in_generate" in given:
        raise UsageError("`--set return_dict_in_generate=...` is given; expected it unset: `--json` says what the console prints")
    if "constraint" in given:
        raise UsageError(
            "`--set constraint=...` is given; expected it unset: `generate` and `fill` take `--regex`, `--choices` and `--schema`"
        )
    fields = DiffusionGenerationConfig().__dict__
    for name, value in given.items():  # of `generate` itself None is as good as no argument, of whatever name
        if name not in fields and (name in ARGUMENTS or value is None):
            flag = "`--seed`" if name == "seed" else "a field of DiffusionGenerationConfig"
            raise UsageError(f"`--set {name}=...` is no setting of generation; expected {flag}")
    settings = {**({} if args.preset is None else DIFFUSION_FIELDS | PRESETS[args.preset]), **given}
    try:
        resolve_config(None, DiffusionGenerationConfig(), dict(settings))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return settings


def read_config(path: str):
    """The config of a checkpoint, which must be of this model."""
    config = AutoConfig.from_pretrained(path)
    if config.model_type != MODEL_TYPE:
        raise UsageError(f"`--model` is {path!r} with `model_type` {config.model_type!r}; expected {MODEL_TYPE!r}")
    return config


def load_tokenizer(path: str):
    return AutoTokenizer.from_pretrained(path, padding_side="left")


def load_model(path: str, **arguments):
    """The model in evaluation mode; `arguments` are those of `from_pretrained`."""
    read_config(path)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, **arguments).eval()


def adapted(model, folder: str):
    """The model with a PEFT adapter in its layers, unmerged: quantised weights can have one too."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).get_base_model().eval()


def refuse_copies(settings: Mapping[str, Any], why: str) -> None:
    """UsageError where `settings` ask for several answers to a prompt."""
    if (settings.get("num_return_sequences") or 1) > 1:
        raise UsageError(f"`num_return_sequences` is above 1; expected 1: {why}")


def prompt_of(args: argparse.Namespace) -> str | list[dict[str, str]] | None:
    """The prompt of a command that has one: a chat, with `--raw` the text itself; None where none is given."""
    return args.prompt if args.raw or args.prompt is None else [{"role": "user", "content": args.prompt}]


class Session:
    """A model, its tokenizer and how it is to generate, as `generation_settings` says it.

    `seed`: the one given, or one drawn here, so that every answer can be had again.
    """

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any]):
        self.settings = settings
        self.seed = secrets.randbelow(2**31) if args.seed is None else args.seed
        self.tokenizer = load_tokenizer(args.model.path)
        loading = {name: getattr(args, name) for name in ("device", "dtype", "quantize", "max_memory", "offload_folder")}
        self.model = load_model(args.model.path, **loading_arguments(**loading))
        if args.adapter is not None:
            self.model = adapted(self.model, args.adapter)

    def watch(self, draw: bool = True, on_text: Callable[[str], None] | None = None) -> Watch:
        """A streamer of one answer, drawn up to its end."""
        ends = self.settings.get("eos_token_id", self.model.generation_config.eos_token_id)
        stop_ids = [*([ends] if isinstance(ends, int) else ends or []), self.tokenizer.pad_token_id]
        return Watch(self.tokenizer, [token for token in stop_ids if token is not None], draw, on_text)

    def encode(self, prompts: Sequence[str | list[dict[str, str]]], tools: Sequence[dict] | None = None) -> dict[str, torch.Tensor]:
        """Chats by the checkpoint's chat template, with `tools` where there are any, strings as they are: ids and mask (B, P), padded on
        the left."""
        form = {"return_tensors": "pt", "padding": True}
        if isinstance(prompts[0], str):
            batch = self.tokenizer(list(prompts), **form)
        elif self.tokenizer.chat_template is None:
            raise UsageError("the checkpoint has no chat template; expected one, or `generate --raw`")
        else:
            if tools is not None:
                check_told(self.tokenizer)
            try:
                asked = {"tools": tools, "add_generation_prompt": True, "return_dict": True}
                batch = self.tokenizer.apply_chat_template(list(prompts), **asked, **form)
            except Exception as error:  # jinja2's errors have no base class that is a ValueError
                raise ValueError(f"the checkpoint's chat template refuses the chat: {error}") from error
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def answer(
        self, prompts: Sequence[str | list[dict[str, str]]], streamer: BaseStreamer | None = None, constraint=None,
        watcher: Watcher | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Generates; `num_return_sequences` answers a prompt, those of the first prompt first. `constraint`: of every one, and prompts tell
        of the tools that it is of; `watcher`: is told of every step."""
        tools = constraint.tools if isinstance(constraint, ToolCalls) else None
        inputs = self.encode(prompts, tools)
        asked = {**inputs, **self.settings, "streamer": streamer, "watcher": watcher, "tokenizer": self.tokenizer}
        asked |= {"return_dict_in_generate": True} | ({} if constraint is None else {"constraint": constraint})
        if self.settings.get("backend") == "reference":  # it draws from torch's global generator, as transformers does
            torch.manual_seed(self.seed)
        else:
            asked["seed"] = self.seed
        output = self.model.generate(**asked)
        copies = len(output.sequences) // len(prompts)
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            {
                **({"text": self.tokenizer.decode(ids[:count], skip_special_tokens=True)} if tools is None
                   else read_answer(self.tokenizer, ids[:count])),
                "prompt_tokens": int(inputs["attention_mask"][index // copies].sum()), "tokens": count,
                "denoising_steps": int(output.denoising_steps[index]), "tokens_per_forward": float(output.tokens_per_forward[index]),
                "finish_reason": output.finish_reasons[index], "seed": self.seed,
            }
            for index, (ids, count) in enumerate(zip(new, output.lengths.tolist(), strict=True))
        ]  # fmt: skip


__all__ = ["Session", "generation_settings", "load_model", "load_tokenizer", "prompt_of", "read_config", "refuse_copies"]
