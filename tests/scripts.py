"""What scripts do with transformers' class: functions of a model and of nothing else of ours, each of which says what came of it.

`test_drop_in.py` runs them on transformers' class and on `drop_in.DiffusionGemmaForBlockDiffusion`.
"""

import copy

import torch
from tiny import CANVAS, VOCAB, tokens
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.diffusion_gemma import generation_diffusion_gemma as their_generation
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as theirs

from generation.cache_names import FIELD

PROMPT = tokens(2, 13)
SETTINGS = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 2, "pad_token_id": 0}


def generated(model, ids=PROMPT, seed=0, **settings):
    torch.manual_seed(seed)
    return model.generate(ids, **settings)


def attached(modules, hook, run, pre=False, **options):
    """What `run` gives while `hook` stands on the modules."""
    handles = [(each.register_forward_pre_hook if pre else each.register_forward_hook)(hook, **options) for each in modules]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def recorded(modules, run, read=lambda module, inputs, output: output):
    """What hooks on the modules read of each call, in order."""
    seen = []
    attached(modules, lambda *call: seen.append(read(*call).detach().clone()), run)
    return seen


def named(model, name):
    """Modules by the name of their class, as scripts look for them."""
    return [module for module in model.modules() if type(module).__name__ == name]


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.put_in, self.drafts = [], []

    def put(self, value):
        self.put_in.append(value)

    def put_draft(self, value):
        self.drafts.append(value)

    def end(self):
        pass


class Spy(LogitsProcessor):
    """A record of every step, as scripts keep one: by a processor that changes nothing."""

    def __init__(self):
        self.entropies, self.steps = [], []

    def __call__(self, input_ids, scores, cur_step=None):
        self.steps.append(int(cur_step))
        self.entropies.append(torch.distributions.Categorical(logits=scores).entropy())
        return scores


class Pin(LogitsProcessor):
    def __call__(self, input_ids, scores, cur_step=None):
        scores[:, 3] = -1e9
        scores[:, 3, 42] = 0
        return scores


# What generate returns and takes


def output_has_sequences(model):
    return generated(model).sequences


def output_is_indexed_as_a_batch(model):
    return generated(model)[0]


def rows_behind_the_prompts_length(model):
    """Empty in transformers' class, since the first field is the batch."""
    return generated(model)[0][PROMPT.shape[1] :]


def output_is_unpacked(model):
    sequences, tokens_per_forward, *_ = generated(model).to_tuple()
    return sequences, tokens_per_forward


def output_by_key(model):
    output = generated(model)
    return list(output.keys())[:3], output["sequences"], output["tokens_per_forward"], "logits" in output, output.scores


def tensor_on_request(model):
    return generated(model, return_dict_in_generate=False)


def arguments_by_place(model):
    torch.manual_seed(0)
    streamer = Kept()
    output = model.generate(PROMPT, DynamicCache(config=model.config.text_config), streamer)
    return output.sequences, streamer.put_in


def streamer_gets_batches(model):
    streamer = Kept()
    generated(model, PROMPT[:1], streamer=streamer)
    return streamer.put_in, streamer.drafts


def sampler_config_is_read_and_written(model):
    config = copy.deepcopy(model.generation_config)
    config.sampler_config = their_generation.EntropyBoundSamplerConfig(entropy_bound=0.25)
    read = config.sampler_config.entropy_bound
    config.sampler_config.entropy_bound = 0.75
    return read, config.sampler_config.entropy_bound, generated(model, generation_config=config).sequences


def sampler_config_as_an_argument(model):
    return generated(model, sampler_config=their_generation.EntropyBoundSamplerConfig(entropy_bound=5.0)).sequences


def their_generation_config(model):
    config = their_generation.DiffusionGemmaGenerationConfig(
        max_new_tokens=CANVAS, max_denoising_steps=3, t_min=0.2, t_max=0.9, stability_threshold=1, confidence_threshold=0.005,
        sampler_config=their_generation.EntropyBoundSamplerConfig(entropy_bound=0.5),
    )  # fmt: skip
    return generated(model, generation_config=config).sequences


def flat_fields_of_the_models_config(model):
    model.generation_config.max_denoising_steps = 3
    try:
        return generated(model).sequences
    finally:
        model.generation_config.max_denoising_steps = SETTINGS["max_denoising_steps"]


def start_canvas(model):
    return generated(model, decoder_input_ids=tokens(2, CANVAS, 5), max_new_tokens=CANVAS).sequences


def cache_of_an_earlier_turn(model):
    first = generated(model, max_new_tokens=CANVAS)
    cache = first.cache if FIELD == "cache" else first.past_key_values
    later = torch.cat((first.sequences[:, PROMPT.shape[1] :], tokens(2, 4, 7)), dim=1)
    return cache.get_seq_length(), generated(model, later, **{FIELD: cache}).sequences


def record_of_every_step(model):
    spy = Spy()
    generated(model, logits_processor=LogitsProcessorList([spy]))
    return spy.steps, spy.entropies


def pinned_position(model):
    return generated(model, logits_processor=LogitsProcessorList([Pin()])).sequences


def padded_batch(model):
    mask = torch.ones_like(PROMPT)
    mask[0, :4] = 0
    return generated(model, attention_mask=mask).sequences


# Looking inside


def prompt_states_of_every_layer(model):
    return recorded(model.model.encoder.language_model.layers, lambda: generated(model))


def canvas_states_of_every_layer(model):
    return recorded(model.model.decoder.layers, lambda: generated(model))


def what_goes_into_a_layer(model):
    seen = []
    layers = [model.model.encoder.language_model.layers[2], model.model.decoder.layers[2]]
    attached(layers, lambda module, inputs: seen.append(inputs[0].clone()), lambda: generated(model), pre=True)
    return seen


def attention_by_keyword(model):
    seen = []

    def hook(module, inputs, kwargs, output):
        seen.extend((kwargs["hidden_states"].clone(), output[0].clone()))

    layers = (model.model.encoder.language_model.layers[1], model.model.decoder.layers[1])
    attached([layer.self_attn for layer in layers], hook, lambda: generated(model), with_kwargs=True)
    return seen


def projections_of_one_pass(model):
    layer = model.model.encoder.language_model.layers[0]
    return recorded([layer.self_attn.q_proj, layer.self_attn.k_norm, layer.mlp.down_proj, layer.input_layernorm], lambda: generated(model))


def whole_passes(model):
    parts = [model.model.encoder, model.model.encoder.language_model, model.model.decoder, model.model.decoder.norm, model.lm_head]
    return recorded(parts, lambda: generated(model), lambda module, inputs, output: output if torch.is_tensor(output) else output[0])


def logit_lens(model):
    """The head over what a layer puts out in the canvas pass, capped as the model caps it."""
    states = recorded([model.model.decoder.layers[1]], lambda: generated(model))
    cap = model.final_logit_softcapping
    return [torch.tanh(model.lm_head(model.model.decoder.norm(each)) / cap) * cap for each in states]


def steered(model, layers):
    direction = torch.linspace(-3, 3, model.config.text_config.hidden_size)
    output = attached(layers, lambda module, inputs, output: output + direction, lambda: generated(model, max_new_tokens=CANVAS))
    cache = output.cache if FIELD == "cache" else output.past_key_values
    return output.sequences, [layer.keys for layer in cache.layers]


def steering_of_the_canvas(model):
    """Fires in the canvas pass alone, and leaves the prompt's keys as they were."""
    return steered(model, [model.model.decoder.layers[1]])


def steering_of_the_prompt(model):
    return steered(model, [model.model.encoder.language_model.layers[1]])


def ablated_in_place(model):
    def zero(module, inputs, output):
        output[0].zero_()

    return attached([model.model.decoder.layers[0].self_attn], zero, lambda: generated(model, max_new_tokens=CANVAS)).sequences


def replaced_forward(model):
    layer = model.model.decoder.layers[3].mlp
    plain = layer.forward
    layer.forward = lambda hidden_states: plain(hidden_states) * 2
    try:
        return generated(model, max_new_tokens=CANVAS).sequences
    finally:
        del layer.forward


def modules_by_class_name(model):
    names = [name for name in vars(theirs) if name.startswith("DiffusionGemma") and "Clippable" not in name and "RMSNorm" not in name]
    return {name: len(named(model, name)) for name in names}


def modules_by_class(model):
    names = ("TextRouter", "TextExperts", "Text4MLP", "SelfConditioning", "EncoderTextLayer", "DecoderTextLayer", "DecoderTextAttention")
    classes = [getattr(theirs, f"DiffusionGemma{name}") for name in names]
    return [sum(isinstance(module, cls) for module in model.modules()) for cls in classes]


def names_of_weights(model):
    """Of a weight that both passes hold, the first name counts: scripts freeze by it."""
    return sorted(name for name, _ in model.named_parameters()), sorted(model.state_dict())


def router_statistics(model):
    seen = []

    def count(module, inputs, output):
        probabilities, weights, chosen = output
        seen.extend((probabilities.clone(), weights.clone(), chosen.flatten().bincount(minlength=4)))

    attached(named(model, "DiffusionGemmaTextRouter"), count, lambda: generated(model))
    return seen


def experts_inputs(model):
    return recorded(named(model, "DiffusionGemmaTextExperts"), lambda: generated(model), lambda module, inputs, output: inputs[2])


def attributes_that_scripts_read(model):
    encoder, decoder = model.model.encoder, model.model.decoder
    position_ids = torch.arange(5)[None]
    states = torch.zeros(1, 5, model.config.text_config.hidden_size)
    return (
        decoder.text_config.num_hidden_layers, encoder.get_input_embeddings()(PROMPT), len(encoder.language_model.layers),
        encoder.language_model.embed_tokens.weight.shape, encoder.language_model.layers[0].self_attn.head_dim,
        [(layer.layer_idx, each.layer_idx, each.is_sliding, each.sliding_window, each.layer_type)
         for stack in (encoder.language_model, decoder) for layer in stack.layers for each in [layer.self_attn]],
        *decoder.rotary_emb(states, position_ids, "full_attention"),
        *encoder.language_model.rotary_emb(states, position_ids, "sliding_attention"),
        model.get_encoder() is model.model.encoder or model.model.get_encoder() is encoder, model.model.get_decoder() is decoder,
        model.get_output_embeddings() is model.lm_head, encoder.language_model.layers[0].layer_scalar, decoder.layers[0].layer_scalar,
    )  # fmt: skip


# Loops of one's own


def hand_written_loop(model):
    """Encoder, masks, and a canvas pass a step."""
    torch.manual_seed(0)
    config, cache = model.config, DynamicCache(config=model.config.text_config)
    position_ids, mask = torch.arange(13)[None], torch.ones_like(PROMPT, dtype=torch.bool)
    masks = model.model.encoder.create_masks_for_generate(
        config=config, inputs_embeds=torch.empty(2, 13, 0), attention_mask=mask, position_ids=position_ids, **{FIELD: cache}
    )
    model.model.encoder(input_ids=PROMPT, attention_mask=masks, position_ids=position_ids, **{FIELD: cache})
    canvas, logits, seen = tokens(2, CANVAS, 3), None, []
    whole = torch.ones(2, 13 + CANVAS, dtype=torch.bool)
    masks = model.model.decoder.create_diffusion_decoder_attention_mask(
        config=config, inputs_embeds=canvas[..., None], decoder_attention_mask=whole, **{FIELD: cache}
    )
    for _ in range(2):
        output = model(
            decoder_input_ids=canvas, self_conditioning_logits=logits, decoder_attention_mask=masks,
            decoder_position_ids=torch.arange(13, 13 + CANVAS)[None], **{FIELD: cache},
        )  # fmt: skip
        logits = output.logits
        seen.append(logits)
        canvas = logits.argmax(dim=-1)
    return seen


def masks_of_padded_rows(model):
    """Made by the model, and handed on to its passes."""
    real = torch.ones_like(PROMPT, dtype=torch.bool)
    real[0, :4] = False
    cache, position_ids = DynamicCache(config=model.config.text_config), torch.arange(13)[None]
    masks = model.model.encoder.create_masks_for_generate(
        config=model.config, inputs_embeds=torch.empty(2, 13, 0), attention_mask=real, position_ids=position_ids, **{FIELD: cache}
    )
    model.model.encoder(input_ids=PROMPT, attention_mask=masks, position_ids=position_ids, **{FIELD: cache})
    canvas, whole = tokens(2, CANVAS), torch.cat((real, torch.ones(2, CANVAS, dtype=torch.bool)), dim=1)
    masks = model.model.decoder.create_diffusion_decoder_attention_mask(
        config=model.config, inputs_embeds=canvas[..., None], decoder_attention_mask=whole, **{FIELD: cache}
    )
    return model(
        decoder_input_ids=canvas, decoder_attention_mask=masks, decoder_position_ids=torch.arange(13, 13 + CANVAS)[None], **{FIELD: cache}
    ).logits


def decoder_by_itself(model):
    cache = model.model.encoder(input_ids=PROMPT)
    cache = cache.cache if FIELD == "cache" else cache.past_key_values
    logits = torch.linspace(-5, 5, VOCAB).repeat(2, CANVAS, 1)
    plain = model.model.decoder(decoder_input_ids=tokens(2, CANVAS), **{FIELD: cache})
    conditioned = model.model.decoder(
        decoder_input_ids=tokens(2, CANVAS),
        self_conditioning_logits=logits,
        self_conditioning_mask=torch.tensor([True, False]),
        **{FIELD: cache},
    )
    return plain.last_hidden_state, conditioned.last_hidden_state


def causal_pass_read(model):
    states = model.model.encoder(input_ids=PROMPT).last_hidden_state
    text = model.model.encoder.language_model(input_ids=PROMPT)
    return model.lm_head(states), text.last_hidden_state, (text.cache if FIELD == "cache" else text.past_key_values).get_seq_length()


def self_conditioning_without_a_batch(model):
    logits = torch.linspace(-5, 5, VOCAB).repeat(CANVAS, 1)
    return model(input_ids=PROMPT[:1], decoder_input_ids=tokens(1, CANVAS), self_conditioning_logits=logits).logits


def self_conditioning_of_the_first_step(model):
    logits = torch.randn(2, CANVAS, VOCAB, generator=torch.Generator().manual_seed(3)) * 5
    canvas = tokens(2, CANVAS, 5)
    return generated(model, decoder_input_ids=canvas, self_conditioning_logits=logits, max_new_tokens=CANVAS).sequences


def exactly_n_steps(model):
    """Thresholds of None: no early stop, even where every step is sure."""
    streamer = Kept()
    model.generation_config.sampler_config = their_generation.EntropyBoundSamplerConfig(entropy_bound=100.0)
    try:
        generated(
            model, streamer=streamer, stability_threshold=None, confidence_threshold=None, max_denoising_steps=5, max_new_tokens=CANVAS,
            logits_processor=LogitsProcessorList([Pin()]),
        )  # fmt: skip
    finally:
        model.generation_config.sampler_config = their_generation.EntropyBoundSamplerConfig(entropy_bound=0.1)
    return len(streamer.drafts)


def model_without_head(model):
    output = model.model(input_ids=PROMPT, decoder_input_ids=tokens(2, CANVAS))
    return output.last_hidden_state, output.encoder_last_hidden_state


def states_of_a_call(model):
    output = model(input_ids=PROMPT, decoder_input_ids=tokens(2, CANVAS), output_hidden_states=True)
    return list(output.hidden_states), output.logits


def static_cache(model):
    """Inside of the window, since beyond it transformers' static cache shows a token too many."""
    return generated(model, PROMPT[:, :4], cache_implementation="static", disable_compile=True, max_new_tokens=CANVAS).sequences


def gradients_of_a_loop(model):
    model.zero_grad()
    output = model(input_ids=PROMPT, decoder_input_ids=tokens(2, CANVAS))
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens(2, CANVAS, 1).flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.zero_grad()
    return [gradients[f"model.{name}.weight"] for name in ("decoder.layers.0.self_attn.k_proj", "decoder.embed_tokens")]


PATTERNS = [
    output_has_sequences, output_is_indexed_as_a_batch, rows_behind_the_prompts_length, output_is_unpacked, output_by_key,
    tensor_on_request, arguments_by_place, streamer_gets_batches, sampler_config_is_read_and_written, sampler_config_as_an_argument,
    their_generation_config, flat_fields_of_the_models_config, start_canvas, cache_of_an_earlier_turn, record_of_every_step,
    pinned_position, padded_batch,
    prompt_states_of_every_layer, canvas_states_of_every_layer, what_goes_into_a_layer, attention_by_keyword, projections_of_one_pass,
    whole_passes, logit_lens, steering_of_the_canvas, steering_of_the_prompt, ablated_in_place, replaced_forward, modules_by_class_name,
    modules_by_class, names_of_weights, router_statistics, experts_inputs, attributes_that_scripts_read, hand_written_loop,
    masks_of_padded_rows, decoder_by_itself, causal_pass_read, self_conditioning_without_a_batch, self_conditioning_of_the_first_step,
    exactly_n_steps,
    model_without_head, states_of_a_call, static_cache, gradients_of_a_loop,
]  # fmt: skip
