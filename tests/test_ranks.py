"""Several processes that share one model's weights do the same passes, whatever their rows and random numbers: two of them, on a CPU."""

import pytest
import ranks_worker
import torch
from small_models import CANVAS, VOCAB, small_model
from two_processes import WORLD, run_ranks


@pytest.fixture(scope="module")
def alone():
    """One process that does every rank's batches in turn and takes the mean of their gradients."""
    model = small_model().train()
    loss_alone = ranks_worker.diffusion_alone(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=ranks_worker.LEARNING_RATE)
    losses = [[] for _ in range(WORLD)]
    for step in range(ranks_worker.STEPS):
        for rank in range(WORLD):
            ranks_worker.drawn_rows(rank, step)
            inputs = ranks_worker.batch(rank, step)
            loss = model(**inputs).loss if step % 2 == 0 else loss_alone(inputs)
            (loss / WORLD).backward()
            losses[rank].append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    weights = model.state_dict()
    return [{"losses": torch.stack(losses[rank]), "weights": weights, **ranks_worker.evaluate(model, rank)} for rank in range(WORLD)]


def test_ranks_draw_differently():
    """Or the tests below would show nothing: on some step one rank's row is conditioned and the other's is not."""
    drawn = []
    for rank in range(WORLD):
        model = small_model().train()
        passes = []
        model.model.decoder.self_conditioning.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        for step in range(ranks_worker.STEPS):
            ranks_worker.drawn_rows(rank, step)
            model(**ranks_worker.batch(rank, step))
            passes.append(0)
        drawn.append("".join(map(str, passes)))
    assert drawn[0] != drawn[1]


def test_sharded_training_and_evaluation_are_those_of_one_process(alone, tmp_path):
    """FSDP2: before, ranks gathered different things where one drew self-conditioning, had a longer prompt, or more canvases."""
    for found, expected in zip(run_ranks("ranks_worker.py", "fsdp", tmp_path), alone, strict=True):
        weights, ours = found.pop("weights"), expected["weights"]
        for name, value in found.items():  # gradients are summed in another order, and four steps make more of it
            torch.testing.assert_close(value, expected[name], atol=1e-3, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        for name, value in weights.items():
            torch.testing.assert_close(value, ours[name], atol=1e-4, rtol=1e-4)


def test_trainer_trains_and_evaluates_on_two_ranks(tmp_path):
    """Every rank has all weights; what it gathers are losses, gradients, and logits of rows of different lengths."""
    found = run_ranks("ranks_worker.py", "trainer", tmp_path)
    assert torch.equal(found[0]["losses"], found[1]["losses"]) and bool(found[0]["losses"].isfinite().all())
    assert found[0]["losses"].shape == (4,) and found[0]["shapes"] == [(6, 3 * CANVAS, VOCAB)] * 2
    examples = ranks_worker.questions()
    assert [of[0] for of in found[0]["answers"]] == [prompt for prompt, _ in examples]  # the data's order
    assert {len(of[1]) for of in found[0]["answers"]} == {8}  # the longest response's length, in whose share it may be
    assert found[0]["answers"] == found[1]["answers"] and found[0]["right"] == found[1]["right"] == 1.0
    assert [rank["asked"] for rank in found] == [3, 2]  # each a share
    assert [rank["told"] for rank in found] == [
        "RuntimeError: evaluation failed in process 1: ZeroDivisionError: a checker's", "ZeroDivisionError: a checker's",
    ]  # fmt: skip
