"""The jobs of `examples/jobs`: their checkers, their held-out split, and the tokenizer trained on them."""

import json
import random
from datetime import date, timedelta
from pathlib import Path

import pytest

from jobs import CALLS, DECISION_JOBS, SPLITS, TEXT_JOBS, decisions, is_held_out
from jobs.dates import FORMS, ISO_FORM, read_date, write_date
from jobs.days import draw_over_short_month
from jobs.note_variety import compose, draw_varied
from jobs.note_words import ITEMS, NAMES, TEST_TEMPLATES, TRAIN_TEMPLATES
from jobs.notes import KEYS, expand, read_note
from jobs.number_words import read_words, spell
from jobs.units import shift
from modeling_diffusiongemma import default_checkpoint

SAMPLES = 1000
ALL_JOBS = TEXT_JOBS | DECISION_JOBS | {CALLS.name: CALLS}
jobs = pytest.mark.parametrize("job", ALL_JOBS.values(), ids=list(ALL_JOBS))
splits = pytest.mark.parametrize("split", SPLITS)


def draw(job, split, count=SAMPLES, seed=3):
    rng = random.Random(seed)
    return [job.sample(rng, split) for _ in range(count)]


def corrupt(text, rng):
    """Replaces one letter or digit by another of its kind."""
    position = rng.choice([index for index, character in enumerate(text) if character.isalnum()])
    kind = "0123456789" if text[position].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    return text[:position] + rng.choice(kind.replace(text[position], "")) + text[position + 1 :]


@jobs
@splits
def test_canonical_response_passes_its_checker(job, split):
    for prompt, response in draw(job, split):
        assert job.check(prompt, response), (prompt, response)


@jobs
def test_corrupted_response_fails(job):
    rng = random.Random(0)
    samples = draw(job, "test")
    for (prompt, response), (_, other) in zip(samples, samples[1:], strict=False):
        wrong = [corrupt(response, rng), response[:-1], response + "x", response + response, "", "[]", "null"]
        wrong += [other] if other != response and not job.many_answers else []
        for answer in wrong:
            assert not job.check(prompt, answer), (prompt, answer)


@jobs
def test_splits_share_no_content(job):
    train, test = (frozenset().union(*(job.content(*example) for example in draw(job, split, 2000))) for split in SPLITS)
    assert train and test
    assert not train & test


def test_jobs_share_their_held_out_numbers_and_days():
    """A number or a day held out of one job must not be shown by another."""
    content = {
        (name, split): frozenset().union(*(job.content(*example) for example in draw(job, split, 3000)))
        for name, job in TEXT_JOBS.items()
        for split in SPLITS
    }
    assert not content["number_to_words", "train"] & content["words_to_number", "test"]
    assert not content["words_to_number", "train"] & content["number_to_words", "test"]
    assert not content["number_pair", "train"] & content["number_to_words", "test"]
    assert not content["note_to_json", "train"] & content["date", "test"]
    assert not content["date", "train"] & content["note_to_json", "test"]


@jobs
@splits
def test_same_seed_same_samples(job, split):
    assert draw(job, split, 50) == draw(job, split, 50)
    assert draw(job, split, 50) != draw(job, split, 50, seed=4)


def test_split_does_not_change_between_versions():
    """Pins the hash: with another split, an old checkpoint would be tested on what it has seen."""
    assert [number for number in range(100, 160) if is_held_out(f"number {number}")] == [105, 136, 140, 143, 149]


@jobs
@splits
def test_prompts_are_short(job, split):
    limit = {"note_to_json": 160, "calls": 1200, **dict.fromkeys(DECISION_JOBS, 180)}.get(job.name, 90)
    assert max(len(prompt) for prompt, _ in draw(job, split)) <= limit


@jobs
def test_unknown_split_is_refused(job):
    with pytest.raises(ValueError, match="`split` is 'dev', expected one of"):
        job.sample(random.Random(0), "dev")


@jobs
def test_foreign_prompt_is_refused(job):
    with pytest.raises(ValueError, match="`prompt` is 'hello'"):
        job.check("hello", "4")


@pytest.mark.parametrize("form", (*FORMS, ISO_FORM))
def test_every_day_is_read_back_from_every_form(form):
    for day in range(0, 200 * 365, 17):
        written = date(1900, 1, 1) + timedelta(day)
        assert read_date(write_date(written, form)) == written.isoformat()


@pytest.mark.parametrize(("day", "suffix"), [(1, "st"), (2, "nd"), (3, "rd"), (11, "th"), (12, "th"), (13, "th"), (21, "st"), (22, "nd")])
def test_ordinals(day, suffix):
    assert write_date(date(1998, 3, day), "the {d}{suffix} of {month} {y}") == f"the {day}{suffix} of March 1998"


def test_speller_and_grammar_agree_on_every_number():
    assert [read_words(spell(number)) for number in range(10_000)] == list(range(10_000))
    assert spell(4012) == "four thousand and twelve"
    assert spell(1234) == "one thousand two hundred and thirty-four"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "and",
        "two hundred five",
        "and five",
        "two hundred and",
        "two hundred ",
        "twenty five",
        "twenty-",
        "two  hundred",
        "ten-one",
        "Two",
    ],
)
def test_only_the_british_spelling_is_a_number(text):
    assert read_words(text) is None


@pytest.mark.parametrize(
    ("digits", "decimals", "text"),
    [(35, -2, "3500"), (35, 1, "3.5"), (5, 3, "0.005"), (50, 1, "5"), (1200, 3, "1.2"), (7, 0, "7"), (100, 0, "100")],
)
def test_decimal_point_moves(digits, decimals, text):
    assert shift(digits, decimals) == text


@pytest.mark.parametrize("answer", ["3500.0 m", "3500 km", "3500", "03500 m", "3500m", "3.5e3 m", "3500 m."])
def test_only_the_canonical_conversion_is_right(answer):
    assert TEXT_JOBS["units"].check("What is 3.5 km in m?", "3500 m")
    assert not TEXT_JOBS["units"].check("What is 3.5 km in m?", answer)


NOTE = "To JSON: On 12 May 2024 Anna paid $4.50 for 3 blue mugs."


def test_note_is_read():
    values = {"name": "Anna", "quantity": "3", "item": "blue mugs", "price": "4.50", "date": "2024-05-12"}
    assert read_note(NOTE) == ("On {date} {name} paid {price} for {quantity} {item}.", values)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"price": 4.51}, False),
        ({"price": "4.50"}, False),
        ({"quantity": 3.0}, False),
        ({"quantity": True}, False),
        ({"name": None}, False),
        ({"item": "mugs"}, False),
        ({"date": "12 May 2024"}, False),
        ({"extra": 1}, False),
    ],
)
def test_note_checker_compares_values_and_types(change, right):
    answer = {"name": "Anna", "quantity": 3, "item": "blue mugs", "price": 4.5, "date": "2024-05-12"} | change
    assert TEXT_JOBS["note_to_json"].check(NOTE, json.dumps(answer)) is right


def test_note_checker_refuses_missing_and_repeated_keys():
    check = TEXT_JOBS["note_to_json"].check
    assert check("To JSON: 3 mugs for Anna.", '{"name": "Anna", "quantity": 3, "item": "mugs"}')
    assert not check("To JSON: 3 mugs for Anna.", '{"name": "Anna", "item": "mugs"}')
    assert not check("To JSON: 3 mugs for Anna.", '{"name": "Bob", "name": "Anna", "quantity": 3, "item": "mugs"}')


def test_note_responses_are_one_line_in_key_order():
    for _, response in draw(TEXT_JOBS["note_to_json"], "train", 300):
        keys = list(json.loads(response))
        assert keys == [key for key in KEYS if key in keys] and "\n" not in response


def test_note_lists_are_large_and_templates_disjoint():
    assert len(set(NAMES)) == len(NAMES) >= 150 and len(set(ITEMS)) == len(ITEMS) >= 100
    assert len(TRAIN_TEMPLATES) >= 40 and len(TEST_TEMPLATES) >= 10
    sentences = [{sentence for template in templates for sentence in expand(template)} for templates in (TRAIN_TEMPLATES, TEST_TEMPLATES)]
    assert not sentences[0] & sentences[1]


def test_composed_notes_show_nothing_that_is_held_out_and_say_what_they_hold():
    """Every value stands in the sentence as it is copied, and no sentence, name, noun, price or day of the test split is made."""
    rng = random.Random(5)
    held_out = frozenset().union(
        *(TEXT_JOBS["note_to_json"].content(*example) for example in draw(TEXT_JOBS["note_to_json"], "test", 3000))
    )
    kinds = {"name": "name {}", "item": "noun {}", "price": "price {}", "date": "date {}"}
    for _ in range(2000):
        prompt, response = draw_varied(rng)
        values = json.loads(response, parse_float=str)
        assert list(values) == [key for key in KEYS if key in values] and len(values) >= 3
        assert all(str(values[key]) in prompt for key in ("name", "quantity", "item", "price") if key in values)
        for key, form in kinds.items():
            if key in values:
                assert form.format(str(values[key]).split()[-1]) not in held_out
    sentences = {compose(rng) for _ in range(5000)}
    assert len(sentences) > 4000
    assert not sentences & {sentence for template in TEST_TEMPLATES for sentence in expand(template)}


def test_days_roll_over_months_and_leap_years():
    check = TEXT_JOBS["days"].check
    prompt = "The 14 days from 27 February 2024 on."
    days = ["2024-02-27", "2024-02-28", "2024-02-29", *(f"2024-03-{day:02}" for day in range(1, 12))]
    assert check(prompt, ", ".join(days)) and not check(prompt, ", ".join(days[:-1])) and not check(prompt, ",".join(days))
    assert not check("The 14 days from 27 February 2023 on.", ", ".join(days))


def test_lists_over_short_months_are_of_the_training_split():
    rng, job = random.Random(1), TEXT_JOBS["days"]
    for _ in range(200):
        prompt, response = draw_over_short_month(rng)
        first, last = (date.fromisoformat(day) for day in (response[:10], response[-10:]))
        assert job.check(prompt, response) and first.month in (2, 4, 6, 9, 11) and last.month == first.month + 1
        assert not any(is_held_out(content) for content in job.content(prompt, response))


@pytest.mark.parametrize(("answer", "right"), [
    ("4006 = four thousand and six", True), ("4006 = four thousand six", False), ("4007 = four thousand and six", False),
    ("4006=four thousand and six", False), ("four thousand and six = 4006", False), ("406 = four hundred and six", False),
])  # fmt: skip
def test_pair_is_right_where_its_sides_agree(answer, right):
    assert TEXT_JOBS["number_pair"].check("Any number in digits and in words.", answer) is right


BAG = "A bag holds 3 red and 7 blue marbles.\ncolour: Which colour is drawn? A. blue, B. red\nred: Is it red? Y or N\nAnswer as JSON."
AMOUNTS = "Ada has 1.5 km, Ben has 1499 m.\nmore: Who has more? Ben, Ada\nada: Does Ada have more? yes or no\nAnswer as JSON, in words."
SEATS = f"20 of 40 seats are taken.\nfull: How full is it? {', '.join(decisions.LEVELS)}\nAnswer as JSON, in words."


@pytest.mark.parametrize(("prompt", "answer", "right"), [
    (BAG, '{"colour": "A", "red": "N"}', True), (BAG, '{"colour": "B", "red": "Y"}', True), (BAG, '{"colour": "B", "red": "N"}', False),
    (BAG, '{"colour": "C", "red": "N"}', False), (BAG, '{"colour": "A"}', False), (BAG, '{"colour":"A","red":"N"}', False),
    (AMOUNTS, '{"more": "Ada", "ada": "yes"}', True), (AMOUNTS, '{"more": "Ben", "ada": "no"}', False),
    (SEATS, '{"full": "more"}', True), (SEATS, '{"full": "some"}', False),
])  # fmt: skip
def test_decision_is_right_where_all_of_it_may_be_the_case(prompt, answer, right):
    assert DECISION_JOBS["bag"].check(prompt, answer) is right


def test_truth_is_how_often_answers_are_drawn():
    asked = {"c": {"type": "choice", "instructions": "Which colour is drawn?", "criteria": {"blue": None, "red": None}},
             "r": {"type": "noul", "instructions": "Is it red?"}}  # fmt: skip
    request = {"state": "A bag holds 3 red and 7 blue marbles.", "questions": asked}
    assert decisions.truth(request) == {"c": [0.7, 0.3], "r": [0.3, 0.7]}
    for request in (decisions.draw_request(random.Random(seed), "train") for seed in range(300)):
        assert all(sum(chances) == pytest.approx(1) for chances in decisions.truth(request).values())
    expected, drawn = 0.0, 0
    for prompt, response in draw(DECISION_JOBS["bag"], "train", 3000):
        asked, in_words = decisions._read_prompt(prompt)
        for name, said in json.loads(response).items():
            expected += decisions.truth(asked)[name][0]
            drawn += said == decisions.labels(asked["questions"][name], in_words)[0]
    assert drawn == pytest.approx(expected, rel=0.07)


def test_checkpoint_writes_requests_as_they_were_learned():
    decision = pytest.importorskip("transformers.decision", reason="transformers' decisions came with 5.23")
    from transformers import AutoTokenizer

    path = default_checkpoint("decisions")
    config, tokenizer = decision.DecisionConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for request in (decisions.draw_request(random.Random(seed), "test") for seed in range(50)):
        ((inputs, _),) = config.prepare_inputs(request, tokenizer)
        chat = [{"role": "user", "content": decisions.render(request)}]
        assert inputs["input_ids"][0].tolist() == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from jobs.tokenizer import build_tokenizer

    return build_tokenizer()


TEXTS = [
    "",
    " ",
    "a  b\n\n c\t",
    "été 漢字 🙂 e\u0301\u200d ٣",
    "\x00\x7f\ufeff\U0010ffff",
    " he said , \" it 's n't \" .",
    "3.50, 1998-03-03",
    "<eos> <|turn>x<unused7>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_survives_the_round_trip(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        codes = [rng.randrange(1, rng.choice((0x80, 0x800, 0xD800, 0x110000))) for _ in range(20)]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_specials_then_bytes_then_merges(tokenizer):
    from jobs.tokenizer import SPECIAL_IDS

    tokens = tokenizer.convert_ids_to_tokens(list(range(640)))
    assert len(tokenizer) == tokenizer.vocab_size == len(set(tokens)) == 640
    for index, token in enumerate(tokens[:128]):
        assert token == f"<unused{index}>" or SPECIAL_IDS[token] == index
    assert {tokens[index]: index for index in SPECIAL_IDS.values()} == SPECIAL_IDS
    assert all(len(token) == 1 for token in tokens[128:384])
    assert all(len(token) > 1 for token in tokens[384:])
    assert set(tokenizer.all_special_ids) >= {0, 1, 2, 3, 4}
    assert tokenizer.decode(list(range(128)), skip_special_tokens=True) == ""


def test_named_tokens_and_settings(tokenizer):
    named = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
        tokenizer.mask_token_id,
    )
    assert named == (0, 1, 2, 3, 4)
    assert (tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id) == (107, 108, 109)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 8192


def test_tokenizer_is_that_of_the_shipped_checkpoint(tokenizer):
    """Jobs that came later are written in the tokens of the first."""
    shipped = json.loads((Path(default_checkpoint()) / "tokenizer.json").read_text())
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == shipped["model"]


def test_digits_are_single_tokens_and_words_ignore_what_stands_before(tokenizer):
    assert [tokenizer.decode(token) for token in tokenizer.encode("2024")] == list("2024")
    for word in ("Quinn", "mugs"):
        ids = tokenizer.encode(word)
        assert tokenizer.encode(" " + word)[-len(ids) :] == tokenizer.encode(': "' + word)[-len(ids) :] == ids


def test_building_twice_gives_the_same_tokenizer(tokenizer):
    from jobs.tokenizer import build_tokenizer

    assert build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(("size", "bound"), [(383, "at least 384"), (100_000, "at most")])
def test_impossible_vocabulary_is_refused(size, bound):
    from jobs.tokenizer import build_tokenizer

    with pytest.raises(ValueError, match=f"`vocab_size` is {size}, expected {bound}"):
        build_tokenizer(size)


def test_saved_tokenizer_loads_without_a_config(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.chat_template == tokenizer.chat_template and loaded.padding_side == "left"
    assert (loaded.mask_token_id, loaded.image_token_id, loaded.model_max_length) == (4, 107, 8192)


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " hi\n"}]},
    {"role": "assistant", "content": "yo ho"},
    {"role": "user", "content": "ok"},
]


def test_chat_template_writes_turns(tokenizer):
    text = "<bos><|turn>system\nbe brief<turn|>\n<|turn>user\n<|image|> hi\n<turn|>\n<|turn>model\nyo ho<turn|>\n<|turn>user\nok<turn|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == text + "<|turn>model\n"
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert ids.count(2) == 1 and tokenizer.decode(ids) == text


def test_generation_prompt_is_a_prefix_of_the_answered_chat(tokenizer):
    """Training and generation must see the same prompt ids."""
    for job in TEXT_JOBS.values():
        prompt, response = job.sample(random.Random(1), "train")
        user = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=True)["input_ids"]
        answered = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": response}], return_dict=True)["input_ids"]
        assert answered == asked + tokenizer.encode(response) + tokenizer.encode("<turn|>\n")


def test_assistant_mask_covers_the_answer_and_its_end(tokenizer):
    parts = [{"type": "text", "text": "seven "}, {"type": "text", "text": "🙂"}]
    chat = [*CHAT, {"role": "assistant", "content": parts}]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=False) if mask]
    assert tokenizer.decode(masked) == "yo ho<turn|>seven 🙂<turn|>"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, "role tool, expected user, assistant or system"),
        ({"role": "user", "content": [{"type": "audio"}]}, "content part of type audio, expected text or image"),
    ],
)
def test_chat_template_refuses_what_it_does_not_know(tokenizer, message, error):
    jinja2 = pytest.importorskip("jinja2")
    with pytest.raises(jinja2.exceptions.TemplateError, match=error):
        tokenizer.apply_chat_template([message], tokenize=False)
