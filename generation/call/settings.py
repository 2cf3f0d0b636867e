"""From what a caller of `generate` says in several places to the one configuration of the call."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..arguments import ARGUMENTS, FIELDS, read, shown, unknown
from ..asking import Ends, end_of_turn
from ..rules.stopping import Never, StoppingRule
from .configuration import DIFFUSION_FIELDS, FURTHER_FIELDS, RELEASED_DEFAULTS, WHY_REFUSED, DiffusionGenerationConfig, refusals
from .together import check_fields

logger = logging.get_logger(__name__)

# Arguments of GenerationMixin.generate that mean nothing here: refused by name unless they are None or False.
FOREIGN_ARGUMENTS = (
    "assistant_model", "assistant_tokenizer", "custom_generate", "negative_prompt_attention_mask", "negative_prompt_ids",
    "prefix_allowed_tokens_fn", "use_model_defaults",
)  # fmt: skip

RELEASED_ENDS = (1, 106, 50)  # `eos_token_id` of the released checkpoint
THRESHOLDS = ("stability_threshold", "confidence_threshold")
FURTHER_STOPS = ("joint_threshold", "patience")
# Arguments that only some values of another read: of which, and which.
READ_BY = (
    ("decoding", ("diffusion", "verified"),
     (*DIFFUSION_FIELDS, "sampler_config", *(name for name in FURTHER_FIELDS if name not in ("decoding", "backend")))),
    ("sampler", ("entropy_bound",), ("entropy_bound", "sampler_config")),
    ("sampler", ("confidence",), ("confidence",)),
    ("sampler", ("predictor_corrector",), ("corrector_steps", "corrector_positions")),
    ("noise", ("mask",), ("mask_token_id",)),
)  # fmt: skip


def resolve_config(
    given: GenerationConfig | Mapping[str, Any] | None, model_default: GenerationConfig, kwargs: dict[str, Any]
) -> tuple[DiffusionGenerationConfig, bool]:
    """The configuration of one call: keyword arguments, over the given config, over the model's, over the released values.

    Returns:
        The config, with nothing of the diffusion fields unset, and whether `max_length` counts: it does where the caller set
        it and did not set `max_new_tokens`.

    Raises:
        ValueError: an argument that is unknown, out of range or not honoured, by name.
    """
    if (synced := kwargs.pop("synced_gpus", None)) not in (None, True, False):  # what it asks for happens wherever weights are shared
        raise ValueError(f"`synced_gpus` is {shown(synced)}; expected True, False or None")
    for name in FOREIGN_ARGUMENTS:
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            why = WHY_REFUSED.get(name, "block diffusion gives it no meaning")
            raise ValueError(f"`{name}` is {shown(value)}; expected None: {why}")
    if "eos_token_id" in kwargs and kwargs["eos_token_id"] is None:
        kwargs["eos_token_id"] = []  # None asks for no end, and must not fall back on the model's
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    config = DiffusionGenerationConfig.from_generation_config(GenerationConfig() if given is None else given)
    if others := [name for name in kwargs if name != "sampler_config" and (name[0] == "_" or name not in config.__dict__)]:
        expected = "model inputs or fields of DiffusionGenerationConfig"
        raise ValueError(f"`generate` got the unknown arguments {unknown(others, [*FIELDS, *ARGUMENTS])}; expected {expected}")
    _refuse(refusals({name: value for name, value in kwargs.items() if name != "sampler_config"}))
    both = "max_length" in kwargs and "max_new_tokens" in kwargs
    if both:  # a pipeline hands the tokenizer's `max_length` on to here
        logger.warning_once("`max_new_tokens` and `max_length` are both set; `max_new_tokens` counts, as elsewhere in transformers.")
    config.update(**kwargs)
    use_max_length = config.max_length is not None and (config.max_new_tokens is None or ("max_length" in kwargs and not both))
    model_default = read("generation_config", model_default, ARGUMENTS["generation_config"])  # whatever was assigned to the model
    models = {} if model_default is None else DiffusionGenerationConfig.from_generation_config(model_default).__dict__
    config.update(defaults_only=True, **{name: value for name, value in models.items() if value is not None and name[0] != "_"})
    use_max_length = use_max_length or (config.max_new_tokens is None and config.max_length is not None)
    config.update(defaults_only=True, **RELEASED_DEFAULTS)
    _refuse(config.refused())
    for reader, values, names in READ_BY:
        given = [name for name in names if name in kwargs]
        if given and getattr(config, reader) not in values:
            got = f"`{given[0]}` is {shown(kwargs[given[0]])}, and `{reader}` is {shown(getattr(config, reader))}"
            raise ValueError(f"{got}; expected {' or '.join(map(repr, values))}, or `{given[0]}` unset, which nothing else reads")
    check_fields(config, whole=True)
    return config, use_max_length


def resolve_stopping(stopping: StoppingRule | None, kwargs: Mapping[str, Any]) -> StoppingRule | None:
    """The rule that counts instead of those of a config: the caller's; `Never`, where a threshold is None among the keyword arguments, as
    in transformers' class; or None.

    Raises:
        ValueError: a rule, and thresholds or `patience` in the same call; or a threshold that is None, and one of `FURTHER_STOPS`.
    """
    never = [name for name in THRESHOLDS if name in kwargs and kwargs[name] is None]
    if stopping is not None and (given := [*never, *(name for name in (*THRESHOLDS, *FURTHER_STOPS) if kwargs.get(name) is not None)]):
        raise ValueError(f"`stopping` is {shown(stopping)}, and {given} are given, too; expected one or the other: it replaces them")
    if never and (given := [name for name in FURTHER_STOPS if kwargs.get(name) is not None]):
        value = shown(kwargs[given[0]])
        raise ValueError(f"`{given[0]}` is {value}; expected it unset, since `{never[0]}` is None: never stop early")
    return Never() if never else stopping


def _refuse(refused: list[str]) -> None:
    if refused:
        raise ValueError(f"block diffusion does not support {', '.join(refused)}; expected these arguments unset")


def stop_ids(config: DiffusionGenerationConfig, vocab_size: int) -> list[int]:
    """The ids that end a text. On a small vocabulary the released ones that it does not hold are never predicted.

    Raises:
        ValueError: any other that it does not hold.
    """
    given = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    given = [token for token in given if token is not None]
    if outside := [token for token in given if token >= vocab_size and token not in RELEASED_ENDS]:
        raise ValueError(f"`eos_token_id` holds {outside}; expected token ids from 0 to {vocab_size - 1}")
    return [token for token in given if token < vocab_size]


def pad_id(config: DiffusionGenerationConfig, stops: Sequence[int], vocab_size: int) -> int:
    """What stands behind the end of a text, which one of `stops` ends; ValueError for an id that the vocabulary does not hold."""
    if config.pad_token_id is None:
        return stops[0] if stops else 0
    if config.pad_token_id >= vocab_size:
        raise ValueError(f"`pad_token_id` is {config.pad_token_id}; expected a token id from 0 to {vocab_size - 1}")
    return config.pad_token_id


def ends_of(config: DiffusionGenerationConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Ends:
    """How a text ends that has a whole canvas, or several, to itself.

    Raises:
        ValueError: nothing ends one; ids that the vocabulary does not hold.
    """
    stops = stop_ids(config, vocab_size)
    if not stops:
        raise ValueError(f"`eos_token_id` is {config.eos_token_id}; expected at least one id of the vocabulary, with which a text ends")
    return Ends(end_of_turn(tokenizer, stops), tuple(stops), pad_id(config, stops, vocab_size))


__all__ = ["ends_of", "pad_id", "resolve_config", "resolve_stopping", "stop_ids"]
