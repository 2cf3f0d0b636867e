"""Several processes that share one model's weights do the same passes, whatever their rows and random numbers: two of them, on a CPU, or
`RANKS`."""

import pytest
import ranks_worker
import torch
from small_models import CANVAS, VOCAB, small_model
from two_processes import WORLD, run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    return run_ranks("ranks_worker.py", "all", tmp_path_factory.mktemp("ranks"))


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


def test_sharded_training_and_evaluation_are_those_of_one_process(ranks, alone):
    """FSDP2: before, ranks gathered different things where one drew self-conditioning, had a longer prompt, or more canvases."""
    for found, expected in zip([each["fsdp"] for each in ranks], alone, strict=True):
        weights, ours = found["weights"], expected["weights"]
        for name in found.keys() - {"weights"}:  # gradients are summed in another order, and four steps make more of it
            torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        for name, value in weights.items():
            torch.testing.assert_close(value, ours[name], atol=1e-4, rtol=1e-4)


def test_trainer_trains_and_evaluates_on_every_rank(ranks):
    """Every rank has all weights; what it gathers are losses, gradients, and logits of rows of different lengths."""
    found = [each["trainer"] for each in ranks]
    first, examples = found[0], ranks_worker.questions()
    assert first["losses"].shape == (4,) and bool(first["losses"].isfinite().all())
    assert first["shapes"] == [(6, 3 * CANVAS, VOCAB)] * 2 and first["right"] == 1.0
    assert [of[0] for of in first["answers"]] == [prompt for prompt, _ in examples]  # the data's order
    assert {len(of[1]) for of in first["answers"]} == {8}  # the longest response's length, in whose share it may be
    for rank, each in enumerate(found):
        assert torch.equal(each["losses"], first["losses"])
        assert each["answers"] == first["answers"] and each["right"] == first["right"]
        assert each["asked"] == len(examples[rank::WORLD])  # its share
        told = "ZeroDivisionError: a checker's"
        assert each["told"] == (told if rank == 1 else f"RuntimeError: evaluation failed in process 1: {told}")


def test_a_torch_that_gathers_the_head_for_its_first_call_alone_is_refused_by_name(ranks):
    for found in ranks:
        now, then = found["older torch"]
        assert (not now) == (torch.__version__ >= (2, 13)) and "`torch` is 2.12.1; expected 2.13" in then
