"""The form of a served answer, by the clients that ask for it: `openai`'s `parse` and `stream` with pydantic models, vLLM's extra fields.

client.chat.completions.parse(model=default_checkpoint(), messages=[...], response_format=Note)
"""

import json
import re
import threading
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from servers import CHAT, MODEL, client_of, served
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_diffusiongemma import default_checkpoint
from modeling_diffusiongemma.console.serve import Body
from modeling_diffusiongemma.console.serve_forms import CHAT as CHAT_FIELDS
from modeling_diffusiongemma.console.serve_forms import COMPLETION, RESPONSE, take_form
from modeling_diffusiongemma.console.serve_requests import GONE

pydantic = pytest.importorskip("pydantic")

PROMPT = f"<|turn>user\n{CHAT[0]['content']}<turn|>\n<|turn>model\n"
SLASHED = "[0-9]{4}/[0-9]{2}/[0-9]{2}"


class Day(pydantic.BaseModel):
    """Another shape than any that the checkpoint writes by itself."""

    year: int = pydantic.Field(ge=1000, le=2999)
    month: Literal["October", "November"]
    days: list[int] = pydantic.Field(max_length=2)


def test_chat_is_parsed_into_an_object(client):
    message = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Day, max_tokens=64).choices[0].message
    assert message.parsed == Day.model_validate_json(message.content)


def test_streamed_chat_is_parsed_into_an_object(client):
    with client.chat.completions.stream(model=MODEL, messages=CHAT, response_format=Day, max_tokens=64) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.parsed == Day.model_validate_json(text)


def test_response_is_parsed_into_an_object(client):
    """transformers' server streams a response that does not say whether it is to."""
    response = client.responses.parse(model=MODEL, input=CHAT[0]["content"], text_format=Day, max_output_tokens=64)
    assert response.output_parsed == Day.model_validate_json(response.output_text)
    with client.responses.stream(model=MODEL, input=CHAT[0]["content"], text_format=Day, max_output_tokens=64) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    Day.model_validate_json(text)


@pytest.mark.parametrize("seed", range(3))
def test_any_object_is_one(client, seed):
    hot = {"response_format": {"type": "json_object"}, "temperature": 1.5, "seed": seed, "max_tokens": 48}
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, **hot)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


STRUCTURED = {
    "regex": (SLASHED, lambda text: re.fullmatch(SLASHED, text)),
    "choice": (["yes", "no"], lambda text: text in ("yes", "no")),
    "json": (Day.model_json_schema(), Day.model_validate_json),
    "json_object": (True, json.loads),
    "template": ("It is {day:1-12}!", lambda text: re.fullmatch("It is .+!", text, re.DOTALL)),
}


@pytest.mark.parametrize("kind", STRUCTURED)
def test_fields_of_vllm_are_obeyed(client, kind):
    given, fits = STRUCTURED[kind]
    asked = {"model": MODEL, "max_tokens": 64, "extra_body": {"structured_outputs": {kind: given}}}
    chat = client.chat.completions.create(messages=CHAT, **asked).choices[0].message.content
    pieces = client.chat.completions.create(messages=CHAT, stream=True, **asked)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    completion = client.completions.create(prompt=PROMPT, **asked).choices[0].text
    response = client.responses.create(
        model=MODEL, input=CHAT[0]["content"], max_output_tokens=64, extra_body=asked["extra_body"]
    ).output_text
    for text in (chat, streamed, completion, response):
        assert fits(text), text


@pytest.mark.parametrize("suffix", ["-02", " {of} 2052}"])
def test_suffix_is_written_towards_and_stands_there_once(client, suffix):
    """transformers' server puts it behind an answer that never saw it."""
    asked = {"model": MODEL, "prompt": PROMPT, "suffix": suffix, "max_tokens": 64}
    for text in (
        client.completions.create(**asked).choices[0].text,
        "".join(piece.choices[0].text for piece in client.completions.create(stream=True, **asked)),
    ):
        assert text.endswith(suffix) and text.count(suffix) == 1 and len(text) > len(suffix)
    assert client.completions.create(**{**asked, "suffix": "-02"}).choices[0].text == "2052-10-02"


def test_snippet_of_the_page_runs(client, capsys):
    page = (Path(__file__).parents[1] / "docs/constraints.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    exec(snippet.replace("http://127.0.0.1:8001/v1", str(client.base_url)), {"path": MODEL})
    day, slashes = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"year=-?\d+ month=\d+", day) and re.fullmatch(SLASHED, slashes)


def test_trace_shows_what_was_demanded(client):
    asked = {"trace": "html", "structured_outputs": {"template": "It is {day:1-12}!"}}
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=64, extra_body=asked)
    assert answer.trace.startswith("<!doctype html>") and answer.choices[0].message.content.startswith("It is ")


def test_plain_text_is_no_form(client):
    for asked in ({"response_format": {"type": "text"}}, {"response_format": None}):
        answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=16, temperature=0, **asked)
        assert answer.choices[0].message.content == "2052-10-02"


def test_form_that_does_not_fit_its_tokens_is_refused(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="leaves 8 tokens; expected at least 10"):
        asked = {"structured_outputs": {"regex": SLASHED}}
        client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=8, extra_body=asked)
    with pytest.raises(openai.UnprocessableEntityError, match="suffix"):  # of a chat
        client.post("/chat/completions", body={"model": MODEL, "messages": CHAT, "suffix": "-02"}, cast_to=object)


def test_model_of_another_kind_is_asked_for_no_form(tmp_path):
    """Its server would pass over the field, and answer in any form."""
    openai, folder = pytest.importorskip("openai"), str(tmp_path / "llama")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=640, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    with served(tmp_path, folder) as url:
        asked = partial(client_of(url).chat.completions.create, model=folder, messages=CHAT, max_tokens=3)
        assert asked().usage.completion_tokens <= 3
        with pytest.raises(openai.BadRequestError, match=r"denoises no canvas of ours; expected none of \['response_format'\]"):
            asked(response_format={"type": "json_object"})


TOOLS_MODEL, REMIND = default_checkpoint("tools"), [{"role": "user", "content": "Remind me in 25 minutes."}]


def tool(name, strict=False, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TIMER = {"minutes": {"type": "integer", "minimum": 10, "maximum": 99}, "sound": {"enum": ["bell", "horn"]}}
CALLABLE = [tool("set_timer", **TIMER), tool("stop")]
BELLS = {"minutes", "sound"}
HOT = {"max_tokens": 64, "temperature": 3.0, "seed": 1}  # so that nothing fits by itself


def fits(name, arguments):
    arguments = json.loads(arguments)
    return name == "set_timer" and arguments.keys() == BELLS and 10 <= arguments["minutes"] <= 99 or name == "stop" and not arguments


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "set_timer"}}])
def test_demanded_call_is_made(client, choice):
    asked = {"model": TOOLS_MODEL, "messages": REMIND, "tools": CALLABLE, "tool_choice": choice, **HOT}
    answer = client.chat.completions.create(**asked).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls]
    assert answer.finish_reason == "tool_calls" and not answer.message.content and all(fits(*call) for call in calls)
    assert choice == "required" or {name for name, _ in calls} == {"set_timer"}
    pieces = [piece.choices[0] for piece in client.chat.completions.create(stream=True, **asked)]
    streamed = [call.function for piece in pieces for call in piece.delta.tool_calls or ()]
    assert [(call.name, call.arguments) for call in streamed] == calls and pieces[-1].finish_reason == "tool_calls"
    flat = [{"type": "function", **each["function"]} for each in CALLABLE]
    chosen = choice if choice == "required" else {"type": "function", "name": "set_timer"}
    response = client.responses.create(model=TOOLS_MODEL, input=REMIND[0]["content"], tools=flat, tool_choice=chosen, max_output_tokens=64)
    made = [part for part in response.output if part.type == "function_call"]
    assert made and all(fits(call.name, call.arguments) for call in made)


@pytest.mark.parametrize("seed", range(3))
def test_strict_function_is_called_as_its_schema_says_or_not_at_all(client, seed):
    given = {"model": TOOLS_MODEL, "messages": REMIND, **HOT, "seed": seed}
    answer = client.chat.completions.create(tools=[tool("set_timer", strict=True, **TIMER)], **given).choices[0].message
    assert all(fits(call.function.name, call.function.arguments) for call in answer.tool_calls or ())
    alone = client.chat.completions.create(tools=CALLABLE, tool_choice="required", parallel_tool_calls=False, **given)
    assert len(alone.choices[0].message.tool_calls) == 1


def test_conversation_goes_on_behind_a_call(client):
    call = {"id": "one", "type": "function", "function": {"name": "set_timer", "arguments": '{"minutes": 25, "sound": "bell"}'}}
    history = [*REMIND, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "one", "content": "blue mugs 12"}]
    answer = client.chat.completions.create(model=TOOLS_MODEL, messages=history, tools=CALLABLE, max_tokens=32, temperature=0)
    assert answer.choices[0].message.content == "blue mugs 12" and answer.choices[0].finish_reason == "stop"


def test_snippet_of_the_page_of_calls_runs(client, capsys):
    page = (Path(__file__).parents[1] / "docs/tool_calls.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    exec(snippet.replace("http://127.0.0.1:8001/v1", str(client.base_url)), {"path": TOOLS_MODEL, "TOOLS": CALLABLE})
    name, arguments = capsys.readouterr().out.split(" ", 1)
    assert fits(name, arguments)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "day", "schema": Day.model_json_schema(), "strict": True}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
BAD = {
    "form of another kind": ({"response_format": {"type": "xml"}}, "`response_format`: `type` is 'xml'"),
    "form that is a word": ({"response_format": "json"}, "`response_format`: it is 'json'; expected an object"),
    "no schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "it has no `schema`"),
    "no mapping with a schema": ({"response_format": {"type": "json_schema"}}, "`json_schema` is None; expected an object"),
    "schema beside another kind": ({"response_format": {**SCHEMA, "type": "text"}}, "beside ['json_schema']"),
    "unknown field": ({"response_format": {**SCHEMA, "grammar": "a"}}, "it has ['grammar']"),
    "unknown keyword": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"patternProperties": {}}}}}, "$.patternProperties",
    ),
    "grammar": ({"structured_outputs": {"grammar": "root ::= 'a'"}}, "`structured_outputs`: it has ['grammar']"),
    "none of vLLM's": ({"structured_outputs": {}}, "it has []; expected one of"),
    "two of vLLM's": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "it has ['choice', 'regex']"),
    "look-ahead": ({"structured_outputs": {"regex": "(?=a)b"}}, "look-around"),
    "pattern that is none": ({"structured_outputs": {"regex": 3}}, "`regex` is 3"),
    "too long a pattern": ({"structured_outputs": {"regex": "(?:[a-z]{1,200}b){200}"}}, "repeat less often"),
    "no object": ({"structured_outputs": {"json_object": False}}, "`json_object` is False"),
    "equal choices": ({"structured_outputs": {"choice": ["a", "a"]}}, "'a' twice"),
    "brace": ({"structured_outputs": {"template": "{a"}}, "single '{'"),
    "two forms": ({"response_format": SCHEMA, "structured_outputs": {"regex": "a"}}, "both given"),
    "tools": ({"response_format": SCHEMA, "tools": TOOLS}, "`tools` and `response_format` are both given"),
    "tool choice of no kind": ({"tools": TOOLS, "tool_choice": "any"}, "`tool_choice` is 'any'; expected"),
    "allowed tools": ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "`tool_choice` is {'type': 'allowed_tools'}"),
    "choice of none": ({"tool_choice": "required"}, "`tool_choice` demands a call ('required'), and there are no `tools`"),
    "choice of another": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "`tool_choice`: `choice` is 'g'; expected",
    ),
    "strict without an end": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}}]},
        "`tools` has 'f', whose parameters make no language",
    ),
    "a thought": ({"response_format": SCHEMA, "chat_template_kwargs": {"enable_thinking": True}}, "`enable_thinking` and"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_form_is_refused_with_its_field(name):
    body, reason = BAD[name]
    with pytest.raises(ValueError, match=re.escape(reason)):
        take_form({"model": MODEL, **body}, CHAT_FIELDS, body.get("chat_template_kwargs", {}))


def test_thought_that_the_server_asks_for_leaves_no_room_for_a_form():
    """`diffusiongemma serve --reasoning on`, unless a request's template arguments say otherwise; the form took the thought's place."""
    GONE.set(threading.Event())
    with pytest.raises(ValueError, match="`enable_thinking` and `response_format` are both given .*`--reasoning`"):
        Body({"response_format": SCHEMA}, CHAT_FIELDS, {"enable_thinking": True})
    asked = Body({"response_format": SCHEMA, "chat_template_kwargs": {"enable_thinking": False}}, CHAT_FIELDS, {"enable_thinking": True})
    assert asked.template == {"enable_thinking": False} and asked.constraint is not None


@pytest.mark.parametrize(
    "body, fields, field",
    [
        ({"response_format": SCHEMA}, CHAT_FIELDS, "response_format"),
        ({"text": {"format": {**SCHEMA["json_schema"], "type": "json_schema"}}}, RESPONSE, "text"),
        ({"suffix": "a", "response_format": {"type": "text"}}, COMPLETION, "suffix"),
        ({"suffix": "", "structured_outputs": None}, COMPLETION, None),
        ({"text": {"format": {"type": "text"}}}, RESPONSE, None),
        ({"text": {}}, RESPONSE, None),
        ({"tool_choice": "auto"}, CHAT_FIELDS, None),
    ],
)
def test_fields_of_a_form_are_taken_out(body, fields, field):
    found = take_form(body, fields, {})
    assert not body and (None if found is None else found[0]) == field
