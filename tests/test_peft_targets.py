"""PEFT's usual target names, which the vision tower has too, mean the stack; and training on text alone under DistributedDataParallel."""

import os

import pytest
import tiny
import torch
from tiny import CANVAS, tokens
from two_processes import ROOT, run_together

peft = pytest.importorskip("peft")

NAMES = {
    "q_proj and v_proj": ["q_proj", "v_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "everything": "all-linear",
    "inside the tower": r".*vision_tower.*q_proj\.linear",
}


def fresh():
    return tiny.same_weights(tiny.pair()[0])


def adapted(model):
    return sorted({name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name})


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens(2, 9), decoder_input_ids=tokens(2, CANVAS, 1)).logits


@pytest.mark.parametrize("name", NAMES)
def test_target_names_are_found(name):
    model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=NAMES[name], r=2))
    where = ["vision_tower" in each for each in adapted(model)]
    assert where and any(where) is (name in ("everything", "inside the tower")) and all(where) is (name == "inside the tower")


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["o_proj", "down_proj"]])
def test_adapters_train_and_are_saved_and_merged(names, tmp_path):
    model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    labels = tokens(2, 9)
    labels[:, :4] = -100
    model(input_ids=tokens(2, 9), labels=labels).loss.backward()
    assert all((parameter.grad is not None) is parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert (expected - logits(fresh())).abs().max() > 0.1
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh(), tmp_path)), expected)
    merged = model.merge_and_unload()
    tiny.close(logits(merged), expected)
    assert list(merged.state_dict()) == list(fresh().state_dict())


def test_transformers_own_way_takes_the_names(adapters_of_transformers):
    model = fresh()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    assert adapted(model) and not any("vision_tower" in name for name in adapted(model))


def test_wrappers_of_the_tower_are_left_out_and_nothing_else():
    model = tiny.ours()
    named = dict(model.named_modules())
    hidden = [
        f"{name}.{child}"
        for name, module in named.items()
        for child, _ in module.named_children()
        if f"{name}.{child}".strip(".") not in named
    ]
    assert hidden and all(name.endswith("_proj") and "vision_tower" in name for name in hidden)
    assert dict(model.named_parameters()).keys() == {name for name in model.state_dict() if name in dict(model.named_parameters())}
    assert all(
        torch.equal(dict(model.named_parameters())[f"{name}.linear.weight"], model.state_dict()[f"{name}.linear.weight"]) for name in hidden
    )


DISTRIBUTED = """
import os, torch, torch.distributed as dist, tiny
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=2)
for frozen in (True, False):
    model = tiny.same_weights(tiny.build_oracle())
    if frozen:
        model.model.encoder.requires_grad_(False)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=not frozen)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.01)
    ids = tiny.tokens(2, 9, seed=rank)
    labels = ids.clone(); labels[:, :4] = -100
    for step in range(3):
        torch.manual_seed(10 * rank + step)
        wrapped(ids, labels=labels).loss.backward()
        optimizer.step(); optimizer.zero_grad()
    weight = model.lm_head.weight.detach()
    both = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(both, weight)
    assert torch.equal(*both), frozen
dist.destroy_process_group()
"""


def test_two_processes_train_on_text_alone(tmp_path):
    """The vision tower takes no part in it: it is frozen (`model.model.encoder.requires_grad_(False)`), or looked for."""
    variables = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT))), "MEETING": tmp_path / "meeting"}
    run_together(("-c", DISTRIBUTED), [{**variables, "RANK": rank} for rank in range(2)], tmp_path)
