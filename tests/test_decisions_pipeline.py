"""transformers' pipeline "decision" on a tiny random model with a shipped template; and what `decide` refuses in that form."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from pages import Page
from small_models import small_model
from transformers import AutoModelForCausalLM, pipeline

from generation import Calibration
from modeling_diffusiongemma.checkpoints import FOLDER, shipped

decision = pytest.importorskip("transformers.decision.template_utils", reason="the pipeline came with transformers 5.23")
from transformers.decision import DecisionConfig  # noqa: E402
from transformers.decision.modeling_utils import DecisionMixin  # noqa: E402

from generation.asking import template_variables  # noqa: E402
from generation.decisions.requests_form import DiffusionDecisionConfig, rotated  # noqa: E402

STATE = "A bag holds 3 red and 7 blue marbles."
COLOUR = {"type": "choice", "instructions": "Which colour is drawn?", "criteria": {"red": None, "blue": None, "green": None}}
RED = {"type": "noul", "instructions": "Is it red?"}
FULL = {"type": "score", "instructions": "How full is it?", "criteria": ["empty", "half", "full"]}
REQUEST = {"state": STATE, "questions": {"colour": COLOUR, "red": RED, "full": FULL}}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny random model with a shipped tokenizer and decision template, not calibrated."""
    folder = tmp_path_factory.mktemp("decisions")
    model = small_model(canvas_length=48, vocab_size=len(tokenizer))
    model.generation_config.update(eos_token_id=[1, 106], pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(FOLDER / "decisions" / "decision_template.jinja", folder)
    (folder / "decision.json").write_text(json.dumps({"labels": {"noul": ["Y", "N"]}}))
    return folder


@pytest.fixture
def decide(folder):
    return pipeline("decision", model=str(folder))


def probabilities(answers):
    return [*answers["colour"]["probabilities"].values(), answers["red"]["noul"], *answers["full"]["probabilities"].values()]


def test_pipeline_answers_every_type_of_question(decide):
    assert isinstance(decide.model, DecisionMixin) and isinstance(decide.decision_config, DiffusionDecisionConfig)
    answers = decide(REQUEST)
    assert list(answers) == ["colour", "red", "full"]
    assert list(answers["colour"]["probabilities"]) == ["red", "blue", "green"] and answers["colour"]["choice"] in COLOUR["criteria"]
    assert sum(answers["colour"]["probabilities"].values()) == pytest.approx(1)
    assert 0 < answers["red"]["noul"] < 1 and 0 <= answers["full"]["score"] <= 2
    assert probabilities(decide(json.dumps(REQUEST))) == probabilities(answers) == probabilities(decide([REQUEST, REQUEST])[1])


def test_plain_form_says_the_same(decide, tokenizer):
    from generation import Choice

    chat = f"<bos><|turn>user\n{STATE}\ncolour: Which colour is drawn? A. red, B. blue, C. green\nred: Is it red? Y or N\n"
    chat += "full: How full is it? A. empty, B. half, C. full\nAnswer as JSON.<turn|>\n<|turn>model\n"
    questions = {"colour": Choice(["A", "B", "C"]), "red": Choice(["Y", "N"]), "full": Choice(["A", "B", "C"])}
    found = decide.model.decide(chat, questions, tokenizer)
    said = [*found["colour"].probabilities.values(), found["red"].probabilities["Y"], *found["full"].probabilities.values()]
    assert probabilities(decide(REQUEST)) == pytest.approx(said, abs=1e-5)


def test_a_template_of_one_question_reads_the_label_alone(folder, tokenizer):
    """transformers' generic prompt, as users call it for any chat model: every question a prompt; the tokenizer is the checkpoint's."""
    answers = pipeline("decision", model=str(folder), decision_config=DecisionConfig())(REQUEST)
    assert sum(answers["colour"]["probabilities"].values()) == pytest.approx(1) and 0 < answers["red"]["noul"] < 1


def test_checkpoints_calibration_counts_and_is_saved_again(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "calibrated")
    before = pipeline("decision", model=str(folder))(REQUEST)["colour"]["probabilities"]
    Calibration({"choice": 2.0}, {"choice": [1.0, 0.0, 0.0]}).save(tmp_path / "calibrated")
    decide = pipeline("decision", model=str(tmp_path / "calibrated"))
    assert decide.decision_config.labels == {"noul": ["Y", "N"]} and decide.decision_config.reads == 4
    after = decide(REQUEST)["colour"]["probabilities"]
    assert after["red"] > after["green"] * before["red"] ** 0.5 / before["green"] ** 0.5
    decide.model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.calibration == Calibration({"choice": 2.0}, {"choice": [1.0, 0.0, 0.0]})
    assert again.decision_config == decide.decision_config
    theirs = DecisionConfig.from_pretrained(tmp_path / "again")
    assert theirs.temperature == {"choice": 2.0} and theirs.chat_template == decide.decision_config.chat_template


def test_model_without_decisions_saves_none(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("decision*"))


def test_orders_are_averaged_and_options_keep_their_names(decide):
    decide.decision_config = replace(decide.decision_config, orders=3)
    found = decide(REQUEST)
    one = replace(decide.decision_config, orders=1)
    decide.decision_config, expected = one, {}
    for by in range(3):
        turned = decide(rotated(REQUEST, by))
        by_label = list(turned["colour"]["probabilities"].items())
        for option, probability in by_label:
            expected[option] = expected.get(option, 0) + probability / 3
    assert found["colour"]["probabilities"] == pytest.approx(expected, abs=1e-4)


def test_rotation_turns_options_and_leaves_yes_and_no():
    turned = rotated(json.dumps(REQUEST), 1)["questions"]
    assert list(turned["colour"]["criteria"]) == ["blue", "green", "red"] and turned["full"]["criteria"] == ["half", "full", "empty"]
    assert turned["red"] == RED


def test_names_that_a_template_reads():
    assert template_variables("{% for question in questions %}{{ question }}{% endfor %}{{ state }}") == {"questions", "state"}
    assert "questions" not in template_variables(None)


REFUSED = {
    "ids": ({"input_ids": torch.ones(3, dtype=torch.int64)}, "`input_ids` is"),
    "no marks": ({"marks": None}, "`marks` is None"),
    "marks behind": ({"marks": torch.tensor([9999])}, "`marks` is"),
    "marks before the end": ({"marks": torch.tensor([1])}, "`marks` is"),
    "no questions": ({"decision_questions": []}, "`decision_questions` is"),
    "no question": ({"decision_questions": ["colour"]}, "which has no"),
    "config": ({"decision_config": {}}, "`decision_config` is"),
    "unknown": ({"inputs_embeds": torch.zeros(1)}, "unknown arguments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(decide, name):
    ((inputs, questions),) = decide.decision_config.prepare_inputs(REQUEST, decide.tokenizer)
    given, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        decide.model.decide(**{**inputs, "decision_questions": questions, **given})


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"type": "guess"}, "the type 'guess'"), ({"labels": ["A"]}, "1 labels"), ({"labels": ["A", "A", "B"]}, "twice"),
     ({"labels": ["A", "B", "<eos>"]}, "cannot write")],
)  # fmt: skip
def test_question_that_does_not_fit_is_refused_by_name(decide, changed, said):
    ((inputs, (question, *_)),) = decide.decision_config.prepare_inputs(REQUEST, decide.tokenizer)
    with pytest.raises(ValueError, match=said):
        decide.model.decide(**inputs, decision_questions=[replace(question, **changed)])


@pytest.mark.parametrize(("field", "value"), [("reads", 0), ("orders", 0), ("temperature", {"choice": -1.0}), ("bias", {"choice": ["a"]})])
def test_settings_out_of_range_are_refused_by_name(decide, field, value):
    decide.decision_config = replace(decide.decision_config)
    setattr(decide.decision_config, field, value)
    with pytest.raises(ValueError, match=f"`{field}`"):
        decide(REQUEST)


@pytest.mark.skipif("decisions" not in shipped(), reason="the checkpoint of this name is not there")
def test_snippets_of_the_page_run_one_after_the_other(capsys):
    page = Page("docs/decisions.md")
    assert len(page.blocks) == 3
    page.run()
    assert "| question | option | probability | standard error |" in capsys.readouterr().out
