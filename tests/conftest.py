"""What all tests share."""

import atexit
import gc
import getpass
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: as many tests run at once as there are cores

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined: Triton's interpreter then runs it on the CPU

# torch's cache of compiled code does not know that ATEN_CPU_CAPABILITY hides instructions: each CPU, real or pretended, has its own.
cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)

# Compiled constraints, the code of repositories and what the Hub gave are kept where all workers of a run find them, and no other run does.
if "PYTEST_XDIST_WORKER" not in os.environ:
    kept = tempfile.mkdtemp(prefix="diffusiongemma_tests_")
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    os.environ.update(DIFFUSIONGEMMA_CACHE=os.path.join(kept, "constraints"), HF_HOME=os.path.join(kept, "hub"))

import tiny  # noqa: E402
from make_fp8_checkpoint import write_fp8_checkpoint  # noqa: E402
from servers import client_of, served  # noqa: E402
from small_models import small_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from generation.fast.proofs import verdict  # noqa: E402
from modeling_diffusiongemma import default_checkpoint  # noqa: E402

# How many threads share a sum changes its last bit, and a random model denoising a canvas makes ten times more of it each step.
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """What `-n auto` means: a worker for each core that this process may use, and at most 8, which take 2 GB each."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable, int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", 8)))


def pytest_collection_finish():
    """What torch, transformers and the tests are made of is there to stay: looked through for garbage it took a twentieth of the time."""
    gc.freeze()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Base address of a server on a free port of this machine, where nothing was ever downloaded."""
    with served(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    """The client of `openai` for it."""
    return client_of(address)


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def adapters_of_transformers():
    """`add_adapter` and its kin. Skips where this transformers demands a newer PEFT than is installed (5.24: newer than any there was)."""
    pytest.importorskip("peft")
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Folder of a checkpoint in the published FP8 layout; read only."""
    folder = tmp_path_factory.mktemp("fp8")
    write_fp8_checkpoint(tiny.build_oracle(), folder)
    return folder


@pytest.fixture(scope="session")
def oracle_checkpoint(tmp_path_factory):
    """Folder of a checkpoint that transformers' own model saved; read only."""
    folder = tmp_path_factory.mktemp("oracle")
    tiny.build_oracle().save_pretrained(folder)
    return folder


@pytest.fixture
def nothing_proven():
    """Before and afterwards."""
    verdict.cache_clear()
    yield
    verdict.cache_clear()


@pytest.fixture
def records(monkeypatch):
    """As on a GPU: flags late, steps recorded."""
    monkeypatch.setattr("generation.call.plan.records", lambda device: True)
    monkeypatch.setattr("generation.call.plan.reads_late", lambda device: True)


@pytest.fixture
def told(monkeypatch):
    """What was warned of fast paths that failed their proof."""
    said = []
    monkeypatch.setattr("generation.fast.proofs.logger.warning_once", said.append)
    return said


@pytest.fixture
def console(capsys, monkeypatch):
    """Runs the console in this process on the lines of `stdin`; returns exit code, standard output, standard error."""

    from modeling_diffusiongemma.console.main import main

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(list(argv))
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


@pytest.fixture
def answers(console):
    """The JSON objects of a run that must succeed."""

    def run(*argv, stdin=""):
        code, out, err = console(*argv, "--json", stdin=stdin)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return run


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped text checkpoint's; read only."""
    return AutoTokenizer.from_pretrained(default_checkpoint(), padding_side="left")


@pytest.fixture(scope="session")
def trained():
    """The shipped text checkpoint; read only."""
    return AutoModelForCausalLM.from_pretrained(default_checkpoint()).eval()


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """The folder of `small_model()`, whose canvas pass an adapter changes by far more than any rounding does; read only."""
    folder = tmp_path_factory.mktemp("small")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs an example in this process, which has imported what takes seconds. Returns what it printed, and its message as it left."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        left = None
        try:
            runpy.run_path(str(Path(__file__).parents[1] / "examples" / script), run_name="__main__")
        except SystemExit as error:
            left = error.code
        printed = capsys.readouterr()
        return printed.out, f"{left}\n{printed.err}" if left else None  # `sys.exit` prints a message to stderr, and the status is 1

    return call
