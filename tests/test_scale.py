"""Training and generating with weights that ranks share: two processes on a CPU, or `RANKS`, give one process's losses, weights,
tokens and files."""

import json
import re
import runpy

import pytest
import scale_worker
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scale_worker import SAVED, STEPS, answers, on_text, with_lora
from small_models import small_model
from two_processes import ROOT, WORLD, launch, run_ranks

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 13), reason="a torch before 2.13 is refused by name: tests/test_ranks.py")
DOCS = ROOT / "docs" / "scale.md"
LOSSES = {"atol": 1e-3, "rtol": 1e-4}  # gradients are summed in another order, and four steps make more of it
WEIGHTS = {"atol": 1e-3, "rtol": 1e-3}


def learnt_alone(model):
    """One process that does every rank's row in turn and takes the mean of their gradients: losses `(ranks, steps)`."""
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=scale_worker.LEARNING_RATE, weight_decay=0.0), torch.zeros(WORLD, STEPS)
    for step in range(STEPS):
        for rank in range(WORLD):
            scale_worker.seed(step, rank)
            loss = model(**scale_worker.batch(step, rank)).loss
            (loss / WORLD).backward()
            losses[rank, step] = loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, scale_worker.CLIPPED)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    """What ranks of `accelerate launch` found, with the config file of docs/scale.md, and where they saved."""
    folder = tmp_path_factory.mktemp("accelerated")
    (folder / "fsdp2.yaml").write_text(re.search(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1], encoding="utf-8")
    return launch(folder / "fsdp2.yaml", "scale_worker.py", "accelerated", folder, "--mixed_precision", "no"), folder


@pytest.fixture(scope="module")
def alone():
    """Losses and models of one process, for full tuning and for LoRA."""
    models = {"full": on_text(small_model()), "lora": with_lora(small_model())}
    return {name: (learnt_alone(model), model) for name, model in models.items()}


def reloaded(name, folder):
    """A whole model from what the ranks saved, in this process."""
    saved = folder / name / "model0"
    if name == "full":
        return DiffusionGemmaForMaskedBlockLM.from_pretrained(saved)
    return PeftModel.from_pretrained(small_model(), saved)


def test_accelerate_shards_layers(accelerated):
    """Three layers, embedding and head together, and the whole. A launcher that falls back to copies of the model, or to processes that
    know nothing of each other, gives losses that look right."""
    for found in accelerated[0]:
        assert found["type"] == "DistributedType.FSDP" and found["world"] == WORLD
        assert found["full"]["sharded"] == found["lora"]["sharded"] == 6


def test_a_loop_by_hand_gives_one_process_losses(accelerated, alone):
    for rank, found in enumerate(accelerated[0]):
        torch.testing.assert_close(found["loop"]["losses"][:STEPS], alone["full"][0][rank], **LOSSES)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_trainer_gives_one_process_losses_and_weights(accelerated, alone, name):
    for found in accelerated[0]:
        torch.testing.assert_close(found[name]["losses"][:STEPS], alone[name][0].mean(dim=0), **LOSSES)
    weights = dict(reloaded(name, accelerated[1]).named_parameters())
    for key, parameter in alone[name][1].named_parameters():
        torch.testing.assert_close(weights[key], parameter, **WEIGHTS, check_device=False, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["loop", "full", "lora"])
def test_a_sharded_checkpoint_goes_on_bit_for_bit(accelerated, name):
    for found in accelerated[0]:
        losses = found[name]["losses"]
        assert torch.equal(losses[SAVED:STEPS], losses[STEPS:])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_tokens_inside_training_are_those_of_one_process(accelerated, name):
    """Rank 0 does several times the passes of the others. Before, these came to their end and left rank 0 waiting."""
    passes, model = [], reloaded(name, accelerated[1])
    hook = model.get_base_model() if name == "lora" else model
    hook.model.decoder.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for rank, found in enumerate(accelerated[0]):
        assert torch.equal(answers(model, rank), found[name]["answers"])
        counts.append(len(passes) - sum(counts))
    assert all(counts[0] > 2 * count for count in counts[1:])


def test_a_rank_that_is_refused_leaves_the_others_with_their_answers(accelerated):
    first, *others = (found["refused"] for found in accelerated[0])
    assert "max_new_tokns" in first and not any(others)


def test_generate_without_gathered_weights_says_what_to_call(accelerated):
    assert all("register_fsdp_forward_method(model, 'generate')" in found["unregistered"] for found in accelerated[0])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_gathered_files_are_those_of_one_process(accelerated, name, tmp_path):
    saved, file = accelerated[1] / name, "model.safetensors" if name == "full" else "adapter_model.safetensors"
    reloaded(name, accelerated[1]).save_pretrained(tmp_path)
    assert (saved / "model0" / file).read_bytes() == (tmp_path / file).read_bytes()
    first, second = (load_file(saved / folder / file) for folder in ("model0", "model1"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert name == "lora" or json.loads((saved / "model0" / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """What ranks found between which transformers' plans divide a model, and where they saved."""
    folder = tmp_path_factory.mktemp("divided")
    return run_ranks("scale_worker.py", "divided", folder), folder


@pytest.fixture(scope="module")
def undivided():
    return {heads: scale_worker.measured(small_model(num_global_key_value_heads=heads)) for heads in (1, 2)}


PLANS = {name: 1 if name == "one key head" else 2 for name in (*scale_worker.plans(), "one key head")}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_gives_one_process_logits_loss_and_gradients(divided, undivided, name):
    expected = undivided[PLANS[name]]
    for found in divided[0]:
        torch.testing.assert_close(found[name]["logits"], expected["logits"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[name]["loss"], expected["loss"], atol=1e-4, rtol=1e-5)
        assert found[name]["gradients"].keys() == expected["gradients"].keys()
        for key, gradient in expected["gradients"].items():
            got, size = found[name]["gradients"][key], gradient.abs().max().item()
            torch.testing.assert_close(got, gradient, atol=1e-4 * size, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_divides_what_it_is_for(divided, name):
    names, sharded = divided[0][0][name]["divided"], WORLD > 2 or name == "all"
    units = divided[0][0][name]["units"]  # three layers, embedding and head, and the rest: not all at once; experts by rank have their own
    assert units in ((5, 8) if sharded else (0,))
    assert any("experts.gate_up_proj" in each for each in names)
    if name == "one key head" and not sharded:  # which would be cut
        assert not any("self_attn" in each for each in names) and any("mlp" in each for each in names)
    if name == "all":
        assert any("self_conditioning" in each for each in names)


@pytest.mark.parametrize("name", scale_worker.plans())
def test_ranks_of_a_plan_answer_alike_whatever_their_random_numbers(divided, name):
    """With random numbers of their own, ranks that compute one answer together would finish at different steps, and wait for ever."""
    questions = [scale_worker.question(name, rank) for rank in range(WORLD)]
    for asked, found in zip(questions, divided[0], strict=True):
        assert f"2052-10-0{2 + asked}" in found[name]["answer"]
    assert len({found[name]["drawn"] for found in divided[0]}) == len(set(questions))


@pytest.mark.skipif(not scale_worker.SHARDS_TRAIN, reason="transformers 5.17's Trainer does not take such a model")
def test_a_trainer_of_a_model_that_came_in_shards_gives_one_process_losses(divided, alone):
    for found in divided[0]:
        torch.testing.assert_close(found["trained"], alone["full"][0].mean(dim=0), **LOSSES)


def test_an_adapter_put_into_a_sharded_model_counts(divided):
    """To be used. To be trained there it is refused: no rank would have averaged its gradients with another's."""
    expected = scale_worker.canvas_logits(with_lora(small_model(num_global_key_value_heads=1)))
    for found in divided[0]:
        torch.testing.assert_close(found["adapted"], expected, atol=1e-4, rtol=1e-4)


def test_mixed_precision_by_transformers_is_bfloat16(divided):
    """A layer's scalar, a buffer, stayed in float32 and took the states along, to a head in bfloat16."""
    models = [small_model(num_global_key_value_heads=1).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    whole, half = (scale_worker.canvas_logits(model) for model in models)
    rounding = (half - whole).abs().mean()
    for found in divided[0]:
        assert 0.5 * rounding < (found["mixed"] - whole).abs().mean() < 2 * rounding


@pytest.mark.parametrize("name", PLANS)
def test_a_divided_model_is_saved_as_it_was_loaded(divided, name):
    saved, loaded = (divided[1] / folder / "model.safetensors" for folder in (name, f"heads{PLANS[name]}"))
    assert saved.read_bytes() == loaded.read_bytes()


def test_why_a_divided_head_is_not_walked_is_said(divided):
    assert divided[0][0]["matrices"]["why"] == "`lm_head` holds no plain weight"


WHOLE = [
    ("four bits", "FourBitConfig"), ("eight bits", "FP8Config"), ("rules", "self_attn.k_proj"),
    ("adapters", "puts an adapter into a model whose"), ("adapters behind", "put in before `fully_shard`"), ("stages", "`pp_size` is"),
    ("sequence", "`enable_sequence_parallel` is True"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "told"), WHOLE)
def test_what_cannot_be_divided_is_refused_by_name(divided, name, told):
    assert all(told in found[name] for found in divided[0])


def test_the_memory_of_each_plan_is_a_table(capsys):
    main = runpy.run_path(str(ROOT / "benchmarks" / "scale_memory.py"))["main"]
    main(["--gpus", "2", "--config", default_checkpoint()])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0].strip() for line in lines] == ["plan", "DDP, any number", "FSDP2, 2", "TP, 2", "EP alone, 2"]
    assert {len(line) for line in lines} == {5}
