"""A small tokenizer for the jobs: byte-level BPE trained on their training split, special tokens at the ids of the released model.

Ids 0 to 127 are special tokens, then come the 256 bytes, then merges, `vocab_size` ids in all. Text is cut into runs of letters, single
digits and runs of everything else, and no merge crosses a cut. So numbers are copied digit by digit, and a word has the same tokens
behind a space as behind a quotation mark, which makes copying a word from a note into JSON copying its ids. Nothing is normalized:
decode(encode(text)) == text for every text, a special token's name included.

The chat template writes Gemma 4's turns and marks the assistant's part, so `return_assistant_tokens_mask` works.
"""

import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from generation import RESPONSE_TEMPLATE

from .dates import DATE
from .notes import NOTE_TO_JSON
from .number_words import NUMBER_TO_WORDS, WORDS_TO_NUMBER
from .sorting import SORT
from .units import UNITS

SPECIAL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool_response>": 50,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image|>": 107,
    "<|image>": 108,
    "<image|>": 109,
}
TOOL_IDS = {"<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48, "<tool_call|>": 49, "<tool_response|>": 51, '<|"|>': 52}
# Of what declares a tool, one id each, behind all others: a prompt is half as long with them.
DECLARING = (
    "declaration:", "parameters:", "properties:", "{type:", "required:", "type:", "STRING", "INTEGER", "NUMBER", "BOOLEAN", "ARRAY",
    "OBJECT", "items:", "call:", "response:", "value:",
)  # fmt: skip
SPECIAL_COUNT = 128
SMALLEST = SPECIAL_COUNT + 256
SAMPLES_PER_JOB = 2000
JOBS = (DATE, NUMBER_TO_WORDS, WORDS_TO_NUMBER, UNITS, SORT, NOTE_TO_JSON)  # later jobs are written in the same tokens
MODEL_MAX_LENGTH = 8192
CUTS = r"\p{N}|\p{L}+|[^\p{L}\p{N}]+"

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- elif part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- else -%}
                {{- raise_exception('content part of type ' ~ part['type'] ~ ', expected text or image') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|turn>model\\n' -}}
        {%- generation -%}
            {{- render(message['content']) -}}
            {{- '<turn|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message['role'] in ['user', 'system'] -%}
        {{- '<|turn>' ~ message['role'] ~ '\\n' ~ render(message['content']) ~ '<turn|>\\n' -}}
    {%- else -%}
        {{- raise_exception('role ' ~ message['role'] ~ ', expected user, assistant or system') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def special_tokens(tools: bool = False) -> list[str]:
    """The 128 special tokens in the order of their ids; ids the released model names otherwise are `<unusedN>`. `tools`: with those of
    tool calls among them."""
    names = {token_id: token for token, token_id in (SPECIAL_IDS | (TOOL_IDS if tools else {})).items()}
    return [names.get(token_id, f"<unused{token_id}>") for token_id in range(SPECIAL_COUNT)]


def training_text(samples_per_job: int = SAMPLES_PER_JOB, seed: int = 0) -> list[str]:
    """Prompts and responses of the training split, the same number from every job, and the roles of the chat template."""
    rng = random.Random(seed)
    texts = [text for job in JOBS for _ in range(samples_per_job) for text in job.sample(rng, "train")]
    return texts + ["user", "model", "system"] * samples_per_job


def build_tokenizer(vocab_size: int = 640, tools: bool = False) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; the same every time.

    Args:
        vocab_size: number of ids, at least 384: 128 special tokens and 256 bytes. 640 leaves 256 merges.
        tools: with the special tokens of tool calls, 16 further ids for what declares tools, a template that writes all of them
            (`calls.jinja`), and what reads calls.

    Raises:
        ValueError: `vocab_size` is too small, or larger than the training text has merges for.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"`vocab_size` is {vocab_size}, expected at least {SMALLEST}: {SPECIAL_COUNT} special tokens and 256 bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CUTS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens(tools)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, expected at most {tokenizer.get_vocab_size()}, all the training text has merges for"
        )
    if tools:
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in DECLARING])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        mask_token="<mask>",
        processor_class="TokenizersBackend",  # AutoProcessor would look for Gemma 4's image processor
        extra_special_tokens={"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"},
        padding_side="left",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=(Path(__file__).parent / "calls.jinja").read_text(encoding="utf-8") if tools else CHAT_TEMPLATE,
        **({"response_template": RESPONSE_TEMPLATE} if tools else {}),
    )


__all__ = ["CHAT_TEMPLATE", "SPECIAL_IDS", "build_tokenizer", "special_tokens", "training_text"]
