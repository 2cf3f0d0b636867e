"""What `from_pretrained` is asked for that nothing follows: transformers would go on without it, or fail without a name for it."""

import os
from collections.abc import Mapping

from transformers import PreTrainedConfig


def check_asked(config_class: type[PreTrainedConfig], arguments: Mapping) -> None:
    """Raises ValueError for such an argument, with what to ask for instead."""
    config = arguments.get("config")
    ours = isinstance(config, PreTrainedConfig) and config.model_type == config_class.model_type
    if not (config is None or ours or isinstance(config, str | os.PathLike)):
        got = config.__name__ if isinstance(config, type) else type(config).__name__
        raise ValueError(f"`config` is a {got}; expected a {config_class.__name__}, or the path of one")
    if arguments.get("gguf_file") is not None:
        raise ValueError(f"`gguf_file` is {arguments['gguf_file']!r}; expected None: transformers reads no GGUF file of this model")
    if arguments.get("max_memory") is not None and arguments.get("device_map") is None:
        raise ValueError("`max_memory` is given without a `device_map` that would be made by it; expected `device_map='auto'`, too")
    for name in ("dtype", "torch_dtype"):
        dtype = arguments.get(name)
        if isinstance(dtype, Mapping) and set(dtype) - {""}:
            raise ValueError(
                f"`{name}` names {sorted(set(dtype) - {''})}; expected one dtype, in which the weights of all parts are loaded"
            )
        if str(dtype).removeprefix("torch.").startswith("float8"):
            raise ValueError(f"`{name}` is {dtype}; expected 16, 32 or 64 bits: `quantization_config=FP8Config()` is for FP8")
    known = {"", *config_class.sub_configs}
    for name in ("attn_implementation", "experts_implementation"):
        if isinstance(given := arguments.get(name), Mapping) and (unknown := sorted(set(given) - known)):
            raise ValueError(f"`{name}` names {unknown}; expected some of {sorted(known)}")
    asked = arguments.get("quantization_config")
    asked = asked if isinstance(asked, Mapping) else vars(asked) if hasattr(asked, "quant_method") else {}
    if asked.get("quant_method") == "mxfp4" and not asked.get("dequantize"):
        why = "transformers has it for the experts of GPT-OSS alone, and would leave these as they are"
        raise ValueError(f"`quantization_config` is MXFP4; expected `FourBitConfig()` for experts in 4 bits: {why}")


__all__ = ["check_asked"]
