"""The contract of a model that generates: what it must have, what it may offer, and the one check of both.

Generation by block diffusion is autoregressive over canvases: `prefill` the prompt, `denoise` a canvas over it step by step, commit it (a
causal pass over it, `prefill` again), denoise the next. Nothing in `generation` knows how a model works inside, and nothing of it is
touched that does not stand here. Positional arguments are passed by place, keyword arguments by the names they have here; what has no
default is always passed.

Two things are only looked at. Methods of transformers' `GenerationMixin` are not called here, so they must be transformers' own.
`peft_config`, which peft gives to a `torch.nn.Module`, has the hooks of its `modules()` asked whether each row of a batch has an adapter of
its own.

B: rows, P: new tokens, L: cached tokens, C: positions of a canvas, D: hidden size, V: ids of the vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from transformers import Cache, CompileConfig, GenerationConfig, GenerationMixin

from .vocabulary.walk import VocabularyHead


class TextConfig(Protocol):
    """Of the text model, a `PreTrainedConfig` of transformers, whose caches are made from it: they read `per_layer_config`, and
    `layer_types` and `sliding_window` where there are any."""

    vocab_size: int
    hidden_size: int


class CanvasConfig(Protocol):
    """`canvas_length`: C, where a call asks for none. An `image_token_id`, where it has one, is what stands for images in a prompt."""

    canvas_length: int

    def get_text_config(self) -> TextConfig: ...


class PassOutput(Protocol):
    """What a pass returns, with hidden states as `compute_logits` takes them."""

    last_hidden_state: torch.Tensor


class GeneratesCanvases(Protocol):
    """What a model must have. `generation_config`: its defaults, or None. `dtype`: in which `soft_embed` takes its logits."""

    config: CanvasConfig
    generation_config: GenerationConfig | None
    dtype: torch.dtype

    def prefill(
        self, *, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor, position_ids: torch.Tensor, cache: Cache,
        inputs_embeds: torch.Tensor | None = None, last_states: int | None = None, **images: torch.Tensor,
    ) -> PassOutput:  # fmt: skip
        """Runs new tokens causally and appends them to the cache: the prompt, and with a finished canvas as input the commit.

        Args:
            input_ids (`int64 (B, P)`): the tokens, or `inputs_embeds` (`(B, P, D)`) instead, as the caller of `generate` gave them.
            attention_mask (`bool (B, L + P)`): True at real tokens, cached ones included; padding is on the left.
            position_ids (`int64 (B or 1, P)`): each row's real tokens counted from 0.
            cache: to read and to append to; made from `config.get_text_config()`, or the caller's.
            last_states: nothing is read of `last_hidden_state` but so many last tokens; None: all are.
            images: `pixel_values`, `image_position_ids` and `mm_token_type_ids`, each where the caller gave it.

        Returns:
            `last_hidden_state` `(B, P or last_states, D)`; soft embeddings begin as zeros of its last size and dtype.

        Raises:
            ValueError: ids, images or a cache that do not fit the model, by name.
        """

    def prepare_canvas(
        self, cache: Cache, canvas_shape: tuple[int, int], attention_mask: torch.Tensor, position_ids: torch.Tensor, /, *, slots: int
    ) -> Any:
        """What all steps of one canvas share, handed to `denoise` as `view`, until something is appended to the cache.

        Args:
            canvas_shape: (B, C).
            attention_mask (`bool (B, L + C)`): True at real tokens, cached ones included.
            position_ids (`int64 (B or 1, C)`): on from each row's real tokens.
            slots: at least so many slots for cached tokens, those not filled being masked; 0: as many as there are tokens. With the length
                that the cache will reach, the views of all canvases have equal shapes, which a recorded step needs.

        Returns:
            The view. One that a recorded step can take is a structure of tensors, numbers and strings (tuples, named tuples, dicts).
        """

    def denoise(self, canvas_ids: torch.Tensor, /, *, soft_embeds: torch.Tensor, view: Any) -> PassOutput:
        """Runs a canvas `int64 (B, C)` bidirectionally over itself and the cache behind `view`, to which nothing is appended.

        Args:
            soft_embeds (`(B, C, D)`): of the step before, from `soft_embed` or the walk; zeros at the first step.

        Returns:
            `last_hidden_state` `(B, C, D)`.
        """

    def compute_logits(self, hidden_states: torch.Tensor, /) -> torch.Tensor:
        """Logits, float32 `(B, n, V)`, of hidden states `(B, n, D)`."""

    def soft_embed(self, logits: torch.Tensor, /) -> torch.Tensor:
        """The expected embedding `(B, C, D)` under softmax(logits) `(B, C, V)`: the self-conditioning of the next step."""


class WalksVocabulary(Protocol):
    """May be offered by a model whose head and embedding are matrices: denoising steps then make no tensor of `(B, C, V)`."""

    def why_dense(self, device: torch.device, /) -> str | None:
        """What keeps this model, as it is now, from being walked on `device`; None where nothing does. Asked once a call."""

    def vocabulary_head(self) -> AbstractContextManager[VocabularyHead]:
        """A context in which head and embedding are there as matrices. Entered at every step."""


class RecordsSteps(Protocol):
    """May be offered by a model whose canvas pass cannot always be recorded and replayed as a CUDA graph; without it, it can."""

    def why_not_recorded(self) -> str | None:
        """What keeps the pass, as it is now, from being recorded, such as weights that are moved; None where nothing does."""


class Compiles(Protocol):
    """May be offered: `compile_config` is refused without it."""

    def compiling(self, compile_config: CompileConfig, /) -> AbstractContextManager:
        """A context in which both passes run compiled.

        Raises:
            ValueError: settings that torch does not know.
        """


class RoundsAsReference(Protocol):
    """May be offered by a model that rounds otherwise than the one whose tokens `backend="reference"` promises."""

    def reference_arithmetic(self) -> AbstractContextManager:
        """A context in which it rounds as that one does."""


class ChecksPrompts(Protocol):
    """May be offered: what `prefill` would raise then comes before anything is drawn, streamed or cached."""

    def check_prompt(
        self, *, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor, cache: Cache | None,
        inputs_embeds: torch.Tensor | None = None, **images: torch.Tensor,
    ) -> None:  # fmt: skip
        """Changes nothing. Arguments as those of `prefill`, and no cache where none is given.

        Raises:
            ValueError: as `prefill`.
        """


class EmbedsTokens(Protocol):
    """May be offered: a `constraint` gets what it returns, to make soft embeddings of its own."""

    def get_input_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What gives ids int64 `(B, C)` their embeddings `(B, C, D)`."""


class SharesWeights(Protocol):
    """May be offered by a model of whose weights each of several processes may hold a share: a pass of one is then a pass of all."""

    def in_step(self) -> AbstractContextManager:
        """A context around the whole of `generate`, in which a pass waits until every process does one; at its end, whatever was raised,
        this process does passes until the others have come to theirs."""


OFFERS = (WalksVocabulary, RecordsSteps, Compiles, RoundsAsReference, ChecksPrompts, EmbedsTokens, SharesWeights)


def passes_in_step(model: Any) -> AbstractContextManager:
    """The model's `in_step`, where it has one."""
    return model.in_step() if hasattr(model, "in_step") else nullcontext()


# What transformers' `generate` is made of. The mixin has these three of its own.
NOT_CALLED = frozenset(name for name, member in vars(GenerationMixin).items() if inspect.isfunction(member) and name[:2] != "__") - {
    "adjust_generation_fn", "compute_transition_scores", "generate"
}  # fmt: skip


def check_contract(model: Any, images: Sequence[str] = ()) -> None:
    """Checks that `model` can be called as it will be, and nothing of what it computes. Methods are looked up on the model, since any may
    have been replaced on it alone; that takes a fraction of a millisecond a call of `generate`.

    Args: `images`: names of the images' arguments that are passed on.

    Raises:
        ValueError: an attribute or a method is missing, one takes other arguments, or one of several is offered without the others; by
            name. Or a method of transformers' `generate`, or one of the model's `not_called`, is overridden, which nothing would call.
    """
    _check_overrides(model)
    wrong = list(_misfits(model, GeneratesCanvases, images))
    if hasattr(model, "config"):
        wrong += [f"{each} in `config`" for each in _misfits(model.config, CanvasConfig)]
        if callable(getattr(model.config, "get_text_config", None)):
            wrong += [f"{each} in `config.get_text_config()`" for each in _misfits(model.config.get_text_config(), TextConfig)]
    for offer in OFFERS:
        if any(hasattr(model, name) for name, _ in _methods(offer)):
            wrong += _misfits(model, offer, images)
    if wrong:
        raise ValueError(f"{type(model).__name__} does not fit `generation.contract`: {'; '.join(wrong)}")


def _check_overrides(model: Any) -> None:
    """Methods that other implementations of `generate` call and this one does not must not be defined on the model, where they are not
    transformers' own."""
    instead = getattr(model, "not_called", {})
    for name in NOT_CALLED | instead.keys():
        method, theirs = getattr(model, name, None), getattr(GenerationMixin, name, None)
        if getattr(method, "__func__", method) is theirs:
            continue
        owner = type(getattr(method, "__self__", model)).__name__
        why = f"`{name}` is that of {owner}, and block diffusion does not call it; expected the model's own"
        if name == "prepare_inputs_for_generation":
            why += ". Prompt tuning, prefix tuning and p-tuning need it: train adapters of weights instead, such as LoRA"
        raise ValueError(f"{why}. Instead, {instead[name]}" if name in instead else why)


def _methods(protocol: type) -> list[tuple[str, Callable]]:
    return [(name, member) for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]


def _misfits(given: Any, protocol: type, images: Sequence[str] = ()) -> Iterator[str]:
    """What `given` lacks of a protocol, and which of its methods cannot be called as the protocol's are."""
    yield from (f"`{name}` is missing" for name in inspect.get_annotations(protocol) if not hasattr(given, name))
    for name, member in _methods(protocol):
        method = getattr(given, name, None)
        if not callable(method):
            yield f"`{name}` is missing"
            continue
        try:
            taken = inspect.signature(method)
        except ValueError:  # a builtin that does not say
            continue
        asked = list(inspect.signature(member).parameters.values())[1:]  # without self
        for passed in (asked, [one for one in asked if one.default is one.empty]):
            places = [one.name for one in passed if one.kind is one.POSITIONAL_ONLY]
            names = [one.name for one in passed if one.kind is one.KEYWORD_ONLY]
            names += images if any(one.kind is one.VAR_KEYWORD for one in passed) else ()
            try:
                taken.bind(*places, **dict.fromkeys(names))
            except TypeError as error:
                call = ", ".join((*places, *(f"{each}=" for each in names)))
                yield f"`{name}({', '.join(taken.parameters)})` cannot be called as `{name}({call})`: {error}"
                break


__all__ = [
    "CanvasConfig", "ChecksPrompts", "Compiles", "EmbedsTokens", "GeneratesCanvases", "PassOutput", "RecordsSteps", "RoundsAsReference",
    "SharesWeights", "TextConfig", "WalksVocabulary", "check_contract", "passes_in_step",
]  # fmt: skip
