"""What generation asks of a model: a toy that has nothing else generates, and whatever lacks a part of it is refused by name."""

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from small_models import small_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedConfig

from generation import DiffusionGenerationMixin
from generation.contract import OFFERS, GeneratesCanvases, check_contract
from generation.rules.prediction import NOTHING_MORE
from generation.vocabulary.walk import VocabularyHead

VOCAB, HIDDEN, CANVAS, CAP = 37, 12, 7, 9.0
IDS = torch.tensor([[3, 8, 21, 5, 30], [11, 2, 17, 29, 6]])
REQUIRED = ("prefill", "prepare_canvas", "denoise", "compute_logits", "soft_embed")
GREEDY = {"do_sample": False, "max_new_tokens": 17, "generation_config": {"max_denoising_steps": 6}}


class Toy(DiffusionGenerationMixin):
    """An embedding, and a layer of attention, causal in a prompt and over all of a canvas. It takes what the contract says, no more."""

    def __init__(self):
        numbers = torch.Generator().manual_seed(0)
        self.weight, self.places = torch.randn(VOCAB, HIDDEN, generator=numbers), torch.randn(64, HIDDEN, generator=numbers)
        self.config = PreTrainedConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, canvas_length=CANVAS)
        self.generation_config, self.dtype = None, torch.float32

    def mix(self, embeds, keys, visible):
        mixed = scaled_dot_product_attention(embeds[:, None], keys[:, None], keys[:, None], visible[:, None])
        return SimpleNamespace(last_hidden_state=embeds + mixed[:, 0])

    def prefill(self, *, input_ids=None, attention_mask, position_ids, cache, inputs_embeds=None, last_states=None):
        embeds = (self.weight[input_ids] if inputs_embeds is None else inputs_embeds) + self.places[position_ids]
        keys = cache.update(embeds[:, None], embeds[:, None], 0)[0][:, 0]
        places = torch.arange(keys.shape[1])
        return self.mix(embeds, keys, (places <= places[-embeds.shape[1] :, None]) & attention_mask[:, None])

    def prepare_canvas(self, cache, canvas_shape, attention_mask, position_ids, /, *, slots):
        return cache.layers[0].keys[:, 0], attention_mask[:, None].expand(-1, canvas_shape[1], -1), self.places[position_ids]

    def denoise(self, canvas_ids, /, *, soft_embeds, view):
        keys, visible, places = view
        embeds = self.weight[canvas_ids] + places + soft_embeds
        return self.mix(embeds, torch.cat((keys, embeds), dim=1), visible)

    def compute_logits(self, hidden_states):
        return CAP * torch.tanh(hidden_states @ self.weight.T / CAP)

    def soft_embed(self, logits):
        return logits.softmax(dim=-1) @ self.weight


class Generous(Toy):
    """Offers all that a model may, and notes what is used of it."""

    def __init__(self, dense=None):
        super().__init__()
        self.dense, self.used = dense, []

    @contextlib.contextmanager
    def using(self, name, value=None):
        self.used.append(name)
        yield value

    def why_dense(self, device):
        return self.dense

    def vocabulary_head(self):
        return self.using("head", VocabularyHead(self.weight, CAP, torch.ones(())))

    def why_not_recorded(self):
        return None

    def compiling(self, compile_config):
        return self.using(f"compiled by {compile_config.backend}")

    def reference_arithmetic(self):
        return self.using("reference")

    def get_input_embeddings(self):
        return self.weight.__getitem__

    def check_prompt(self, *, input_ids=None, attention_mask, cache, inputs_embeds=None):
        if input_ids is not None and int(input_ids.max()) >= VOCAB:
            raise ValueError(f"`input_ids` holds ids up to {int(input_ids.max())}; expected less than {VOCAB}")


class Nothing:
    """A constraint that asks for nothing: tokens are embedded, and every prediction counts as it is."""

    wanted = NOTHING_MORE

    def constrain(self, prediction, state, embed):
        assert embed(prediction.argmax).shape == prediction.soft_embeds.shape
        return prediction

    def select(self, rows):
        return self


class Streamer:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value)

    def end(self):
        self.got.append("end")


@pytest.mark.parametrize("model", [Toy(), Generous()], ids=["least", "most"])
@pytest.mark.parametrize("decoding", ["diffusion", "autoregressive", "verified"])
def test_toy_generates(model, decoding):
    found = model.generate(IDS, decoding=decoding, **GREEDY)
    assert found.shape == (2, 5 + 17) and torch.equal(found[:, :5], IDS)
    assert torch.equal(found, model.generate(IDS, decoding=decoding, **GREEDY))
    if decoding == "verified":
        assert torch.equal(found, model.generate(IDS, decoding="autoregressive", **GREEDY))


def test_sampled_rows_depend_on_their_seeds_alone():
    both = Toy().generate(IDS, seed=[4, 5], max_new_tokens=17)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), IDS[1:]), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    assert torch.equal(Toy().generate(padded, attention_mask=mask, seed=5, max_new_tokens=17)[:, 8:], both[1:, 5:])


def test_one_step_is_the_argmax_of_the_models_logits():
    model, canvas = Toy(), torch.randint(VOCAB, (2, CANVAS), generator=torch.Generator().manual_seed(1))
    real, positions = torch.ones(2, 5 + CANVAS, dtype=torch.bool), torch.arange(5 + CANVAS)[None]
    model.prefill(input_ids=IDS, attention_mask=real[:, :5], position_ids=positions[:, :5], cache=(cache := DynamicCache()))
    view = model.prepare_canvas(cache, (2, CANVAS), real, positions[:, 5:], slots=0)
    expected = model.compute_logits(model.denoise(canvas, soft_embeds=torch.zeros(2, CANVAS, HIDDEN), view=view).last_hidden_state).argmax(
        dim=-1
    )
    settings = {**GREEDY, "max_new_tokens": CANVAS, "max_denoising_steps": 1}
    assert torch.equal(model.generate(IDS, decoder_input_ids=canvas, **settings)[:, 5:], expected)


def test_embeddings_are_a_prompt_too():
    model = Toy()
    assert torch.equal(model.generate(inputs_embeds=model.weight[IDS], **GREEDY), model.generate(IDS, **GREEDY)[:, 5:])


def test_head_is_walked_where_nothing_speaks_against_it():
    walked, dense = Generous(), Generous(dense="`head` is overridden")
    assert torch.equal(walked.generate(IDS, **GREEDY), dense.generate(IDS, **GREEDY))
    assert "head" in walked.used and dense.used == []


def test_offered_contexts_are_entered_where_they_are_asked_for():
    model = Generous()
    model.generate(IDS, compile_config={"backend": "eager"}, backend="reference", **GREEDY)
    assert model.used == ["compiled by eager", "reference"]
    with pytest.raises(ValueError, match="`compile_config` is given, and Toy has no method `compiling`; expected None"):
        Toy().generate(IDS, compile_config={"backend": "eager"})


def test_generation_touches_nothing_but_the_contract():
    named = {name for protocol in (GeneratesCanvases, *OFFERS) for name in (*vars(protocol), *protocol.__annotations__)}
    touched = set()

    class Watched(Generous):
        def __getattribute__(self, name):
            if inspect.currentframe().f_back.f_code.co_filename != __file__:
                touched.add(name)
            return super().__getattribute__(name)

    for dense, decoding in ((None, "diffusion"), ("", "diffusion"), (None, "autoregressive"), (None, "verified")):
        Watched(dense).generate(IDS, decoding=decoding, **GREEDY)
    Watched().generate(IDS, constraint=Nothing(), **GREEDY)
    assert touched > set(REQUIRED)
    assert touched - set(dir(DiffusionGenerationMixin)) <= named | {"peft_config", "__class__"}


def without(name):
    """A toy whose class lacks one method."""
    return type("Lacking", (DiffusionGenerationMixin,), {each: member for each, member in vars(Toy).items() if each != name})()


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_method_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^Lacking does not fit `generation.contract`: `{name}` is missing$"):
        without(name).generate(IDS)


@pytest.mark.parametrize("name", ["dtype", "generation_config", "config"])
def test_missing_attribute_is_refused_by_name(name):
    model = Toy()
    delattr(model, name)
    with pytest.raises(ValueError, match=f"`{name}` is missing$"):
        check_contract(model)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (PreTrainedConfig(vocab_size=VOCAB, hidden_size=HIDDEN), "`canvas_length` is missing in `config`$"),
        (PreTrainedConfig(hidden_size=HIDDEN, canvas_length=7), r"`vocab_size` is missing in `config.get_text_config\(\)`$"),
        (SimpleNamespace(canvas_length=7), "`get_text_config` is missing in `config`$"),
    ],
)
def test_what_a_config_lacks_is_named(config, match):
    model = Toy()
    model.config = config
    with pytest.raises(ValueError, match=match):
        model.generate(IDS)


@pytest.mark.parametrize(
    ("name", "method", "match"),
    [
        ("denoise", lambda canvas, view: None,
         r"`denoise\(canvas, view\)` cannot be called as `denoise\(canvas_ids, soft_embeds=, view=\)`: got an unexpected keyword argument"),
        ("denoise", lambda canvas, soft_embeds, view, mask: None, "missing a required argument: 'mask'"),
        ("prepare_canvas", lambda cache, shape, mask, slots: None, "multiple values for argument 'slots'"),
        ("compute_logits", lambda: None, "too many positional arguments"),
        ("soft_embed", 3, "`soft_embed` is missing"),
        ("prefill", lambda input_ids, attention_mask, position_ids, cache, last_states, inputs_embeds=None: None,
         r"`prefill\(attention_mask=, position_ids=, cache=\)`: missing a required argument: 'input_ids'"),
        ("prefill", lambda input_ids=None, past_key_values=None: None, "got an unexpected keyword argument 'attention_mask'"),
        ("compiling", lambda: None, r"`compiling\(\)` cannot be called as `compiling\(compile_config\)`"),
        ("check_prompt", lambda input_ids: None, r"`check_prompt\(input_ids\)` cannot be called"),
        ("vocabulary_head", lambda: None, "contract`: `why_dense` is missing$"),
        ("why_dense", lambda device: None, "contract`: `vocabulary_head` is missing$"),
    ],
)  # fmt: skip
def test_method_of_other_arguments_is_refused_by_name(name, method, match):
    model = Toy()
    setattr(model, name, method)
    with pytest.raises(ValueError, match=match):
        model.generate(IDS)


def test_methods_may_name_what_is_passed_by_place_as_they_like():
    model = Toy()
    model.compute_logits = lambda x, scale=1.0: Toy.compute_logits(model, x)
    model.denoise = lambda *canvas, **rest: Toy.denoise(model, *canvas, **rest)
    assert torch.equal(model.generate(IDS, **GREEDY), Toy().generate(IDS, **GREEDY))


def test_all_that_is_wrong_is_told_at_once():
    model = without("denoise")
    model.soft_embed = lambda: None
    with pytest.raises(ValueError, match="`denoise` is missing; `soft_embed"):
        model.generate(IDS)


def test_images_are_refused_where_prefill_takes_none():
    with pytest.raises(ValueError, match="`prefill.* got an unexpected keyword argument 'pixel_values'"):
        Toy().generate(IDS, pixel_values=torch.zeros(1, 4, 12))


def test_refused_call_changes_nothing():
    model, cache, streamer, generator = without("soft_embed"), DynamicCache(), Streamer(), torch.Generator().manual_seed(3)
    for ids in (IDS, torch.full((1, 4), VOCAB)):
        with pytest.raises(ValueError, match="`soft_embed` is missing|`input_ids` holds"):
            model.generate(ids, cache=cache, streamer=streamer, generator=generator)
        assert cache.get_seq_length() == 0 and streamer.got == [] and generator.initial_seed() == 3
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
        model = Generous()


def test_the_model_here_fits():
    check_contract(small_model(), ["pixel_values", "image_position_ids", "mm_token_type_ids"])
