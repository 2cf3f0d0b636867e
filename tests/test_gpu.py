"""What needs a CUDA device; skipped without one. `make test-gpu` runs this file alone."""

import pytest
import torch
from small_models import prompts, small_model, small_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from modeling_diffusiongemma import default_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_logits_equal_those_of_transformers_on_cuda():
    oracle, ours = (model.cuda() for model in small_pair())
    ids, canvas = prompts(2, 21)[0].cuda(), prompts(2, 10, seed=1)[0].cuda()
    with torch.no_grad():
        expected, got = (model(input_ids=ids, decoder_input_ids=canvas).logits for model in (oracle, ours))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # tf32 may be on


def test_reference_tokens_equal_those_of_transformers_on_cuda():
    oracle, ours = (model.cuda() for model in small_pair())
    ids = prompts(2, 9)[0].cuda()
    settings = {"max_new_tokens": 10, "max_denoising_steps": 4}
    torch.manual_seed(0)
    expected = oracle.generate(ids, **settings).sequences
    torch.manual_seed(0)
    got = ours.generate(ids, backend="reference", **settings)
    assert torch.equal(got, expected[:, : got.shape[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_cache_equals_dynamic_cache_on_cuda(dtype):
    model = small_model().cuda().to(dtype)
    ids, canvas = prompts(2, 21)[0].cuda(), prompts(2, 10, seed=1)[0].cuda()
    with torch.no_grad():
        dynamic = model(input_ids=ids, decoder_input_ids=canvas).logits
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=30)
        static = model(input_ids=ids, decoder_input_ids=canvas, past_key_values=cache).logits
    torch.testing.assert_close(static, dynamic, atol=1e-3 if dtype == torch.float32 else 0.3, rtol=0)


def test_shipped_checkpoint_answers_on_cuda():
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).cuda(), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt").to("cuda")
    sequences = model.generate(**inputs, seed=0, canvas_length=64, max_new_tokens=64)
    assert tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == "2052-10-02"
