"""What form a request wants its answer to have: fields of OpenAI's and vLLM's requests as languages of `generation.constraints`.

Sources: OpenAI's `response_format` and `text` ("Structured model outputs", platform.openai.com/docs/guides/structured-outputs), `suffix`
(platform.openai.com/docs/api-reference/completions), `tool_choice`, `parallel_tool_calls` and `strict` ("Function calling",
platform.openai.com/docs/guides/function-calling); vLLM's `structured_outputs` (docs.vllm.ai, "Structured Outputs").
"""

from collections.abc import Collection, Mapping
from typing import Any

from generation.constraints.languages import Choice, JsonSchema, Language, Regex, Template, ToolCalls

ANY_OBJECT = {"type": "object", "additionalProperties": True}
KINDS = ("text", "json_object", "json_schema")
NAMING = ("name", "description", "strict")  # what a schema is called: not part of the answer, which is strict always
STRUCTURED = ("json", "regex", "choice", "json_object", "template")


def take_form(body: dict[str, Any], fields: Collection[str], template: Mapping[str, Any]) -> tuple[str, Language] | None:
    """Takes those of `fields` out of a request's body that say a form: the name of the one that says one, and the answer's language.
    `template`: what the chat template is given.

    Raises:
        ValueError: a field is not as its source describes it; two say a form; the answer may be a call of `tools`, or begins with a
            thought, for neither of which a form leaves room; whatever is wrong with a schema or a pattern.

    Of `tools`, which stay in the body, `tool_choice` is taken out. Where a call is demanded, one function is `strict` or there may be but
    one call, the language is of text and calls; otherwise they are as free as text.
    """
    found = {}
    for field in fields:
        given = body.pop(field, None)
        language = None if given is None else _read(field, given)
        if language is not None:
            found[field] = language
    if not found:
        return _take_calls(body)
    field, *others = found
    if others:
        raise ValueError(f"`{field}` and `{others[0]}` are both given; expected one of them")
    if body.get("tools"):
        raise ValueError(f"`tools` and `{field}` are both given; expected one of them: an answer of that form cannot be a call")
    if template.get("enable_thinking"):
        raise ValueError(
            f"`enable_thinking` and `{field}` are both given (the first by `chat_template_kwargs`, or the server's `--reasoning`); "
            "expected one of them: all of the answer has that form"
        )
    return field, found[field]


def _take_calls(body: dict[str, Any]) -> tuple[str, Language] | None:
    tools, given = body.get("tools") or [], body.pop("tool_choice", None) or "auto"
    named = given.get("function", given) if isinstance(given, dict) and given.get("type") == "function" else None
    choice = named.get("name") if isinstance(named, dict) else given
    if not isinstance(choice, str) or named is None and choice not in ("auto", "required"):
        raise ValueError(f"`tool_choice` is {given!r}; expected 'none', 'auto', 'required' or a function of `tools`")
    called = given != "auto"
    if not tools:
        if called:
            raise ValueError(f"`tool_choice` demands a call ({choice!r}), and there are no `tools`; expected some")
        return None
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    several = body.get("parallel_tool_calls") is not False
    if called or not several or any(isinstance(function, dict) and function.get("strict") for function in functions):
        try:
            return "tools", ToolCalls(tools, choice, several)
        except ValueError as error:
            raise ValueError(f"`tools` and `tool_choice`: {error}") from error
    return None


def _read(field: str, given: Any) -> Language | None:
    try:
        return READERS[field](given)
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from error


def _fields(given: Any, what: str, known: Collection[str]) -> dict[str, Any]:
    """A mapping's fields that are not null; ValueError where it is none, or has others than are known."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} is {given!r}; expected an object")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{what} has {unknown}; expected none but {list(known)}")
    return {name: value for name, value in given.items() if value is not None}


def _schema(given: dict[str, Any]) -> JsonSchema:
    if "schema" not in given:
        raise ValueError("it has no `schema`; expected one")
    return JsonSchema(given["schema"])


def read_response_format(given: Any) -> Language | None:
    """Of a chat completion: `{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}`, or another of `KINDS`."""
    fields = _fields(given, "it", ("type", "json_schema"))
    if fields.get("type") != "json_schema":
        return _without_schema(fields)
    return _schema(_fields(given.get("json_schema"), "`json_schema`", ("schema", *NAMING)))


def read_text(given: Any) -> Language | None:
    """Of a response: `{"format": {"type": "json_schema", "name": ..., "schema": ...}}`, or another of `KINDS`."""
    fields = _fields(_fields(given, "it", ("format",)).get("format", {"type": "text"}), "`format`", ("type", "schema", *NAMING))
    return _schema(fields) if fields.get("type") == "json_schema" else _without_schema(fields)


def _without_schema(fields: dict[str, Any]) -> Language | None:
    if fields.get("type") not in KINDS:
        raise ValueError(f"`type` is {fields.get('type')!r}; expected one of {list(KINDS)}")
    if len(fields) > 1:
        raise ValueError(f"`type` is {fields['type']!r}, beside {sorted(set(fields) - {'type'})}; expected nothing beside it")
    return JsonSchema(ANY_OBJECT) if fields["type"] == "json_object" else None


def read_structured_outputs(given: Any) -> Language:
    """As vLLM has it, one of `STRUCTURED`; `template` is ours: text with blanks, as `generation.Template` writes them."""
    fields = _fields(given, "it", STRUCTURED)
    if len(fields) != 1:
        raise ValueError(f"it has {sorted(fields)}; expected one of {list(STRUCTURED)}")
    ((kind, value),) = fields.items()
    if kind == "json":
        return JsonSchema(value)
    if kind == "json_object":
        if value is not True:
            raise ValueError(f"`json_object` is {value!r}; expected true")
        return JsonSchema(ANY_OBJECT)
    if kind == "choice":
        return Choice(value)
    if not isinstance(value, str):
        raise ValueError(f"`{kind}` is {value!r}; expected a string")
    return Regex(value) if kind == "regex" else Template(value)


def read_suffix(given: Any) -> Language | None:
    """Of a completion: what its text ends with. transformers' server puts it behind whatever was written; here it is written towards."""
    if not isinstance(given, str):
        raise ValueError(f"it is {given!r}; expected a string")
    return Template("{middle}" + given.replace("{", "{{").replace("}", "}}")) if given else None


READERS = {
    "response_format": read_response_format, "text": read_text, "structured_outputs": read_structured_outputs, "suffix": read_suffix,
}  # fmt: skip

# Which of them a request to a path may have.
CHAT, COMPLETION, RESPONSE = (
    ("response_format", "structured_outputs"), ("response_format", "structured_outputs", "suffix"), ("text", "structured_outputs"),
)  # fmt: skip

__all__ = ["CHAT", "COMPLETION", "RESPONSE", "take_form"]
