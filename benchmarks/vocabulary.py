"""Times the pass over the vocabulary against the two products with the head that it cannot do without.

    python benchmarks/vocabulary.py                    # 256 positions, 262,144 ids, hidden size 256
    python benchmarks/vocabulary.py --cpu-time         # the same on a busy machine: CPU time of one thread
    python benchmarks/vocabulary.py --hidden 2816 --vocab-size 65536

A round is one pass (`generation.vocabulary.walk.streamed_prediction`: argmax, a sample, entropy, soft embedding) and the products alone, by
`torch.mm` and as the pass makes them. Prints the medians over the rounds, and of the ratios of each round.
"""

import argparse
import statistics
import sys
import time

import torch

from generation.rules.draws import BatchDraws
from generation.vocabulary.walk import VocabularyHead, streamed_prediction
from measure import heading, machine, markdown, number, time_products


def measure(weight: torch.Tensor, positions: int, rounds: int, clock) -> dict[str, float]:
    """Medians: milliseconds of `pass`, `plain` and `used` products, and of the ratios of the first to the others."""
    numbers = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, positions, weight.shape[1], generator=numbers).to(weight.dtype)
    head = VocabularyHead(weight, 30.0, torch.tensor(weight.shape[1] ** 0.5, dtype=weight.dtype))
    found = []
    for _ in range(rounds + 1):  # the first warms up
        start = clock()
        streamed_prediction(hidden, head, 0.7, BatchDraws(numbers))
        one = {"pass": 1000 * (clock() - start)} | time_products(weight, positions, clock, repeats=1)
        found.append(one | {f"by {way}": one["pass"] / one[way] for way in ("plain", "used")})
    return {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}


@torch.no_grad()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("positions", 256), ("vocab-size", 262_144), ("hidden", 256), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--dtype", nargs="+", default=("float32", "bfloat16"), choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, instead of wall-clock time")
    args = parser.parse_args(arguments)
    if args.cpu_time and args.threads not in (None, 1):
        parser.error("`--cpu-time` counts one thread; expected --threads 1 or none")
    for name in ("positions", "vocab_size", "hidden", "rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"`--{name.replace('_', '-')}` is {value}; expected a positive integer")
    if args.threads or args.cpu_time:
        torch.set_num_threads(args.threads or 1)
    print(f"{heading(__file__, arguments, machine('cpu'))}\n")
    rows = []
    for name in args.dtype:
        weight = (torch.randn(args.vocab_size, args.hidden, generator=torch.Generator().manual_seed(0)) * 0.05).to(getattr(torch, name))
        found = measure(weight, args.positions, args.rounds, time.thread_time if args.cpu_time else time.perf_counter)
        rows.append([name, *(number(found[key]) for key in ("pass", "plain", "used", "by plain", "by used"))])
    header = ["dtype", "pass, ms", "products by torch.mm, ms", "products as it makes them, ms", "pass by the former", "by the latter"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
