"""The version of this package, which setup.py repeats; the files of a remote-code repository name it."""

VERSION = "0.1.0"

__all__ = ["VERSION"]
