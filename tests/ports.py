"""A port for a server that a test starts."""

import contextlib
import socket


@contextlib.contextmanager
def port():
    """A free one, which nobody else is given meanwhile: it stays bound, which hinders no server that reuses addresses."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


__all__ = ["port"]
