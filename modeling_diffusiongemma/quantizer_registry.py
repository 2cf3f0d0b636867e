"""How this package's quantisers get into transformers' `from_pretrained`."""

from transformers.quantizers import auto


def register(method: str, config: type, quantizer: type) -> None:
    """As transformers' `register_quantization_config` and `register_quantizer`, which refuse a name they know, as that of a file of
    remote code that is read anew."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(method, None)
    auto.register_quantization_config(method)(config)
    auto.register_quantizer(method)(quantizer)


__all__ = ["register"]
