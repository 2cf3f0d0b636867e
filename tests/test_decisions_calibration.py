"""Calibration finds what made probabilities wrong, is kept beside a checkpoint, and is measured before and after."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from generation import Calibration, fit_calibration, judge
from generation.decisions.calibration import true_probabilities
from generation.decisions.judging import confidences, draw_reliability, expected_calibration_error, reliability
from modeling_diffusiongemma.checkpoints import FOLDER


def overconfident(count=400, temperature=3.0, bias=(0.8, -0.5, -0.3), seed=0, reads=1):
    """Scores of questions whose true probabilities are known: `temperature` times too sharp, and shifted."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((count, 3), generator=generator, dtype=torch.float64)
    truths = logits.softmax(dim=1)
    scores = (logits - torch.tensor(bias, dtype=torch.float64)) * temperature
    return [one.expand(reads, 3).log_softmax(dim=1) for one in scores], truths


def test_fit_finds_the_temperature_and_the_bias_that_were_made():
    scores, truths = overconfident()
    found = fit_calibration({"choice": scores}, {"choice": truths.tolist()})
    assert found.temperature["choice"] == pytest.approx(3, abs=0.05)
    assert found.bias["choice"] == pytest.approx([0.8, -0.5, -0.3], abs=0.02)


def test_fit_of_hard_answers_lowers_the_error_on_others():
    scores, truths = overconfident()
    right = torch.multinomial(truths, 1, generator=torch.Generator().manual_seed(1)).flatten().tolist()
    found = fit_calibration({"choice": scores}, {"choice": right})
    others, wanted = overconfident(seed=5)
    before = judge([one[0].exp() for one in others], list(wanted))
    after = judge([found.apply(one, "q")[0].exp() for one in others], list(wanted))
    assert after.error < before.error / 3 and after.brier < before.brier and after.log_likelihood > before.log_likelihood


def test_questions_of_other_numbers_of_options_and_reads_are_fitted_together():
    scores, truths = overconfident(40)
    two, others = [one[:, :2] for one in scores[:20]], [(one[:2] / one[:2].sum()).tolist() for one in truths[:20]]
    found = fit_calibration({"q": two + [one.expand(2, 3) for one in scores[20:]]}, {"q": others + truths[20:].tolist()}, bias=False)
    assert found.bias == {} and found.temperature["q"] > 1


def test_answers_that_are_all_right_keep_a_finite_temperature():
    found = fit_calibration({"q": [torch.tensor([[-0.1, -3.0]], dtype=torch.float64)] * 5}, {"q": [0] * 5})
    assert 0 < found.temperature["q"] < 1


def test_a_name_goes_before_a_type_and_missing_places_have_no_bias():
    calibration = Calibration({"choice": 2.0, "tone": 1.0}, {"choice": [1.0]})
    scores = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    assert torch.equal(calibration.apply(scores, "tone", "choice"), (scores + torch.tensor([1.0, 0.0])).log_softmax(dim=1))
    assert torch.equal(calibration.apply(scores, "q", "choice"), (scores / 2 + torch.tensor([1.0, 0.0])).log_softmax(dim=1))
    assert torch.equal(calibration.apply(scores, "q", "noul"), scores.log_softmax(dim=1))


def test_what_is_saved_is_loaded_and_leaves_the_rest_of_the_file(tmp_path):
    (tmp_path / "decision.json").write_text(json.dumps({"labels": {"noul": ["Y", "N"]}, "temperature": {"score": 9.0}}))
    calibration = Calibration({"choice": 2.5}, {"choice": [0.25, -0.25]})
    calibration.save(tmp_path)
    assert Calibration.from_pretrained(tmp_path) == calibration
    assert json.loads((tmp_path / "decision.json").read_text())["labels"] == {"noul": ["Y", "N"]}


def test_calibration_that_is_set_and_all_else_of_decisions_are_saved_with_the_model(trained, tmp_path):
    trained.save_pretrained(tmp_path / "shipped")
    for name in ("decision.json", "decision_template.jinja"):
        shutil.copy(FOLDER / "decisions" / name, tmp_path / "shipped")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shipped")
    model.calibration = Calibration({"refund": 2.0}, {"choice": [0.5, -0.5]})
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").calibration == model.calibration
    shipped, saved = (json.loads((folder / "decision.json").read_text()) for folder in (tmp_path / "shipped", tmp_path / "again"))
    assert saved["labels"] == shipped["labels"] and saved["temperature"] == {"refund": 2.0}
    template = "decision_template.jinja"
    assert (tmp_path / "again" / template).read_text() == (FOLDER / "decisions" / template).read_text()


def test_folder_without_a_calibration_has_none_and_a_broken_one_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert Calibration.from_pretrained(tmp_path) == Calibration()
    (tmp_path / "decision.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Calibration.from_pretrained(tmp_path)
    (tmp_path / "decision.json").write_text('{"temperature": {"choice": 0}}')
    with pytest.raises(ValueError, match="`temperature` of 'choice' is 0"):
        Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("scores", "truths", "said"),
    [({}, {}, "`scores` has the keys"), ({"q": []}, {"q": []}, "at least one"), ({"q": [torch.zeros(1, 2)]}, {"p": [0]}, "the same"),
     ({"q": [torch.zeros(1, 2)]}, {"q": [2]}, "`truths` holds 2"), ({"q": [torch.zeros(1, 2)]}, {"q": [[0.5, 0.6]]}, "`truths` holds"),
     ({"q": [torch.zeros(1, 2)]}, {"q": [True]}, "`truths` holds True"),
     ({"q": [torch.zeros(2)]}, {"q": [0]}, "`scores` of 'q' holds Tensor"),
     ({"q": [[[-1.0, -2.0]]]}, {"q": [0]}, "`scores` of 'q'"), ({"q": [torch.zeros(0, 2)]}, {"q": [0]}, "`scores` of 'q'"),
     ({"q": [torch.tensor([[float("nan"), 0.0]])]}, {"q": [0]}, "`scores` of 'q' holds NaN"),
     ({"q": [torch.zeros(1, 2)]}, {"q": [None]}, "`truths` holds None"), ({"q": [torch.zeros(1, 2)]}, {"q": [{"a": 1}]}, "`truths` holds"),
     ({"q": [torch.zeros(1, 2)]}, [0], "`truths` is"), (None, None, "`scores` is None")],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(scores, truths, said):
    """Scores of one dimension were fitted as if nothing had been said: temperature 1, biases 0."""
    with pytest.raises(ValueError, match=said):
        fit_calibration(scores, truths)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (({"a": float("nan")},), "`temperature` of 'a'"),
        (({"a": 1e-320},), "`temperature` of 'a'"),
        (({}, {"a": "x"}), "`bias` of 'a'"),
        ((3,), "`temp"),
    ],
)
def test_what_is_no_calibration_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Calibration(*given)


def test_error_of_a_case_by_hand():
    """Said 0.9 twice, true 1 and 0: off by 0.4. Said 0.5 once, true 1: off by 0.5."""
    said, true = torch.tensor([0.9, 0.9, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert expected_calibration_error(said, true) == pytest.approx((2 * 0.4 + 0.5) / 3)
    assert [count for _, _, count in reliability(said, true)] == [1, 2]
    judged = judge([torch.tensor([0.75, 0.25], dtype=torch.float64)], [true_probabilities(1, 2)])
    assert judged.accuracy == 0 and judged.brier == pytest.approx(2 * 0.75**2) and judged.distance == pytest.approx(0.75)


@pytest.mark.parametrize("scores", [torch.zeros(2, 1, 2), [torch.zeros(1, 2)] * 2])
@pytest.mark.parametrize("truths", [torch.tensor([0, 1]), np.array([0, 1]), [np.array([1.0, 0.0]), (0, 1)]])
def test_truths_and_scores_in_one_tensor_or_array_are_read(scores, truths):
    assert fit_calibration({"q": scores}, {"q": truths}) == fit_calibration({"q": [*scores]}, {"q": [0, 1]})


@pytest.mark.parametrize(
    ("said", "true", "told"),
    [([0.5, 0.5], [1.0], "`truths` has 1 options at 0"), ([-0.1, -2.0], [1.0, 0.0], "`probabilities` holds"),
     ([float("nan"), 1.0], [1.0, 0.0], "`probabilities` holds"), ([0.6, 0.4], [1.0, 1.0], "`truths` holds"),
     ([5.0, -4.0], [1.0, 0.0], "`probabilities` holds")],
)  # fmt: skip
def test_what_are_no_probabilities_is_not_judged(said, true, told):
    """One truth was spread over all options, and log-probabilities had an accuracy and an error like any others."""
    with pytest.raises(ValueError, match=told):
        judge([torch.tensor(said, dtype=torch.float64)], [torch.tensor(true, dtype=torch.float64)])


@pytest.mark.parametrize(("said", "true"), [([0.5, 0.5], [1.0, 0.0]), (torch.tensor([0.5, 0.5]), 1), ({"a": 1.0}, torch.ones(1))])
def test_what_are_no_tensors_is_not_judged(said, true):
    with pytest.raises(ValueError, match="expected a tensor"):
        judge([said], [true])


def test_diagram_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    scores, truths = overconfident(50)
    judged = confidences([one[0].exp() for one in scores], list(truths))
    draw_reliability({"before": judged, "after": judged}, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="`judged` is empty"):
        draw_reliability({}, tmp_path / "nothing.png")
