"""What a served answer is, by the clients that ask for it: whose it is, where it ends, what its stream looks like, and what of a request
was passed over.

client.chat.completions.create(model=default_checkpoint(), messages=[...], stop=["\\n"], seed=3)
"""

import asyncio
import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from servers import CHAT, MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_diffusiongemma.console.serve import resolve_checked
from modeling_diffusiongemma.console.serve_answers import Answer, UpToStop, before_stop, in_form
from modeling_diffusiongemma.console.serve_requests import Door, Refused, check_type

QUESTION = CHAT[0]["content"]
PROMPT = f"<|turn>user\n{QUESTION}<turn|>\n<|turn>model\n"
NOISY = {"canvas_length": 16, "max_new_tokens": 16, "max_denoising_steps": 1, "temperature": 100.0, "suppress_tokens": list(range(128))}
ENDLESS = {**NOISY, "max_new_tokens": 500_000}
CHATS, RESPONSES = "/v1/chat/completions", "/v1/responses"
PATHS = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 20},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 20},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 20},
}
every_path = pytest.mark.parametrize("path", PATHS)


def ask(client, path, **settings):
    """Text of an answer to a path, and the answer."""
    body = {"model": MODEL, "temperature": 0, **PATHS[path], **settings}
    answer = client.post(path.removeprefix("/v1"), body=body, cast_to=dict[str, object])
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"], answer
    choice = answer["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"], answer


def stream(address, path, **settings):
    """The events of a stream, as they come."""
    body = {"model": MODEL, "temperature": 0, "stream": True, **PATHS[path], **settings}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return [event.removeprefix("data: ") for event in answer.read().decode().split("\n\n") if event]


def test_stop_string_is_no_part_of_an_answer(address, client):
    """transformers' server leaves it at the end, where OpenAI's clients do not look for it."""
    for path in ("/v1/chat/completions", "/v1/completions"):
        for stop, text in ((["-10", "-02"], "2052"), ("0", "2"), (["2052-"], "")):
            found, answer = ask(client, path, stop=stop)
            assert (found, answer["choices"][0]["finish_reason"]) == (text, "stop")
            *events, done = stream(address, path, stop=stop)
            choices = [json.loads(event)["choices"][0] for event in events]
            assert "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices) == text
            assert choices[-1]["finish_reason"] == "stop" and done == "[DONE]"


@pytest.mark.parametrize("stops", [["ba"], ["abab", "ac"], ["c", "abc"], ["x"], ["abaabab"], []])
def test_stream_up_to_a_stop_string_is_the_whole_answers(stops):
    text = "ababaababcabcabaaababab"
    for length in range(1, len(text)):
        given = []
        cut = UpToStop(given.append, stops)
        for start in range(0, len(text), length):
            cut(text[start : start + length])
        cut(None)
        assert given.pop() is None and "".join(given) == before_stop(text, stops)


def test_stream_that_ends_inside_a_character_has_the_text_of_an_answer(address, client):
    """The first of two bytes, three times, was no text of a stream."""
    first = AutoTokenizer.from_pretrained(MODEL)("é", add_special_tokens=False)["input_ids"][0]
    biased = {"generation_config": json.dumps({"sequence_bias": [[[first], 100.0]], "max_new_tokens": 3})}
    for path, limit in ((CHATS, "max_tokens"), ("/v1/completions", "max_tokens"), (RESPONSES, "max_output_tokens")):
        events = [json.loads(event) for event in stream(address, path, **{limit: 3}, **biased) if event != "[DONE]"]
        choices = [choice for event in events for choice in event.get("choices", ())]
        pieces = [choice.get("text") or choice.get("delta", {}).get("content") for choice in choices]
        pieces += [event["delta"] for event in events if event.get("type") == "response.output_text.delta"]
        assert ask(client, path, **{limit: 3}, **biased)[0] == "".join(filter(None, pieces)) == 3 * "\ufffd"


@pytest.mark.parametrize("streamed", [False, True])
def test_answer_that_nobody_waits_for_is_given_up(address, client, streamed):
    """A client that left, or whose time was over, kept everybody else waiting until its answer was whole."""
    body = {"model": MODEL, "messages": CHAT, "stream": streamed, "generation_config": json.dumps(ENDLESS)}
    data = json.dumps(body).encode()
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + data)
        time.sleep(2)
    assert ask(client, "/v1/chat/completions")[0] == "2052-10-02"


def test_seed_is_of_its_own_request(client):
    """It seeded torch for the whole process, so that the next request without one was told the same as the last time."""
    noisy = {"generation_config": json.dumps(NOISY), "temperature": None, "max_tokens": None}
    drawn = [[ask(client, "/v1/chat/completions", seed=seed, **noisy)[0] for seed in (3, None, None, None)] for _ in range(2)]
    assert drawn[0][0] == drawn[1][0] and drawn[0][1:] != drawn[1][1:]  # any two are equal once in 80 times
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: ask(client, "/v1/chat/completions", seed=seed, **noisy)[0], (3, 4, 5, 3)))
    assert together[0] == together[3] == drawn[0][0] and len(set(together)) == 3

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    sequences = model.generate(**inputs, **NOISY, seed=3)
    assert tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == drawn[0][0]


def test_reference_backend_takes_a_seed(client):
    """Which draws for a whole batch, and refuses seeds of rows."""
    reference = json.dumps({"canvas_length": 16, "max_new_tokens": 16, "backend": "reference"})
    first, second = (ask(client, CHATS, seed=3, temperature=None, generation_config=reference)[0] for _ in range(2))
    assert first == second


@every_path
def test_answer_without_tokens_left_says_so(address, client, path):
    """A response that was cut short was `completed`, like any other."""
    limit = {name: 4 for name in PATHS[path] if name.startswith("max_")}
    text, answer = ask(client, path, **limit)
    *_, last = (json.loads(event) for event in stream(address, path, **limit) if event != "[DONE]")
    assert text == "2052"
    if path != "/v1/responses":
        assert answer["choices"][0]["finish_reason"] == last["choices"][0]["finish_reason"] == "length"
    else:
        assert last["type"] == "response.incomplete"
        for response in (answer, last["response"]):
            assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "max_output_tokens"}
            assert response["output"][0]["status"] == "incomplete" and response["output"][0]["content"][0]["text"] == "2052"
        whole, unhurried = ask(client, path)[1], json.loads(stream(address, path)[-1])
        assert (whole["status"], unhurried["type"]) == ("completed", "response.completed")


@every_path
def test_stream_that_fails_before_it_begins_is_refused(client, path):
    """The stream had begun, and broke off with a line that was no JSON where the reason held a quotation mark."""
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match=r'unknown generation arguments `a"b`'):
        ask(client, path, stream=True, generation_config=json.dumps({'a"b': 4}))


def test_stream_that_fails_later_ends_in_an_error_of_openais_form():
    answer, reason = Answer([], threading.Event()), 'it "has"\n\ntwo lines'

    async def pieces():
        yield 'data: {"choices": []}\n\n'
        answer.error = ValueError(reason)
        yield f'data: {{"choices": []}}\n\ndata: {{"error": "{reason}"}}\n\n'

    async def collect():
        return [piece async for piece in in_form([], pieces(), answer, response=False)]

    events = "".join(asyncio.run(collect())).split("\n\n")
    assert json.loads(events[2].removeprefix("data: "))["error"]["message"] == reason and events[3:] == ["data: [DONE]", ""]


@every_path
def test_null_is_unset(client, path):
    """`chat_template_kwargs: null` and `parallel_tool_calls: null` were errors inside of the server."""
    of_path = {CHATS: ["chat_template_kwargs", "tools"], RESPONSES: ["parallel_tool_calls", "reasoning"]}
    nulls = ["stream", "seed", "top_p", "generation_config", *of_path.get(path, [])]
    assert ask(client, path, **dict.fromkeys(nulls))[0] == "2052-10-02"


@every_path
def test_sampling_of_vllms_requests_is_honoured(client, path):
    assert ask(client, path, temperature=5, top_k=1, seed=0)[0] == ask(client, path, temperature=5, min_p=1.0, seed=0)[0] == "2052-10-02"
    assert ask(client, path, repetition_penalty=5.0)[0] != "2052-10-02"


def test_bias_reaches_a_completion(client):
    """transformers' server reads it in chats alone."""
    two = AutoTokenizer.from_pretrained(MODEL).convert_tokens_to_ids("2")
    assert "2" not in ask(client, "/v1/completions", logit_bias={two: -100})[0]
    assert ask(client, "/v1/completions", logit_bias={})[0] == "2052-10-02"


def test_newer_name_of_the_limit_counts(client):
    """transformers 5.17 passes over it."""
    assert ask(client, "/v1/chat/completions", max_completion_tokens=2)[0] == "20"


@pytest.mark.parametrize("settings", [{"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True}])
def test_settings_of_more_than_a_text_are_refused(client, settings):
    """Of two answers one was dropped, or both were streamed into one text."""
    openai = pytest.importorskip("openai")
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError, match="a request has one answer"):
            ask(client, "/v1/chat/completions", stream=streamed, generation_config=json.dumps(settings))


SYSTEM = {"role": "system", "content": "Be brief."}
PASSED_OVER = {
    "effort of a response": (RESPONSES, {"reasoning": {"effort": "high"}}, "`reasoning` is {'effort': 'high'}"),
    "stored prompt": (RESPONSES, {"prompt": {"id": "a"}}, "`prompt` is {'id': 'a'}"),
    "stored conversation": (RESPONSES, {"conversation": "a"}, "`conversation` is 'a'"),
    "compaction": (RESPONSES, {"context_management": [{"type": "compaction"}]}, "`context_management` is"),
    "moderation": (CHATS, {"moderation": {"model": "a"}}, "`moderation` is"),
    "system message that instructions replace": (RESPONSES, {"instructions": "A", "input": [SYSTEM, *CHAT]}, "are both given"),
    "instructions that are no text": (RESPONSES, {"instructions": [SYSTEM]}, "`instructions` is"),
    "item that is none": (RESPONSES, {"input": [*CHAT, "a"]}, "expected a string, or a list of JSON objects"),
    "input that is a number": (RESPONSES, {"input": 5}, "`input` is 5"),
    "word for a flag": (RESPONSES, {"parallel_tool_calls": "yes"}, "`parallel_tool_calls` is 'yes'"),
    "half of a character": (CHATS, {"messages": [{"role": "user", "content": "a\ud83d"}]}, "'\\ud83d', half of a surrogate pair"),
    "settings that are an object": (CHATS, {"generation_config": {}}, "`generation_config` is {}; expected a string"),
    "settings that are a list": (CHATS, {"generation_config": "[1]"}, "`generation_config` is '[1]'"),
    "settings that are no JSON": (CHATS, {"generation_config": "{"}, "`generation_config` is '{', no JSON"),
    "biases of words": (CHATS, {"logit_bias": {"a": 1}}, "`logit_bias` has ['a']"),
    "number for a stop string": (CHATS, {"stop": 5}, "`stop` is 5"),
    "what the server sets": (CHATS, {"chat_template_kwargs": {"tokenize": False}}, "`chat_template_kwargs` holds ['tokenize']"),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_field_that_was_passed_over_or_failed_inside_is_refused(name):
    path, body, reason = PASSED_OVER[name]
    with pytest.raises(Refused) as refusal:
        Door(None, [MODEL]).check(json.dumps({"model": MODEL, **body}).encode(), path)
    assert refusal.value.args[0] == 400 and reason in refusal.value.args[1]


@pytest.mark.parametrize("served, asked", [("a/b", "a/b@main"), ("a/b@main", "a/b"), ("a/b@dev", "a/b@dev"), ("a/b", "a/b")])
def test_repository_is_named_with_its_revision_or_without(served, asked):
    """Answers name it; transformers' server refused it where the model is pinned."""
    assert json.loads(Door(None, [served], pinned=True).check(json.dumps({"model": asked}).encode(), CHATS)) == {"model": served}


def test_shipped_checkpoint_is_asked_for_by_its_name_where_it_is_served():
    """As `--model` and `--allow` name it; only its path was known, which differs from machine to machine."""
    door = Door(None, [MODEL])
    assert json.loads(door.check(b'{"model": "text"}', CHATS)) == {"model": MODEL}
    with pytest.raises(Refused) as refusal:
        door.check(b'{"model": "sudoku"}', CHATS)
    assert refusal.value.args[0] == 404


@pytest.mark.parametrize("served, asked", [(MODEL, f"{MODEL}@main"), ("a/b", "a/b@dev"), ("a/b@dev", "a/b")])
def test_other_revision_and_revision_of_a_folder_are_not_served(served, asked):
    """A folder was loaded a second time, or another folder that no `--allow` named."""
    with pytest.raises(Refused) as refusal:
        Door(None, [served]).check(json.dumps({"model": asked}).encode(), CHATS)
    assert refusal.value.args[0] == 404


def test_variable_that_a_chat_template_does_not_read_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{% if enable_thinking %}{{ tools }}{% endif %}"}

    def check(template):
        resolve_checked(lambda body: ("name", None, tokenizer), SimpleNamespace(template=template))

    for read in ({"enable_thinking": True}, {"continue_final_message": True}):
        check(read)
    with pytest.raises(ValueError, match=r"has \['documents', 'thinking'\], which .* expected some of \['enable_thinking'\]"):
        check({"thinking": True, "documents": [], "enable_thinking": True})
    tokenizer.chat_template = "{{ messages }}"
    check({"enable_thinking": False})


def test_fields_that_ask_for_what_happens_anyway_pass():
    anyway = {"reasoning": {"effort": None, "summary": None}, "conversation": None, "context_management": [], "instructions": "A"}
    Door(None, [MODEL]).check(json.dumps({"model": MODEL, "input": [*CHAT, SYSTEM], **anyway}).encode(), RESPONSES)


def test_body_of_another_type_is_refused():
    """As `curl -d` sends it; the reason was the validation library's, with a path of the server's."""
    for header in ("application/json", "application/json; charset=utf-8", "Application/vnd.a+json"):
        check_type(header)
    for header in ("application/x-www-form-urlencoded", "text/plain", ""):
        with pytest.raises(Refused, match="`Content-Type` is .* expected application/json"):
            check_type(header)
