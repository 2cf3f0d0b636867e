"""What the training objective costs: all canvases of a response at once against one, packed rows against padded ones, the head in pieces.

    python benchmarks/objective.py canvases    # seconds and memory of a learned canvas, one a row and all at once
    python benchmarks/objective.py packing     # learned tokens a second, padded and packed
    python benchmarks/objective.py head        # time and memory of both losses at 262,144 ids, whole logits and pieces

Random models on a CPU in float32, forward and backward; every table from one run, its ways taking turns. Memory is the peak of the
process's anonymous memory above what it was before the call, by `measure.PeakMemory`.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch

from measure import PeakMemory, heading, machine, markdown, peak_mib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from modeling_diffusiongemma import BlockDiffusionCollator, DiffusionGemmaForMaskedBlockLM, block_diffusion_loss
from recipes import small_config


def build(vocab_size: int, hidden_size: int, layers: int, canvas_length: int) -> DiffusionGemmaForMaskedBlockLM:
    torch.manual_seed(0)
    ids = {"image_token_id": 107, "boi_token_id": 108, "eoi_token_id": 109}
    model = DiffusionGemmaForMaskedBlockLM(small_config(vocab_size, hidden_size, layers, canvas_length, 10_000.0, **ids)).train()
    model.set_experts_implementation("dense_mm")
    return model


def random_ids(count: int, seed: int, vocab_size: int) -> list[int]:
    return torch.randint(128, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def learn(model, batch: dict, **settings) -> tuple[float, float, int]:
    """Seconds, peak MiB and learned canvases of one forward and backward."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    peak_mib(torch.device("cpu"), forget=True)  # what earlier runs freed is not in use
    with PeakMemory() as memory:
        started = time.perf_counter()
        loss = block_diffusion_loss(
            model, **batch, self_conditioning_mask=torch.ones(len(batch["input_ids"]), dtype=torch.bool), **settings
        )
        (loss.diffusion + loss.causal).backward()
        seconds = time.perf_counter() - started
    return seconds, (memory.peak - memory.start) / 2**20, len(loss.canvas_losses)


def best(model, ways: dict, rounds: int) -> dict[str, list[float]]:
    """Of each way the least seconds and the least peak of some rounds, the ways taking turns, and its canvases."""
    found = {name: [float("inf"), float("inf"), 0] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, (batch, settings) in ways.items():
            seconds, peak, count = learn(model, batch, **settings)
            if turn:
                found[name] = [min(found[name][0], seconds), min(found[name][1], peak), count]
    return found


def canvases(rounds: int, less: int) -> str:
    """Prompts of 128 tokens, responses of 1,024: eight canvases of 128."""
    model = build(640, 192, 6, 128 // less)
    pairs = [([5] * 128, random_ids(1024 // less, row, 640)) for row in range(2)]
    batch = dict(BlockDiffusionCollator(pad_token_id=0)(pairs))
    found = best(model, {way: (batch, {"canvases": way, "keep_logits": False}) for way in ("one", "all")}, rounds)
    rows = [[way, count, f"{seconds:.2f}", f"{seconds / count:.3f}", f"{peak:.0f}"] for way, (seconds, peak, count) in found.items()]
    return markdown(["canvases of a row", "learned", "s", "s a canvas", "MiB"], rows)


def packing(rounds: int, less: int) -> str:
    """64 conversations of 16 to 256 tokens, half of each its response, on canvases of 64."""
    model, rng = build(640, 192, 6, 64), random.Random(0)
    sizes = [rng.choice((8, 12, 16, 24, 32, 128)) for _ in range(64 // less)]
    pairs = [([rng.randint(128, 639) for _ in range(size)], [rng.randint(128, 639) for _ in range(size)]) for size in sizes]
    ways = {
        "padded": BlockDiffusionCollator(pad_token_id=0)(pairs),
        "packed into 256": BlockDiffusionCollator(pad_token_id=0, max_length=256, packing=True)(pairs),
    }
    found = best(model, {name: (dict(batch), {"keep_logits": False}) for name, batch in ways.items()}, rounds)
    rows = [
        [name, "x".join(map(str, ways[name]["input_ids"].shape)), f"{seconds:.2f}", f"{sum(sizes) / seconds:.0f}", f"{peak:.0f}"]
        for name, (seconds, peak, _) in found.items()
    ]
    return markdown(["rows", "tokens", "s", "response tokens/s", "MiB"], rows)


def head(rounds: int, less: int) -> str:
    """Two responses of 512 tokens at 262,144 ids on a small backbone, so that the head is what is measured."""
    model = build(2**18 // less, 64, 1, 256)
    pairs = [([5] * 8, random_ids(512, row, 2**18 // less)) for row in range(2)]
    batch = dict(BlockDiffusionCollator(pad_token_id=0)(pairs))
    found = best(
        model, {name: (batch, {"keep_logits": kept}) for name, kept in (("whole logits of the canvases", True), ("pieces", False))}, rounds
    )
    rows = [[name, count, f"{seconds:.1f}", f"{peak:.0f}"] for name, (seconds, peak, count) in found.items()]
    return markdown(["head", "canvases", "s", "MiB"], rows)


TABLES = {"canvases": canvases, "packing": packing, "head": head}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke run on an eighth of everything, whose numbers mean nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(heading("objective.py", arguments, machine("cpu", args.threads)) + "\n")
    print(TABLES[args.table](args.rounds, 8 if args.quick else 1))


if __name__ == "__main__":
    main(sys.argv[1:])
