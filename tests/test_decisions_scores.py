"""What options of a question score, against all strings of tokens; where they stand on canvases; and what is refused."""

import itertools
import json
import math

import pytest
import torch

from generation import Choice
from generation.asking import Ends
from generation.constraints.compiled import compile_constraint
from generation.decisions.allowed import canvas_automaton
from generation.decisions.layout import lay_out
from generation.decisions.questions import Asked
from generation.decisions.scores import name_ids, named_log_probs, option_scores
from generation.decisions.spelling import Spelling, spelling_of

LETTERS = [None, b"a", b"b", b"ab", b"ba", b"aab", b"a"]  # 0: the end, which writes nothing; two ids write the same
END, PAD = 0, 7


class Letters:
    """A tokenizer of these ids that takes the longest one, from left to right."""

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [self.one(text.encode()) for text in texts]}

    def one(self, text):
        found = []
        while text:
            token = max((place for place, each in enumerate(LETTERS) if each and text.startswith(each)), key=lambda t: len(LETTERS[t]))
            found, text = [*found, token], text[len(LETTERS[token]) :]
        return found


def letters():
    ids = {}
    for token, text in enumerate([*LETTERS, None]):
        if text:
            ids.setdefault(text, []).append(token)
    return Spelling([*LETTERS, None], ids, 3)


def by_enumeration(field, log_probs, ends):
    """Of each option, over all strings of ids of the field's width."""
    totals = []
    for text in field.texts:
        found = []
        for ids in itertools.product(range(8), repeat=field.width):
            written, rest = list(ids), []
            if field.ends:
                stop = next((place for place, token in enumerate(ids) if token in ends.stops), None)
                if stop is None:
                    continue
                written, rest = written[:stop], list(ids[stop + 1 :])
            if any(LETTERS[token] is None if token < 7 else True for token in written) or any(token != ends.pad for token in rest):
                continue
            if b"".join(LETTERS[token] for token in written) == text:
                found.append(sum(float(log_probs[place, token]) for place, token in enumerate(ids)))
        totals.append(math.log(math.fsum(map(math.exp, found))) if found else -math.inf)
    return totals


@pytest.mark.parametrize("options", [("ab", "bb", "aab"), ("aab", "bab"), ("a", "ab", "abba"), ("abab", "baba", "aabb"), ("b", "a")])
@pytest.mark.parametrize("pad", [PAD, END])
def test_scores_are_those_of_all_ways_to_write_an_option(options, pad):
    ends, spelling = Ends(END, (END,), pad), letters()
    (layout,) = lay_out([Asked("q", options)], Letters(), spelling, 9, ends, False)
    (field,), named = layout.fields, name_ids(layout, spelling, ends)
    log_probs = torch.randn((3, field.width, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(dim=-1)
    scores = option_scores(log_probs[..., named.ids], named.automata[0])
    for read in range(3):
        assert scores[read].tolist() == pytest.approx(by_enumeration(field, log_probs[read], ends), abs=1e-9)


def test_options_of_one_length_are_a_field_and_others_leave_the_end_open():
    ends = Ends(END, (END,), PAD)
    (same,) = lay_out([Asked("q", ("b", "ab"))], Letters(), letters(), 9, ends, False)
    assert (same.fields[0].begin, same.fields[0].width, same.fields[0].ends) == (0, 1, False) and int(same.open.sum()) == 1
    (other,) = lay_out([Asked("q", ("b", "abb"))], Letters(), letters(), 9, ends, False)
    assert (other.fields[0].begin, other.fields[0].width, other.fields[0].ends) == (0, 3, True)
    assert other.ids.tolist() == [2, END] + [PAD] * 7


def test_text_of_an_option_is_spelled_as_its_compiled_constraint_does(tokenizer):
    """What `spelling` makes shortly is what the compiler of languages makes over the whole vocabulary."""
    size = 600
    spelling, text = spelling_of(tokenizer, size), "blue mugs"
    compiled = compile_constraint(Choice([text]), tokenizer, size, cache=False)
    edges = {(begin, stop, token) for begin, stop, token in spelling.edges(text.encode())}
    named = {(int(s), token, int(t)) for s, k, t in zip(compiled.source, compiled.kind, compiled.target, strict=True)
             for token in (compiled.classes == k).nonzero().flatten().tolist()}  # fmt: skip
    assert compiled.states == len(text) + 1 and len(named) == len(edges)
    distances = dict(zip(range(compiled.states), compiled.fewest.tolist(), strict=True))
    assert distances[0] == min(compiled.fewest[0], len(text))
    assert {token for _, token, _ in named} == {token for _, _, token in edges}


def layouts_of(tokenizer, asked, length=64, as_json=True):
    ends = Ends(106, (1, 106), 0)
    return lay_out(asked, tokenizer, spelling_of(tokenizer, len(tokenizer)), length, ends, as_json), ends


def test_questions_of_equal_width_share_a_canvas_that_reads_as_json(tokenizer):
    asked = [Asked("refund", ("Y", "N")), Asked("tone", ("A", "B", "C")), Asked("stars", ("1", "2", "3"))]
    (layout,), _ = layouts_of(tokenizer, asked)
    text = tokenizer.decode(layout.ids.tolist(), skip_special_tokens=True)
    assert text == '{"refund": "Y", "tone": "A", "stars": "1"}' == json.dumps({one.name: one.options[0] for one in asked})
    assert int(layout.open.sum()) == 3 and [field.width for field in layout.fields] == [1, 1, 1]
    assert [[text.decode() for text in field.texts] for field in layout.fields] == [list(one.options) for one in asked]


def test_question_whose_options_differ_in_length_closes_a_canvas(tokenizer):
    asked = [Asked("a", ("Y", "N")), Asked("b", ("blue mugs", "mugs")), Asked("c", ("A", "B")), Asked("d", ("Y", "N"))]
    layouts, _ = layouts_of(tokenizer, asked)
    assert [[field.place for field in layout.fields] for layout in layouts] == [[0, 1], [2, 3]]
    assert layouts[0].fields[-1].ends and not layouts[1].fields[-1].ends
    assert [text.decode()[-2:] for text in layouts[0].fields[1].texts] == ['"}', '"}']


def test_canvas_that_would_be_too_long_is_divided(tokenizer):
    asked = [Asked(f"question {place}", ("A", "B")) for place in range(5)]
    layouts, _ = layouts_of(tokenizer, asked, length=40)
    assert len(layouts) > 1 and [field.place for layout in layouts for field in layout.fields] == list(range(5))


def test_canvas_automaton_accepts_what_options_write_in_their_places_and_nothing_else(tokenizer):
    asked = [Asked("a", ("Y", "N")), Asked("b", ("blue mugs", "mugs"))]
    (layout,), ends = layouts_of(tokenizer, asked)
    automaton = canvas_automaton(layout, spelling_of(tokenizer, len(tokenizer)), ends, len(tokenizer))
    for one, other in itertools.product(*(each.options for each in asked)):
        ids = tokenizer(json.dumps({"a": one, "b": other}), add_special_tokens=False)["input_ids"]
        assert automaton.accepts(ids) and not automaton.accepts(ids[:-1])
    assert not automaton.accepts(tokenizer('{"a": "M", "b": "mugs"}', add_special_tokens=False)["input_ids"])
    ids = tokenizer('{"a": "Y", "b": "mugs"}', add_special_tokens=False)["input_ids"]
    assert not automaton.accepts([*tokenizer("{", add_special_tokens=False)["input_ids"],
                                  *tokenizer('"', add_special_tokens=False)["input_ids"], *ids[1:]])  # fmt: skip


def test_log_probabilities_of_named_ids_are_those_of_whole_logits(trained):
    hidden = torch.randn((2, 3, trained.config.text_config.hidden_size), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, 77, 301])
    with torch.no_grad():
        expected = trained.compute_logits(hidden).double().log_softmax(dim=-1)[..., ids]
        assert trained.why_dense(hidden.device) is None
        torch.testing.assert_close(named_log_probs(trained, hidden, ids), expected, atol=1e-4, rtol=0)  # float32 sums of 600 ids


@pytest.mark.parametrize(
    ("options", "length", "said"),
    [(("yes", "<eos>"), 64, "cannot write"), (("yes", "no " * 60), 64, "does not fit")],
)
def test_option_that_cannot_be_written_is_named(tokenizer, options, length, said):
    with pytest.raises(ValueError, match=f"question 'q'.*{said}"):
        layouts_of(tokenizer, [Asked("q", options)], length)
