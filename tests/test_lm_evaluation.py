"""lm-eval with the model type `diffusiongemma`: the real harness on local tasks made from the examples' jobs.

python -m modeling_diffusiongemma.lm_evaluation --model diffusiongemma --tasks gsm8k --apply_chat_template --batch_size 8
"""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from small_models import small_model

from modeling_diffusiongemma import default_checkpoint

NEEDS = 'needs pip install -e ".[lm-eval]"'
ROOT = Path(__file__).parents[1]
WRONG = 3  # of the documents below, so many have a target that no model writes
DATES = 12
NARROW = {"canvas_length": 16}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: {target}
target_delimiter: ""
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason=NEEDS)


@pytest.fixture(scope="module")
def adapter(lm_eval):
    from modeling_diffusiongemma.lm_evaluation import DiffusionGemmaEvaluation

    return DiffusionGemmaEvaluation


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks on the same held-out dates: write them, and choose them among wrong ones."""
    from jobs import TEXT_JOBS

    rng, folder, rows = random.Random(0), tmp_path_factory.mktemp("tasks"), []
    for number in range(DATES):
        prompt, right = TEXT_JOBS["date"].sample(rng, "test")
        wrong = f"{int(right[:4]) - 1}{right[4:]}"
        choices = [wrong, right] if number % 2 else [right, wrong]
        answer = "no date" if number < WRONG else right
        rows.append({"prompt": prompt, "answer": answer, "choices": "|".join(choices), "gold": choices.index(right)})
    (folder / "dates.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"file": folder / "dates.jsonl"}
    write = "generation_kwargs: {until: ['<turn|>'], max_gen_toks: 16, do_sample: false}"
    choices = """doc_to_choice: "{{choices.split('|')}}" """
    kinds = {
        "dates_written": {"kind": "generate_until", "target": '"{{answer}}"', "more": write, "metric": "exact_match"},
        "dates_chosen": {
            "kind": "multiple_choice",
            "target": "gold",
            "more": """doc_to_choice: "{{choices.split('|')}}" """,
            "metric": "acc",
        },
        "dates_scored": {"kind": "loglikelihood", "target": '"{{answer}}"', "more": "", "metric": "acc"},
    }
    for name, fields in kinds.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, **common, **fields))
    return folder


def evaluate(lm_eval, tasks, names, model_args=NARROW, **settings):
    from lm_eval.tasks import TaskManager

    import modeling_diffusiongemma.lm_evaluation  # noqa: F401  registers the model type

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="diffusiongemma",
        model_args=model_args,
        tasks=names,
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
        **settings,
    )


def test_known_scores_of_local_tasks(lm_eval, tasks):
    """The shipped checkpoint writes every date right, prefers it to the year before, and its greedy decoding agrees; three of the
    twelve targets are no dates."""
    found = evaluate(lm_eval, tasks, ["dates_written", "dates_chosen", "dates_scored"], batch_size=5)["results"]
    known = (DATES - WRONG) / DATES
    assert found["dates_written"]["exact_match,none"] == known
    assert found["dates_chosen"]["acc,none"] == 1
    assert found["dates_scored"]["acc,none"] == known


def test_monte_carlo_mode_chooses_the_same(lm_eval, tasks):
    found = evaluate(lm_eval, tasks, ["dates_chosen"], {**NARROW, "mode": "diffusion", "samples": 8}, batch_size=12, limit=6)
    assert found["results"]["dates_chosen"]["acc,none"] == 1


def test_command_line(lm_eval, tasks, tmp_path, monkeypatch):
    """lm-eval's own; without `pretrained` the model is the shipped one. In a clean process it runs in tests/test_readme.py."""
    from modeling_diffusiongemma.lm_evaluation import main

    monkeypatch.setattr(sys, "argv", sys.argv)
    model = ["run", "--model", "diffusiongemma", "--model_args", "canvas_length=16", "--tasks", "dates_written", "--batch_size", "4"]
    main([*model, "--include_path", str(tasks), "--apply_chat_template", "--limit", "4", "--output_path", str(tmp_path)])
    (report,) = tmp_path.rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["dates_written"]["exact_match,none"] == (4 - WRONG) / 4


# The adapter's own answers, on a small random model with the shipped tokenizer


@pytest.fixture(scope="module")
def small(adapter):
    return lambda **settings: adapter(pretrained=small_model(3, vocab_size=640), tokenizer=default_checkpoint(), **settings)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


TEXTS = [("The day is", " 1998-03-03."), ("One and a half kilometre, in metres:", " 1,500"), ("", "Hello there."), ("A", "B")]


def by_hand(lm, context, continuation):
    """Sum of next-token log-probabilities of the causal pass, token by token, and whether each was the most probable."""
    total, greedy = 0.0, True
    with torch.no_grad():
        for place, token in enumerate(continuation):
            ids = torch.tensor([[*context, *continuation[:place]]])
            logits = lm.model.compute_logits(lm.model.prefill(ids).last_hidden_state[:, -1])[0]
            total += float(logits.log_softmax(-1)[token])
            greedy &= int(logits.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, "4"])
def test_log_likelihood_is_the_sum_over_tokens_in_any_batch(small, batch_size):
    lm = small(batch_size=batch_size)
    found = lm.loglikelihood(requests("loglikelihood", *TEXTS), disable_tqdm=True)
    for (context, continuation), got in zip(TEXTS, found, strict=True):
        begin, whole = lm.tok_encode(context), lm.tok_encode(context + continuation)
        total, greedy = by_hand(lm, begin, whole[len(begin) :])  # lm-eval's cut, also where a token would reach across it
        assert got[0] == pytest.approx(total, abs=1e-3) and got[1] == greedy


@pytest.mark.parametrize("mode", ["autoregressive", "diffusion"])
def test_greedy_flag_is_what_greedy_decoding_writes(small, mode):
    lm = small(mode=mode, samples=2, **({"canvas_length": 8, "max_denoising_steps": 4} if mode == "diffusion" else {}))
    context = lm.tok_encode("The day is")
    written = lm._sequences([context], None, do_sample=False, max_new_tokens=11, eos_token_id=[], decoding=mode)[0]
    other = [*written[:-1], written[-1] ^ 1]
    found = lm._loglikelihood_tokens([(None, context, written), (None, context, other)], disable_tqdm=True)
    assert [flag for _, flag in found] == [True, False]


def test_rolling_log_likelihood_predicts_every_token_once(small):
    """Windows of 7: six predicted tokens after one of context, the last window with as much context as fits."""
    lm = small(max_length=8, batch_size=2)
    text = "Write three hundred and five in digits, and 305 in words."
    ids = lm.tok_encode(text, add_special_tokens=False)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    wanted, done = 0.0, 0
    while done < len(ids):
        end = min(done + 7, len(ids))
        context = [lm.prefix_token_id] if done == 0 else ids[end - 8 : done]
        wanted += by_hand(lm, context, ids[done:end])[0]
        done = end
    assert found == pytest.approx(wanted, abs=1e-3) and len(ids) > 14
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0.0]


def test_texts_depend_on_their_seed_and_not_on_their_batch(small):
    prompts = [(text, {"until": [], "max_gen_toks": 20}) for text in ("The day is", "Ten", "Write 300 in words, please:", "Ten")]
    settings = {"canvas_length": 8, "max_denoising_steps": 3}
    alone, together, other = (
        small(batch_size=size, seed=seed, **settings).generate_until(requests("generate_until", *prompts), disable_tqdm=True)
        for size, seed in ((1, 0), (4, 0), (4, 1))
    )
    assert alone == together and together != other
    assert together[1] != together[3], "the same request again is another sample"


def test_answer_is_cut_before_the_first_stop_string(small):
    lm, whole = small(canvas_length=8, max_denoising_steps=3), {"max_gen_toks": 40, "do_sample": False, "suppress_tokens": list(range(128))}
    (text,) = lm.generate_until(requests("generate_until", ("The day is", {"until": [""], **whole})), disable_tqdm=True)
    stops = [text[20:23], text[9:11]]
    (cut,) = lm.generate_until(requests("generate_until", ("The day is", {"until": stops, **whole})), disable_tqdm=True)
    assert cut == text[: min(text.find(stop) for stop in stops)]
    (short,) = lm.generate_until(requests("generate_until", ("The day is", {**whole, "max_gen_toks": 4})), disable_tqdm=True)
    assert text.startswith(short) and 0 < len(short) < len(text)


def test_newline_of_the_chat_template_stays_in_the_context(small):
    """Scored with the answer, it was never greedy: no model is trained to write it."""
    lm, prompt = small(), "<bos><|turn>user\nHello<turn|>\n<|turn>model\n"
    assert lm._encode_pair(prompt, "1998") == (lm.tok_encode(prompt), lm.tok_encode("1998", add_special_tokens=False))
    crossing = lm._encode_pair('{"a": ', '"b"')  # one token holds the quotation marks of both
    assert crossing[0] == lm.tok_encode('{"a":')


def test_long_context_keeps_its_end(small):
    lm, text = small(max_length=16), "Write three hundred and five in digits, and 305 in words."
    ids = lm.tok_encode(text)
    (found,) = lm._loglikelihood_tokens([(None, ids, [300, 301])], disable_tqdm=True)
    assert found[0] == pytest.approx(by_hand(lm, ids[-14:], [300, 301])[0], abs=1e-3) and len(ids) > 14


def test_chat_template_is_the_tokenizers_and_begins_once(small):
    lm = small()
    text = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text == "<bos><|turn>user\nHello<turn|>\n<|turn>model\n" and lm.tok_encode(text).count(lm.tokenizer.bos_token_id) == 1
    assert lm.tok_encode("Hello")[0] == lm.tokenizer.bos_token_id != lm.tok_encode("Hello", add_special_tokens=False)[0]
    begun = lm.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}], add_generation_prompt=False
    )
    assert begun.endswith("<|turn>model\nIt is") and lm.chat_template(True) == lm.tokenizer.chat_template
    assert "/" not in lm.tokenizer_name and lm.tokenizer_name


def test_placement_and_precision_are_the_consoles(adapter, tmp_path):
    """lm-eval's command line cuts at commas."""
    fp8 = adapter(quantize="fp8", max_memory="cpu=1GB", offload_folder=str(tmp_path / "new"), device="cpu")
    assert fp8.model.model.decoder.layers[0].experts.gate_up_proj.dtype == torch.float8_e4m3fn
    on_disk = adapter(max_memory="cpu=100KB")
    assert set(on_disk.model.hf_device_map.values()) == {"disk"} and on_disk.device.type == "cpu"
    assert on_disk._loglikelihood_tokens([(None, [2], [300])], disable_tqdm=True) == adapter()._loglikelihood_tokens(
        [(None, [2], [300])], disable_tqdm=True
    )


BAD_ARGUMENTS = {
    "batch_size": "auto", "max_batch_size": 64, "mode": "bound", "samples": 0, "seed": -1, "max_length": 0, "max_gen_toks": "many",
    "canvas": 16, "sampler": "beam", "dtype": "float99", "pretrained": str(ROOT), "quantize": "8bit", "max_memory": 12,
    "offload_folder": f"{__file__}/new",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_model_argument_is_refused_by_name(adapter, name):
    match = {"pretrained": str(ROOT), "dtype": "float99"}.get(name, name)
    with pytest.raises((ValueError, OSError), match=match):
        adapter(**{name: BAD_ARGUMENTS[name]})


def test_model_without_its_tokenizer_or_of_another_kind_is_refused(adapter):
    with pytest.raises(ValueError, match="`tokenizer` is None"):
        adapter(pretrained=small_model())
    with pytest.raises(ValueError, match="`dtype`"):
        adapter(pretrained=small_model(), dtype="bfloat16")
    with pytest.raises(ValueError, match="`quantize` is 'fp8'; expected None, since `pretrained` is a model"):
        adapter(pretrained=small_model(), quantize="fp8")
    with pytest.raises(ValueError, match="`pretrained` is a Linear"):
        adapter(pretrained=torch.nn.Linear(2, 2), tokenizer=default_checkpoint())


def test_bad_request_is_refused_by_name(small):
    lm = small(max_length=16)
    with pytest.raises(ValueError, match="continuation"):
        lm._loglikelihood_tokens([(None, [2], [])], disable_tqdm=True)
    with pytest.raises(ValueError, match="continuation"):
        lm._loglikelihood_tokens([(None, [2], [300] * 16)], disable_tqdm=True)
    for arguments, name in (
        ({"num_beams": 4}, "num_beams"), ({"num_return_sequences": 2}, "num_return_sequences"), ({"max_gen_toks": 16}, "max_gen_toks"),
        ({"temperture": 1.0}, "temperture"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            lm.generate_until(requests("generate_until", ("Hello", {"max_gen_toks": 4, **arguments})), disable_tqdm=True)


def test_missing_extra_is_named_in_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "modeling_diffusiongemma.lm_evaluation", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'^lm-eval is not installed; expected: pip install -e "\.\[lm-eval\]"'):
        import modeling_diffusiongemma.lm_evaluation  # noqa: F401
