"""One rank of tests/test_scale.py: `scale_worker.py WAY FOLDER`, with the variables of torchrun or `accelerate launch`. Writes what it
found to FOLDER/RANK.pt."""

import os
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import CANVAS, PAD, VOCAB, small_model
from torch import distributed
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig
from two_processes import WORLD

from modeling_diffusiongemma import (
    BlockDiffusionCollator,
    DiffusionGemmaForMaskedBlockLM,
    FourBitConfig,
    FP8Config,
    default_checkpoint,
)
from modeling_diffusiongemma.training import pieces

STEPS, SAVED, LEARNING_RATE, CLIPPED = 4, 2, 1e-2, 1.0
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "target_parameters": ["experts.gate_up_proj"], "lora_alpha": 16}
SETTINGS = {"max_denoising_steps": 7, "seed": 3, "eos_token_id": []}


def rows():
    """One row for each step and rank, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for place in range(STEPS * WORLD):
        ids = torch.randint(5, 90, (3 + 5 * (place % 3) + 12,), generator=generator).tolist()
        drawn.append((ids[: -4 - 3 * (place % 2)], ids[-4 - 3 * (place % 2) :]))
    return drawn


def seed(step, rank):
    """Ranks draw noise and self-conditioning differently."""
    torch.manual_seed(100 * step + rank)


def asked(rank):
    """A rank's prompts, and how many tokens behind them: rank 0 does several times the passes of the others."""
    ids = torch.randint(8, 90, (2 + rank, 7 + 3 * rank), generator=torch.Generator().manual_seed(rank))
    return ids, SETTINGS | {"max_new_tokens": 24 if rank == 0 else 9}


def answers(model, rank):
    model.eval()
    ids, settings = asked(rank)
    return model.generate(ids, **settings)


def on_text(model):
    """Full tuning on text: the vision tower learns nothing, and an optimizer that has no state of it could not be loaded again."""
    model.model.encoder.requires_grad_(False)
    return model


def with_lora(model):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first, which would teach lora_A nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def batch(step, rank):
    return BlockDiffusionCollator(pad_token_id=PAD)([rows()[WORLD * step + rank]])


def on_a_cpu():
    """Accelerate takes FSDP for accelerators alone: here it is told that this process has one, which is the CPU."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)


def loop(accelerator, folder):
    """A training loop by hand, which stops after `SAVED` steps, begins again from what it saved, and generates in between."""
    rank, losses = accelerator.process_index, []
    model = on_text(small_model()).train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(learnt, lr=LEARNING_RATE, weight_decay=0.0))
    register_fsdp_forward_method(model, "generate")
    for begin in (0, SAVED):
        if begin:
            accelerator.load_state(folder / "state")
        for step in range(begin, STEPS):
            model.train()
            seed(step, rank)
            loss = model(**batch(step, rank)).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIPPED)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step + 1 == SAVED and not begin:
                answers(model, rank)
                accelerator.save_state(folder / "state")
    return {"losses": torch.stack(losses), "answers": answers(model, rank)}


def refused(model, rank):
    """What each rank is told where rank 0 asks wrongly."""
    ids, settings = asked(rank)
    try:
        model.generate(ids, **settings, **({"max_new_tokns": 3} if rank == 0 else {}))
    except ValueError as error:
        return str(error)
    return ""


class Each(TrainerCallback):
    """Seeds each step, and answers prompts when the Trainer evaluates."""

    def __init__(self):
        self.answers = []

    def on_step_begin(self, args, state, control, **kwargs):
        seed(state.global_step, args.process_index)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.answers.append(answers(model, args.process_index))
        model.train()


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def arguments(folder, **more):
    return TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=1, per_device_eval_batch_size=1, logging_steps=1,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=CLIPPED, eval_strategy="steps",
        eval_steps=STEPS, save_strategy="steps", save_steps=SAVED, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False, logging_nan_inf_filter=False, **more,
    )  # fmt: skip


def trainer(folder, adapt):
    """Trains, saves, and goes on in a new Trainer from the checkpoint in the middle."""
    found, losses = {}, []
    for resumed in (False, True):
        each, model = Each(), adapt(small_model())
        run = InOrder(
            model=model, args=arguments(folder / "run"), data_collator=BlockDiffusionCollator(pad_token_id=PAD), train_dataset=rows(),
            eval_dataset=rows()[:3], callbacks=[each],
        )  # fmt: skip
        run.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{SAVED}") if resumed else None)
        log = run.state.log_history
        losses += [entry["loss"] for entry in log if "loss" in entry][SAVED if resumed else 0 :]
        found |= {"answers": each.answers[-1], "eval loss": torch.tensor([entry["eval_loss"] for entry in log if "eval_loss" in entry])}
        found["sharded"] = sum(isinstance(module, FSDPModule) for module in run.model.modules())
        run.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        run.save_model(str(folder / f"model{int(resumed)}"))
    return found | {"losses": torch.tensor(losses)}


def accelerated(folder):
    on_a_cpu()
    pieces.NUMBERS = 5 * VOCAB  # tokens go through the head five at a time, and once more on the way back
    accelerator = Accelerator()
    found = {"type": str(accelerator.distributed_type), "world": accelerator.num_processes, "loop": loop(accelerator, folder)}
    model = small_model()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    found["unregistered"] = refused(model, 1)
    register_fsdp_forward_method(model, "generate")
    found["refused"] = refused(model, accelerator.process_index)
    for name, adapt in (("full", on_text), ("lora", with_lora)):
        found[name] = trainer(folder / name, adapt)
    return found


KNOWN = {field.name for field in fields(DistributedConfig)}
SHARDS_TRAIN = "ep_size" in KNOWN  # transformers 5.17's Trainer puts a model that came in shards into DDP, which fails


def plans():
    """transformers' settings by what they divide in two; those for experts have changed between versions. More processes than two shard
    what is divided already (FSDP2), or hold what is sharded again (HSDP)."""
    experts = {"ep_size": 2} if "ep_size" in KNOWN else {"enable_expert_parallel": True}
    found = {"matrices": {"tp_size": 2}, "experts": {"tp_size": 2, **experts}}
    if WORLD > 2:
        found = {name: {**plan, "fsdp_size": WORLD // 2} for name, plan in found.items()}
    replicas = {"dp_replicate_size": WORLD // 2} if WORLD > 2 and "dp_replicate_size" in KNOWN else {}
    return {**found, "all": {"fsdp_size": 2 if replicas else WORLD, **replicas}}


def question(name, rank):
    """Which one a rank has under a plan: those between which matrices are divided share theirs."""
    return rank if name == "all" else rank // 2


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def canvas_logits(model):
    """Of a self-conditioned canvas."""
    drawn = torch.Generator().manual_seed(1)
    ids, canvas = (torch.randint(8, 90, (2, length), generator=drawn) for length in (9, CANVAS))
    conditioning = torch.randn(2, CANVAS, VOCAB, generator=drawn)
    return model.eval()(input_ids=ids, decoder_input_ids=canvas, self_conditioning_logits=conditioning).logits


def measured(model):
    """Logits of a canvas, and loss and gradients of a training step."""
    logits = canvas_logits(model)
    seed(0, 0)
    loss = model.train()(**BlockDiffusionCollator(pad_token_id=PAD)(rows()[:2])).loss
    loss.backward()
    gradients = {name: whole(each.grad).clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": logits, "loss": loss.detach(), "gradients": gradients}


def answered(model, day):
    """What the checkpoint that ships says, with torch's own random numbers."""
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    chat = [{"role": "user", "content": f"Write October {day}, 2052 as an ISO date."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    register_fsdp_forward_method(model, "generate")  # does nothing where FSDP2 shards nothing
    return tokenizer.decode(model.generate(**inputs, canvas_length=16, max_new_tokens=16)[0], skip_special_tokens=True)


def refusal(folder, **settings):
    try:
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, **settings)
    except ValueError as error:
        return str(error)
    return ""


def trained(folder, sharded):
    """Losses of a Trainer whose model came in shards."""
    if distributed.get_rank() == 0:
        small_model().save_pretrained(folder / "whole")
    distributed.barrier()
    model = on_text(DiffusionGemmaForMaskedBlockLM.from_pretrained(folder / "whole", **sharded))
    settings = arguments(folder / "sharded", save_only_model=True, use_cpu=True, ddp_backend="gloo")
    collator = BlockDiffusionCollator(pad_token_id=PAD)
    run = InOrder(model=model, args=settings, data_collator=collator, train_dataset=rows(), eval_dataset=rows()[:3], callbacks=[Each()])
    run.train()
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


def divided(folder):
    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {}
    for heads in (1, 2):
        if rank == 0:
            small_model(num_global_key_value_heads=heads).save_pretrained(folder / f"heads{heads}")
        distributed.barrier()
    cases = [(name, 2, settings) for name, settings in plans().items()] + [("one key head", 1, plans()["matrices"])]
    for name, heads, settings in cases:
        model = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder / f"heads{heads}", distributed_config=DistributedConfig(**settings))
        found[name] = measured(model) | {"why": model.why_dense(torch.device("cpu"))}
        found[name]["divided"] = sorted(each for each, value in model.named_parameters() if isinstance(value, DTensor))
        found[name]["units"] = sum(isinstance(module, FSDPModule) for module in model.modules())
        model.save_pretrained(folder / name)
    for name, settings in plans().items():
        model = DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint(), distributed_config=DistributedConfig(**settings))
        torch.manual_seed(rank)
        found[name]["answer"] = answered(model, 2 + question(name, rank))
        found[name]["drawn"] = torch.rand(1).item()
    tensor = {"distributed_config": DistributedConfig(tp_size=WORLD)}
    found["four bits"] = refusal(default_checkpoint(), quantization_config=FourBitConfig(), **tensor)
    found["eight bits"] = refusal(default_checkpoint(), quantization_config=FP8Config(), **tensor)
    sharded = {"distributed_config": DistributedConfig(fsdp_size=WORLD)}
    for name, settings in (("adapters", tensor), ("adapters behind", sharded)):
        model = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder / "heads1", **settings)
        try:
            with_lora(model)
        except ValueError as error:
            found[name] = str(error)
    if rank == 0:
        with_lora(small_model(num_global_key_value_heads=1)).save_pretrained(folder / "adapter")
    distributed.barrier()
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder / "heads1", **sharded)
    found["adapted"] = canvas_logits(PeftModel.from_pretrained(model, folder / "adapter"))
    if SHARDS_TRAIN:
        found["trained"] = trained(folder, sharded)
    mixed = DistributedConfig(fsdp_size=WORLD, fsdp_mixed_precision=True)
    found["mixed"] = canvas_logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(folder / "heads1", distributed_config=mixed))
    rules = {"model.decoder.layers.*.self_attn.k_proj": "colwise"}
    cut = DistributedConfig(tp_size=WORLD, tp_plan=rules)
    for name, settings in (("rules", cut), ("stages", DistributedConfig(pp_size=WORLD))):
        found[name] = refusal(folder / "heads1", distributed_config=settings)
    sequence = DistributedConfig(tp_size=WORLD, enable_sequence_parallel=True)
    found["sequence"] = refusal(folder / "heads1", distributed_config=sequence)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    way, folder = sys.argv[1], Path(sys.argv[2])
    found = {"accelerated": accelerated, "divided": divided}[way](folder)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    distributed.destroy_process_group()
