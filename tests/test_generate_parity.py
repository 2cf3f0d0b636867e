"""`generate(backend="reference")` against transformers' own `generate`: equal seed and weights, equal tokens.

Every comparison covers the greedy canvas of every denoising step as well as the result. Ours is trimmed to `max_new_tokens`
and behind the last row's end; `trimmed` states what that means, in Python loops.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from small_models import IMAGE, PAD, VOCAB, prompts, small_pair
from transformers import DiffusionGemmaGenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig


class Drafts(BaseStreamer):
    """Keeps the argmax canvas of every denoising step, and whatever is put."""

    def __init__(self):
        self.drafts, self.puts, self.ended = [], [], False

    def put(self, value):
        self.puts.append(value)

    def put_draft(self, value):
        self.drafts.append(value)

    def end(self):
        self.ended = True


class Forbid(LogitsProcessor):
    """Forbids ids; keeps what it was called with."""

    def __init__(self, ids):
        self.ids, self.calls = ids, []

    def __call__(self, input_ids, scores, cur_step):
        self.calls.append((int(cur_step), input_ids.tolist()))
        scores = scores.clone()
        scores[..., self.ids] = -float("inf")
        return scores


class Favour(LogitsProcessor):
    """Adds a fixed random preference of a weight for each row: the argmax canvas of a random model never settles without one."""

    def __init__(self, *weights):
        preference = torch.randn(10, VOCAB, generator=torch.Generator().manual_seed(0))
        self.preference = torch.tensor(weights)[:, None, None] * preference

    def __call__(self, input_ids, scores):
        return scores + self.preference


class Script(LogitsProcessor):
    """Makes tokens certain at places of a canvas: the scripts of its rows, `{place: token}`, canvas by canvas."""

    def __init__(self, canvases):
        self.canvases, self.canvas, self.before = canvases, -1, 0

    def __call__(self, input_ids, scores, cur_step):
        self.canvas += int(cur_step) > self.before  # it counts down inside a canvas
        self.before = int(cur_step)
        scores = scores.clone()
        for row, script in enumerate(self.canvases[self.canvas]):
            for place, token in script.items():
                scores[row, place] = -float("inf")
                scores[row, place, token] = 0.0
        return scores


@pytest.fixture(scope="module")
def pair():
    return small_pair()


def run_both(pair, ids, mask=None, *, seed=0, new_tokens=10, cut=True, processors=(None, None), caches=(None, None), **settings):
    """Runs both from the same seed, compares the drafts, and returns both outputs."""
    (oracle, ours), (theirs, own) = pair, (Drafts(), Drafts())
    mask = {} if mask is None else {"attention_mask": mask}
    oracle_settings = dict(settings)
    if "entropy_bound" in settings:
        oracle_settings["sampler_config"] = EntropyBoundSamplerConfig(oracle_settings.pop("entropy_bound"))
    common = {"max_new_tokens": new_tokens, **mask}
    torch.manual_seed(seed)
    expected = oracle.generate(
        ids.clone(), streamer=theirs, logits_processor=processors[0], past_key_values=caches[0],
        disable_compile=True, **common, **oracle_settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    got = ours.generate(
        ids, streamer=own, logits_processor=processors[1], past_key_values=caches[1], backend="reference",
        return_dict_in_generate=True, **common, **settings,
    )  # fmt: skip
    if Version(transformers.__version__) < Version("5.23") and bool((expected.sequences[:, ids.shape[1] :] == IMAGE).any()):
        pytest.skip("transformers before 5.23 commits a generated image token as the pad token")
    assert len(own.drafts) == len(theirs.drafts), "both take the same number of denoising steps"
    for step, (a, b) in enumerate(zip(own.drafts, theirs.drafts, strict=True)):
        assert torch.equal(a, b), f"the argmax canvas of pass {step} differs"
    return expected, got


def row_until_end(row, eos):
    """A row's tokens up to its first end-of-sequence token, that one included."""
    kept = []
    for token in row:
        kept.append(token)
        if token in eos:
            break
    return kept


def trimmed(expected, prompt_length, new_tokens, eos=()):
    """What trimming makes of transformers' output, and the number of tokens of each row."""
    rows = [row_until_end(row[prompt_length : prompt_length + new_tokens].tolist(), eos) for row in expected.sequences]
    longest = max(len(row) for row in rows)
    new = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    return torch.cat((expected.sequences[:, :prompt_length], new), dim=1), [len(row) for row in rows]


def oracle_steps(expected, prompt_length):
    """Canvas passes of each row: transformers reports them only as tokens (that are not pad) per pass."""
    tokens = (expected.sequences[:, prompt_length:] != PAD).sum(dim=1)
    return (tokens / expected.tokens_per_forward).round().long()


def assert_same(expected, got, prompt_length, new_tokens, eos=()):
    sequences, counts = trimmed(expected, prompt_length, new_tokens, eos)
    assert torch.equal(got.sequences, sequences)
    behind = expected.sequences[:, prompt_length:][:, :new_tokens][:, sequences.shape[1] - prompt_length :]
    assert bool((behind == PAD).all()), "what is cut off within the allowed length is padding alone"
    assert torch.equal(got.denoising_steps, oracle_steps(expected, prompt_length))
    assert torch.equal(got.tokens_per_forward, torch.tensor(counts) / got.denoising_steps)
    if new_tokens % 10 == 0:
        # transformers does not count a generated token that happens to be the pad id
        compared = [r for r, row in enumerate(got.sequences[:, prompt_length:].tolist()) if PAD not in row[: counts[r]]]
        assert torch.equal(got.tokens_per_forward[compared], expected.tokens_per_forward[compared])


CONFIGURATIONS = {
    "one row, released settings": (1, 5, 0, 10, {}),
    "left padding": (3, 7, 3, 30, {"max_denoising_steps": 9}),
    "several canvases, trimmed, prompt longer than the window": (2, 20, 0, 35, {"max_denoising_steps": 9}),
    "left padding longer than the window": (2, 21, 10, 20, {"max_denoising_steps": 9}),
    "one step": (2, 9, 2, 20, {"max_denoising_steps": 1}),
    "seven steps": (2, 9, 0, 20, {"max_denoising_steps": 7}),
    "small entropy bound": (2, 9, 0, 20, {"max_denoising_steps": 9, "entropy_bound": 1e-4}),
    "large entropy bound": (2, 9, 0, 20, {"max_denoising_steps": 9, "entropy_bound": 30.0}),
    "cold": (2, 9, 0, 20, {"max_denoising_steps": 9, "t_min": 0.01, "t_max": 0.2}),
    "hot": (2, 9, 0, 20, {"max_denoising_steps": 9, "t_min": 1.3, "t_max": 2.7}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_same_tokens_as_transformers(pair, name):
    """A temperature one float32 rounding away from transformers' is enough to change tokens after some ten steps."""
    batch_size, length, padded, new_tokens, settings = CONFIGURATIONS[name]
    ids, mask = prompts(batch_size, length, seed=len(name), padded=padded)
    expected, got = run_both(pair, ids, mask, new_tokens=new_tokens, **settings)
    assert_same(expected, got, length, new_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_same_tokens_in_half_precision(pair, dtype, tmp_path):
    """Both loaded in it: `.to(dtype)` rounds the rotary frequencies of transformers' model. By default ours computes experts in another
    way in bfloat16, on every CPU."""
    pair[0].save_pretrained(tmp_path)
    loaded = [type(model).from_pretrained(tmp_path, dtype=dtype).eval() for model in pair]
    ids, mask = prompts(2, 9, seed=6, padded=2)
    expected, got = run_both(loaded, ids, mask, new_tokens=20, max_denoising_steps=9)
    assert_same(expected, got, 9, 20)


@pytest.mark.parametrize(("stability_threshold", "confidence_threshold", "weight"), [(0, 2.0, 0), (1, 3.0, 8), (3, 3.0, 12)])
def test_rows_that_stop_at_different_steps(pair, stability_threshold, confidence_threshold, weight):
    """A row that is finished must keep its canvas, its self-conditioning and its count while the others go on."""
    ids, mask = prompts(3, 9, seed=3)
    certain = {place: 20 + place for place in range(10)}
    expected, got = run_both(
        pair, ids, mask, new_tokens=10, max_denoising_steps=20, stability_threshold=stability_threshold,
        confidence_threshold=confidence_threshold,
        processors=[LogitsProcessorList([Favour(0, weight, 0), Script([[certain, {}, {}]])]) for _ in range(2)],
    )  # fmt: skip
    assert_same(expected, got, 9, 10)
    steps = got.denoising_steps.tolist()
    assert steps[0] == stability_threshold + 1 < max(steps), f"the rows stop at different steps: {steps}"


@pytest.mark.parametrize("stability_threshold", [0, 1])
def test_every_row_stops_early_in_several_canvases(pair, stability_threshold):
    """An early stop ends the loop over steps, so the next canvas continues the random numbers from there."""
    ids, mask = prompts(2, 9, seed=4, padded=3)
    expected, got = run_both(
        pair, ids, mask, seed=5, new_tokens=40, max_denoising_steps=20, stability_threshold=stability_threshold,
        confidence_threshold=3.0, processors=[LogitsProcessorList([Favour(20, 20)]) for _ in range(2)],
    )  # fmt: skip
    assert_same(expected, got, 9, 40)
    assert max(got.denoising_steps.tolist()) < 60, "fewer than 4 canvases of 20 steps: most canvases stop early"


def test_end_of_sequence_inside_a_canvas_of_some_rows(pair):
    """The canvas of an ended row becomes padding before it is committed, and its passes are no longer counted."""
    ids, mask = prompts(3, 6, seed=5, padded=2)
    one, two = 91, 92
    canvases = [[{4: one}, {}, {}], [{}, {3: two}, {}], [{}, {}, {}]]
    forbidden = [Forbid([one, two]) for _ in range(2)]  # elsewhere, so that no row ends by chance
    processors = [LogitsProcessorList([forbid, Script(canvases)]) for forbid in forbidden]
    settings = {"max_denoising_steps": 6, "seed": 2, "new_tokens": 30, "eos_token_id": [one, two]}
    expected, got = run_both(pair, ids, mask, processors=processors, **settings)
    assert_same(expected, got, 6, 30, eos=(one, two))
    ends = [len(row_until_end(row[6:].tolist(), (one, two))) for row in got.sequences]
    assert ends == [5, 14, 30], "the rows end in the first canvas, in the second and never"
    assert bool((got.sequences[0, 6 + ends[0] :] == PAD).all())


@pytest.mark.parametrize("as_list", [False, True])
def test_generation_stops_when_every_row_has_ended(pair, as_list):
    ids, mask = prompts(1, 6, seed=6)
    processors = [LogitsProcessorList([Forbid([91]), Script([[{4: 91}]])]) for _ in range(2)]
    settings = {"new_tokens": 30, "max_denoising_steps": 5, "eos_token_id": [91] if as_list else 91}
    expected, got = run_both(pair, ids, mask, processors=processors, **settings)
    assert_same(expected, got, 6, 30, eos=(91,))
    assert got.sequences.shape[1] == 6 + 5 and got.denoising_steps.tolist() == [5]


def test_user_logits_processor(pair):
    """Processors come before the temperature and get the remaining steps and everything committed so far."""
    ids, mask = prompts(2, 7, seed=7)
    processors = Forbid(list(range(20, 60))), Forbid(list(range(20, 60)))
    expected, got = run_both(
        pair, ids, mask, new_tokens=20, max_denoising_steps=6, processors=[LogitsProcessorList([one]) for one in processors]
    )
    assert_same(expected, got, 7, 20)
    new = got.sequences[:, 7:]
    assert not bool(((new >= 20) & (new < 60)).any())
    assert processors[1].calls == processors[0].calls


def test_image_prompt(pair):
    """The image's tokens attend to each other in both directions; images go into the first prompt pass only."""
    ids, mask = prompts(2, 14, seed=8, padded=2)
    ids[:, 4:10] = IMAGE
    kinds = (ids == IMAGE).long()
    grid = torch.tensor([[x, y] for y in range(4) for x in range(6)]).expand(2, 24, 2)  # 24 patches are 6 soft tokens
    pixels = torch.rand(2, 24, 12, generator=torch.Generator().manual_seed(9))
    images = {"pixel_values": pixels, "image_position_ids": grid, "mm_token_type_ids": kinds}
    expected, got = run_both(pair, ids, mask, new_tokens=20, max_denoising_steps=6, **images)
    assert_same(expected, got, 14, 20)
    images["pixel_values"] = 1 - pixels
    _, other = run_both(pair, ids, mask, new_tokens=20, max_denoising_steps=6, **images)
    assert not torch.equal(got.sequences, other.sequences), "the images are seen"


def test_first_canvas_given(pair):
    """transformers draws a canvas even where one is given: the random numbers after it must agree."""
    ids, mask = prompts(2, 7, seed=10)
    canvas = torch.randint(VOCAB, (2, 10), generator=torch.Generator().manual_seed(11))
    expected, got = run_both(pair, ids, mask, new_tokens=20, max_denoising_steps=6, decoder_input_ids=canvas)
    assert_same(expected, got, 7, 20)


def test_static_cache_inside_the_window():
    """Beyond the window transformers' static cache shows one token too many; ours is compared with itself in test_generate.

    Three steps a canvas: the two allocate different numbers of empty slots, which sdpa sums in another order, and this model
    multiplies a rounding error by ten a step. After three it is still far from changing a token.
    """
    ids, mask = prompts(2, 9, seed=12, padded=2)
    pair = small_pair(seed=1, sliding_window=64)
    expected, got = run_both(pair, ids, mask, new_tokens=30, max_denoising_steps=3, cache_implementation="static")
    assert_same(expected, got, 9, 30)


@pytest.mark.parametrize("padded", [0, 4])
def test_second_turn_on_the_returned_cache(pair, padded):
    """The returned cache holds all but the last canvas, which the next call gets together with the new tokens."""
    ids, mask = prompts(2, 11, seed=13, padded=padded)
    text_alone = [LogitsProcessorList([Forbid([IMAGE])]) for _ in range(2)]  # an image token would ask for its image
    expected, got = run_both(pair, ids, mask, new_tokens=20, max_denoising_steps=6, processors=text_alone)
    assert_same(expected, got, 11, 20)
    caches = expected.past_key_values, got.past_key_values
    assert [cache.get_seq_length() for cache in caches] == [21, 21]
    turn = torch.cat((got.sequences[:, 21:], prompts(2, 4, seed=14)[0]), dim=1)
    mask = torch.cat((mask, torch.ones(2, 24, dtype=mask.dtype)), dim=1)
    expected, got = run_both(pair, turn, mask, seed=3, new_tokens=20, max_denoising_steps=6, caches=caches)
    assert_same(expected, got, 14, 20)
    assert got.past_key_values.get_seq_length() == 21 + 14 + 10


def test_settings_of_a_generation_config_object(pair):
    """transformers' config object, handed to both, means the same to both."""
    oracle, ours = pair
    config = DiffusionGemmaGenerationConfig(
        max_new_tokens=20, max_denoising_steps=6, t_min=0.3, t_max=0.9, stability_threshold=2, confidence_threshold=3.0,
        sampler_config=EntropyBoundSamplerConfig(1.0), eos_token_id=[1, 6], pad_token_id=PAD,
    )  # fmt: skip
    ids, mask = prompts(2, 9, seed=15)
    torch.manual_seed(4)
    expected = oracle.generate(ids, attention_mask=mask, generation_config=config)
    torch.manual_seed(4)
    got = ours.generate(ids, attention_mask=mask, generation_config=config, backend="reference")
    assert_same(expected, got, 9, 20, eos=(1, 6))
