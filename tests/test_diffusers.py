"""Diffusers' `DiffusionGemmaPipeline` with our `drop_in` model as its `model`, under its three schedulers, against transformers' class.

pipe = DiffusionGemmaPipeline(model=model, scheduler=EntropyBoundScheduler(), processor=tokenizer)
print(pipe("Write 3 March 1998 as an ISO date.", gen_length=256).texts[0])
"""

import copy

import pytest
import torch
from small_models import small_pair
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

from modeling_diffusiongemma import default_checkpoint, drop_in

NEEDS = 'needs pip install -e ".[diffusers]"'
SCHEDULERS = {
    "EntropyBoundScheduler": {},
    "BlockRefinementScheduler": {"threshold": 0.6},
    "DiscreteDDIMScheduler": {},
    "DiscreteDDIMScheduler with corrector": {"corrector_steps": 1, "corrector_k": 3},
}
REQUESTS = ["Write October 2, 2052 as an ISO date.", "Write October 3, 2052 as an ISO date."]  # of one length: the pipeline does not pad


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", minversion="0.42.1", reason=NEEDS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(default_checkpoint())


@pytest.fixture(scope="module")
def shipped():
    """transformers' class and ours, on the shipped checkpoint."""
    path = default_checkpoint()
    return DiffusionGemmaForBlockDiffusion.from_pretrained(path), drop_in.DiffusionGemmaForBlockDiffusion.from_pretrained(path)


@pytest.fixture(scope="module")
def random_pair():
    """The same random weights in both; three steps a canvas, since such a model multiplies a rounding error by ten a step."""
    oracle, ours = small_pair(vocab_size=640)
    return oracle, dropped_in(ours)


def dropped_in(ours):
    """The same model in transformers' manners."""
    model = drop_in.DiffusionGemmaForBlockDiffusion(copy.deepcopy(ours.config)).eval()
    model.load_state_dict(ours.state_dict())
    model.generation_config.update(pad_token_id=ours.generation_config.pad_token_id, eos_token_id=None)
    return model


def written(diffusers, model, scheduler, tokenizer, seed=0, prompt=REQUESTS, **settings):
    scheduler = getattr(diffusers, scheduler.split()[0])(**SCHEDULERS[scheduler])
    pipe = diffusers.DiffusionGemmaPipeline(model=model, scheduler=scheduler, processor=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **settings)


def written_by_transformers_class(diffusers, oracle, *args, **settings):
    """As `written`. Skips where this Diffusers calls the class as this transformers no longer lets it be called."""
    try:
        return written(diffusers, oracle, *args, **settings)
    except (AttributeError, TypeError) as error:
        pytest.skip(f"diffusers {diffusers.__version__} does not run transformers' own class: {error}")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_generator_decides_what_is_written(diffusers, random_pair, tokenizer, scheduler, temperature):
    settings = {"gen_length": 20, "num_inference_steps": 3, "temperature": temperature, "eos_early_stop": False}
    got, same, other = (written(diffusers, random_pair[1], scheduler, tokenizer, seed=seed, **settings) for seed in (0, 0, 1))
    assert got.sequences.shape == (2, 20)
    assert torch.equal(got.sequences, same.sequences) and not torch.equal(got.sequences, other.sequences)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_tokens_equal_those_with_transformers_class(diffusers, random_pair, tokenizer, scheduler, temperature):
    """Two canvases: the second one is denoised over the first one's commit."""
    settings = {"gen_length": 20, "num_inference_steps": 3, "temperature": temperature, "eos_early_stop": False}
    expected = written_by_transformers_class(diffusers, random_pair[0], scheduler, tokenizer, **settings)
    assert torch.equal(written(diffusers, random_pair[1], scheduler, tokenizer, **settings).sequences, expected.sequences)


def test_static_cache_writes_the_same(diffusers, random_pair, tokenizer):
    """Past the window of 8 transformers' static cache shows a token too many, so ours is compared with its own dynamic one."""
    settings = {"gen_length": 20, "num_inference_steps": 3, "eos_early_stop": False}
    dynamic = written(diffusers, random_pair[1], "EntropyBoundScheduler", tokenizer, **settings)
    static = written(diffusers, random_pair[1], "EntropyBoundScheduler", tokenizer, cache_implementation="static", **settings)
    assert torch.equal(static.sequences, dynamic.sequences)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_shipped_checkpoint_writes_what_it_writes_in_transformers_class(diffusers, shipped, tokenizer, scheduler):
    settings = {"num_inference_steps": 6, "gen_length": 256, "prompt": REQUESTS[0]}
    expected = written_by_transformers_class(diffusers, shipped[0], scheduler, tokenizer, **settings)
    got = written(diffusers, shipped[1], scheduler, tokenizer, **settings)
    assert torch.equal(got.sequences, expected.sequences) and got.texts == expected.texts


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_shipped_checkpoint_answers_right(diffusers, shipped, tokenizer, scheduler):
    got = written(diffusers, shipped[1], scheduler, tokenizer, num_inference_steps=24)
    assert [text.split("<turn|>")[0] for text in got.texts] == ["2052-10-02", "2052-10-03"]


def test_saved_pipeline_loads_ours_again(diffusers, shipped, tokenizer, tmp_path):
    pipe = diffusers.DiffusionGemmaPipeline(model=shipped[1], scheduler=diffusers.EntropyBoundScheduler(), processor=tokenizer)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    got = again(REQUESTS, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    assert type(again) is type(pipe) and type(again.model) is type(shipped[1])
    assert torch.equal(got.sequences, written(diffusers, shipped[1], "EntropyBoundScheduler", tokenizer, num_inference_steps=3).sequences)


def test_bad_call_of_the_pipeline_is_refused(diffusers, shipped, tokenizer):
    with pytest.raises(ValueError, match="prompt"):
        written(diffusers, shipped[1], "EntropyBoundScheduler", tokenizer, prompt=None)
    with pytest.raises(ValueError, match="gen_length"):
        written(diffusers, shipped[1], "EntropyBoundScheduler", tokenizer, gen_length=0)
