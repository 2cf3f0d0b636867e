"""Patterns of scripts written for transformers' class (`scripts.py`), on that class and on `drop_in.DiffusionGemmaForBlockDiffusion`: equal
results, or a refusal that names what was asked for. None differs without a word.

With the reference backend equal seeds give equal tokens; steps are few,
so that no token of a random model hangs on a last bit.
"""

import copy
import gc
import importlib
import pickle
import weakref
from pathlib import Path
from types import MappingProxyType

import programs
import pytest
import tiny
import torch
import transformers
from pages import Page
from scripts import PATTERNS, PROMPT, SETTINGS, generated, gradients_of_a_loop, named, recorded
from tiny import CANVAS, IMAGE, VOCAB, close, tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    TextIteratorStreamer,
)
from transformers.models.diffusion_gemma import generation_diffusion_gemma as their_generation
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as theirs

from generation import DiffusionGenerationOutput
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FP8Config, default_checkpoint, drop_in
from modeling_diffusiongemma.drop_in.generation import OVERRIDES

ROOT = Path(__file__).parents[1]


def dropped_in(oracle):
    """Ours in transformers' manners, with the oracle's weights, and its tokens."""
    model = drop_in.DiffusionGemmaForBlockDiffusion(type(oracle.config).from_dict(oracle.config.to_dict())).eval()
    model.load_state_dict(oracle.state_dict())
    model.set_attn_implementation(oracle.config._attn_implementation)
    model.generation_config.update(backend="reference", eos_token_id=None)
    return model


@torch.no_grad()
def fresh_pair(attention="sdpa"):
    """No image token is ever the most probable: before 5.23 transformers' class commits one as the pad token."""
    oracle = tiny.build_oracle(attention)
    oracle.model.decoder.embed_tokens.weight[IMAGE] = 0
    for model in (pair := (oracle, dropped_in(oracle))):
        model.generation_config.update(**SETTINGS)
    return pair


@pytest.fixture(scope="module")
def pair():
    """Not to be changed; what a pattern attaches it takes off again."""
    return fresh_pair()


def compared(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        close(got, expected) if expected.is_floating_point() else close(got, expected, 0)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            compared(one, other)
    else:
        assert got == expected


@pytest.mark.parametrize("pattern", PATTERNS, ids=[pattern.__name__ for pattern in PATTERNS])
def test_pattern_gives_what_it_gives_on_transformers_class(pattern, pair):
    grad = torch.enable_grad() if pattern is gradients_of_a_loop else torch.no_grad()
    with grad:
        expected, got = map(pattern, pair)
    compared(got, expected)


# What is refused, by name


def no_call(*args, **kwargs):
    raise AssertionError("called, though it was refused")


@pytest.mark.parametrize("where", ["subclass", "instance"])
@pytest.mark.parametrize("name", [*OVERRIDES, "_sample", "_get_logits_processor"])
def test_override_that_nothing_calls_is_refused(name, where):
    for cls in (drop_in.DiffusionGemmaForBlockDiffusion, DiffusionGemmaForMaskedBlockLM):
        model = (type("Patched", (cls,), {name: no_call}) if where == "subclass" else cls)(tiny.tiny_config()).eval()
        if where == "instance":
            setattr(model, name, no_call)
        with pytest.raises(ValueError, match=f"`{name}` is that of {type(model).__name__}, and block diffusion does not call it") as error:
            model.generate(PROMPT, max_new_tokens=4)
        assert ("Instead, " in str(error.value)) == (name in OVERRIDES)
        assert model(PROMPT, decoder_input_ids=tokens(2, 4)).logits.shape == (2, 4, VOCAB), "a pass is not generation"


@pytest.mark.parametrize("module", ["", "model"])
@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward"])
@pytest.mark.parametrize("cls", [drop_in.DiffusionGemmaForBlockDiffusion, DiffusionGemmaForMaskedBlockLM])
def test_what_is_attached_to_a_module_that_generation_does_not_call_is_refused(cls, what, module):
    """Transformers' class calls the first as a function in every step, and the second as a module."""
    model = cls(tiny.tiny_config()).eval()
    holder = model.get_submodule(module)
    if what == "forward":
        holder.forward = no_call
    else:
        (holder.register_forward_hook if what == "hook" else holder.register_forward_pre_hook)(no_call)
    with pytest.raises(ValueError, match="has a (forward hook|`forward` of its own), and generation does not call it"):
        model.generate(PROMPT, max_new_tokens=4)


def test_subclass_with_another_forward_is_refused():
    class Counting(drop_in.DiffusionGemmaForBlockDiffusion):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="the model has the `forward` of .*Counting, and generation does not call it"):
        Counting(tiny.tiny_config()).eval().generate(PROMPT, max_new_tokens=4)


@pytest.mark.parametrize(
    ("holder", "name"),
    [
        (theirs.DiffusionGemmaText4MLP, "forward"), (theirs.DiffusionGemmaForBlockDiffusion, "_denoising_step"),
        (their_generation.DiffusionGemmaGenerationMixin, "_denoising_step"), (theirs, "apply_rotary_pos_emb"),
        (their_generation.EntropyBoundSampler, "accept_canvas"), (their_generation.StableAndConfidentStoppingCriteria, "__call__"),
        (theirs.DiffusionGemmaDecoderModel, "create_diffusion_decoder_attention_mask"),
    ],
)  # fmt: skip
def test_function_of_transformers_that_was_replaced_is_refused(holder, name, pair, monkeypatch):
    """As packages of kernels put theirs there, and scripts their samplers: it would never run in ours."""
    monkeypatch.setattr(holder, name, no_call)
    with pytest.raises(ValueError, match=f"{name}` of transformers was replaced, which nothing here calls"):
        pair[1].generate(PROMPT, max_new_tokens=4)


@pytest.mark.parametrize(
    ("side", "name"), [("encoder", "create_masks_for_generate"), ("decoder", "create_diffusion_decoder_attention_mask")]
)
def test_masks_of_a_scripts_own_making_are_refused(side, name, pair, monkeypatch):
    monkeypatch.setattr(pair[1].model.get_submodule(side), name, no_call)
    with pytest.raises(ValueError, match=f"`{name}` is replaced on the model"):
        pair[1].generate(PROMPT, max_new_tokens=4)


def test_hooks_of_torch_and_accelerate_are_let_through():
    from accelerate import cpu_offload

    model = dropped_in(tiny.build_oracle())
    expected = generated(model, max_denoising_steps=2).sequences
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(generated(offloaded, max_denoising_steps=2).sequences, expected)


def test_bad_images_are_refused_by_the_prompt_pass_itself(pair):
    with pytest.raises(ValueError, match="pixel_values"):
        pair[1].model.encoder(
            input_ids=torch.full((1, 4), IMAGE), pixel_values=torch.zeros(1, 4, 12), image_position_ids=torch.zeros(1, 4, 2).long()
        )


@torch.no_grad()
def test_images_count_in_whole_calls_as_on_our_own_class(pair):
    """`forward` and `causal_logits` dropped them on their way to `encoder`, and answered as if the prompt had none."""
    ids, mask, images = tiny.image_inputs("two_in_a_row")
    ours, canvas = tiny.same_weights(pair[0]), tokens(1, CANVAS)
    for call in (
        lambda model: model(ids, mask, decoder_input_ids=canvas, **images).logits,
        lambda model: model.causal_logits(ids, mask, **images),
    ):
        assert torch.equal(call(pair[1]), call(ours))


# The same model, whichever way it is loaded, placed, copied and saved


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drop_in")
    tiny.ours().save_pretrained(folder)
    return folder


PLACEMENTS = {
    "plain": {}, "auto": {"device_map": "auto"}, "disk": {"device_map": {"": "disk"}},
    "disk with buffers": {"device_map": {"": "disk"}, "offload_buffers": True}, "FP8": {"quantization_config": FP8Config()},
    "eager": {"attn_implementation": "eager"},
}  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_are_those_of_our_own_class(placement, checkpoint, tmp_path):
    """Both passes' scalars differ in this checkpoint: offloaded, each must come from its own place."""
    settings = PLACEMENTS[placement] | ({"offload_folder": tmp_path} if "disk" in placement else {})
    models = [
        cls.from_pretrained(checkpoint, **settings) for cls in (drop_in.DiffusionGemmaForBlockDiffusion, DiffusionGemmaForMaskedBlockLM)
    ]
    got, expected = (
        model.generate(PROMPT, max_new_tokens=20, max_denoising_steps=2, seed=0, return_dict_in_generate=True) for model in models
    )
    assert torch.equal(got.sequences, expected.sequences) and got.finish_reasons == expected.finish_reasons
    layers = [named(models[0], f"DiffusionGemma{side}TextLayer") for side in ("Encoder", "Decoder")]
    assert [len(each) for each in layers] == [4, 4]


@pytest.mark.parametrize("cls", [drop_in.DiffusionGemmaForBlockDiffusion, drop_in.DiffusionGemmaModel])
def test_saved_files_are_those_of_our_own_class(cls, checkpoint, tmp_path):
    model = cls.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    if cls is drop_in.DiffusionGemmaForBlockDiffusion:
        assert (tmp_path / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    auto = AutoModel if cls is drop_in.DiffusionGemmaModel else AutoModelForImageTextToText
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is cls and not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs_again, info = getattr(theirs, cls.__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = theirs_again.state_dict()
    assert {
        name: torch.equal(value, wanted[name]) for name, value in again.state_dict().items() if name in wanted
    }.keys() >= wanted.keys() - {name for name in wanted if "vision_tower" in name}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_share_no_weights_and_hold_each_once(duplicate):
    model = dropped_in(tiny.build_oracle())
    other = duplicate(model)
    torch.nn.init.normal_(other.model.decoder.layers[0].mlp.up_proj.weight)
    torch.nn.init.normal_(other.model.encoder.language_model.layers[1].mlp.up_proj.weight)
    for layer in range(4):
        pairs = [m.model.get_submodule(f"{side}.layers.{layer}.mlp.up_proj").weight for m in (model, other)
                 for side in ("encoder.language_model", "decoder")]  # fmt: skip
        assert pairs[0] is pairs[1] and pairs[2] is pairs[3] and torch.equal(pairs[0], pairs[2]) == (layer > 1)
    assert len(list(other.parameters())) == len(list(tiny.ours().parameters()))
    for each in (model, other):  # each shows its own passes
        assert torch.equal(each.model.encoder(PROMPT).last_hidden_state, each.prefill(PROMPT).last_hidden_state)
    assert not torch.equal(model.model.encoder(PROMPT).last_hidden_state, other.model.encoder(PROMPT).last_hidden_state)
    close(model.double().model.encoder.language_model.layers[0].mlp.up_proj.weight.dtype is torch.float64, True, 0)


def test_shallow_copies_leave_each_others_passes_alone():
    model = drop_in.DiffusionGemmaModel(tiny.tiny_config()).eval()
    expected = model.prefill(PROMPT).last_hidden_state
    other = copy.copy(model)
    assert torch.equal(other.encoder(PROMPT).last_hidden_state, expected)
    del other
    assert torch.equal(model.encoder(PROMPT).last_hidden_state, expected), "the copy that was shown last is gone"
    other = copy.copy(model)
    del model
    assert torch.equal(other.encoder(PROMPT).last_hidden_state, expected)


def test_deleted_model_is_freed_at_once():
    model = drop_in.DiffusionGemmaForBlockDiffusion(tiny.tiny_config())
    shown = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert shown() is None
    finally:
        gc.enable()


def test_other_embeddings_serve_both_passes():
    model = dropped_in(tiny.build_oracle())
    embedding = copy.deepcopy(model.get_input_embeddings())
    torch.nn.init.normal_(embedding.weight)
    model.set_input_embeddings(embedding)
    assert model.model.encoder.get_input_embeddings().weight is embedding.weight is model.model.decoder.embed_tokens.weight
    model.resize_token_embeddings(VOCAB + 7)
    assert model.model.encoder.get_input_embeddings().weight is model.model.decoder.embed_tokens.weight
    assert model(PROMPT, decoder_input_ids=tokens(2, 4)).logits.shape[-1] == VOCAB + 7


def test_compiled_and_checkpointed_passes_are_the_same():
    model = dropped_in(tiny.build_oracle())
    expected = model(PROMPT, decoder_input_ids=tokens(2, 5)).logits
    close(torch.compile(model, backend="eager", fullgraph=True)(PROMPT, decoder_input_ids=tokens(2, 5)).logits, expected)
    labels = torch.cat((torch.full((2, 6), -100), PROMPT[:, 6:]), dim=1)
    models, losses = (model, copy.deepcopy(tiny.ours())), []
    models[0].gradient_checkpointing_enable()
    for each in models:
        each.train()
        torch.manual_seed(0)
        losses.append(each(PROMPT, labels=labels, self_conditioning_mask=torch.tensor([True, False])).loss)
        losses[-1].backward()
    close(*losses, 1e-5)
    gradients = [dict(each.named_parameters(remove_duplicate=False)) for each in models]
    assert gradients[0].keys() > gradients[1].keys()
    for name, parameter in gradients[1].items():
        if parameter.grad is not None:
            close(gradients[0][name].grad, parameter.grad)


def test_a_hook_keeps_a_long_prompt_in_one_piece(monkeypatch):
    monkeypatch.setattr(importlib.import_module("modeling_diffusiongemma.model.block_model"), "CHUNK", 5)
    for model in (dropped_in(tiny.build_oracle()), copy.deepcopy(tiny.ours())):
        layer = model.model.encoder.language_model.layers[1]
        with torch.no_grad():
            expected = model.prefill(PROMPT).last_hidden_state
            got = []
            seen = recorded([layer], lambda model=model, got=got: got.append(model.prefill(PROMPT).last_hidden_state),
                            lambda module, inputs, output: output if torch.is_tensor(output) else output[0])  # fmt: skip
        close(got[0], expected)
        assert [tuple(states.shape) for states in seen] == [(2, 13, 32)]


def test_finished_rows_stay_where_hooks_look_on_or_the_cache_is_handed_out():
    """With rows of their own: a hook that counts rows across steps would count others, and a cache of some rows would be none."""
    model = dropped_in(tiny.build_oracle())
    model.generation_config.update(backend="auto")
    first = model.generate(PROMPT, max_new_tokens=CANVAS, seed=0, max_denoising_steps=2).sequences[0, 13].item()  # ends the first row early
    settings = {"max_new_tokens": 3 * CANVAS, "seed": 0, "max_denoising_steps": 2, "eos_token_id": first, "pad_token_id": 0}
    output = model.generate(PROMPT, **settings)
    rows = recorded([model.model.decoder], lambda: model.generate(PROMPT, **settings, return_dict_in_generate=False),
                    lambda module, inputs, output: output[0])  # fmt: skip
    assert {len(each) for each in rows} == {2} and output.cache.get_seq_length() >= 13
    assert torch.equal(model.generate(PROMPT, **settings, return_dict_in_generate=False), output.sequences)


def test_texts_are_filled_in_and_revised_as_on_our_own_class():
    """`revise` ended in an AttributeError: the output in transformers' manners lacked `canvas_steps`."""
    path, chat = default_checkpoint(), [{"role": "user", "content": "Write 3 March 1998 as an ISO date."}]
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto.from_pretrained(path)
        revised = model.revise("1998-30-03", tokenizer, chat, where="uncertain", seed=0)
        found.append((revised.text, revised.steps, model.fill("{year}-03-03", tokenizer, chat, seed=0).text))
    assert found[0] == found[1]
    missing = set(DiffusionGenerationOutput.__dataclass_fields__) - set(drop_in.DiffusionGemmaGenerationOutput.__dataclass_fields__)
    assert missing == {"attentions"}  # which transformers' class has not


def test_a_default_device_and_any_mapping_of_settings_are_taken():
    """The cache of the call was made on torch's default device, and a mapping that is no dict raised a TypeError."""
    model, ids = fresh_pair()[1], tokens(2, 9)
    settings = {"max_new_tokens": 12, "max_denoising_steps": 2, "backend": "auto"}
    expected = model.generate(ids, seed=0, **settings).sequences
    assert torch.equal(model.generate(ids, seed=0, generation_config=MappingProxyType(settings)).sequences, expected)
    with torch.device("meta"):
        assert torch.equal(model.generate(ids, seed=0, **settings).sequences, expected)


def test_a_hook_keeps_steps_out_of_cuda_graphs():
    model = dropped_in(tiny.build_oracle())
    assert model.why_not_recorded() is None
    handle = model.model.decoder.layers[0].mlp.register_forward_hook(lambda *call: None)
    assert "hooks" in model.why_not_recorded()
    handle.remove()
    assert model.why_not_recorded() is None


# The doors


def test_auto_classes_give_what_transformers_gives():
    path, tokenizer = default_checkpoint(), AutoTokenizer.from_pretrained(default_checkpoint())
    chat = [{"role": "user", "content": "Write 3 March 1998 as an ISO date."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(path)
        output = model.generate(**inputs, max_new_tokens=32)
        assert type(model) is drop_in.DiffusionGemmaForBlockDiffusion and type(model.generation_config.sampler_config).__name__
        assert tokenizer.decode(output[0][0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == "1998-03-03"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=32, streamer=streamer)
    assert "".join(streamer) == "1998-03-03"
    assert isinstance(AutoModelForCausalLM.from_pretrained(path).generate(**inputs, max_new_tokens=32), torch.Tensor)


def test_installed_class_stands_in_until_it_is_undone():
    places = [transformers, transformers.models.diffusion_gemma, theirs]
    before = [place.DiffusionGemmaForBlockDiffusion for place in places]
    undo = drop_in.install()
    try:
        assert [place.DiffusionGemmaForBlockDiffusion for place in places] == [drop_in.DiffusionGemmaForBlockDiffusion] * 3
        from transformers import DiffusionGemmaForBlockDiffusion, DiffusionGemmaModel

        assert (
            DiffusionGemmaForBlockDiffusion is drop_in.DiffusionGemmaForBlockDiffusion
            and DiffusionGemmaModel is drop_in.DiffusionGemmaModel
        )
        assert type(before[0](tiny.tiny_config()).model) is theirs.DiffusionGemmaModel, "what was imported before stays what it was"
    finally:
        undo()
    assert [place.DiffusionGemmaForBlockDiffusion for place in places] == before
    undo()
    assert transformers.DiffusionGemmaModel is theirs.DiffusionGemmaModel


UNTOUCHED = """
import sys
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

path = sys.argv[1]
model, tokenizer = DiffusionGemmaForBlockDiffusion.from_pretrained(path), AutoTokenizer.from_pretrained(path)
chat = [{"role": "user", "content": "Write 3 March 1998 as an ISO date."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32)
print(type(model).__module__, tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True), __name__)
"""


def test_script_that_cannot_be_touched_runs(tmp_path):
    (tmp_path / "script.py").write_text(UNTOUCHED)
    done = programs.run("-m", "modeling_diffusiongemma.drop_in", tmp_path / "script.py", default_checkpoint())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["modeling_diffusiongemma.drop_in.model", "1998-03-03", "__main__"]
    for wrong in ([], [str(tmp_path / "absent.py")]):
        done = programs.run("-m", "modeling_diffusiongemma.drop_in", *wrong)
        assert done.returncode != 0 and "expected a Python file" in done.stderr


def test_transformers_converts_no_weights_by_these_class_names():
    mapping = importlib.import_module("transformers.conversion_mapping")
    for name in vars(theirs):
        assert not name.startswith("DiffusionGemma") or mapping.get_checkpoint_conversion_mapping(name) is None, name


def test_snippets_of_the_page_run(capsys, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    before = transformers.DiffusionGemmaForBlockDiffusion
    Page("docs/drop_in.md").run()
    assert capsys.readouterr().out.splitlines() == ["1998-03-03", "modeling_diffusiongemma.drop_in.model"]
    assert transformers.DiffusionGemmaForBlockDiffusion is before and (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_page_names_what_takes_the_place_of_every_override():
    page = Page("docs/drop_in.md").text
    assert [name for name in OVERRIDES if f"`{name}`" not in page] == []
