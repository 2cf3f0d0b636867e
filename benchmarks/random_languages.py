"""Random languages with judges that know nothing of how a constraint is made, and random calls of `generate` under them.

The judges: `re` for patterns; `in` for choices; `json`, and `jsonschema` where it is installed, for schemas; for templates a search for a
way to cut the text into its fields, each judged in its way, and blanks by the tokens written. A judge says what is wrong, or None.
"""

import contextlib
import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import Choice, JsonSchema, Regex, Template
from generation.constraints.compiled import compile_constraint
from jobs import TEXT_JOBS
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint
from recipes import small_config

KINDS = ("regex", "schema", "choice", "template")
ENDS, PAD = (1, 106, 50), 0
LETTERS = "abcdefgxyzABC0123456789    .,:;!?-_/'\"\\\n\téßñ漢語あ😀\u00a0\u2028"
CLASSES = ("[a-f]", "[0-9a-z]", r"\d", r"\w", r"\s", ".", "[^a-z]", "[^\\d\\s]", "[A-Z]", "[é-ü]", "[あ-ん]", r"\S", "[xyz.,-]")
BOUNDED, ENDLESS = ("", "", "", "?", "??", "{2}", "{1,3}", "{0,2}"), ("*", "+", "{2,}", "*?", "+?")
# Languages beyond are drawn again, since they take seconds a step: tokens of the shortest text, edges of the automaton.
LONGEST, MOST_EDGES = 160, 10_000

Judge = Callable[[str, list[int]], str | None]  # of the text, and how many bytes of it each token wrote


class Case(NamedTuple):
    """`kind`, one of `KINDS`."""

    kind: str
    language: Any
    judge: Judge


def random_case(draw: random.Random, kind: str) -> Case:
    return {"regex": regex_case, "schema": schema_case, "choice": choice_case, "template": template_case}[kind](draw)


def random_cases(draw: random.Random, tokenizer, vocab_size: int, count: int, refused: list[str]) -> tuple[list[Case], int]:
    """Languages that are not too large, and the fewest tokens that each of them fits into; `refused` gets the messages of those that are.

    Raises:
        ValueError: a language is refused for something else.
    """
    cases, most = [], 1
    while len(cases) < count:
        case = random_case(draw, draw.choice(KINDS))
        try:
            automaton = compile_constraint(case.language, tokenizer, vocab_size)
        except ValueError as error:
            if "; lower its counts" not in str(error):
                raise
            refused.append(str(error))
            continue
        if (fewest := int(automaton.fewest[0])) <= LONGEST and len(automaton.source) <= MOST_EDGES:
            cases, most = [*cases, case], max(most, fewest)
    return cases, most


# Regular expressions


def regex_case(draw: random.Random) -> Case:
    pattern = draw.choice(["", "", "", "(?i)", "(?s)", "(?a)"]) + draw.choice(["", "", "^", r"\A"])
    pattern += "|".join(random_pattern(draw, 2) for _ in range(draw.choice([1, 1, 1, 2])))
    pattern += draw.choice(["", "", "$", r"\Z"])
    return Case("regex", Regex(pattern), lambda text, _: None if re.fullmatch(pattern, text) else "`re` does not match it")


def random_pattern(draw: random.Random, depth: int, repeated: bool = False) -> str:
    """Repetitions without an end are of characters and literals, at most two in each sequence, and none within another repetition: `re`
    would go through more of them, one by one, for hours."""
    pieces, endless = [], 0
    for _ in range(draw.randint(1, 4)):
        kind = draw.random()
        grouped = depth > 0 and kind >= 0.75
        again = draw.choice(BOUNDED if repeated or grouped or endless == 2 else BOUNDED + ENDLESS)
        if grouped:
            inner = "|".join(random_pattern(draw, depth - 1, repeated or again not in ("", "?", "??")) for _ in range(draw.randint(1, 3)))
            piece = f"{draw.choice(['(', '(?:'])}{inner})"
        elif kind < 0.45:
            piece = "".join(re.escape(draw.choice(LETTERS)) for _ in range(draw.randint(1, 5)))
            piece = f"(?:{piece})" if again else piece
        else:
            piece = draw.choice(CLASSES)
        endless += again in ENDLESS
        pieces.append(piece + again)
    return "".join(pieces)


# Choices


def random_text(draw: random.Random, least: int, most: int) -> str:
    return "".join(draw.choice(LETTERS) for _ in range(draw.randint(least, most)))


def choice_case(draw: random.Random) -> Case:
    options = list(dict.fromkeys(random_text(draw, 1, draw.choice([2, 6, 20])) for _ in range(draw.randint(1, 12))))
    return Case("choice", Choice(options), lambda text, _: None if text in options else "it is no option")


# JSON schemas


def schema_case(draw: random.Random) -> Case:
    schema = random_schema(draw, draw.choice([0, 1, 2, 2]))
    if draw.random() < 0.15:
        schema = {
            "$defs": {"node": {"type": "object", "additionalProperties": False, "properties": {
                "value": schema, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["value"]}},
            "$ref": "#/$defs/node",
        }  # fmt: skip
    whitespace = draw.choice([None, None, "compact", "spaced", "any"])
    return Case("schema", JsonSchema(schema, whitespace, draw.choice([1, 2])), lambda text, _: wrong_json(text, schema, whitespace))


def random_schema(draw: random.Random, depth: int) -> dict:
    kinds = ["string", "string", "integer", "number", "boolean", "null", "enum", "const"]
    kind = draw.choice(kinds + ["object", "object", "object", "array", "anyOf", "tuple", "types", "open"] * (depth > 0))
    if kind == "string":
        least = draw.randint(0, 3)
        return {"type": "string", **draw.choice([
            {}, {"minLength": least}, {"maxLength": least + draw.randint(0, 5)}, {"minLength": least, "maxLength": least + 2},
            {"format": draw.choice(["date", "time", "date-time", "ipv4", "uuid", "email"])},
            {"pattern": draw.choice(["^[a-c]{2,4}$", "b+", '^"', "^é?$", r"\d$", "^(ab|\\\\|/)*$", "^[^a]+$", r"^\w{1,3}\s\w+$"])},
        ])}  # fmt: skip
    if kind in ("integer", "number"):
        least, most = sorted((draw.randint(-2000, 2000), draw.randint(-2000, 2000)))
        shift = draw.choice([0, 0.25, 0.125]) if kind == "number" else 0
        bounds = {"minimum": least - shift, "maximum": most + shift, "exclusiveMinimum": least - 1, "exclusiveMaximum": most + 1}
        return {"type": kind, **{name: bounds[name] for name in bounds if draw.random() < 0.3}}
    if kind in ("boolean", "null"):
        return {"type": kind}
    values = [None, True, 0, -7, 2.5, "a", 'q"\\', "é漢😀\n", [1, "x"], {"k": [], "é": 1}]
    if kind == "enum":
        return {"enum": draw.sample(values, draw.randint(1, 4))}
    if kind == "const":
        return {"const": draw.choice(values)}
    if kind == "array":
        least = draw.randint(0, 2)
        counts = draw.choice([{}, {"minItems": least}, {"maxItems": least + 1}, {"minItems": least, "maxItems": least + 2}])
        return {"type": "array", "items": random_schema(draw, depth - 1), **counts}
    if kind == "tuple":
        first = [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": draw.randint(0, len(first))}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "types":
        return {"type": draw.sample(["string", "integer", "boolean", "null"], draw.randint(1, 3))}
    names = draw.sample(["name", "id", "x", 'q"', "größe", "日付", "a b", "tags", "\\n", "z9"], draw.randint(0 if kind == "open" else 1, 4))
    found = {
        "type": "object",
        "properties": {name: random_schema(draw, depth - 1) for name in names},
        "additionalProperties": random_schema(draw, 0) if kind == "open" else False,
    }
    if draw.random() < 0.7:
        found["required"] = [name for name in names if draw.random() < 0.6]
    return found


def wrong_json(text: str, schema: dict, whitespace: str | None = "any") -> str | None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return f"`json` does not read it: {error}"
    if whitespace in ("compact", "spaced"):
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
        gap = "" if whitespace == "compact" else " "
        if re.search(r"\s", outside) if not gap else re.search(r"[,:](?! \S)|[^,:]\s|\s\s", outside):
            return f"its whitespace is not {whitespace}"
    with contextlib.suppress(ImportError):
        import jsonschema

        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        for error in jsonschema.Draft202012Validator(schema, format_checker=checker).iter_errors(value):
            return f"`jsonschema` says: {error.message} at {error.json_path}"
    return wrong_order(value, schema)


def wrong_order(value: Any, schema: dict) -> str | None:
    """Names that the schema lists, in another order than it lists them."""
    listed = list(schema.get("properties", {}))
    if isinstance(value, dict) and listed and "anyOf" not in schema:
        found = [name for name in value if name in listed]
        if found != [name for name in listed if name in value]:
            return f"the order of {found} is not {listed}"
    return None


# Templates


def template_case(draw: random.Random) -> Case:
    text, fields, segments = "", {}, []
    for place in range(draw.randint(1, 4)):
        literal = random_text(draw, 0 if place == 0 else 1, 8)
        name, kind = f"f{place}", draw.choice(["free", "count", "range", "regex", "choice", "schema"])
        segments.append(literal)
        text += literal.replace("{", "{{").replace("}", "}}")
        if kind in ("free", "count", "range"):
            least = draw.randint(1, 4)
            most = least if kind == "count" else least + draw.randint(1, 5)
            text += {"free": f"{{{name}}}", "count": f"{{{name}:{least}}}", "range": f"{{{name}:{least}-{most}}}"}[kind]
            segments.append((1, None) if kind == "free" else (least, most))
        else:
            case = random_case(draw, kind)
            fields[name], text = case.language, f"{text}{{{name}}}"
            segments.append(case.judge)
    segments.append(literal := random_text(draw, 0, 8))
    text += literal
    return Case("template", Template(text, **fields), lambda found, widths: wrong_cut(found, widths, segments))


def wrong_cut(text: str, widths: list[int], segments: list) -> str | None:
    """Whether the text can be cut into literals (strings), blanks (fewest and most tokens) and fields (judges)."""
    ends, place = [], 0
    for width in widths:
        ends.append(place := place + width)
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode()))
    if ends and ends[-1] != offsets[-1]:
        return f"its tokens wrote {ends[-1]} bytes of {offsets[-1]}"

    def fits(segment: Any, start: int, stop: int) -> bool:
        if isinstance(segment, str):
            return text[start:stop] == segment
        if callable(segment):
            return segment(text[start:stop], []) is None
        begin, end = offsets[start], offsets[stop]
        touched = sum(1 for first, last in zip([0, *ends], ends, strict=False) if first < end and last > begin and last > first)
        return stop > start and touched >= segment[0] and (segment[1] is None or touched <= segment[1])

    reached = {0}
    for segment in segments:
        if isinstance(segment, str):
            reached = {start + len(segment) for start in reached if text.startswith(segment, start)}
        else:
            reached = {stop for start in reached for stop in range(start, len(text) + 1) if fits(segment, start, stop)}
    return None if len(text) in reached else "it cannot be cut into the fields of the template"


# Calls


class Written(NamedTuple):
    """One text: `wrong` says what is wrong with it, or None; `settings` are those of the call, `row` its place there."""

    case: Case
    text: str
    wrong: str | None
    settings: dict[str, Any]
    row: int


def load_models(dtype: torch.dtype = torch.float32) -> tuple[list, Any, Any]:
    """Random models, one of which is sure of nothing, the shipped checkpoint's tokenizer, and the checkpoint."""
    path, models = default_checkpoint(), []
    tokenizer = AutoTokenizer.from_pretrained(path)
    for seed, spread in enumerate((0.02, 0.3)):
        torch.manual_seed(seed)
        more = len(tokenizer) + 3  # ids that the tokenizer has not
        config = small_config(more, 32, 2, 16, 10_000.0, image_token_id=107, boi_token_id=108, eoi_token_id=109)
        config.initializer_range = config.text_config.initializer_range = spread
        models.append(DiffusionGemmaForMaskedBlockLM(config).to(dtype).eval())
    return models, tokenizer, AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def random_texts(seed: int, models: list, tokenizer, trained, rows: int = 3) -> tuple[list[Written], list[str]]:
    """What one call of `generate` writes, of one of `models`, which are random, or as likely of `trained`, which is asked one of its jobs.
    With the messages of languages that were refused as too large.

    Raises:
        ValueError: a language or a call is refused for something else.
    """
    draw, refused = random.Random(seed), []
    model = trained if draw.random() < 0.5 else draw.choice(models)
    if model is trained:
        prompt = TEXT_JOBS[draw.choice(list(TEXT_JOBS))].sample(draw, "test")[0]
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        ids = ids.expand(rows, -1)
    else:
        ids = torch.randint(200, 500, (rows, draw.randint(1, 9)), generator=torch.Generator().manual_seed(seed))
    cases, fewest = random_cases(draw, tokenizer, model.config.get_text_config().vocab_size, rows, refused)
    return random_call(draw, model, tokenizer, cases, fewest, ids), refused


def random_call(draw: random.Random, model, tokenizer, cases: list[Case], fewest: int, ids: torch.Tensor) -> list[Written]:
    """Generates a row for each case, by settings drawn at random, and judges it.

    Args:
        fewest: tokens that every case fits into.
        ids (`int64 (rows, n)`): the prompts.
    """
    settings = {
        "canvas_length": draw.choice([5, 10, 16, 33]), "max_denoising_steps": draw.choice([1, 2, 3, 6]), "do_sample": draw.random() < 0.7,
        "max_new_tokens": fewest + draw.choice([0, 1, 2, 7, 20, 40]), "temperature": draw.choice([0.2, 1.0, 1.0, 4.0]),
        **draw.choice([{}, {}, {}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 50, "top_p": 0.9}]),
        **draw.choice([{}, {}, {}, {"sampler": "confidence"}, {"sampler": "predictor_corrector"}, {"sampler": "fixed_steps"}]),
        **draw.choice([{}, {}, {}, {"cache_implementation": "static"}, {"output_logits": True}]),
    }  # fmt: skip
    if settings["do_sample"]:
        settings["seed"] = [draw.randrange(10**6) for _ in cases]
    if draw.random() < 0.15:
        length = settings["canvas_length"]
        settings = {name: settings[name] for name in ("max_new_tokens", "do_sample", "temperature", "seed") if name in settings}
        settings["decoding"] = "autoregressive"
        if draw.random() < 0.5:
            settings = {"decoding": "verified", "do_sample": False, "max_new_tokens": settings["max_new_tokens"], "canvas_length": length}
            cases, ids = cases[:1], ids[:1]
    found = model.generate(
        ids, constraint=[case.language for case in cases], tokenizer=tokenizer, eos_token_id=list(ENDS), pad_token_id=PAD,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return [judged(case, row[ids.shape[1] :].tolist(), tokenizer, settings, place) for place, (case, row) in enumerate(
        zip(cases, found.sequences, strict=True))]  # fmt: skip


def judged(case: Case, row: list[int], tokenizer, settings: dict[str, Any], place: int) -> Written:
    """The tokenizer is of bytes, each of which a character of a token stands for."""
    end = next((place for place, token in enumerate(row) if token in ENDS), len(row))
    text = tokenizer.decode(row[:end], skip_special_tokens=False)
    if any(token != PAD for token in row[end + 1 :]):
        wrong = "something stands behind its end"
    elif len(row) > settings["max_new_tokens"]:
        wrong = "it is longer than it may be"
    else:
        wrong = case.judge(text, [len(token) for token in tokenizer.convert_ids_to_tokens(row[:end])])
    return Written(case, text, wrong, settings, place)
