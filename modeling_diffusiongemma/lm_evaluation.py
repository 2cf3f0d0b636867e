"""The model as a model type of lm-eval (EleutherAI's evaluation harness, 0.4.13), called `diffusiongemma`.

    python -m modeling_diffusiongemma.lm_evaluation --tasks gsm8k --apply_chat_template \\
        --model diffusiongemma --model_args pretrained=FOLDER,max_denoising_steps=24 --batch_size 8
    ... --model_args pretrained=FOLDER,quantize=4bit,max_memory=0=20GB+cpu=12GB

or `import modeling_diffusiongemma.lm_evaluation`, then `lm_eval.simple_evaluate(model="diffusiongemma", ...)`. The command line
is lm-eval's own; its `lm-eval` never imports this file. `generate_until` is block diffusion. Log-likelihoods are the causal pass's,
exact, or with `mode=diffusion` the canvas pass's Monte-Carlo estimate (`training/score.py`).
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation.call.configuration import DiffusionGenerationConfig

from .checkpoints import default_checkpoint
from .console.placement import loading_arguments, memory, quantization_name, writable_folder
from .model.head import DiffusionGemmaForMaskedBlockLM
from .training.collator import BlockDiffusionCollator
from .training.score import MODES

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError('lm-eval is not installed; expected: pip install -e ".[lm-eval]" in a checkout of this project') from error

logger = logging.getLogger(__name__)
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # a task's names for the length of an answer


@register_model("diffusiongemma")
class DiffusionGemmaEvaluation(TemplateLM):
    """What lm-eval asks of a model. A request's result depends neither on its neighbours nor on the batch size, except for the
    Monte-Carlo estimates of `mode="diffusion"`.

    Args:
        pretrained: a folder or Hub repository, or a loaded `DiffusionGemmaForMaskedBlockLM`. Default: the shipped text checkpoint.
        tokenizer (*optional*): its name, or itself. Default: the checkpoint's.
        batch_size: rows a batch; `max_batch_size`, which lm-eval passes for its own search, must be unset or equal to it.
        device, dtype: of the model; default: cuda where there is one, and the checkpoint's. "auto" spreads it over all devices.
        quantize, max_memory, offload_folder: how it is loaded, as for `diffusiongemma generate`: `"fp8"` or `"4bit"`; `"12GB"`, or
            `"0=20GB,cpu=40GB"`, where `+` may stand for the comma that lm-eval's command line cuts at; and the name of a folder. With
            the last two `device` says which GPU is used beside the CPU.
        max_length: tokens of context and continuation; default: the config's `max_position_embeddings`. Longer contexts lose
            their beginning.
        max_gen_toks: tokens to generate where a task does not say (256: lm-eval).
        seed: request number i of a task is generated with seed + i.
        mode: `"autoregressive"` or `"diffusion"`, of log-likelihoods.
        samples: draws of a Monte-Carlo estimate.
        settings: fields of `DiffusionGenerationConfig`; a task's own go over them. Most tasks set `do_sample: false`, which takes
            each position's argmax; `--gen_kwargs do_sample=True` asks for the released sampling.
    """

    def __init__(
        self, pretrained=None, tokenizer=None, batch_size: int | str = 1, max_batch_size: int | str | None = None,
        device: str | None = None, dtype: str = "auto", max_length: int | None = None, max_gen_toks: int = 256, seed: int = 0,
        mode: str = "autoregressive", samples: int = 16, quantize: str | None = None, max_memory: str | None = None,
        offload_folder: str | None = None, **settings,
    ):  # fmt: skip
        super().__init__()
        self.batch_size = _integer("batch_size", batch_size)
        if max_batch_size not in (None, batch_size, self.batch_size):
            raise ValueError(f"`max_batch_size` is {max_batch_size!r}; expected None: batches are of `batch_size`, {self.batch_size}")
        if mode not in MODES:
            raise ValueError(f"`mode` is {mode!r}; expected one of {MODES}")
        self.max_gen_toks, self.mode, self.samples = _integer("max_gen_toks", max_gen_toks), mode, _integer("samples", samples)
        self.seed, self.settings = _integer("seed", seed, 0), settings
        DiffusionGenerationConfig(**settings)  # refuses what it does not know before anything is loaded
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"`dtype` is {dtype!r}; expected 'auto' or the name of a torch dtype")
        loading = {
            "quantize": _read("quantize", quantization_name, quantize), "max_memory": _read("max_memory", memory, max_memory),
            "offload_folder": _read("offload_folder", writable_folder, offload_folder),
        }  # fmt: skip
        if pretrained is None or isinstance(pretrained, str):
            pretrained = default_checkpoint() if pretrained is None else pretrained
            cuda = torch.cuda.is_available()
            if str(device).startswith("cuda") and not cuda:  # lm-eval's command line says cuda:0 where nobody said anything
                logger.warning("`device` is %s and there is no CUDA: the model is evaluated on the CPU", device)
                device = "cpu"
            self.model = AutoModelForCausalLM.from_pretrained(pretrained, **loading_arguments(device, dtype, **loading)).eval()
            tokenizer = pretrained if tokenizer is None else tokenizer
        elif given := {name: value for name, value in {"dtype": dtype, **loading}.items() if value not in (None, "auto")}:
            name, value = next(iter(given.items()))
            default = "'auto'" if name == "dtype" else None
            raise ValueError(f"`{name}` is {value!r}; expected {default}, since `pretrained` is a model and not its name")
        else:
            self.model = pretrained.eval() if device is None else pretrained.to(device).eval()
        if not isinstance(self.model, DiffusionGemmaForMaskedBlockLM):
            raise ValueError(f"`pretrained` is a {type(self.model).__name__}; expected a DiffusionGemma checkpoint or model")
        if tokenizer is None:
            raise ValueError("`tokenizer` is None; expected a tokenizer, since `pretrained` is a model and not its name")
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._device = self.model.device
        text_config = self.model.config.get_text_config()
        self.max_length = _integer("max_length", text_config.max_position_embeddings if max_length is None else max_length)
        self.pad_token_id = next(i for i in (self.tokenizer.pad_token_id, text_config.pad_token_id, 0) if i is not None)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning of a sequence."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids, with one beginning-of-sequence token in front unless `add_special_tokens` is False; a chat template has it already."""
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        return ids if add_special_tokens is False or begin is None or ids[:1] == [begin] else [begin, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut where their texts are. lm-eval moves every whitespace at the end of the context into the continuation, also
        the newline that a chat template ends with and no model is trained to write; here only where a token reaches across the cut."""
        begin, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(begin)] == begin:
            return begin, whole[len(begin) :]
        return super()._encode_pair(context, continuation)

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes cached requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of a task's `until`. Generation keyword arguments are `generate`'s, by lm-eval's names for
        the length (`max_gen_toks` and its aliases)."""
        calls = [(self.tok_encode(request.args[0]), self.seed + index, request.args) for index, request in enumerate(requests)]
        batches = Collator(calls, lambda call: -len(call[0]), lambda call: {"": json.dumps(call[2][1], sort_keys=True)}, "gen_kwargs")
        answers = []
        with tqdm(total=len(calls), desc="generate_until", disable=disable_tqdm) as bar:
            for batch in batches.get_batched(self.batch_size):  # longest first: memory runs out at once or never
                contexts, seeds, given = zip(*batch, strict=True)
                normal = normalize_gen_kwargs(given[0][1], self.max_gen_toks)  # equal in all of a batch
                length, until = normal["max_gen_toks"], list(filter(None, normal["until"]))  # '' separates nothing
                arguments = {name: value for name, value in given[0][1].items() if name not in ("until", *LENGTHS)}
                if until:
                    arguments |= {"stop_strings": until, "tokenizer": self.tokenizer}
                contexts = [self._fit(context, length, "`max_gen_toks`") for context in contexts]
                rows = self._sequences(contexts, list(seeds), **arguments, max_new_tokens=length)
                texts, stop = self.tokenizer.batch_decode(rows, skip_special_tokens=True), "|".join(map(re.escape, until))
                for args, text in zip(given, texts, strict=True):
                    answers.append(re.split(stop, text, maxsplit=1)[0] if until else text)
                    self.cache_hook.add_partial("generate_until", args, answers[-1])
                bar.update(len(batch))
        return batches.get_original(answers)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of `max_length` tokens, each token predicted once."""
        windows, totals = [], [0.0] * len(requests)
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            windows += [(index, (None, *make_disjoint_window(window))) for window in rolling]
        found = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm=disable_tqdm, greedy=False)
        for (index, _), (log_prob, _) in zip(windows, found, strict=True):
            totals[index] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, greedy: bool = True, **kwargs) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether greedy decoding (of the same mode) would write it.

        Args: `requests`: triples of the texts (context, continuation), or None, and the ids of both; `greedy`: False spares that answer.
        """
        what = "the length of a continuation"
        fitting = [(texts, self._fit(context, len(answer), what), answer) for texts, context, answer in requests]
        batches, found = Collator(fitting, lambda request: -len(request[1]) - len(request[2])), []
        with torch.random.fork_rng(), tqdm(total=len(fitting), desc=f"log-likelihood ({self.mode})", disable=disable_tqdm) as bar:
            torch.manual_seed(self.seed)
            for batch in batches.get_batched(self.batch_size):
                collated = BlockDiffusionCollator(pad_token_id=self.pad_token_id)([pair for _, *pair in batch])
                inputs = {name: tensor.to(self.device) for name, tensor in collated.items()}
                how = {"samples": self.samples, "canvas_length": self.settings.get("canvas_length")} if self.mode == "diffusion" else {}
                score = self.model.score(**inputs, mode=self.mode, **how)
                totals = (score.log_prob.double() * score.tokens).tolist()
                flags = [greedy and self._is_written(*pair) for _, *pair in batch] if score.greedy is None else score.greedy.tolist()
                for (texts, *_), *answer in zip(batch, totals, flags, strict=True):
                    found.append(tuple(answer))
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[-1])
                bar.update(len(batch))
        return batches.get_original(found)

    def _fit(self, context: list[int], length: int, what: str) -> list[int]:
        """The last tokens of a context that fit before `length` more, which the error calls `what`."""
        if not 0 < length < self.max_length:
            raise ValueError(f"{what} is {length}; expected 1 to {self.max_length - 1} (`max_length` - 1)")
        return context[-(self.max_length - length) :]

    def _is_written(self, context: list[int], continuation: list[int]) -> bool:
        """Whether block diffusion with `do_sample=False` writes this continuation."""
        written = self._sequences([context], None, do_sample=False, max_new_tokens=len(continuation), eos_token_id=[])
        return written[0] == continuation

    def _sequences(self, contexts: list[list[int]], seeds: list[int] | None, **settings) -> list[list[int]]:
        """The new tokens of each row."""
        longest, made = max(map(len, contexts)), {"dtype": torch.int64, "device": self.device}
        ids = torch.tensor([[self.pad_token_id] * (longest - len(context)) + context for context in contexts], **made)
        real = torch.tensor([[0] * (longest - len(context)) + [1] * len(context) for context in contexts], **made)
        given = {**self.settings, **settings, "return_dict_in_generate": True}
        output = self.model.generate(ids, attention_mask=real, seed=seeds, **given)
        if (copies := len(output.sequences) // len(contexts)) > 1:
            raise ValueError(f"`num_return_sequences` is {copies}; expected 1: a request has one answer")
        return [row[:length] for row, length in zip(output.sequences[:, longest:].tolist(), output.lengths.tolist(), strict=True)]


def _read(name: str, parse: Callable[[str], Any], value: str | None) -> Any:
    """What the console's option of this name would be."""
    try:
        return None if value is None else parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"`{name}`: {error}") from None


def _integer(name: str, value, smallest: int = 1) -> int:
    found = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(found, bool) or not isinstance(found, int) or found < smallest:
        raise ValueError(f"`{name}` is {value!r}; expected an integer >= {smallest}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """lm-eval's command line, with the model type registered."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *(sys.argv[1:] if arguments is None else arguments)]
    cli_evaluate()


if __name__ == "__main__":
    main()

__all__ = ["DiffusionGemmaEvaluation", "main"]
