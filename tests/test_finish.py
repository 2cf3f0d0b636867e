"""After how many tokens a row has ended, and why: the same by every way of decoding."""

from types import SimpleNamespace

import pytest
import torch
from small_models import CANVAS, PAD, prompts, small_model
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from generation import AfterCanvas, stream_events
from jobs.tokenizer import build_tokenizer

END, OTHER, PROMPT, ALLOWED = 1, 40, 6, 13
ENDS = {"at the last allowed token": 12, "early": 3, "behind the allowed tokens, in the last canvas": 13, "never": None}
COUNTS, WHYS = [13, 4, 13, 13], ["stop", "stop", "length", "length"]
WAYS = [{"decoding": "diffusion"}, {"decoding": "autoregressive"}, {"decoding": "verified"}, {"backend": "reference"}]


class Script(LogitsProcessor):
    """Row i of `prompts` writes `lines[i]`, and `OTHER` behind it."""

    def __init__(self, lines, ids):
        self.lines = {int(first): line for first, line in zip(ids[:, 0], lines, strict=True)}

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e9)
        for row, first in enumerate(input_ids[:, 0].tolist()):
            for place in range(scores.shape[1]):
                rest = self.lines[first][input_ids.shape[1] - PROMPT + place :]
                scores[row, place, rest[0] if rest else OTHER] = 0.0
        return scores


@pytest.fixture(scope="module")
def model():
    return small_model()


def call(ends, **settings):
    """A prompt a row, and the arguments with which it ends at its place of `ends`."""
    ids = prompts(len(ends), PROMPT)[0]
    script = Script([[OTHER] * (ALLOWED + 9) if end is None else [OTHER] * end + [END] for end in ends], ids)
    given = {
        "max_new_tokens": ALLOWED,
        "eos_token_id": END,
        "do_sample": False,
        "generation_config": {"max_denoising_steps": 2},
        "logits_processor": [script],
    }
    return ids, given | settings


def finished(model, ends, **settings):
    ids, given = call(ends, **settings)
    return model.generate(ids, return_dict_in_generate=True, **given)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way.values())))
def test_an_end_at_the_last_allowed_token_is_a_stop_and_one_behind_it_none(model, way):
    output = finished(model, ENDS.values(), **way)
    assert output.lengths.dtype == torch.int64 and output.lengths.tolist() == COUNTS
    assert output.finish_reasons == WHYS
    assert torch.equal(output.tokens_per_forward, output.lengths.float() / output.denoising_steps)


def test_rows_that_are_verified_one_by_one_share_one_clock(model, monkeypatch):
    """Each used to start `max_time` anew. A clock that moves a second whenever it is looked at: at two rounds a row, the third is late."""
    ticks = iter(range(1000))
    monkeypatch.setattr("generation.call.plan.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    output = finished(model, [None] * 4, decoding="verified", max_time=5.5, max_denoising_steps=1)
    assert output.finish_reasons[0] == "length" and output.finish_reasons[-1] == "time", output.finish_reasons
    assert next(ticks) < 25, "rows behind the time take one round each"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way.values())))
def test_time_is_the_reason_of_the_rows_it_cuts_alone(model, way):
    """Decoding without diffusion failed where the time was over before the first token."""
    output = finished(model, [0, None], max_time=1e-9, **way)
    assert output.finish_reasons == ["stop", "time"] and output.lengths[0] == 1
    assert output.lengths[1] == (1 if way.get("decoding") == "autoregressive" else CANVAS)
    assert finished(model, [None], max_new_tokens=1, max_time=1e-9, **way).finish_reasons == ["length"], "nothing was left to write"


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(
    ("criterion", "reason", "length"),
    [
        (After(PROMPT + 5), "stop", 5),
        (AfterCanvas(After(PROMPT + 5)), "stop", CANVAS),
        (EosTokenCriteria(OTHER), "stop", 1),
        (MaxLengthCriteria(PROMPT + 7), "length", 7),
        (MaxTimeCriteria(1.0, initial_timestamp=0.0), "time", CANVAS),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, StoppingCriteria) else "",
)
def test_a_stopping_criterion_stops_and_a_limit_of_transformers_is_a_limit(model, criterion, reason, length):
    output = finished(model, [None, None], stopping_criteria=[criterion])
    assert output.finish_reasons == [reason] * 2 and output.lengths.tolist() == [length] * 2


class Following(StoppingCriteria):
    """As application libraries write them: smolagents joins the last token of each call to a text (`StopOnStrings`), LangChain looks at the
    last token alone (`StopOnTokens`), lm-eval keeps what has ended by its place in the batch (`MultiTokenEOSCriteria`)."""

    def __init__(self, lengths):
        self.lengths, self.shown = lengths, [[] for _ in lengths]

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == len(self.lengths) and scores is None
        for text, row in zip(self.shown, input_ids.tolist(), strict=True):
            text.append(row[-1])
            assert text == row[PROMPT:], "a token came twice, late, or not at all"
        return torch.tensor([len(text) >= length for text, length in zip(self.shown, self.lengths, strict=True)])


@pytest.mark.parametrize("decoding", ["diffusion", "autoregressive"])
def test_a_criterion_is_asked_once_after_each_token_with_every_row_in_its_place(model, decoding):
    """It was asked after a canvas, when what it looks for was behind others, and of the rows that were left."""
    criterion = Following([2, 12, 99, 99])
    output = finished(model, [None, None, 4, None], stopping_criteria=[criterion], decoding=decoding)
    assert output.lengths.tolist() == [2, 12, 5, 13] and output.finish_reasons == ["stop", "stop", "stop", "length"]
    assert criterion.shown[0][2:] == [PAD] * 11 and criterion.shown[2][4:] == [END] + [PAD] * 8, "what has ended is padded"
    assert torch.equal(output.sequences[:, PROMPT:], torch.tensor(criterion.shown))


def test_a_criterion_that_ends_all_rows_is_asked_no_more(model):
    criterion = Following([3, 3])
    assert finished(model, [None, None], stopping_criteria=[criterion]).lengths.tolist() == [3, 3]
    assert [len(text) for text in criterion.shown] == [3, 3]


def test_a_criterion_of_the_callers_sees_one_row_alone_where_drafts_are_verified(model):
    assert finished(model, [None], stopping_criteria=[Following([4])], decoding="verified").lengths.tolist() == [4]
    with pytest.raises(ValueError, match="decoding='verified'.* 2 rows.*Following.*expected one row"):
        finished(model, [None, None], stopping_criteria=[Following([4, 4])], decoding="verified")
    assert finished(model, [None, None], stopping_criteria=[MaxLengthCriteria(PROMPT + 7)], decoding="verified").lengths.tolist() == [7, 7]


def test_of_two_reasons_at_one_token_the_stop_counts(model):
    output = finished(model, [6, 7, None], stopping_criteria=[MaxTimeCriteria(1.0, initial_timestamp=0.0), MaxLengthCriteria(PROMPT + 7)])
    assert output.finish_reasons == ["stop", "length", "length"] and output.lengths.tolist() == [7, 7, 7]


def test_a_stop_string_is_a_stop_also_in_the_last_allowed_token():
    tokenizer, own = build_tokenizer(), small_model(vocab_size=640)
    ids, line = prompts(2, PROMPT)[0], tokenizer("one; two", add_special_tokens=False)["input_ids"]
    given = {"max_new_tokens": len(line), "eos_token_id": [], "pad_token_id": PAD, "generation_config": {"max_denoising_steps": 2}}
    given |= {"tokenizer": tokenizer, "logits_processor": [Script([line, line], ids)], "return_dict_in_generate": True}
    for stop, length in ((";", next(n for n in range(len(line)) if ";" in tokenizer.decode(line[:n]))), ("two", len(line))):
        output = own.generate(ids, stop_strings=[stop], **given)
        assert output.finish_reasons == ["stop", "stop"] and output.lengths.tolist() == [length, length]


def test_copies_of_a_prompt_have_a_reason_each(model):
    output = finished(model, [3, None], num_return_sequences=2, do_sample=True)
    assert output.finish_reasons == ["stop", "stop", "length", "length"] and output.lengths.tolist() == [4, 4, 13, 13]


def test_a_commit_tells_what_each_row_keeps_and_why_it_ended(model):
    ids, given = call(ENDS.values())
    commits = [event for event in stream_events(model, ids, **given) if not hasattr(event, "step")]
    assert [event.lengths.tolist() for event in commits] == [[10, 4, 10, 10], [3, 0, 3, 3]]
    assert [event.finish_reasons for event in commits] == [(None, "stop", None, None), tuple(WHYS)]
    assert [event.tokens.shape[1] for event in commits] == [10, 3]


def test_a_commit_at_which_the_time_was_over_says_so(model):
    ids, given = call([None])
    *_, last = stream_events(model, ids, max_time=1e-9, **given)
    assert last.finish_reasons == ("time",) and last.lengths.tolist() == [CANVAS]
