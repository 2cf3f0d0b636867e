"""Looking inside: hooks see the states of each pass and may change one alone, router logits and their loss, causal logits, arguments that
nobody knows, caches whose layers disagree; and the page and the example that show it."""

import copy
import re
from pathlib import Path

import programs
import pytest
import torch
from pages import Page
from tiny import CANVAS, IMAGE, PAD, VOCAB, WINDOW, caches, close, gradients, image_inputs, ours, pad_rows, pair, rows_of, tokens
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments, cache_utils
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from generation.cache_names import FIELD
from generation.call.caches import quantized_cache
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.drop_in import DiffusionGemmaForBlockDiffusion
from modeling_diffusiongemma.layers.caches import cached_length

ROOT = Path(__file__).parents[1]
IDS, CANVAS_IDS = tokens(2, 13), tokens(2, CANVAS, 1)
TOP_K = 2


@pytest.fixture
def model():
    return copy.deepcopy(ours())


def hooked(modules, run, **kwargs):
    """What each module put out while `run` ran, in the order of the calls."""
    seen = []
    handles = [module.register_forward_hook(lambda module, args, output: seen.append(output), **kwargs) for module in modules]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(params=["one stack", "pulled apart"])
def either(request, model):
    if request.param == "pulled apart":
        model.model.pull_apart()
    return model


def test_hooks_see_in_each_pass_what_hooks_on_transformers_class_see(either, without_gradients):
    oracle = pair()[0]

    def first(outputs):
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    prompt_layers, canvas_layers = (
        [each.model.encoder.language_model.layers for each in (oracle, either)],
        [each.model.decoder.layers for each in (oracle, either)],
    )
    runs = [lambda each=each: each(IDS, decoder_input_ids=CANVAS_IDS) for each in (oracle, either)]
    theirs, found = (first(hooked(layers, run)) for layers, run in zip(prompt_layers, runs, strict=True))
    assert [tuple(states.shape) for states in found] == [(2, 13, 32)] * 4
    close(found, theirs)
    theirs, found = (first(hooked(layers, run)) for layers, run in zip(canvas_layers, runs, strict=True))
    found = found[-4:]  # in one stack they are called in the prompt pass, too
    assert [tuple(states.shape) for states in found] == [(2, CANVAS, 32)] * 4
    close(found, theirs)


def test_hook_of_the_prompt_pass_changes_the_prompt_pass_alone(either, without_gradients):
    prefilled = either.prefill(IDS)
    plain = either.denoise(CANVAS_IDS, prefilled.cache).last_hidden_state
    layer = either.model.encoder.language_model.layers[1]
    handle = layer.register_forward_hook(lambda layer, args, output: (output[0] + 1, *output[1:]))
    assert torch.equal(either.denoise(CANVAS_IDS, prefilled.cache).last_hidden_state, plain)
    changed = either.prefill(IDS)
    handle.remove()
    assert not torch.equal(changed.last_hidden_state, prefilled.last_hidden_state)
    before, after = (each.cache.layers for each in (prefilled, changed))
    assert [torch.equal(old.keys, new.keys) for old, new in zip(before, after, strict=True)] == [True, True, False, False]


def test_layer_is_told_which_pass_runs(model, without_gradients):
    told = []
    layer = model.model.decoder.layers[2]
    layer.register_forward_hook(lambda layer, args, kwargs, output: told.append(kwargs["is_causal"]), with_kwargs=True)
    model.generate(IDS, max_new_tokens=2 * CANVAS, max_denoising_steps=2, pad_token_id=PAD, eos_token_id=None, seed=0)
    assert told[0] and True in told[1:] and set(told) == {True, False}  # the prompt, canvases, and the first canvas as it is committed


def test_steering_the_canvas_pass_leaves_the_prompts_cache_as_it_is(model, without_gradients):
    plain = model(IDS, decoder_input_ids=CANVAS_IDS)

    def steer(layer, args, kwargs, output):
        return None if kwargs["is_causal"] else (output[0] + 1, *output[1:])

    model.model.decoder.layers[0].register_forward_hook(steer, with_kwargs=True)
    steered = model(IDS, decoder_input_ids=CANVAS_IDS)
    for one, other in zip(plain.cache.layers, steered.cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert not torch.equal(plain.logits, steered.logits)


# Router logits.


def test_router_puts_out_what_transformers_router_does(without_gradients):
    oracle, model = pair()
    states = torch.randn(7, 32)
    for one, other in zip(oracle.model.decoder.layers, model.model.decoder.layers, strict=True):
        close(other.router(states), one.router(states))


def test_router_logits_are_the_logarithms_of_transformers_probabilities(either, without_gradients):
    oracle = pair()[0]
    layers = [*oracle.model.encoder.language_model.layers, *oracle.model.decoder.layers]
    probabilities = [output[0] for output in hooked([layer.router for layer in layers], lambda: oracle(IDS, decoder_input_ids=CANVAS_IDS))]
    calls = []
    for layer in either.model.decoder.layers:
        layer.router.register_forward_hook(lambda *_: calls.append(1))
    output = either(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    assert [tuple(each.shape) for each in output.router_logits] == [(2 * CANVAS, 4)] * 4
    assert [tuple(each.shape) for each in output.encoder_router_logits] == [(2 * 13, 4)] * 4
    found = (*output.encoder_router_logits, *output.router_logits)
    close([each.exp() for each in found], probabilities)
    close([each.softmax(dim=-1) for each in found], probabilities)
    assert len(calls) == (8 if either.model.prompt_stack is either.model.decoder else 4)  # hooks fire as ever


def test_router_logits_stay_finite_and_differentiable_where_a_probability_vanishes(model):
    with torch.no_grad():
        model.model.decoder.layers[0].router.scale.mul_(1e4)
    output = model(IDS, decoder_input_ids=CANVAS_IDS, labels=CANVAS_IDS, output_router_logits=True)
    assert bool((output.router_logits[0].exp() < 1e-30).any())
    (output.loss + sum(each.sum() for each in output.router_logits)).backward()
    assert all(bool(each.isfinite().all()) for each in output.router_logits)
    assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters() if weight.grad is not None)


def test_nothing_is_given_where_router_logits_are_not_asked_for(without_gradients):
    output = ours()(IDS, decoder_input_ids=CANVAS_IDS)
    assert not {"router_logits", "encoder_router_logits", "aux_loss"} & set(output.keys())
    block = ours().model(IDS, decoder_input_ids=CANVAS_IDS)
    assert not {"router_logits", "encoder_router_logits"} & set(block.keys())


def test_block_model_and_passes_give_router_logits(without_gradients):
    model = ours()
    expected = model(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    block = model.model(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    prefilled = model.prefill(IDS, output_router_logits=True)
    denoised = model.denoise(CANVAS_IDS, prefilled.cache, output_router_logits=True)
    for canvas, prompt in ((block.router_logits, block.encoder_router_logits), (denoised.router_logits, prefilled.router_logits)):
        close(canvas, expected.router_logits, 0)
        close(prompt, expected.encoder_router_logits, 0)
    behind = model(decoder_input_ids=CANVAS_IDS, cache=prefilled.cache, output_router_logits=True)
    assert behind.encoder_router_logits is None and behind.aux_loss is not None
    close(behind.router_logits, expected.router_logits)
    with pytest.raises(ValueError, match="`chunk_length` is 5; expected None together with .*`output_router_logits`"):
        model.prefill(IDS, chunk_length=5, output_router_logits=True)


@pytest.mark.parametrize("where", ["config", "text_config"])
def test_config_asks_for_router_logits(model, where):
    held = model.config if where == "config" else model.config.text_config
    held.output_router_logits, held.router_aux_loss_coef = True, 0.25
    output = model(IDS, decoder_input_ids=CANVAS_IDS, labels=CANVAS_IDS)
    close(output.loss, output.diffusion_loss + 0.25 * output.aux_loss, 1e-6)
    assert model.model(IDS, decoder_input_ids=CANVAS_IDS).router_logits is not None
    assert model(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=False).router_logits is None


@pytest.mark.parametrize("coefficient", [-0.1, "0.1", float("nan"), True, None])
def test_coefficient_that_is_none_is_refused_by_name(model, coefficient):
    model.config.router_aux_loss_coef = coefficient
    with pytest.raises(ValueError, match="`router_aux_loss_coef` in the config is .*expected a number >= 0"):
        model(IDS, decoder_input_ids=CANVAS_IDS)


def test_stacks_of_the_drop_in_give_probabilities_as_theirs_do(without_gradients):
    oracle = pair()[0]
    model = DiffusionGemmaForBlockDiffusion(copy.deepcopy(oracle.config)).eval()
    model.load_state_dict({name: oracle.state_dict()[name] for name in model.state_dict()})
    found = []
    for each in (oracle, model):
        options = {FIELD: DynamicCache(config=each.config.text_config), "output_router_logits": True}
        found.append([each.model.encoder.language_model(IDS, **options), each.model.decoder(CANVAS_IDS, **options)])
    close(*([output.router_logits for output in outputs] for outputs in found))
    output = model(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    close(output.router_logits, ours()(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True).router_logits)


# The balancing loss.


def expected_loss(*passes):
    """By transformers' function over the tokens of both passes: each `(router_logits, mask or None)`."""
    logits, masks = [], []
    for router_logits, mask in passes:
        logits.append(router_logits)
        masks.append(torch.ones(len(router_logits[0]), dtype=torch.int64) if mask is None else mask.reshape(-1).long())
    joined = tuple(torch.cat(each) for each in zip(*logits, strict=True))
    return load_balancing_loss_func(joined, joined[0].shape[1], TOP_K, torch.cat(masks)[None])


def test_balancing_loss_of_a_given_canvas_is_transformers_function_over_both_passes(model):
    output = model(IDS, decoder_input_ids=CANVAS_IDS, labels=CANVAS_IDS, output_router_logits=True)
    close(output.aux_loss, expected_loss((output.encoder_router_logits, None), (output.router_logits, None)), 1e-5)
    close(output.loss, output.diffusion_loss + 0.001 * output.aux_loss, 1e-6)
    assert output.causal_loss is None and output.aux_loss.shape == () and output.aux_loss.dtype == torch.float32
    close(output.diffusion_loss, model(IDS, decoder_input_ids=CANVAS_IDS, labels=CANVAS_IDS).loss, 1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_the_balancing_loss(model, side, without_gradients):
    ids, mask = pad_rows(rows_of((13, 5)), side)
    output = model(ids, mask, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    close(output.aux_loss, expected_loss((output.encoder_router_logits, mask), (output.router_logits, None)), 1e-5)
    rows = [model(row[None], decoder_input_ids=CANVAS_IDS[i : i + 1], output_router_logits=True) for i, row in enumerate(rows_of((13, 5)))]
    joined = [
        (tuple(torch.cat(each) for each in zip(*(getattr(row, name) for row in rows), strict=True)), None)
        for name in ("encoder_router_logits", "router_logits")
    ]
    close(output.aux_loss, expected_loss(*joined))


def test_padding_of_a_canvas_does_not_count_either(model, without_gradients):
    mask = torch.ones(2, 13 + CANVAS, dtype=torch.int64)
    mask[1, -3:] = 0
    output = model(IDS, decoder_input_ids=CANVAS_IDS, decoder_attention_mask=mask, output_router_logits=True)
    close(output.aux_loss, expected_loss((output.encoder_router_logits, None), (output.router_logits, mask[:, 13:])), 1e-5)


def examples():
    ids, mask = pad_rows(rows_of((17, 12)), "right")
    labels = torch.full_like(ids, -100)
    labels[0, 8:17], labels[1, 4:12] = ids[0, 8:17], ids[1, 4:12]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "self_conditioning_mask": torch.tensor([True, False])}


def test_balancing_loss_of_whole_examples_is_added_to_both_losses(either):
    either.config.router_aux_loss_coef = 0.5
    batch = examples()
    torch.manual_seed(3)
    output = either(**batch, output_router_logits=True)
    close(output.aux_loss, expected_loss((output.encoder_router_logits, batch["attention_mask"]), (output.router_logits, None)), 1e-5)
    close(output.loss, output.diffusion_loss + output.causal_loss + 0.5 * output.aux_loss, 1e-6)
    torch.manual_seed(3)
    close(either(**batch).loss, output.diffusion_loss + output.causal_loss, 1e-6)


def test_balancing_loss_alone_moves_routers_and_gradient_checkpointing_agrees(model):
    def loss(each):
        return each(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True).aux_loss

    model.train()
    plain = gradients(model, loss)
    assert all(plain[f"model.decoder.layers.{i}.router.proj.weight"].abs().max() > 0 for i in range(4))
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, loss)
    learned = [name for name, gradient in plain.items() if gradient is not None]
    close([checkpointed[name] for name in learned], [plain[name] for name in learned])


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "dense_mm"])
def test_router_logits_are_the_same_whatever_computes_the_experts(model, experts, without_gradients):
    expected = model(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    model.set_experts_implementation(experts)
    close(model(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True).router_logits, expected.router_logits)


def test_router_logits_can_be_traced(model, without_gradients):
    expected = model(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    traced = torch.compile(model, fullgraph=True, backend="eager")(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True)
    close(traced.router_logits, expected.router_logits)
    close(traced.aux_loss, expected.aux_loss)
    exported = torch.export.export(
        model, (IDS,), {"decoder_input_ids": CANVAS_IDS, "output_router_logits": True, "use_cache": False}, strict=False
    )
    found = exported.module()(IDS, decoder_input_ids=CANVAS_IDS, output_router_logits=True, use_cache=False)
    close(found["router_logits"], expected.router_logits)


def test_config_that_asks_for_router_logits_is_saved_and_read(model, tmp_path):
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.125
    model.save_pretrained(tmp_path)
    again = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)
    assert (again.config.output_router_logits, again.config.router_aux_loss_coef) == (True, 0.125)


def test_trainer_learns_and_evaluates_where_the_config_asks_for_router_logits(model, tmp_path):
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 1000.0
    batch = examples()
    rows = [{name: tensor[row] for name, tensor in batch.items() if name != "self_conditioning_mask"} for row in (0, 1)]
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "max_steps": 1, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), **settings, report_to=[], save_strategy="no", disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 1000 and trainer.evaluate()["eval_loss"] > 1000


# Causal logits.


def test_causal_logits_are_those_of_transformers_prompt_pass(either, without_gradients):
    oracle, cap = pair()[0], either.config.text_config.final_logit_softcapping
    states = oracle.model.encoder(IDS).last_hidden_state
    logits = either.causal_logits(IDS)
    assert tuple(logits.shape) == (2, 13, VOCAB) and logits.dtype == torch.float32
    close(logits, torch.tanh(oracle.lm_head(states) / cap) * cap)
    close(either.causal_logits(IDS, last_states=3), logits[:, -3:])


def test_causal_logits_take_padding_caches_embeddings_and_images(model, without_gradients):
    ids, mask = pad_rows(rows_of((13, 5)), "left")
    close(model.causal_logits(ids, mask)[1, -5:], model.causal_logits(rows_of((13, 5))[1][None])[0])
    for name in ("cache", "past_key_values"):
        cache = model.prefill(IDS[:, :7]).cache
        close(model.causal_logits(IDS[:, 7:], **{name: cache}), model.causal_logits(IDS)[:, 7:])
        assert cache.get_seq_length() == 13
    close(model.causal_logits(inputs_embeds=model.get_input_embeddings()(IDS)), model.causal_logits(IDS))
    ids, mask, images = image_inputs("small")
    assert IMAGE in ids
    close(model.causal_logits(ids, mask, **images), model.compute_logits(model.prefill(ids, mask, **images).last_hidden_state), 0)


def test_causal_logits_pass_gradients_on(model):
    model.causal_logits(IDS).square().mean().backward()
    assert model.model.decoder.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


# Arguments.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(IDS, zebra=1), r"`forward` .*unknown.* `zebra`.*expected some of .*'input_ids'.*'output_router_logits'"),
        (lambda model: model(IDS, decoder_input_id=IDS), r"`forward` .*unknown.* `decoder_input_id`.*did you mean `decoder_input_ids`\?"),
        (lambda model: model.model(IDS, attention_masks=None), r"`forward` .*unknown.* `attention_masks`.*did you mean `attention_mask`\?"),
        (lambda model: model.prefill(IDS, last_stats=1), r"`prefill` .*unknown.* `last_stats`.*did you mean `last_states`\?"),
        (lambda model: model.denoise(IDS, soft_embed=None), r"`denoise` .*unknown.* `soft_embed`.*did you mean `soft_embeds`\?"),
        (lambda model: model.prepare_canvas(None, (1, 2), slot=1), r"`prepare_canvas` .*unknown.* `slot`.*did you mean `slots`\?"),
        (lambda model: model.causal_logits(IDS, last_state=1), r"`causal_logits` .*unknown.* `last_state`.*did you mean `last_states`\?"),
    ],
)  # fmt: skip
def test_argument_that_nobody_knows_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(ours())


@pytest.mark.parametrize("masked", [False, True])
def test_self_conditioning_logits_of_two_dimensions_count_for_every_row(masked, without_gradients):
    oracle, model = pair()
    logits = torch.randn(CANVAS, VOCAB)
    mask = {"self_conditioning_mask": torch.tensor([True, False])} if masked else {}
    given = model(IDS, decoder_input_ids=CANVAS_IDS, self_conditioning_logits=logits, **mask).logits
    whole = model(IDS, decoder_input_ids=CANVAS_IDS, self_conditioning_logits=logits.expand(2, -1, -1), **mask).logits
    assert torch.equal(given, whole)
    close(given, oracle(IDS, decoder_input_ids=CANVAS_IDS, self_conditioning_logits=logits.expand(2, -1, -1), **mask).logits)


@pytest.mark.parametrize("shape", [(CANVAS + 1, VOCAB), (CANVAS, VOCAB - 1), (3, CANVAS, VOCAB), (VOCAB,)])
def test_self_conditioning_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="`self_conditioning_logits` .*expected"):
        ours()(IDS, decoder_input_ids=CANVAS_IDS, self_conditioning_logits=torch.zeros(shape))


# Caches whose layers disagree.


def more(layer, tokens=3):
    return torch.randn(2, 2 if layer % 2 == 0 else 1, tokens, 8 if layer % 2 == 0 else 16)


CALLS = {
    "forward": lambda model, cache: model(decoder_input_ids=CANVAS_IDS, cache=cache),
    "prompt": lambda model, cache: model(IDS, decoder_input_ids=CANVAS_IDS, cache=cache),
    "prefill": lambda model, cache: model.prefill(IDS, cache=cache),
    "denoise": lambda model, cache: model.denoise(CANVAS_IDS, cache),
    "prepare_canvas": lambda model, cache: model.prepare_canvas(cache, (2, CANVAS)),
    "generate": lambda model, cache: model.generate(IDS, cache=cache, max_new_tokens=3, max_denoising_steps=2, pad_token_id=PAD),
}


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["windowed", "keep_all", "static"])
@pytest.mark.parametrize("call", CALLS)
def test_cache_with_keys_appended_to_one_layer_is_refused_by_name(call, kind, layer, without_gradients):
    """They were silently left out, the first layer's length counting for all."""
    model = ours()
    cache = caches(model)[kind]
    model.prefill(IDS, cache=cache)
    cache.update(more(layer), more(layer), layer)
    before = [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]
    with pytest.raises(ValueError, match=r"`cache` holds (13|16) tokens in layer 0 and (13|16) in layer \d; expected as many in every"):
        CALLS[call](model, cache)
    assert all(map(torch.equal, before, [states for layer in cache.layers for states in (layer.keys, layer.values)]))


@pytest.mark.parametrize("kind", ["windowed", "keep_all", "static"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_fresh_cache_with_keys_in_one_layer_is_refused(kind, layer, without_gradients):
    model = ours()
    cache = caches(model)[kind]
    cache.update(more(layer), more(layer), layer)
    with pytest.raises(ValueError, match="`cache` holds . tokens in layers? 0 .*expected as many in every layer"):
        model(IDS, decoder_input_ids=CANVAS_IDS, cache=cache)


@pytest.mark.parametrize("length", [3, 13])
def test_keys_laid_into_a_sliding_layer_by_hand_are_refused(length, without_gradients):
    model = ours()
    cache = model.prefill(IDS[:, :length]).cache
    layer = cache.layers[2]
    layer.keys, layer.values = torch.cat((layer.keys, more(2)), dim=2), torch.cat((layer.values, more(2)), dim=2)
    most = min(length, WINDOW - 1)
    with pytest.raises(ValueError, match=f"`cache` stores {most + 3} keys in layer 2; expected at most {most} of the {length} tokens"):
        model.denoise(CANVAS_IDS, cache)


@pytest.mark.parametrize("kind", ["windowed", "keep_all", "static"])
def test_keys_appended_to_every_layer_count_as_tokens(kind, without_gradients):
    oracle, model = pair()
    states = [(more(layer), more(layer)) for layer in range(4)]

    def filled(each, kind):
        cache = caches(model)[kind]
        (each.prefill if each is model else each.model.encoder)(IDS, **{"cache" if each is model else "past_key_values": cache})
        for layer, (keys, values) in enumerate(states):
            cache.update(keys, values, layer)
        return cache

    found = model(decoder_input_ids=CANVAS_IDS, cache=filled(model, kind)).logits
    plain = model(IDS, decoder_input_ids=CANVAS_IDS).logits
    close(found, oracle(decoder_input_ids=CANVAS_IDS, past_key_values=filled(oracle, "windowed")).logits)
    assert (found - plain).abs().max() > 0.1


def test_caches_of_every_kind_are_taken_empty_filled_and_cropped(without_gradients):
    model = ours()
    kinds = {**caches(model), "offloaded": DynamicCache(config=model.config.text_config)}
    for name, cache in kinds.items():
        model.prefill(IDS[:, :5], cache=cache)
        if name != "static":
            cache.crop(-2)
            model.prefill(IDS[:, 3:5], cache=cache)
        model.prefill(IDS[:, 5:], cache=cache)
        close(model(decoder_input_ids=CANVAS_IDS, cache=cache).logits, model(IDS, decoder_input_ids=CANVAS_IDS).logits)
        cache.reset()
        if name != "static" and "reset" not in vars(cache_utils.DynamicLayer):
            if name != "keep_all":  # older transformers keeps zeros there, and full attention counts them
                with pytest.raises(ValueError, match="`cache` (stores|holds)"):
                    model(IDS, decoder_input_ids=CANVAS_IDS, cache=cache)
            continue
        close(model(IDS, decoder_input_ids=CANVAS_IDS, cache=cache).logits, model(IDS, decoder_input_ids=CANVAS_IDS).logits)


def test_lengths_counted_on_a_device_are_read_where_asked_alone():
    """As on a GPU, where reading one waits: here a device whose numbers cannot be read at all."""
    config = ours().config.text_config
    cache = StaticCache(config, max_cache_len=20)
    for layer_idx in range(4):
        cache.update(more(layer_idx), more(layer_idx), layer_idx)
    for layer in (cache.layers[1], cache.layers[3]):  # full attention
        layer.cumulative_length = layer.cumulative_length.to("meta")
    assert cached_length(cache) == 3
    with pytest.raises((NotImplementedError, RuntimeError)):
        cached_length(cache, waits=True)


def test_quantized_cache_is_taken_filled(without_gradients):
    """Its layers count beside what they store."""
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("transformers before 5.23 has no FP8 cache")
    model = ours()
    cache = quantized_cache(model.config.text_config)
    model.prefill(IDS, cache=cache)
    assert tuple(model(decoder_input_ids=CANVAS_IDS, cache=cache).logits.shape) == (2, CANVAS, VOCAB)
    cache.update(more(1), more(1), 1)
    with pytest.raises(ValueError, match="13 tokens in layer 0 and 16 in layer 1"):
        model(decoder_input_ids=CANVAS_IDS, cache=cache)


# The page and the example.


def test_snippets_of_the_page_run_and_print_what_it_says(capsys):
    page = Page("docs/inside.md")
    assert len(page.blocks) >= 10 and len(page.expected) >= 12
    page.run()
    assert capsys.readouterr().out.splitlines() == page.expected


def test_example_draws_the_lens_steers_the_canvas_and_counts_experts(tmp_path):
    done = programs.run("examples/inside.py", "--out", tmp_path / "inside.svg")
    assert done.returncode == 0, done.stderr
    picture = (tmp_path / "inside.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg") and "step 1" in picture and picture.count("layer 5") == picture.count("step ")
    assert "'six hundred and forty-eight'; steered" in done.stdout and "'three hundred and forty-eight'" in done.stdout
    assert "the same, bit for bit" in done.stdout
    shares = re.findall(r"^\d +((?: *\d+)+)$", done.stdout, re.MULTILINE)
    assert len(shares) == 6 and all(len(row.split()) % 4 == 0 for row in shares)
