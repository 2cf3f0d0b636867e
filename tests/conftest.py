"""What all tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the network

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined: Triton's interpreter then runs it on the CPU

import tiny  # noqa: E402

# How many threads share a sum changes its last bit, and a random model denoising a canvas makes ten times more of it each step.
torch.set_num_threads(1)


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
def oracle_checkpoint(tmp_path_factory):
    """Folder of a checkpoint that transformers' own model saved; read only."""
    folder = tmp_path_factory.mktemp("oracle")
    tiny.build_oracle().save_pretrained(folder)
    return folder
