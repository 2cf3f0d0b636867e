"""The two names of a cache: `cache`, and `past_key_values` as it was called before transformers 5.24.

Functions take it under both (`takes_cache`), outputs give it under both (`cache_output`), and neither warns. As a field of an output it has
the name that the installed transformers uses, since by that name `Trainer` leaves it out of what it gathers.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Cache
from transformers.utils import ModelOutput

NAMES = ("cache", "past_key_values")
FIELD = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"


def takes_cache(function: Callable) -> Callable:
    """Lets a function with an argument `cache` take it as `past_key_values`, too.

    Raises:
        ValueError: both names are given.
    """
    place = list(inspect.signature(function).parameters).index("cache")

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        if "past_key_values" in kwargs:
            old = kwargs.pop("past_key_values")
            if old is not None and (kwargs.get("cache") is not None or len(args) > place):
                raise ValueError("`cache` and `past_key_values` are both given; expected one of them: they are two names of one argument")
            if old is not None:
                kwargs["cache"] = old
        return function(*args, **kwargs)

    return renamed


class CacheOutput(ModelOutput):
    """A `ModelOutput` whose cache is read and written under both names."""

    @property
    def cache(self) -> Cache | None:
        return self.past_key_values  # one of the two is a field, which hides its property

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_field(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_field(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_field(name), value)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(_field(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(_field(key), default)


def cache_output(cls: type[CacheOutput]) -> type[CacheOutput]:
    """`dataclass` for a `CacheOutput` with a field `cache`, which gets the name `FIELD`: construct it with `**{FIELD: cache}`."""
    if FIELD != "cache":
        cls.__annotations__ = {FIELD if name == "cache" else name: kind for name, kind in cls.__annotations__.items()}
        setattr(cls, FIELD, cls.cache)
        del cls.cache
    return dataclass(cls)


def _field(key: Any) -> Any:
    return FIELD if isinstance(key, str) and key in NAMES else key


__all__ = ["FIELD", "CacheOutput", "cache_output", "takes_cache"]
