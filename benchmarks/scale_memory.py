"""Memory that tuning the released model takes on each GPU, by how it is divided between them. Loads no weights, needs no GPU.

    python benchmarks/scale_memory.py                        # the table of docs/scale.md
    python benchmarks/scale_memory.py --gpus 2 16 --rank 64  # other numbers of GPUs, another LoRA

The model is built on the meta device from the released config.json, and every parameter counted where its plan puts it. In a cell stand
GiB a GPU: weights, gradients and AdamW's two moments, with what FSDP2 gathers beside its shards. Not counted: activations (with gradient
checkpointing 30 layers' inputs, 5.6 kB a token and layer, and one layer's inside), logits, buffers of collectives, the allocator's waste.

Assumed: training on text, so that the vision tower and its projection are frozen. "bf16" holds weights, gradients and moments in bfloat16,
8 bytes a trained parameter; "float32" all four in float32, 16 bytes, as Accelerate does with `mixed_precision: bf16`, where passes compute
in bfloat16. Frozen weights are in bfloat16, adapters as "float32". DDP with `gradient_as_bucket_view=True`: without it gradients are there
twice. FSDP2 shards `BlockLayer` and the rest: whole are, in bfloat16, all that is in no layer and two layers, and the gradients of what of
both is trained. TP: transformers' plan for matrices. EP alone: its plan for experts, which divides the dense MLP too, and nothing else.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM  # noqa: E402

GIB, HALF = 2**30, 2  # bytes of a number in bfloat16
TRAINED = {"bf16": 8, "float32": 16}  # bytes a trained parameter
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS = {
    "LoRA, attention and MLP": {"target_modules": MODULES},
    "LoRA, experts too": {"target_modules": MODULES, "target_parameters": EXPERTS},
}


class Weight(NamedTuple):
    """`layer`: which one holds it, None beside the layers."""

    name: str
    count: int
    trained: bool
    layer: int | None


def weights_of(model: torch.nn.Module) -> list[Weight]:
    found = []
    for name, parameter in model.named_parameters():
        after = name.partition("decoder.layers.")[2]
        found.append(Weight(name, parameter.numel(), parameter.requires_grad, int(after.split(".")[0]) if after else None))
    return found


def build(folder: Path, adapters: dict | None = None, rank: int = 16) -> torch.nn.Module:
    """On the meta device, trained on text: all of it but the vision tower, or adapters alone."""
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
        if adapters is None:
            model.model.encoder.requires_grad_(False)
            return model
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, **adapters))


def held(weights: list[Weight], each: int) -> float:
    """Bytes of weights in bfloat16, or of all that training them takes, `each` bytes a parameter."""
    return sum(weight.count * (each if weight.trained else HALF) for weight in weights)


def gathered(weights: list[Weight]) -> float:
    """Bytes that FSDP2 has whole at its highest: what is in no layer and two layers, and gradients of what of it is trained."""
    layers: dict[int | None, float] = {}
    for weight in weights:
        layers[weight.layer] = layers.get(weight.layer, 0) + weight.count * HALF * (1 + weight.trained)
    return layers.pop(None) + sum(sorted(layers.values())[-2:])


def divided(model: torch.nn.Module, weights: list[Weight], plan: dict[str, str], processes: int, each: int) -> float:
    """Bytes on one of several processes between which a plan of transformers divides matrices; the others are whole on each."""
    heads = {
        model.config.text_config.per_layer_config[layer].num_key_value_heads for layer in range(model.config.text_config.num_hidden_layers)
    }
    round_ = all(count % processes == 0 for count in heads)  # or attention stays whole: `model/divided.py`
    total = 0.0
    for weight in weights:
        generic = ".".join("*" if piece.isdigit() else piece for piece in weight.name.split("."))
        rule = plan.get(generic) or plan.get(generic.rpartition(".")[0])
        whole = rule in (None, "replicated_with_grad_allreduce") or (".self_attn." in weight.name and not round_)
        total += held([weight], each) / (1 if whole else processes)
    return total


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[2, 4, 8], help="numbers of GPUs (default: 2 4 8)")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default: 16)")
    parser.add_argument("--config", default=str(ROOT / "tests" / "data" / "released"), help="folder with a config.json")
    args = parser.parse_args(arguments)
    if min(args.gpus) < 2:
        parser.error(f"`--gpus` is {args.gpus}; expected numbers from 2 on")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    model, cases = build(Path(args.config)), {}
    full = weights_of(model)
    cases = {f"full, {name}": (full, each) for name, each in TRAINED.items()}
    for name, adapters in ADAPTERS.items():
        adapted = weights_of(build(Path(args.config), adapters, args.rank))
        cases[f"{name}, r={args.rank}"] = (adapted, TRAINED["float32"])
        print(f"{name}: {sum(weight.count for weight in adapted if weight.trained) / 1e6:,.0f} million trained parameters")
    print(f"whole model: {sum(weight.count for weight in full) / 1e9:.2f} thousand million parameters\n")
    print(f"| plan | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    rows = {"DDP, any number": [held(weights, each) for weights, each in cases.values()]}
    for gpus in args.gpus:
        rows[f"FSDP2, {gpus}"] = [held(weights, each) / gpus + gathered(weights) for weights, each in cases.values()]
    plans = {"TP": model.tp_plan | {"model.decoder.embed_tokens": "embedding_rowwise"}, "EP alone": model._ep_plan}
    for kind, plan in plans.items():
        for gpus in args.gpus:
            both = [divided(model, full, plan, gpus, each) for each in TRAINED.values()]
            rows[f"{kind}, {gpus}"] = both + [None] * len(ADAPTERS)
    for name, row in rows.items():
        print(f"| {name} | {' | '.join('-' if size is None else f'{size / GIB:.1f}' for size in row)} |")


if __name__ == "__main__":
    main()
