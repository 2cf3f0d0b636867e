"""transformers' server with this package's model in a process of its own, and the real `openai` client."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from modeling_diffusiongemma import default_checkpoint

NEEDS = 'needs pip install -e ".[serve]"'
MODEL = default_checkpoint()
CHAT = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]


@contextlib.contextmanager
def served(home, *options):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=NEEDS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "modeling_diffusiongemma.serve", "--host", "127.0.0.1", "--port", str(port), "--enable-cors", *options]
    environment = {**os.environ, "HF_HOME": str(home / "none")}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    with ThreadPoolExecutor(1) as reader:
        log = reader.submit(server.stderr.read)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=60)
            print(log.result()[-2000:])  # shown where a test fails


def _wait_for(url, server, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5)
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no answer from {url}")


def client_of(url):
    openai = pytest.importorskip("openai", reason=NEEDS)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120)
