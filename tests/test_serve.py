"""transformers' own server and chat on the shipped checkpoint: the real server in a process of its own, the real `openai` client.

python -m modeling_diffusiongemma.serve --port 8000
client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="-")
client.chat.completions.create(model=default_checkpoint(), messages=[{"role": "user", "content": "..."}])
"""

import argparse
import base64
import html
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from servers import CHAT, MODEL, NEEDS, client_of, served
from transformers import AutoProcessor, AutoTokenizer

from generation import Trace
from modeling_diffusiongemma import default_checkpoint
from modeling_diffusiongemma.console.arguments import UsageError
from modeling_diffusiongemma.console.main import main as console
from modeling_diffusiongemma.console.serve import loading_as, named, read_checked
from modeling_diffusiongemma.console.serve_requests import MAX_BODY, MAX_CHARACTERS, check_chat
from modeling_diffusiongemma.serve import main
from modeling_diffusiongemma.weights.fp8 import FP8Experts

DATES = {"October 2, 2052": "2052-10-02", "4 May 1911": "1911-05-04", "3 March 1998": "1998-03-03", "2077/12/31": "2077-12-31"}
NARROW = {"generation_config": json.dumps({"canvas_length": 16, "max_new_tokens": 16, "do_sample": False})}
ENDLESS = {"canvas_length": 16, "max_new_tokens": 500_000, "max_denoising_steps": 2, "suppress_tokens": list(range(128))}  # special tokens


def ask(client, messages=CHAT, **settings):
    """Text, tokens counted, and why the answer ended."""
    answer = client.chat.completions.create(model=MODEL, messages=messages, **settings)
    return answer.choices[0].message.content, answer.usage.completion_tokens, answer.choices[0].finish_reason


def ask_streaming(client, messages=CHAT, **settings):
    """As `ask`, from the pieces of a stream."""
    pieces = list(client.chat.completions.create(model=MODEL, messages=messages, stream=True, **settings))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    return text, pieces[-1].usage.completion_tokens, pieces[-1].choices[0].finish_reason


@pytest.mark.parametrize("how", [ask, ask_streaming])
def test_answer_and_its_tokens(client, how):
    """Ten characters and the end of the turn are eleven tokens. With transformers' class the first call fails, and the second
    counts one token for the canvas."""
    assert how(client, extra_body=NARROW) == ("2052-10-02", 11, "stop")
    assert how(client, temperature=0, max_tokens=20) == ("2052-10-02", 11, "stop")


@pytest.mark.parametrize("how", [ask, ask_streaming])
def test_an_end_in_the_last_allowed_token_is_a_stop_and_one_of_time_none(client, how):
    """transformers' server counts tokens: eleven of eleven were its `length`, ten of five hundred thousand its `stop`."""
    assert how(client, temperature=0, max_tokens=11) == ("2052-10-02", 11, "stop")
    hurried = {"generation_config": json.dumps({**ENDLESS, "max_time": 1e-9})}
    assert how(client, extra_body=hurried)[1:] == (16, "length")


@pytest.mark.parametrize("how", [ask, ask_streaming])
def test_answer_ends_at_its_limit_or_stop_string(client, how):
    assert how(client, temperature=0, max_tokens=4) == ("2052", 4, "length")
    assert how(client, temperature=0, max_tokens=20, stop="-10") == ("2052", 7, "stop")


def test_usual_arguments_reach_generate(client):
    two = AutoTokenizer.from_pretrained(MODEL).convert_tokens_to_ids("2")
    forbidden = ask(client, temperature=0, max_tokens=16, logit_bias={two: -100})[0]
    assert "2" not in forbidden and "10" in forbidden
    ask(client, max_tokens=16, top_p=0.9, frequency_penalty=0.1, seed=3)


def test_several_requests_at_once(client):
    """Streaming and not; every one gets its own answer."""
    wanted = [(how, date) for how in (ask, ask_streaming) for date in DATES]
    with ThreadPoolExecutor(len(wanted)) as pool:
        chats = [[{"role": "user", "content": f"Write {date} as an ISO date."}] for _, date in wanted]
        answers = pool.map(lambda job: job[0][0](client, job[1], extra_body=NARROW), zip(wanted, chats, strict=True))
        assert [answer[0] for answer in answers] == [DATES[date] for _, date in wanted]


def test_cancelled_stream_frees_the_model(client):
    """One request is generated at a time: the next one would wait for half a million tokens."""
    stream = client.chat.completions.create(model=MODEL, messages=CHAT, stream=True, extra_body={"generation_config": json.dumps(ENDLESS)})
    assert sum(bool(piece.choices[0].delta.content) for piece, _ in zip(stream, range(40), strict=False)) > 20
    stream.close()
    assert ask(client, extra_body=NARROW)[0] == "2052-10-02"


def test_other_endpoints_count_the_same(client):
    prompt = f"<|turn>user\n{CHAT[0]['content']}<turn|>\n<|turn>model\n"
    completion = client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, temperature=0)
    assert (completion.choices[0].text, completion.usage.completion_tokens) == ("2052-10-02", 11)
    full = client.completions.create(model=MODEL, prompt=prompt, max_tokens=11, temperature=0)
    assert (full.choices[0].text, full.choices[0].finish_reason) == ("2052-10-02", "stop")
    response = client.responses.create(model=MODEL, input=CHAT[0]["content"], max_output_tokens=16, temperature=0, stream=False)
    assert (response.output_text, response.usage.output_tokens) == ("2052-10-02", 11)


def ask_traced(client, form, **settings):
    return client.chat.completions.create(model=MODEL, messages=CHAT, extra_body={**NARROW, "trace": form}, **settings)


def test_answer_brings_along_how_it_came_about(client, tmp_path):
    """`trace` in the client's `extra_body`, and an attribute of what it gets."""
    page, picture, file = (ask_traced(client, form) for form in ("html", "svg", "safetensors"))
    for answer in (page, picture, file):
        assert (answer.choices[0].message.content, answer.usage.completion_tokens, answer.choices[0].finish_reason) == (
            "2052-10-02",
            11,
            "stop",
        )
    assert page.trace.startswith("<!doctype html>") and html.escape(CHAT[0]["content"]) in page.trace
    assert picture.trace.startswith("<svg ") and html.escape(CHAT[0]["content"]) in picture.trace
    (path := tmp_path / "trace.safetensors").write_bytes(base64.b64decode(file.trace))
    (canvas,) = (trace := Trace.load(path)).row()
    text = AutoTokenizer.from_pretrained(MODEL).decode(canvas.tokens, skip_special_tokens=True)
    assert text == "2052-10-02" and trace.finish_reasons == ["stop"]


def test_trace_comes_with_a_completion_and_with_none_that_does_not_ask(client):
    prompt = f"<|turn>user\n{CHAT[0]['content']}<turn|>\n<|turn>model\n"
    completion = client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, temperature=0, extra_body={"trace": "html"})
    assert completion.choices[0].text == "2052-10-02" and html.escape(CHAT[0]["content"]) in completion.trace
    for settings in ({}, {"trace": None}):
        answer = client.chat.completions.create(model=MODEL, messages=CHAT, extra_body={**NARROW, **settings})
        assert not hasattr(answer, "trace") and answer.choices[0].message.content == "2052-10-02"


def test_traces_of_requests_at_once_are_their_own(client):
    with ThreadPoolExecutor(len(DATES)) as pool:
        chats = [[{"role": "user", "content": [{"type": "text", "text": f"Write {date} as an ISO date."}]}] for date in DATES]
        ask_one = partial(client.chat.completions.create, model=MODEL, extra_body={**NARROW, "trace": "svg"})
        answers = pool.map(lambda chat: ask_one(messages=chat), chats)
        for date, answer in zip(DATES, answers, strict=True):
            assert answer.choices[0].message.content == DATES[date] and f">Write {date} as an ISO date.</text>" in answer.trace


IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
PATH_PART = {"type": "image_url", "image_url": {"url": "/etc/passwd"}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}
BAD = {
    "unknown role": ({"messages": [{"role": "clown", "content": "Hello"}]}, "role clown"),
    "empty chat": ({"messages": []}, "`messages` is"),
    "no chat": ({}, "'messages'"),
    "text for a chat": ({"messages": "Hello"}, "`messages` is 'Hello'"),
    "message without a role": ({"messages": [{"content": "Hello"}]}, "`role`"),
    "message without content": ({"messages": [{"role": "user"}]}, "`content`"),
    "image": ({"messages": [{"role": "user", "content": [IMAGE_PART]}]}, "image"),
    "no model": ({"messages": CHAT, "model": None}, "`model` is None"),
    "no tokens": ({"messages": CHAT, "max_tokens": 0}, "`max_new_tokens` is 0"),
    "negative temperature": ({"messages": CHAT, "temperature": -1}, "`temperature` is -1.0"),
    "empty stop string": ({"messages": CHAT, "stop": ""}, "`stop_strings` is ''"),
    "beams": ({"messages": CHAT, "generation_config": '{"num_beams": 4}'}, "num_beams=4"),
    "unknown argument": ({"messages": CHAT, "generation_config": '{"canvas": 4}'}, "unknown generation arguments"),
    "calls that are no list": ({"messages": [*CHAT, {"role": "assistant", "tool_calls": "abc"}]}, "`tool_calls` of `messages[1]` is 'abc'"),
    "call without arguments": ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "`tool_calls`"),
    "call of no JSON": ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "an object"),
    "tokens as text": ({"messages": CHAT, "max_tokens": "64"}, "`max_tokens` is '64'; expected an integer"),
    "words for a number": ({"messages": CHAT, "temperature": "hot"}, "`temperature` is 'hot'; expected a number"),
    "a flag for a number": ({"messages": CHAT, "seed": True}, "`seed` is True; expected an integer"),
    "sound": ({"messages": CHAT, "modalities": ["audio"]}, "`modalities` is ['audio']"),
    "effort": ({"messages": CHAT, "reasoning_effort": "high"}, "`reasoning_effort` is 'high'"),
    "a call that must be": (
        {"messages": CHAT, "tools": [TOOL], "tool_choice": "required"},
        "`tools` are given, and the chat template of this model",
    ),
    "one call alone": (
        {"messages": CHAT, "tools": [TOOL], "parallel_tool_calls": False},
        "`tools` are given, and the chat template of this model",
    ),
    "two answers": ({"messages": CHAT, "n": 2}, "`n` is 2"),
    "probabilities": ({"messages": CHAT, "logprobs": True}, "`logprobs` is True"),
    "list of biases": ({"messages": CHAT, "logit_bias": [1]}, "`logit_bias` is [1]"),
    "template of its own": ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "a template is a program"),
    "unread variable": ({"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}}, "(or the server's `--reasoning`) has"),
    "unknown form of a trace": (
        {"messages": CHAT, "trace": "gif"},
        "`trace` is 'gif' in a request to /v1/chat/completions; expected one of",
    ),
    "trace as a flag": ({"messages": CHAT, "trace": True}, "`trace` is True"),
    "trace of a stream": ({"messages": CHAT, "trace": "svg", "stream": True}, "`trace` is 'svg', and `stream` is set"),
    "trace without steps": (
        {"messages": CHAT, "trace": "svg", "generation_config": '{"decoding": "autoregressive"}'},
        "no denoising steps",
    ),
    "settings that are no JSON": ({"messages": CHAT, "generation_config": "{"}, "`generation_config` is '{', no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_refused_with_its_reason(client, name):
    openai = pytest.importorskip("openai")
    body, reason = BAD[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": MODEL, **body}, cast_to=object)
    assert reason in caught.value.body["message"]


def post(address, path, body, kind="application/json"):
    """Status, headers and answer of a request whose body may be anything."""
    request = urllib.request.Request(address + path, data=body, headers={"Content-Type": kind, "Origin": "http://a.page"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def text_of(length):
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a" * length}]}).encode()


HOSTILE = {  # path, body, status, what the reason says
    "more text than is read": ("/v1/chat/completions", text_of(MAX_CHARACTERS), 413, "characters"),
    "20 MB of text": ("/v1/chat/completions", text_of(20_000_000), 413, "characters"),
    "20 MB in a call's arguments": ("/v1/completions", text_of(20_000_000).replace(b'"content"', b'"image_url"'), 413, "characters"),
    "more bytes than are read": ("/v1/responses", b" " * (MAX_BODY + 1), 413, "bytes"),
    "brackets without end": ("/v1/chat/completions", b"[" * 10**6, 400, "no JSON"),
    "no JSON": ("/v1/chat/completions", b"\xff", 400, "no JSON"),
    "no body": ("/load_model", b"", 400, "no JSON"),
    "a list": ("/v1/chat/completions", b"[]", 400, "expected a JSON object"),
    "another folder": ("/v1/completions", json.dumps({"model": os.path.dirname(__file__), "prompt": "a"}).encode(), 404, "not served"),
    "another folder to load": ("/load_model", b'{"model": "/etc"}', 404, "not served"),
    "another repository": ("/v1/completions", b'{"model": "gpt2", "prompt": "a"}', 404, "not served"),
    "trace of a response": (
        "/v1/responses", json.dumps({"model": MODEL, "input": "a", "trace": "html"}).encode(), 400, "`trace` is 'html' in a request to",
    ),
    "audio": ("/v1/audio/transcriptions", b"", 501, "reads no audio"),
    "unknown path": ("/v1/embeddings", json.dumps({"model": MODEL}).encode(), 404, "Not Found"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_request_is_answered_at_once_with_its_reason(address, name):
    """20 MB of text kept everybody waiting for minutes, and any folder that was named was loaded."""
    path, body, status, reason = HOSTILE[name]
    begun = time.monotonic()
    found, headers, answer = post(address, path, body)
    assert found == status and reason in answer["error"]["message"] and answer["error"]["type"], answer
    assert headers["access-control-allow-origin"] and headers["x-request-id"]
    with urllib.request.urlopen(f"{address}/health", timeout=60) as health:
        assert health.status == 200
    assert time.monotonic() - begun < 60  # it takes tenths of a second, of a core that others may have


def test_body_longer_than_it_says_is_cut_off(address):
    """A chunked body has no length in its header."""
    host, port = address.removeprefix("http://").split(":")
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(4 * MAX_BODY // 0x10000 + 2):
                connection.sendall(piece)
        except ConnectionError:  # it has been cut off already
            pass
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_models_are_those_that_may_be_asked_for(client):
    """Without a cache folder the list was an internal error."""
    shipped = [default_checkpoint(name) for name in ("decisions", "sudoku")]
    assert [model.id for model in client.models.list()] == [*shipped, MODEL, default_checkpoint("tools")]


def test_tools_that_may_not_be_called_are_not_shown(client):
    """As agents ask for a last answer; with them a form of the answer is refused, and without them it is not."""
    form = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}}}}
    given = {"model": MODEL, "messages": CHAT, "extra_body": NARROW, "response_format": form, "parallel_tool_calls": True}
    answer = client.chat.completions.create(tools=[TOOL], tool_choice="none", **given)
    assert answer.usage.prompt_tokens == client.chat.completions.create(**given).usage.prompt_tokens
    assert set(json.loads(answer.choices[0].message.content)) <= {"a"}


@pytest.mark.parametrize("calls", [None, []])
def test_history_as_the_client_keeps_it_is_read(client, calls):
    """`tool_calls: null` was refused, and an empty list dropped the content, before transformers 5.24."""
    history = [*CHAT, {"role": "assistant", "content": "2052-10-02", "tool_calls": calls, "refusal": None}, *CHAT]
    answer = client.chat.completions.create(model=MODEL, messages=history, extra_body=NARROW)
    same = client.chat.completions.create(
        model=MODEL, messages=[*CHAT, {"role": "assistant", "content": "2052-10-02"}, *CHAT], extra_body=NARROW
    )
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens > 60


def test_bad_request_is_refused_before_its_stream_begins(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match=r"`temperature` is -1\.0"):
        ask_streaming(client, temperature=-1)


def test_chat_in_a_terminal(address):
    """`transformers chat`, its keyboard scripted."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # it would refuse loopback too
    code = "from transformers.cli.transformers import app; app()"
    command = [sys.executable, "-c", code, "chat", MODEL, f"{address}/v1", "canvas_length=16", "max_new_tokens=16", "do_sample=False"]
    ended = subprocess.run(
        command, input=f"{CHAT[0]['content']}\n!exit\n", capture_output=True, text=True, timeout=120, env=environment | {"COLUMNS": "200"}
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "2052-10-02" in ended.stdout and "11 tokens in" in ended.stdout


def test_what_is_said_beside_a_call_stays_in_the_history():
    """transformers drops it."""
    pytest.importorskip("fastapi", reason=NEEDS)
    from transformers.cli.serving.utils import BaseHandler, Modality

    calls = [{"function": {"name": "f", "arguments": '{"a": 1}'}}]
    history = [*CHAT, {"role": "assistant", "content": "So I call.", "tool_calls": calls}, {"role": "assistant", "tool_calls": calls}]
    _, said, silent = read_checked(BaseHandler.get_processor_inputs_from_messages, history, Modality.LLM)
    assert said["content"] == "So I call." and said["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]
    assert silent["content"] == "" and "tool_calls" in silent


GOOD_CHATS = [
    (CHAT, False),
    ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], False),
    ([{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "Hello"}]}], True),
    ([{"role": "assistant", "content": None, "tool_calls": []}], False),
]


@pytest.mark.parametrize("messages, images", GOOD_CHATS)
def test_chats_the_model_can_read_pass(messages, images):
    check_chat(messages, images)


@pytest.mark.parametrize("part", [IMAGE_PART, {"type": "input_audio"}, {"text": "Hello"}, "Hello"])
def test_part_the_model_cannot_read_is_refused(part):
    """The server leaves out what its handler does not know, and answers the rest."""
    with pytest.raises(ValueError, match=r"`messages\[1\]`"):
        check_chat([*CHAT, {"role": "user", "content": [part]}], images=False)


def test_image_at_a_path_is_refused():
    """transformers would open any file of the server's."""
    with pytest.raises(ValueError, match="'/etc/passwd'"):
        check_chat([{"role": "user", "content": [PATH_PART]}], images=True)


@pytest.mark.parametrize("pinned", [(MODEL,), ()])
def test_model_is_served_as_it_is_asked_to_be_loaded(pinned, tmp_path):
    """The first model is loaded while the server is made, others when a request names them."""
    options = ("--quantize", "fp8", "--max-memory", "1GB", "--offload-folder", str(tmp_path / "new"), *pinned)
    with served(tmp_path, *options) as url:
        assert ask(client_of(url), temperature=0, max_tokens=20) == ("2052-10-02", 11, "stop")


def test_models_are_loaded_quantised_and_placed():
    """What the model manager loads in the context in which the server is made and runs."""
    pytest.importorskip("fastapi", reason=NEEDS)
    from transformers.cli.serving.model_manager import ModelManager

    before, ours = ModelManager._load_model, argparse.Namespace(quantize="fp8", max_memory={"cpu": 10**9}, offload_folder=None)
    with loading_as(ours):
        model = ModelManager(device="cpu", force_model=MODEL).loaded_models.popitem()[1].model
        assert type(model.model.decoder.layers[0].experts) is FP8Experts
        with pytest.raises(ValueError, match="`--quantize` is 'fp8' and `--quantization` 'bnb-4bit'; expected one"):
            ModelManager(device="cpu", force_model=MODEL, quantization="bnb-4bit")
    assert ModelManager._load_model is before


@pytest.mark.parametrize(
    "options, said",
    [
        (["--quantize", "8bit"], "argument --quantize: got '8bit'; expected fp8 or 4bit"),
        (["--max-memory", "12"], "argument --max-memory: got '12'; expected a size"),
        (["--max-memory", "99=1GB"], "`--max-memory` names 99; expected some of"),
        (["--offload-folder", f"{__file__}/new"], "expected a folder that can be written (Not a directory)"),
        (["--quantize", "fp8", "--quantization", "bnb-4bit"], "expected one of them"),
    ],
)
def test_wrong_placement_is_named_before_the_server_runs(options, said, capsys):
    pytest.importorskip("fastapi", reason=NEEDS)
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert said in f"{stop.value} {capsys.readouterr().err}"
    assert console(["serve", *options]) == 2 and said in capsys.readouterr().err


def test_one_that_is_loaded_first_is_named_as_by_other_commands(tmp_path):
    """`serve tools` asked the Hub for a repository `tools`, and `serve nosuch` for one of that name, again and again."""
    assert named("tools") == default_checkpoint("tools") and named(None) is None
    for other in ("owner/name@v2", "owner/name:file.gguf", default_checkpoint("sudoku")):
        assert named(other) == other
    (tmp_path / "adapter_config.json").touch()
    for wrong, said in (("nosuch", "'nosuch' is no checkpoint"), (str(tmp_path), "holds an adapter")):
        with pytest.raises(UsageError, match=f"FORCE_MODEL: .*{said}"):
            named(wrong)


def test_folder_that_cannot_be_loaded_is_named_in_one_line(tmp_path):
    pytest.importorskip("fastapi", reason=NEEDS)
    with pytest.raises(SystemExit, match=r"^error: .*" + re.escape(str(tmp_path))):
        main([str(tmp_path)])


@pytest.mark.parametrize("name", ["text", "sudoku", "decisions", "tools"])
def test_shipped_tokenizer_is_its_processor(name):
    """The server loads AutoProcessor, which looked for Gemma 4's image processor."""
    path = default_checkpoint(name)
    assert type(AutoProcessor.from_pretrained(path)) is type(AutoTokenizer.from_pretrained(path))


def test_missing_extra_is_named_in_one_line(monkeypatch, capsys):
    for name in ["fastapi", *(name for name in sys.modules if name.startswith("fastapi."))]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r'^error: .* pip install -e "\.\[serve\]"'):
        main([])
    assert console(["serve"]) == 1 and 'pip install -e ".[serve]"' in capsys.readouterr().err
