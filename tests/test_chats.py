"""Examples in the forms that people's data has: which tokens are learned, packing, and what is refused by its place."""

import numpy as np
import pytest
import torch
from small_models import PAD, small_model

from modeling_diffusiongemma import BlockDiffusionCollator

IGNORED = -100
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Sort: 3, 1"},
    {"role": "assistant", "content": "1, 3"},
]
# A template without `{% generation %}` that trims what it writes, puts a system turn into the user's, and knows tools.
PLAIN = (
    "{{ bos_token }}{% for t in tools or [] %}<|tool>{{ t['name'] }}{% endfor %}"
    "{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
FORGETTING = (
    "{% for m in messages %}<|turn>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'][:1] }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def learned(batch, tokenizer, row=0):
    """The runs of targets of a row, as text."""
    runs, before = [], IGNORED
    for label in batch["labels"][row].tolist():
        if label != IGNORED:
            runs = runs + [[label]] if before == IGNORED else runs[:-1] + [[*runs[-1], label]]
        before = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [None, PLAIN], ids=["shipped", "without marks"])
def test_every_assistant_turn_of_a_chat_is_learned(tokenizer, template, monkeypatch):
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    batch = BlockDiffusionCollator(tokenizer)([{"messages": CHAT}])
    assert learned(batch, tokenizer) == ["1<turn|>", "1, 3<turn|>"]
    assert tokenizer.decode(batch["input_ids"][0]).endswith("1, 3<turn|>")


def test_prompt_and_completion_are_taken_as_text_and_as_messages(tokenizer):
    same = [
        {"prompt": "one", "response": "1"},
        {"prompt": "one", "completion": "1", "source": "a table"},
        {"prompt": [{"role": "user", "content": "one"}], "completion": [{"role": "assistant", "content": "1"}]},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]},
        ("one", "1"),
    ]
    batch = BlockDiffusionCollator(tokenizer)(same)
    assert all(torch.equal(tensor, tensor[:1].expand_as(tensor)) for tensor in batch.values())
    earlier = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    assert learned(BlockDiffusionCollator(tokenizer)([earlier]), tokenizer) == ["1, 3<turn|>"]


def test_tools_and_further_arguments_reach_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN + "{{ tail }}")
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "clock"}]}
    with_tools = BlockDiffusionCollator(tokenizer)([chat])
    assert "<|tool>clock" in tokenizer.decode(with_tools["input_ids"][0])
    monkeypatch.setattr(tokenizer, "chat_template", "{{ start }}" + PLAIN)
    batch = BlockDiffusionCollator(tokenizer, template_kwargs={"start": "xyz"})([("a", "b")])
    assert tokenizer.decode(batch["input_ids"][0]).startswith("xyz")


def test_variables_that_nobody_reads_and_tools_that_nobody_is_told_of_are_refused(tokenizer, monkeypatch):
    """A chat was learned as it is without them, silently; and what an example brought along, as TRL has it, was never read."""
    monkeypatch.setattr(tokenizer, "chat_template", "{{ start }}{{ messages[0].content }}: {{ messages[1].content if messages[1] }}")
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    own = BlockDiffusionCollator(tokenizer)([chat | {"chat_template_kwargs": {"start": "xyz"}}])
    assert tokenizer.decode(own["input_ids"][0]).startswith("xyz")
    other = BlockDiffusionCollator(tokenizer, template_kwargs={"chat_template": "{{ other }}" + tokenizer.chat_template, "other": "x"})
    assert tokenizer.decode(other([chat])["input_ids"][0]).startswith("x")
    BlockDiffusionCollator(tokenizer, template_kwargs={"enable_thinking": False})([chat | {"tools": []}])
    for given, further, said in (
        ({"strat": "xyz"}, {}, r"example 0: .*`template_kwargs`.* has \['strat'\], which .* does not read; expected some of \['start'\]"),
        ({}, {"chat_template_kwargs": {"strat": 1}}, r"has \['strat'\], which"),
        ({}, {"chat_template_kwargs": ["start"]}, "as `chat_template_kwargs`; expected a mapping"),
        ({}, {"tools": [{"name": "clock"}]}, "has `tools`, and the chat template tells the model of none"),
    ):
        with pytest.raises(ValueError, match=said):
            BlockDiffusionCollator(tokenizer, template_kwargs=given)([chat | further])
    for key, value in (("chat_template_kwargs", {"start": "x"}), ("tools", [{"name": "clock"}])):
        with pytest.raises(ValueError, match=f"example 0 has `{key}`, and is token ids, which no chat template makes"):
            BlockDiffusionCollator(tokenizer)([{"prompt": [5, 6], "response": [7], key: value}])


def test_packed_rows_hold_every_example_once_and_train_as_they_would_apart(tokenizer):
    """Tokens of the batch and the losses of each canvas: those of the examples in rows of their own."""
    pairs = [(f"number {place}", ", ".join(str(7 * n) for n in range(1, 2 + 2 * place))) for place in range(6)]
    apart = BlockDiffusionCollator(tokenizer)(pairs)
    packed = BlockDiffusionCollator(tokenizer, max_length=64, packing=True)(pairs)
    rows = packed["input_ids"].shape[0]
    assert rows < 6 and packed["input_ids"].shape[1] <= 64
    assert int((packed["position_ids"] == 0).logical_and(packed["attention_mask"] == 1).sum()) == 6
    assert int(packed["attention_mask"].sum()) == int(apart["attention_mask"].sum())
    assert sorted(sum((learned(packed, tokenizer, row) for row in range(rows)), [])) == sorted(f"{answer}<turn|>" for _, answer in pairs)
    model = small_model(vocab_size=640)
    with torch.no_grad():
        causal = [model(**dict(batch)).causal_loss for batch in (packed, apart)]
    torch.testing.assert_close(causal[0], causal[1], atol=1e-4, rtol=0)


REFUSED = {
    "no assistant's turn": ({"messages": CHAT[:2]}, r"example 1 has messages of \['system', 'user'\]; expected an assistant's turn"),
    "nothing but responses": ({"messages": []}, "example 1 has messages of"),
    "too long": (("a", "9 " * 60), r"example 1 has \d+ tokens; expected at most 60"),
    "other keys": ({"text": "a"}, r"example 1 has the keys \['text'\]; expected `prompt` and `response`"),
    "a string": ("ab", "example 1 is 'ab'"),
    "three": (("a", "b", "c"), "example 1 is"),
    "of different kinds": (("a", [1]), "example 1: prompt and response are of different kinds"),
    "a number": (5, "example 1 is 5; expected a pair"),
    "no response": (("a", None), "example 1 holds None; expected prompt and response as text"),
    "fractions": (([1, 2], [3.5]), r"example 1 holds \[3.5\]; expected .* token ids"),
    "a label that is ignored": (([1, 2], [3, -100]), r"example 1 holds \[3, -100\]; expected .* token ids"),
    "bools": (([1, 2], torch.tensor([True])), "example 1 holds Tensor torch.bool"),
    "two rows": (([1, 2], torch.tensor([[3]])), "example 1 holds Tensor torch.int64 of shape"),
    "bytes": ((b"a", b"b"), "example 1 holds b'a'"),
    "a chat as a string": ({"messages": "hi"}, "example 1 has 'hi' as messages"),
    "a string in a chat": ({"messages": [CHAT[1], "hi"]}, "example 1 has .* as messages; expected a list of mappings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_example_that_cannot_be_learned_is_named_by_its_place(tokenizer, name):
    example, told = REFUSED[name]
    with pytest.raises(ValueError, match=told):
        BlockDiffusionCollator(tokenizer, max_length=60)([("one", "1"), example])


def test_token_ids_may_come_as_tensors_arrays_or_numbers_of_numpys():
    collator = BlockDiffusionCollator(pad_token_id=0)
    rows = collator([([1, 2], (3,)), (torch.tensor([1, 2]), torch.tensor([3])), (np.array([1, 2]), [np.int32(3)]), [range(1, 3), [3]]])
    assert rows["input_ids"].tolist() == [[1, 2, 3]] * 4


def test_a_template_that_writes_a_turn_otherwise_later_is_refused(tokenizer, monkeypatch):
    """Templates drop thoughts of earlier turns: what was written then is not what stands there now."""
    monkeypatch.setattr(tokenizer, "chat_template", FORGETTING)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match="example 0: the chat template writes message 1 otherwise once others follow it"):
        BlockDiffusionCollator(tokenizer)([{"messages": chat}])


@pytest.mark.parametrize(
    ("settings", "told"), [({"packing": True}, "`packing` is given without `max_length`"), ({"max_length": 1}, "`max_length` is 1")]
)
def test_settings_that_make_no_rows_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        BlockDiffusionCollator(pad_token_id=PAD, **settings)
