"""transformers' server with this package's model in a process of its own, and the real `openai` client."""

import contextlib
import time
import urllib.request

import programs
import pytest
from ports import port

from modeling_diffusiongemma import default_checkpoint

NEEDS = 'needs pip install -e ".[serve]"'
MODEL = default_checkpoint()
CHAT = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]


@contextlib.contextmanager
def served(folder, *options):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=NEEDS)
    with port() as free:
        command = ["-m", "modeling_diffusiongemma.serve", "--host", "127.0.0.1", "--port", free, "--enable-cors", *options]
        with running(folder, free, *command) as url:
            yield url


@contextlib.contextmanager
def running(folder, free, *command):
    """Base address of the server that Python's command line `command` starts on the port `free`."""
    server, url = programs.start(*command, cwd=folder, stdout=folder / "log", stderr=folder / "log"), f"http://127.0.0.1:{free}"
    try:
        _wait_for(f"{url}/health", server)
        yield url
    finally:
        server.terminate()
        server.join(60)
        print((folder / "log").read_text()[-2000:])  # shown where a test fails


def _wait_for(url, server, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.is_alive():
        try:
            return urllib.request.urlopen(url, timeout=5)
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no answer from {url}")


def client_of(url):
    openai = pytest.importorskip("openai", reason=NEEDS)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120)
