"""Calls of tools under a constraint, as transformers reads them and jsonschema judges their arguments.

generate(..., constraint=ToolCalls(tools)), tokenizer.parse_response(answer)
"""

import contextlib
import json
import random
import re
import runpy
import shlex
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from pages import Page
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tool_calls
from generation import RESPONSE_TEMPLATE, Regex, ToolCalls, stream_text
from generation.constraints.calls import MARKS, calls_expression, read_tools
from generation.constraints.compiled import compile_constraint
from generation.constraints.tokens import make_vocabulary
from jobs.tokenizer import build_tokenizer
from modeling_diffusiongemma import default_checkpoint
from modeling_diffusiongemma.console.main import main
from modeling_diffusiongemma.console.tools import read_answer

ROOT, PAGE = Path(__file__).parents[1], Page("docs/tool_calls.md")
MODEL = default_checkpoint("tools")
BOOK = {
    "name": "book.table",
    "parameters": {
        "type": "object",
        "properties": {
            "people": {"type": "integer", "minimum": 1, "maximum": 20},
            "Date": {"type": "string", "format": "date"},
            "note": {"type": "string", "maxLength": 12},
            "seats": {"type": "array", "items": {"enum": ["window", "door", 3, None]}, "maxItems": 2},
            "guest": {"type": "object", "properties": {"name": {"type": "string"}, "vip": {"type": "boolean"}}, "required": ["vip"]},
        },
        "required": ["people", "Date"],
    },
}
PING = {"name": "ping"}
TOOLS = [{"type": "function", "function": BOOK}, {"type": "function", "function": PING}]
SCHEMAS = {"book.table": BOOK["parameters"], "ping": {"type": "object", "maxProperties": 0}}
CHAT = [{"role": "user", "content": "Book a table for 4 on 3 March 1998."}]
GOOD = {"people": 4, "Date": "1998-03-03"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, padding_side="left")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


def encode(tokenizer, **settings):
    return tokenizer.apply_chat_template(CHAT, tools=TOOLS, add_generation_prompt=True, return_dict=True, return_tensors="pt", **settings)


def written(tokenizer, *calls, content=""):
    """The ids that the chat template writes for an answer, without its end."""
    chat = [*CHAT, {"role": "assistant", "content": content, "tool_calls": [{"function": call} for call in calls]}]
    texts = [tokenizer.apply_chat_template(CHAT, tools=TOOLS, add_generation_prompt=True, tokenize=False)]
    texts.append(tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False))
    return tokenizer(texts[1][len(texts[0]) :].removesuffix("<turn|>\n"), add_special_tokens=False)["input_ids"]


def judge(tokenizer, ids, choice="auto"):
    """What an answer holds, judged."""
    answer = tokenizer.parse_response(tokenizer.decode(ids), prefix="")
    calls = [call["function"] for call in answer.get("tool_calls", ())]
    for call in calls:
        jsonschema.validate(call["arguments"], SCHEMAS[call["name"]], format_checker=jsonschema.FormatChecker())
    if choice != "auto":
        assert calls and not answer.get("content")
    return answer, calls


def walk(automaton, numbers, longest):
    """Ids of an accepted string, drawn edge by edge, and towards the end once it is long."""
    state, ids = 0, []
    while True:
        edges = (automaton.source == state).nonzero().flatten().tolist()
        if bool(automaton.accepting[state]) and (not edges or len(ids) >= longest or numbers.random() < 0.1):
            return ids
        if len(ids) >= longest:
            edges = [edge for edge in edges if automaton.fewest[automaton.target[edge]] < automaton.fewest[state]]
        edge = numbers.choice(edges)
        ids.append(numbers.choice((automaton.classes == automaton.kind[edge]).nonzero().flatten().tolist()))
        state = int(automaton.target[edge])


@pytest.mark.parametrize("choice", ["auto", "required", "book.table"])
@pytest.mark.parametrize("parallel", [True, False])
def test_whatever_is_accepted_is_read_and_fits(tokenizer, choice, parallel):
    automaton, numbers = compile_constraint(ToolCalls(TOOLS, choice, parallel), tokenizer, len(tokenizer), cache=False), random.Random(0)
    counts = []
    for _ in range(60):
        _, calls = judge(tokenizer, walk(automaton, numbers, longest=60), choice)
        assert choice in ("auto", "required") or {call["name"] for call in calls} == {choice}
        counts.append(len(calls))
    assert max(counts) > 1 if parallel else max(counts) == 1
    assert min(counts) == (choice != "auto")


@pytest.mark.parametrize(
    "arguments, fits",
    [
        (GOOD, True),
        ({**GOOD, "note": "ö\n\"',{:}", "seats": ["door", 3], "guest": {"vip": True}}, True),
        ({**GOOD, "seats": [None], "guest": {"name": "", "vip": False}}, True),
        ({**GOOD, "seats": []}, True),
        ({"people": 4}, False),
        ({**GOOD, "people": 0}, False),
        ({**GOOD, "people": "4"}, False),
        ({**GOOD, "Date": "1998-02-29"}, False),
        ({**GOOD, "note": "longer than twelve"}, False),
        ({**GOOD, "seats": ["window", "roof"]}, False),
        ({**GOOD, "colour": "red"}, False),
    ],
)
def test_what_the_template_writes_is_accepted_where_it_fits(tokenizer, arguments, fits):
    ids = written(tokenizer, {"name": "book.table", "arguments": arguments})
    assert tokenizer.parse_response(ids, prefix="")["tool_calls"][0]["function"] == {"name": "book.table", "arguments": arguments}
    assert compile_constraint(ToolCalls(TOOLS), tokenizer, len(tokenizer), cache=False).accepts(ids) == fits


def test_text_thought_and_calls_stand_where_they_may(tokenizer):
    call, other = {"name": "book.table", "arguments": GOOD}, {"name": "ping", "arguments": {}}
    thought = tokenizer("<|channel>thought\nIt is a table.<channel|>", add_special_tokens=False)["input_ids"]
    text = written(tokenizer, content="No < tool | does > that.")
    texts = {
        "auto": [text, [], written(tokenizer, other, call, content="I do."), [*thought, *text], [*thought, *written(tokenizer, call)]],
        "required": [written(tokenizer, call, other, call), [*thought, *written(tokenizer, other)]],
        "ping": [written(tokenizer, other), written(tokenizer, other, other)],
    }
    refused = {
        "required": [text, [], [*written(tokenizer, call), *text]],
        "ping": [written(tokenizer, call), text],
        "auto": [[*text, *thought]],
    }
    for choice in texts:
        automaton = compile_constraint(ToolCalls(TOOLS, choice), tokenizer, len(tokenizer), cache=False)
        assert all(map(automaton.accepts, texts[choice])) and not any(map(automaton.accepts, refused[choice]))
    silent = compile_constraint(ToolCalls(TOOLS, parallel=False, thought=False), tokenizer, len(tokenizer), cache=False)
    assert silent.accepts(written(tokenizer, call)) and not silent.accepts([*thought, *text])
    assert not silent.accepts(written(tokenizer, call, other))


def test_marks_are_tokens_and_nothing_else(tokenizer):
    """Spelled out in characters a mark would end a string for who reads the answer as text; and a byte that no text holds is no mark."""
    automaton = compile_constraint(ToolCalls([BOOK]), tokenizer, len(tokenizer), cache=False)
    string, call = written(tokenizer, {"name": "book.table", "arguments": {**GOOD, "note": "@"}}), tokenizer.convert_tokens_to_ids(MARKS[0])
    place = string.index(tokenizer.encode("@", add_special_tokens=False)[0])
    assert automaton.accepts(string)

    def letters(text):
        return tokenizer.convert_tokens_to_ids([*text])  # no special token among them, whatever they spell

    for spelled in ('<|"|>', "<tool_call|>", "\x01", "\x02"):
        ids = letters(spelled) if spelled.isprintable() else tokenizer(spelled, add_special_tokens=False)["input_ids"]
        assert not automaton.accepts([*string[:place], *ids, *string[place + 1 :]])
    assert automaton.accepts([*string[:place], *letters("<|tool"), *string[place + 1 :]])
    assert automaton.accepts(letters("<|tool_")) and not automaton.accepts(letters(MARKS[0]))
    vocabulary = make_vocabulary([b"a", None, b"\xf8", b"b\xf9", b"c"]).marked({1: 0, 4: 2})
    tokens = [bytes(vocabulary.data[one:other]) for one, other in zip(vocabulary.starts, vocabulary.starts[1:], strict=False)]
    assert tokens == [b"a", b"\xf8", b"", b"", b"\xfa"]
    assert sum(automaton.classes == automaton.classes[call]) == 1


@pytest.mark.parametrize("settings", [{}, {"do_sample": False}, {"decoding": "autoregressive"}, {"canvas_length": 16}])
def test_generated_calls_fit(model, tokenizer, settings):
    """Hot enough that nothing fits by itself."""
    inputs = encode(tokenizer)
    hot = {"temperature": 8.0} if settings.get("do_sample", True) else {}
    for seed in range(3):
        settings = {"generation_config": {"canvas_length": 64, "max_denoising_steps": 3}, "max_new_tokens": 64, **hot, **settings}
        sequences = model.generate(**inputs, **settings, seed=seed, constraint=ToolCalls(TOOLS, "required"), tokenizer=tokenizer)
        judge(tokenizer, sequences[0, inputs["input_ids"].shape[1] :].tolist(), "required")


def test_rows_have_tools_of_their_own(model, tokenizer):
    inputs = encode(tokenizer)
    inputs = {name: value.expand(3, -1) for name, value in inputs.items()}
    constraints = [ToolCalls([PING], "required"), Regex("[a-z]{3}"), ToolCalls([BOOK], "required")]
    settings = {"canvas_length": 64, "max_new_tokens": 64, "max_denoising_steps": 3, "temperature": 8.0, "seed": [0, 1, 2]}
    rows = model.generate(**inputs, **settings, constraint=constraints, tokenizer=tokenizer)[:, inputs["input_ids"].shape[1] :].tolist()
    assert {call["name"] for call in judge(tokenizer, rows[0], "required")[1]} == {"ping"}
    assert len(tokenizer.decode(rows[1], skip_special_tokens=True)) == 3
    assert {call["name"] for call in judge(tokenizer, rows[2], "required")[1]} == {"book.table"}


def test_pipeline_gives_the_calls(model, tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = generator(CHAT, tools=TOOLS, constraint=ToolCalls(TOOLS, "required"), tokenizer=tokenizer, max_new_tokens=64, seed=0)
    message = answer["generated_text"][-1]
    assert message["role"] == "assistant" and {call["function"]["name"] for call in message["tool_calls"]} <= set(SCHEMAS)


def test_stream_is_the_text_alone(model, tokenizer):
    settings = {"max_new_tokens": 64, "canvas_length": 16, "seed": 0}
    words = "".join(stream_text(model, tokenizer, encode(tokenizer)["input_ids"], constraint=ToolCalls([PING], "required"), **settings))
    assert words.removeprefix("thought").lstrip().startswith("call:ping{}") or "call:ping{}" in words


def add(left: float, right: float = 0.5):
    """
    Adds two numbers.

    Args:
        left: the first one.
        right: the second one.
    """


def test_functions_are_tools(tokenizer):
    language = ToolCalls([add])
    assert language == ToolCalls(language.tools) == ToolCalls([language.tools[0]["function"]])
    assert language.tools[0]["function"]["description"] == "Adds two numbers."  # for the chat template
    automaton = compile_constraint(ToolCalls([add], "required"), tokenizer, len(tokenizer), cache=False)
    assert automaton.accepts(written(tokenizer, {"name": "add", "arguments": {"left": 1.5}}))


@pytest.mark.parametrize(
    "tools, settings, said",
    [
        ([], {}, "`tools` is []; expected a list of at least one function"),
        ("add", {}, "`tools` is 'add'"),
        ([{"type": "function"}], {}, "`tools[0]` is {'type': 'function'}; expected a function with a `name`"),
        ([{"name": "a b"}], {}, "expected a function with a `name` of letters"),
        ([PING, PING], {}, "`tools[1]` has the name 'ping', which another tool has"),
        ([lambda x: x], {}, "of which no schema can be made"),
        ([{"name": "a", "parameters": {"type": "array"}}], {}, "expected a JSON schema of an object"),
        ([{"name": "a", "parameters": {"properties": {"b-c": {"type": "null"}}}}], {}, "the argument 'b-c', which stands bare"),
        ([{"name": "a", "parameters": {"properties": {"b": {"multipleOf": 2}}}}], {}, "`tools` has 'a', whose parameters make no language"),
        ([{"name": "a", "parameters": {"properties": {"b": {"enum": ["c", '<|"|>']}}}}], {}, "which nobody could read in a call"),
        ([PING], {"choice": "pong"}, "`choice` is 'pong'; expected 'auto', 'required' or one of ['ping']"),
        ([PING], {"parallel": 1}, "`parallel` is 1; expected True or False"),
        ([PING], {"depth": -1}, "`depth` is -1"),
    ],
)
def test_wrong_tools_are_refused(tools, settings, said):
    with pytest.raises(ValueError) as caught:
        ToolCalls(tools, **settings)
    assert said in str(caught.value)


def test_tokenizer_without_marks_is_refused(tokenizer):
    plain = AutoTokenizer.from_pretrained(default_checkpoint())
    with pytest.raises(ValueError, match=r"`tokenizer` has no tokens \['<\|tool_call>', '<tool_call\|>', '<\|\"\|>'\]"):
        compile_constraint(ToolCalls(TOOLS), plain, len(plain))


def test_calls_that_do_not_fit_their_tokens_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="`max_new_tokens` leaves 4 tokens; expected at least"):
        model.generate(**encode(tokenizer), max_new_tokens=4, constraint=ToolCalls([BOOK], "required"), tokenizer=tokenizer)


def test_template_reads_what_others_leak(tokenizer):
    """A call inside a thought, a name with dots, padding, the end spelled out inside of a text, arguments that are no JSON."""

    def read(text):
        return tokenizer.parse_response(tokenizer(text, add_special_tokens=False)["input_ids"], RESPONSE_TEMPLATE, prefix="")

    call = '<|tool_call>call:a.b-c{x:<|"|>{"y": 1}<|"|>}<tool_call|>'
    assert read(f"Yes.{call}<|tool_response>")["tool_calls"][0]["function"] == {"name": "a.b-c", "arguments": {"x": '{"y": 1}'}}
    thinking = read(f"<|channel>thought\nI may {call}.<channel|>No.<turn|>")
    assert "tool_calls" not in thinking and thinking["content"] == "No."
    assert read(f"{call}<|tool_response><pad><pad>").keys() == {"role", "tool_calls"} and read("No.<turn|><pad>")["content"] == "No."
    assert read("It is <eos> that ends it.<turn|>")["content"] == "It is <eos> that ends it."
    assert read("<|tool_call>call:a{x:}<tool_call|>")["tool_calls"][0]["function"] == {"name": "a", "arguments": "{x:}"}


def test_shipped_tokenizer_is_built_by_its_recipe(tokenizer):
    """Template and marks of the checkpoint are copies; what reads answers, too."""
    built = build_tokenizer(640, tools=True)
    assert tokenizer.chat_template == built.chat_template and tokenizer.response_template == RESPONSE_TEMPLATE
    assert tokenizer.get_vocab() == built.get_vocab() and set(tokenizer.all_special_ids) == set(built.all_special_ids)


def test_template_of_the_tokenizer_reads_its_answers(tokenizer, monkeypatch):
    other = json.loads(json.dumps(RESPONSE_TEMPLATE).replace("call:", "ping:"))
    monkeypatch.setattr(tokenizer, "response_template", other)
    ids = tokenizer("<|tool_call>ping:a{}<tool_call|>", add_special_tokens=False)["input_ids"]
    assert read_answer(tokenizer, ids) == {"text": "", "tool_calls": [{"name": "a", "arguments": {}}]}


def test_marks_beyond_the_models_vocabulary_are_none(tokenizer):
    """That of a call's end is 49, that of a thought's end 101, which was an IndexError. Below 128 nothing writes text, and no mark is a
    character that is missing."""
    language = ToolCalls([PING], "required")
    with pytest.raises(ValueError, match="`tokenizer` has no tokens"):
        compile_constraint(language, tokenizer, 49, cache=False)
    with pytest.raises(ValueError, match=r"none of them writes 'c' \(U\+0063\)"):
        compile_constraint(language, tokenizer, 101, cache=False)


def test_language_is_named_by_all_that_it_is():
    languages = [ToolCalls(TOOLS), ToolCalls(TOOLS, "required"), ToolCalls(TOOLS, "ping"), ToolCalls(TOOLS, parallel=False)]
    languages += [ToolCalls(TOOLS, thought=False), ToolCalls([PING])]
    assert len({json.dumps(language.description()) for language in languages}) == len(languages)
    told = ToolCalls([{**PING, "description": "Says so."}])  # to the model; a call of it is the same
    assert told.description() == ToolCalls([PING]).description() and told != ToolCalls([PING])
    assert calls_expression(read_tools(TOOLS), "auto", True, True, 3) == ToolCalls(TOOLS).expression()


def test_thoughts_need_their_marks_alone(tokenizer):
    """A tokenizer without the marks of a thought writes none."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert torch.tensor(tokenizer.convert_tokens_to_ids(list(MARKS))).unique().numel() == len(MARKS)
    for token in backend["added_tokens"]:
        if token["content"] in MARKS[3:]:
            token["content"] = f"<other{token['id']}>"
    for name in MARKS[3:]:
        place = backend["model"]["vocab"].pop(name)
        backend["model"]["vocab"][f"<other{place}>"] = place
    other = AutoTokenizer.from_pretrained(MODEL)
    other._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    whole, less = (compile_constraint(ToolCalls([PING]), one, len(tokenizer), cache=False) for one in (tokenizer, other))
    assert less.states < whole.states and less.accepts(written(tokenizer, {"name": "ping", "arguments": {}}))


def test_page_says_what_its_snippets_print(capsys):
    PAGE.run()
    assert len(PAGE.expected) >= 4 and capsys.readouterr().out.splitlines() == PAGE.expected


def test_commands_of_the_page_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [shlex.split(line) for line in PAGE.commands()]
    assert [main([*command[1:], "--seed", "0"]) for command in commands] == [0, 0]
    free, forced = map(json.loads, capsys.readouterr().out.splitlines())
    assert free == {"name": "set_timer", "arguments": {"minutes": 25}}
    assert {call["name"] for call in forced["tool_calls"]} == {"add_item"} and forced["text"] == ""


def test_example_calls_functions_until_the_model_answers(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["call_tools.py"])
    runpy.run_path(str(ROOT / "examples/call_tools.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "calls add_item(item='blue mugs', quantity=12): blue mugs 12\n  says: blue mugs 12" in printed
    assert "calls set_timer(minutes=25)" in printed and "calls send_message(text='the blue mugs are here', to='Anna')" in printed


@pytest.mark.parametrize(
    "line, said",
    [
        ("--tools {}/nowhere", "`--tools`: '{}/nowhere' cannot be read"),
        ("--tools {}/empty.json", "`--tools`: `tools` is []; expected a list of at least one function"),
        ("--tools {}/tools.json --tool-choice pong", "`--tools`: `choice` is 'pong'; expected 'auto', 'required' or one of ['ping']"),
        ("--tools {}/tools.json --schema {}/tools.json", "not allowed with argument"),
        ("--tools {}/tools.json --raw", "`--raw` and `--tools` are both given"),
        ("--tool-choice ping", "`--tool-choice` is 'ping' without `--tools`"),
    ],
)
def test_wrong_tools_of_the_console_are_named(line, said, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps([PING]))
    (tmp_path / "empty.json").write_text("[]")
    with contextlib.suppress(SystemExit):
        assert main(["generate", "hello", *line.replace("{}", str(tmp_path)).split()]) == 2
    assert said.replace("{}", str(tmp_path)) in capsys.readouterr().err


def test_model_that_is_told_of_no_tools_is_given_none(tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps([PING]))
    assert main(["generate", "hello", "--model", "text", "--tools", str(tmp_path / "tools.json")]) == 1
    assert "`tools` are given, and the chat template of this model tells it of none" in capsys.readouterr().err


def test_benchmark_counts_what_fits(capsys):
    tool_calls.main(["--quick"])
    (row,) = re.findall(r"^\| 2 steps \| constraint \| \d \| (\d) \|", capsys.readouterr().out, re.MULTILINE)
    assert row == "3"
    prompt = json.dumps({"tools": ToolCalls(TOOLS).tools, "request": "Remind me in 25 minutes."})
    good = [{"name": "book.table", "arguments": GOOD}]
    assert tool_calls.fits(prompt, json.dumps(good)) and tool_calls.fits(prompt, '"No tool does that."')
    for wrong in ([{"name": "pong", "arguments": {}}], [{"name": "book.table", "arguments": "{people:"}], [{**good[0], "arguments": {}}]):
        assert not tool_calls.fits(prompt, json.dumps(wrong))
