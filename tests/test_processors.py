"""Logits processors of the caller's: transformers' classes for `(rows, V)` mean on a canvas what they mean elsewhere, or are refused by
name; others get whole canvases."""

import inspect

import pytest
import torch
import transformers
from small_models import CANVAS, PAD, VOCAB, prompts, small_model
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.models.diffusion_gemma.generation_diffusion_gemma import LinearTemperatureScheduleLogitsProcessor

from generation.call.processors import LOOKS_AT, CallersProcessor

IDS, MASK = prompts(2, 6, seed=1, padded=2)
APPLIED = {
    "EpsilonLogitsWarper": lambda: EpsilonLogitsWarper(0.02), "EtaLogitsWarper": lambda: EtaLogitsWarper(0.02),
    "InfNanRemoveLogitsProcessor": InfNanRemoveLogitsProcessor, "LogitNormalization": LogitNormalization,
    "MinLengthLogitsProcessor": lambda: MinLengthLogitsProcessor(11, 7),
    "MinNewTokensLengthLogitsProcessor": lambda: MinNewTokensLengthLogitsProcessor(6, 4, 7),
    "MinPLogitsWarper": lambda: MinPLogitsWarper(0.3),
    "NoBadWordsLogitsProcessor": lambda: NoBadWordsLogitsProcessor([[5], [6, 8]], eos_token_id=1),
    "NoRepeatNGramLogitsProcessor": lambda: NoRepeatNGramLogitsProcessor(2),
    "RepetitionPenaltyLogitsProcessor": lambda: RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=2),
    "SequenceBiasLogitsProcessor": lambda: SequenceBiasLogitsProcessor([[[5], 2.0], [[6, 8], -3.0]]),
    "SuppressTokensLogitsProcessor": lambda: SuppressTokensLogitsProcessor([3, 4]),
    "TemperatureLogitsWarper": lambda: TemperatureLogitsWarper(0.5), "TopHLogitsWarper": lambda: TopHLogitsWarper(0.4),
    "TopKLogitsWarper": lambda: TopKLogitsWarper(4), "TopPLogitsWarper": lambda: TopPLogitsWarper(0.5),
    "TypicalLogitsWarper": lambda: TypicalLogitsWarper(0.5),
}  # fmt: skip
CLASSES = sorted(
    name for name, kind in inspect.getmembers(logits_process, inspect.isclass)
    if issubclass(kind, LogitsProcessor) and kind is not LogitsProcessor
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    own = small_model()
    own.generation_config.update(eos_token_id=[1], pad_token_id=PAD)
    return own


def generate(model, ids=IDS, **settings):
    return model.generate(
        ids, **{"attention_mask": MASK, "max_new_tokens": 15, "generation_config": {"max_denoising_steps": 4}, "seed": 0, **settings}
    )


def logits(seed=0):
    return torch.randn(2, CANVAS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_every_class_that_is_applied_is_tried_here():
    assert APPLIED.keys() == LOOKS_AT.keys() and LOOKS_AT.keys() <= set(CLASSES)
    exported = {name for name in dir(transformers) if name.endswith(("LogitsProcessor", "LogitsWarper"))}
    assert exported - {"LogitsProcessor", "LinearTemperatureScheduleLogitsProcessor"} <= set(CLASSES)


@pytest.mark.parametrize("name", sorted(APPLIED))
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_transformers_processor_sees_each_position_behind_what_comes_before_it(name, first):
    """A repetition penalty touched the last position alone, n-grams were banned everywhere, others raised or gave NaN."""
    guess, raw = prompts(2, CANVAS, seed=3)[0], logits()
    shaped = CallersProcessor.of(APPLIED[name]())(raw.clone(), IDS, None if first else guess, 3)
    for place in range(CANVAS):
        before = IDS if first else torch.cat((IDS, guess[:, :place]), dim=1)
        if LOOKS_AT[name] == "length" and first:
            before = torch.cat((IDS, torch.zeros(2, place, dtype=torch.int64)), dim=1)
        torch.testing.assert_close(shaped[:, place], APPLIED[name]()(before, raw[:, place].clone()), atol=0, rtol=0)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - APPLIED.keys()))
def test_every_other_class_of_transformers_is_refused_by_name(model, name):
    processor = object.__new__(getattr(logits_process, name))
    with pytest.raises(ValueError, match=f"logits_processor.*{name}"):
        generate(model, logits_processor=[processor])


ALIKE = {
    "repetition_penalty": (1.8, lambda: RepetitionPenaltyLogitsProcessor(1.8)),
    "no_repeat_ngram_size": (2, lambda: NoRepeatNGramLogitsProcessor(2)),
    "bad_words_ids": ([[5], [60, 61]], lambda: NoBadWordsLogitsProcessor([[5], [60, 61]], eos_token_id=1)),
    "sequence_bias": ({(42,): 8.0}, lambda: SequenceBiasLogitsProcessor({(42,): 8.0})),
    "suppress_tokens": ([70, 71, 72], lambda: SuppressTokensLogitsProcessor([70, 71, 72])),
    "top_k": (2, lambda: TopKLogitsWarper(2)),
    "min_new_tokens": (9, lambda: MinNewTokensLengthLogitsProcessor(6, 9, list(range(20, 60)))),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("form", [list, LogitsProcessorList, tuple])
def test_processor_and_argument_give_the_same_tokens(model, name, form):
    value, make = ALIKE[name]
    ends = {"eos_token_id": list(range(20, 60))} if name == "min_new_tokens" else {}
    got = generate(model, logits_processor=form([make()]), **ends)
    assert torch.equal(got, generate(model, **{name: value}, output_logits=True, return_dict_in_generate=True, **ends).sequences)
    assert not torch.equal(got, generate(model, **ends)), "the argument changes nothing here"


def test_one_processor_alone_and_a_plain_list_are_taken(model):
    expected = generate(model, logits_processor=LogitsProcessorList([TopKLogitsWarper(1)]))
    assert torch.equal(generate(model, logits_processor=[TopKLogitsWarper(1)]), expected)
    assert torch.equal(generate(model, logits_processor=TopKLogitsWarper(1)), expected)


def test_what_is_derived_from_transformers_classes_keeps_their_form(model):
    class Derived(RepetitionPenaltyLogitsProcessor):
        def __call__(self, input_ids, scores):
            assert scores.dim() == 2
            return super().__call__(input_ids, scores)

    plain = generate(model, logits_processor=[RepetitionPenaltyLogitsProcessor(1.8)])
    assert torch.equal(generate(model, logits_processor=[Derived(1.8)]), plain)


def test_processor_written_for_a_canvas_gets_one(model):
    """Those of a class of its own, those that take `cur_step`, functions, and transformers' class for this model."""
    shapes = []

    class Own(LogitsProcessor):
        def __call__(self, input_ids, scores):
            shapes.append(tuple(scores.shape))
            return scores

    class Stepping(TopKLogitsWarper):
        def __call__(self, input_ids, scores, cur_step):
            shapes.append((tuple(scores.shape), cur_step))
            return scores

    class Keywords:
        def __call__(self, input_ids, scores, **kwargs):
            shapes.append((tuple(scores.shape), kwargs["cur_step"]))
            return scores

    def function(input_ids, scores):
        shapes.append(tuple(scores.shape))
        return scores

    for processor in (Own(), Stepping(2), Keywords(), function):
        generate(model, max_new_tokens=CANVAS, max_denoising_steps=1, logits_processor=[processor])
    whole = (2, CANVAS, VOCAB)
    assert shapes == [whole, (whole, 1), (whole, 1), whole]
    schedule = LinearTemperatureScheduleLogitsProcessor(0.5, 0.5, 4)
    halved = generate(model, logits_processor=[TemperatureLogitsWarper(0.5)])
    assert torch.equal(generate(model, logits_processor=[schedule]), halved)


def test_processor_that_changes_its_logits_leaves_output_logits_alone(model):
    def spoil(input_ids, scores):
        return scores.fill_(0)

    settings = {"max_new_tokens": CANVAS, "max_denoising_steps": 1, "output_logits": True, "return_dict_in_generate": True}
    assert torch.equal(generate(model, logits_processor=[spoil], **settings).logits.bool().any(-1), torch.ones(2, CANVAS, dtype=torch.bool))


def extra(input_ids, scores, table):
    return scores


@pytest.mark.parametrize(
    "bad", [[TopKLogitsWarper], 3, "x", [3], {}, [None], [lambda ids, scores: None], [lambda ids, scores: scores[0]], [extra]],
)  # fmt: skip
def test_what_is_no_processor_is_refused_by_name(model, bad):
    with pytest.raises(ValueError, match="logits_processor"):
        generate(model, logits_processor=bad)


# Those that other libraries and users write for single tokens


class Following:
    """What `outlines.from_transformers(model, tokenizer)(prompt, output_type)` hands to `generate`, and xgrammar's `LogitsProcessor` is:
    called once a token, each row follows an automaton by the last token it is shown (outlines 1.3.3, xgrammar 0.2.8)."""

    __module__ = "outlines.backends.outlines_core"

    def __init__(self, lines):
        self.lines, self.written = lines, [[] for _ in lines]

    def __call__(self, input_ids, scores):
        assert scores.shape[:-1] == input_ids.shape[:-1] == (len(self.lines),), "as these libraries demand"
        for row, (line, written) in enumerate(zip(self.lines, self.written, strict=True)):
            written.extend(input_ids[row, 6 + len(written) :].tolist())
            allowed = torch.full((VOCAB,), -torch.inf)
            allowed[line[len(written)] if len(written) < len(line) else PAD] = 0
            scores[row] += allowed
        return scores


def test_processor_that_follows_a_text_is_refused_by_name_where_a_canvas_is_written_at_once(model):
    """It failed inside with an empty AssertionError, or wrote what it has to hinder."""
    for decoding in ({}, {"decoding": "verified", "do_sample": False}):
        processor = Following([[5, 6, 1], [7, 1]])
        with pytest.raises(ValueError, match="logits_processor.*Following of outlines.*expected `constraint=`.*autoregressive"):
            generate(model, logits_processor=[processor], **decoding)
        assert processor.written == [[], []]


def test_processor_that_follows_a_text_gets_each_token_once_where_tokens_come_one_by_one(model):
    processor = Following([[5, 6, 1], [7, 8, 9, 10, 1]])
    got = generate(model, logits_processor=[processor], decoding="autoregressive")[:, 6:]
    assert got.tolist() == [[5, 6, 1, PAD, PAD], [7, 8, 9, 10, 1]]


def assigned(input_ids, scores):
    scores[:, [3, 7]] = -torch.inf
    return scores


def added(input_ids, scores):
    scores[:, 5] += 4.0
    return scores


def masked(input_ids, scores):
    mask = torch.full_like(scores, -torch.inf)
    mask[:, [2, 4, 9]] = 0
    return scores + mask


@pytest.mark.parametrize("processor", [assigned, added, masked])
def test_processor_that_takes_positions_for_ids_is_told(model, processor):
    """`scores[:, ids] += 4` did nothing, in silence: on a canvas it moves all logits of a position."""
    with pytest.raises(ValueError, match=r"logits_processor.*changed all ids of position \d+ alike.*expected `scores\[\.\.\., ids\]`"):
        generate(model, logits_processor=[processor])


def certain(input_ids, scores):
    """Of one token at one position, which a difference of infinities must not be taken for."""
    scores = scores.clone()
    scores[:, 4] = -torch.inf
    scores[:, 4, 9] = 0.0
    return scores


@pytest.mark.parametrize(
    "processor",
    [lambda _, scores: scores.log_softmax(-1), lambda _, scores: scores - scores.amax(-1, keepdim=True), lambda _, scores: scores / 2,
     lambda _, scores: scores.index_fill(-1, torch.tensor([3, 7]), -torch.inf), lambda _, scores: scores, lambda _, scores: scores + 1,
     lambda _, scores: torch.cat((scores[:, :3].log_softmax(-1), scores[:, 3:]), dim=1), certain],
)  # fmt: skip
def test_processor_that_means_every_position_is_not_taken_for_one_of_them(model, processor):
    generate(model, logits_processor=[processor])


def test_error_of_a_processor_says_what_it_was_given(model):
    """Gathering by ids, as penalties do, fails on a canvas: which processor, and what its logits were, was not said."""

    def penalty(input_ids, scores):
        return scores.scatter(1, input_ids, torch.gather(scores, 1, input_ids) - 1)

    with pytest.raises(RuntimeError) as caught:
        generate(model, logits_processor=[penalty])
    assert "penalty at 0x" in caught.value.__notes__[0] and f"(2, {CANVAS}, {VOCAB})" in caught.value.__notes__[0]


def test_processor_sees_every_row_in_its_place_until_the_last_has_ended(model):
    """A table of the caller's with a line for each row was off by one as soon as a row had left."""
    seen = []

    def first_row_ends(input_ids, scores):
        seen.append(input_ids[:, 0].tolist())
        scores[0, :, 1] += 1e4
        return scores

    assert generate(model, logits_processor=[first_row_ends], max_new_tokens=25)[1, 6 + CANVAS :].ne(PAD).any()
    assert all(rows == IDS[:, 0].tolist() for rows in seen)


# Stopping criteria


def test_criteria_of_transformers_stop_at_their_place_and_not_at_the_end_of_the_canvas(model):
    """Asked after each canvas alone, an end inside of one was missed."""
    free = generate(model)[:, 6:].tolist()
    for form in (list, transformers.StoppingCriteriaList, tuple):
        assert generate(model, stopping_criteria=form([MaxLengthCriteria(9)])).shape[1] == 9
    end = free[1][4]
    got, expected = generate(model, stopping_criteria=[EosTokenCriteria(end)]), generate(model, eos_token_id=end, ignore_after_eos=False)
    assert torch.equal(got, expected)
    assert torch.equal(generate(model, stopping_criteria=EosTokenCriteria(end)), got)


@pytest.mark.parametrize("bad", [EosTokenCriteria, 3, "x", [3], [lambda ids, scores: None], [lambda ids, scores: torch.ones(5)]])
def test_what_is_no_criterion_is_refused_by_name(model, bad):
    with pytest.raises(ValueError, match="stopping_criteria"):
        generate(model, stopping_criteria=bad)
    with pytest.raises(ValueError, match="stopping_criteria.*ConfidenceCriteria"):
        generate(model, stopping_criteria=[ConfidenceCriteria(0.5)])


def test_stop_string_criteria_cut_a_row_behind_the_string():
    from jobs.tokenizer import build_tokenizer

    tokenizer, own = build_tokenizer(), small_model(seed=2, vocab_size=640)
    own.generation_config.update(pad_token_id=0, eos_token_id=[1])
    printable = [i for i in range(128, 640) if (word := tokenizer.decode([i])).isascii() and word.isprintable()]
    banned = sorted(set(range(640)) - set(printable))
    settings = {"max_new_tokens": 20, "max_denoising_steps": 3, "seed": 4, "suppress_tokens": banned}
    ids = tokenizer("Sort 3, 1", return_tensors="pt")["input_ids"]
    free = own.generate(ids, **settings)[0, ids.shape[1] :]
    stop = tokenizer.decode(free[12:13])
    got = own.generate(ids, stopping_criteria=[StopStringCriteria(tokenizer, [stop])], **settings)
    assert torch.equal(got, own.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **settings)) and got.shape[1] < ids.shape[1] + 20
