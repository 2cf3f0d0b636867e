"""Times the ways of computing a mixture of experts: what `experts_implementation` chooses from, layer by layer.

    python benchmarks/experts.py                       # the table behind `choose_experts` in modeling_diffusiongemma/layers/experts.py
    python benchmarks/experts.py --cpu-time            # the same on a busy machine: CPU time of one thread
    python benchmarks/experts.py --device cuda --dtype bfloat16
    python benchmarks/experts.py --four-bit --dtype bfloat16 --shape 128 8 2816 704 --tokens 20 256 --rounds 1  # a released layer in NF4

Prints milliseconds of one call (the least of several rounds, the ways taking turns), and what is chosen when the user does not.
A dash: the way would make a tensor of more than 128 MiB, as "batched_mm" does, which gathers the weights of every token.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DiffusionGemmaTextConfig

from measure import heading, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from modeling_diffusiongemma.layers.experts import Experts, arithmetic, choose_experts
from modeling_diffusiongemma.weights.four_bit_experts import PACKED, FourBitExperts

WAYS = ("eager", "grouped_mm", "batched_mm", "dense_mm")
SHAPES = ((4, 2, 128, 64), (4, 2, 192, 96), (16, 4, 512, 128), (128, 8, 256, 64))  # experts, active ones, hidden, intermediate size
TOKENS = (1, 16, 64, 256, 2048)
MOST_BYTES = 2**27


def build(experts: int, active: int, hidden: int, intermediate: int, device: str, dtype: torch.dtype) -> Experts:
    config = DiffusionGemmaTextConfig(
        num_experts=experts, top_k_experts=active, hidden_size=hidden, moe_intermediate_size=intermediate,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    module = Experts(config).to(device, dtype).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=hidden**-0.5)
    return module


def in_four_bits(module: Experts) -> FourBitExperts:
    packed = FourBitExperts(module, arithmetic(module)[1], 64)
    for name, place in PACKED.items():
        for suffix, tensor in zip(("", "_scale"), packed.quantized(getattr(module, name)), strict=True):
            packed.register_parameter(f"{place}{suffix}", torch.nn.Parameter(tensor, requires_grad=False))
        delattr(module, name)
    return packed


def bytes_made(way: str, tokens: int, experts: int, active: int, hidden: int, intermediate: int, dtype: torch.dtype) -> int:
    """Of the largest tensor that a way makes, but for weights in fewer bits, which are dequantised."""
    rows = {"batched_mm": tokens * active * 2 * intermediate * hidden, "dense_mm": tokens * experts * 2 * intermediate}
    return rows.get(way, tokens * active * 2 * intermediate) * dtype.itemsize


@torch.no_grad()
def measure(module: Experts, tokens: int, active: int, ways: list[str], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of one call of each way."""
    device, dtype = arithmetic(module)
    hidden = torch.randn(tokens, module.hidden_dim, device=device, dtype=dtype)
    weights, chosen = torch.randn(tokens, module.num_experts, device=device).softmax(dim=-1).topk(active)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for way in ways:
            module.config._experts_implementation = way
            calls, start = 0, clock()
            while calls < 2 or (clock() - start < 0.03 and calls < 100):
                begin = clock()
                module(hidden, chosen, weights)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best[way] = min(best[way], 1000 * (clock() - begin))
                calls += 1
    return best


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=("float32", "bfloat16"), choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("E", "A", "D", "I"), help="instead of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, instead of wall-clock time")
    parser.add_argument("--four-bit", action="store_true", help="experts in NF4, which every way dequantises; needs bitsandbytes")
    args = parser.parse_args(arguments)
    if args.cpu_time and (args.device != "cpu" or args.threads not in (None, 1)):
        parser.error("`--cpu-time` counts one thread of a CPU; expected --device cpu, and --threads 1 or none")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device` is 'cuda', and torch finds no CUDA device; expected cpu")
    if args.rounds < 1 or min(args.tokens) < 1:
        parser.error(f"`--rounds` is {args.rounds} and `--tokens` {args.tokens}; expected positive integers")
    if args.threads or args.cpu_time:
        torch.set_num_threads(args.threads or 1)
    print(heading(__file__, arguments, machine(args.device)))
    for name in args.dtype:
        dtype = getattr(torch, name)
        print(f"\n| {name}: experts, active, hidden, intermediate | tokens | {' | '.join(WAYS)} | chosen |\n|{'---|' * (len(WAYS) + 3)}")
        for shape in args.shape or SHAPES:
            module = build(*shape, args.device, dtype)
            module = in_four_bits(module) if args.four_bit else module
            for tokens in args.tokens:
                ways = [way for way in WAYS if bytes_made(way, tokens, *shape, dtype) <= MOST_BYTES]
                best = measure(module, tokens, shape[1], ways, args.rounds, time.thread_time if args.cpu_time else time.perf_counter)
                cells = [f"{best[way]:.3g}" if way in best else "-" for way in WAYS]
                print(f"| {', '.join(map(str, shape))} | {tokens} | {' | '.join(cells)} | {choose_experts(module)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
