"""FP8 in numbers: bytes of the released architecture, memory while loading, accuracy, and time of a canvas pass.

    python benchmarks/fp8.py bytes                   # the released architecture, on the meta device
    python benchmarks/fp8.py memory                  # loading and quantising a shrunk model, each in a process of its own
    python benchmarks/fp8.py accuracy --cases 100    # the shipped text checkpoint: float32, bfloat16, FP8, and what else was tried
    python benchmarks/fp8.py time                    # a canvas pass, random weights: full size on a GPU, shrunk on a CPU
    python benchmarks/fp8.py load                    # on a CPU: two layers at full size from a file (3.3 GB of disk and memory)
    python benchmarks/fp8.py cpu                     # one layer at full size on a CPU, with torch's conversion and with the table (1 GB)

Every part prints its table with hardware and versions, to be pasted into RESULTS.md.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DiffusionGemmaConfig, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from measure import PeakMemory, heading, machine
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FP8Config, default_checkpoint
from modeling_diffusiongemma.layers.experts import Experts
from modeling_diffusiongemma.quantize import quantize_checkpoint
from modeling_diffusiongemma.weights import fp8_numbers
from modeling_diffusiongemma.weights.fp8 import FP8Experts, FP8Linear
from modeling_diffusiongemma.weights.fp8_layout import default_ignore, fp8_modules, make_fp8, published_layout
from modeling_diffusiongemma.weights.fp8_math import E4M3, dequantize, quantize_rows, quantize_weight
from random_checkpoint import write_checkpoint
from random_model import stored_config

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from recipes import TextRecipe  # noqa: E402

RELEASED = Path(__file__).parents[1] / "tests" / "data" / "released"
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}  # bytes/s, by name of the GPU
SHRUNK = {"hidden_size": 704, "num_hidden_layers": 6, "num_experts": 32, "moe_intermediate_size": 176, "intermediate_size": 528,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["bytes", "memory", "accuracy", "time", "cpu", "load"])
    parser.add_argument("--cases", type=int, default=50, help="accuracy: unseen inputs of each job")
    parser.add_argument("--canvas-length", type=int, default=64, help="accuracy: 256 is the checkpoint's own")
    parser.add_argument("--prompt", type=int, default=1024, help="time: prompt tokens")
    parser.add_argument("--repeats", type=int, default=20, help="time: canvas passes; cpu: runs of each line, at most 5")
    parser.add_argument("--compile", action="store_true", help="time: torch.compile, with CUDA graphs on a GPU")
    parser.add_argument("--load", nargs=3, metavar=("KIND", "SRC", "DST"), help=argparse.SUPPRESS)  # `memory` and `load` call themselves
    return parser.parse_args(arguments)


def shrunk_config() -> DiffusionGemmaConfig:
    """The released architecture with smaller sizes; 6 layers, of which one attends fully."""
    stored = json.loads((RELEASED / "config.json").read_text())
    stored["text_config"] |= SHRUNK | {"layer_types": stored["text_config"]["layer_types"][:6], "num_global_key_value_heads": 1}
    stored["vision_config"] |= {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
                                "head_dim": 32, "intermediate_size": 64}  # fmt: skip
    stored |= {"image_token_id": 4000, "boi_token_id": 4001, "eoi_token_id": 4002}
    return DiffusionGemmaConfig.from_dict(stored)


def stored_bytes(config: DiffusionGemmaConfig) -> tuple[collections.Counter, collections.Counter, int]:
    """Bytes of a checkpoint in bfloat16 and in FP8 by part of the model, and the number of tensors of the latter."""
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(config)
    parts = ("experts", "self_attn", "mlp", "embed_tokens", "encoder")

    def part_of(name: str) -> str:
        found = next((part for part in parts if f".{part}." in name and (part == "encoder" or ".encoder." not in name)), "rest")
        return {"encoder": "vision and prompt side", "self_attn": "attention", "mlp": "dense MLP"}.get(found, found)

    plain, fp8 = collections.Counter(), collections.Counter()
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            plain[part_of(name)] += 2 * tensor.numel()
    make_fp8(model, default_ignore(model))
    layout = published_layout(model)
    for name, (dtype, shape) in layout.items():
        fp8[part_of(name)] += torch.Size(shape).numel() * (1 if dtype == "F8_E4M3" else 2)
    return plain, fp8, len(layout)


def print_bytes() -> None:
    plain, fp8, tensors = stored_bytes(AutoConfig.from_pretrained(RELEASED))
    print("| part | bfloat16, bytes | FP8 checkpoint, bytes |\n|---|---|---|")
    for name, size in plain.most_common():
        print(f"| {name} | {size:,} | {fp8[name]:,} |")
    print(f"| **all** | **{plain.total():,}** | **{fp8.total():,}** |\n\n{tensors:,} tensors in the FP8 checkpoint.")
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(AutoConfig.from_pretrained(RELEASED))
    ignore = default_ignore(model)
    make_fp8(model, ignore)
    kinds = collections.Counter(name.rpartition(".")[2] for name in fp8_modules(model))
    print(f"FP8: {', '.join(f'{count} {name}' for name, count in sorted(kinds.items()))}; {len(ignore)} names in `ignore`.")


@torch.no_grad()
def load_layers(kind: str, source: str) -> None:
    """A checkpoint of two layers loaded, and canvas passes, in a process of its own; prints a line of JSON."""
    AutoModelForCausalLM.from_pretrained(default_checkpoint(), quantization_config=FP8Config())
    started, before = time.perf_counter(), PeakMemory.now()
    model = AutoModelForCausalLM.from_pretrained(source)
    if kind == "stacked":
        for module in fp8_modules(model).values():
            if isinstance(module, FP8Experts):
                module.stack()
    measured = {"load": time.perf_counter() - started, "loaded": PeakMemory.now() - before}
    canvas = torch.randint(200, 250_000, (1, 256), generator=torch.Generator().manual_seed(0))
    cache, passes = model.prefill(canvas[:, :20]).cache, []
    for _ in range(3):
        started = time.perf_counter()
        states = model.denoise(canvas, cache).last_hidden_state
        passes.append(time.perf_counter() - started)
    bits = hashlib.sha256(states.view(torch.uint8).numpy().tobytes()).hexdigest()
    print(json.dumps(measured | {"pass": statistics.median(passes), "run": PeakMemory.now() - before, "bits": bits}))


def print_load() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = stored_config(layers=2)
        stored["vision_config"]["num_hidden_layers"] = 1
        size = write_checkpoint(Path(folder), stored, fp8=True, shard_bytes=2**40)
        print(f"{size / 1e9:.2f} GB in one file, 2 layers, 256 tokens a canvas\n")
        print("| experts | load, s | private memory, GB | after 3 canvas passes, GB | canvas pass, s (median) | bits |")
        print("|---|---|---|---|---|---|")
        for kind, name in {"mapped": "in the file", "stacked": "stacked in memory, by `stack()`"}.items():
            command = [sys.executable, __file__, "load", "--load", kind, folder, "-"]
            done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            memory = f"{done['loaded'] / 1e9:.2f} | {done['run'] / 1e9:.2f}"
            print(f"| {name} | {done['load']:.1f} | {memory} | {done['pass']:.2f} | {done['bits'][:8]} |", flush=True)


def load(kind: str, source: str, destination: str) -> None:
    """One measurement, in a process of its own; prints a line of JSON."""
    torch.set_num_threads(1)
    # What transformers imports at the first load is not the model's memory.
    AutoModelForCausalLM.from_pretrained(default_checkpoint(), quantization_config=FP8Config())
    with PeakMemory() as memory:
        if kind == "command":
            quantize_checkpoint(source, destination)
            weights = 0
        else:
            settings = {"quantization_config": FP8Config()} if kind == "quantise" else {}
            model = AutoModelForCausalLM.from_pretrained(source, **settings)
            weights = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name != "lm_head.weight")
    print(json.dumps({"peak": memory.peak - memory.start, "weights": weights}))


def print_memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        plain, fp8 = f"{folder}/plain", f"{folder}/fp8"
        DiffusionGemmaForMaskedBlockLM(shrunk_config()).to(torch.bfloat16).save_pretrained(plain, max_shard_size="60MB")
        lines = {
            "bfloat16 checkpoint, loaded as it is": ("plain", plain, "-"),
            "bfloat16 checkpoint, command line": ("command", plain, fp8),
            "bfloat16 checkpoint, quantised while loading": ("quantise", plain, "-"),
            "FP8 checkpoint": ("plain", fp8, "-"),
        }
        print("| on a CPU | model afterwards, MiB | peak while at it, MiB |\n|---|---|---|")
        for name, arguments in lines.items():
            command = [sys.executable, __file__, "memory", "--load", *arguments]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            measured = json.loads(output.splitlines()[-1])
            print(f"| {name} | {measured['weights'] / 2**20:,.1f} | {measured['peak'] / 2**20:,.1f} |")
        layer = 2 * torch.Size((SHRUNK["num_experts"], 2 * SHRUNK["moe_intermediate_size"], SHRUNK["hidden_size"])).numel()
        print(f"\nLargest tensor: {layer / 2**20:.1f} MiB in bfloat16.")


@contextlib.contextmanager
def fp8_cache():
    """Keys and values of the cache rounded to e4m3 with one scale a head and token."""
    originals = {kind: kind.update for kind in (DynamicLayer, DynamicSlidingWindowLayer)}

    def rounded(states):
        return dequantize(*quantize_rows(states), states.dtype)

    def make(original):
        return lambda self, keys, values, *args, **kwargs: original(self, rounded(keys), rounded(values), *args, **kwargs)

    for kind, original in originals.items():
        kind.update = make(original)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.update = original


def print_accuracy(args: argparse.Namespace) -> None:
    recipe, path = TextRecipe(), default_checkpoint()

    def fp8_head():
        """The tied embedding rounded to e4m3 by row: it is the head, the soft embedding and the embedding."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=FP8Config())
        weight = model.get_input_embeddings().weight
        weight.data.copy_(dequantize(*quantize_weight(weight.data), weight.dtype))
        return model

    lines = {
        "float32": (lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), contextlib.nullcontext),
        "bfloat16": (lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), contextlib.nullcontext),
        "FP8": (lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=FP8Config()),
                contextlib.nullcontext),
        "FP8, and the head and soft embedding": (fp8_head, contextlib.nullcontext),
        "FP8, and the cache": (lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=FP8Config()),
                               fp8_cache),
    }  # fmt: skip
    header = False
    for name, (make, context) in lines.items():
        with context():
            results = recipe.evaluate(make().eval(), args.cases, canvas_length=args.canvas_length, max_new_tokens=64)
        if not header:
            print(f"{args.cases} unseen inputs a job, canvas {args.canvas_length}, exact answers\n")
            print(f"| | {' | '.join(results)} | mean | steps |\n|{'---|' * (len(results) + 3)}")
            header = True
        exact = [row["exact"] for row in results.values()]
        steps = statistics.mean(row["steps"] for row in results.values())
        print(f"| {name} | {' | '.join(f'{value:.1%}' for value in exact)} | {statistics.mean(exact):.1%} | {steps:.1f} |", flush=True)


def random_model(config: DiffusionGemmaConfig, device: torch.device, fp8: bool) -> DiffusionGemmaForMaskedBlockLM:
    """Random weights made on the device, in bfloat16 or in FP8, one tensor at a time."""
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(config).to(torch.bfloat16)
        if fp8:
            make_fp8(model, default_ignore(model))
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    fill(model, generator)
    return model.eval()


@torch.no_grad()
def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random weights."""
    for name, tensor in module.named_parameters():
        if name.endswith("_scale") and tensor.dtype == torch.float32 and tensor.dim() > 1:
            tensor.fill_(2e-4)  # e4m3 numbers have a deviation of 100 below
        elif tensor.dtype == E4M3:
            for part in tensor.view(-1, tensor.shape[-1]).split(2**16):
                numbers = torch.randn(part.shape, generator=generator, device=tensor.device, dtype=torch.bfloat16)
                part.copy_((numbers * 100).clamp(-448, 448))
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0, 0.02, generator=generator)
    for _, buffer in module.named_buffers():
        buffer.fill_(1.0)


def pass_bytes(model: DiffusionGemmaForMaskedBlockLM, cache: DynamicCache) -> int:
    """What a canvas pass reads at least: the stack's weights once, the cache once."""
    weights = sum(parameter.nbytes for name, parameter in model.model.decoder.named_parameters() if "embed_tokens" not in name)
    return weights + sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def print_time(args: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    config = AutoConfig.from_pretrained(RELEASED) if gpu else shrunk_config()
    bandwidth = next((speed for name, speed in BANDWIDTH.items() if gpu and name in torch.cuda.get_device_name()), None)
    print(f"{'full size' if gpu else f'shrunk ({SHRUNK})'}, random weights, batch 1, {args.prompt} prompt tokens, canvas of "
          f"{config.canvas_length}, the stack without the head, {'compiled' if args.compile else 'eager'}\n")  # fmt: skip
    print("| weights | GB read a pass | ms a canvas pass (median) | roofline, ms |\n|---|---|---|---|")
    for name, fp8 in (("bfloat16", False), ("FP8", True)):
        model = random_model(config, device, fp8)
        vocabulary = config.text_config.vocab_size
        prompt = torch.randint(8, vocabulary - 200, (1, args.prompt), device=device)
        canvas = torch.randint(8, vocabulary - 200, (1, config.canvas_length), device=device)
        cache = model.prefill(prompt).cache
        step = torch.compile(model.denoise, mode="reduce-overhead" if gpu else None) if args.compile else model.denoise
        milliseconds = []
        for _ in range(args.repeats + 3):
            if gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            step(canvas, cache)
            if gpu:
                torch.cuda.synchronize()
            milliseconds.append(1e3 * (time.perf_counter() - started))
        read = pass_bytes(model, cache)
        floor = "" if bandwidth is None else f"{1e3 * read / bandwidth:.2f}"
        print(f"| {name} | {read / 1e9:.2f} | {statistics.median(milliseconds[3:]):.2f} | {floor} |", flush=True)
        del model, cache, step
        if gpu:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def torchs_conversion():
    """Without the table of e4m3 numbers."""
    original, fp8_numbers.has_table = fp8_numbers.has_table, lambda *_: False
    try:
        yield
    finally:
        fp8_numbers.has_table = original


@torch.no_grad()
def print_cpu(args: argparse.Namespace) -> None:
    """Experts and a linear layer of the released widths; the two ways in turn, and whether they agree to the last bit."""
    config = AutoConfig.from_pretrained(RELEASED).text_config
    with torch.device("meta"):
        layers = {"experts": FP8Experts(Experts(config)), "linear layer": FP8Linear(config.hidden_size, config.intermediate_size)}
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        fill(layer.to_empty(device="cpu"), generator)
    print(f"{config.num_experts} experts of {config.hidden_size} and {config.moe_intermediate_size}, {config.top_k_experts} a token;")
    print(f"linear layer of {config.hidden_size} and {config.intermediate_size}; {torch.get_num_threads()} threads; median (fastest)\n")
    print("| layer, activations | tokens | experts hit | torch's conversion, ms | table, ms | ratio | same bits |")
    print("|---|---|---|---|---|---|---|")
    for dtype, tokens in [(dtype, tokens) for dtype in (torch.bfloat16, torch.float32) for tokens in (256, 20)]:
        hidden = torch.randn(tokens, config.hidden_size, generator=generator).to(dtype)
        chosen = torch.rand(tokens, config.num_experts, generator=generator).topk(config.top_k_experts).indices
        weights = torch.rand(tokens, config.top_k_experts, generator=generator)
        for name, inputs in {"experts": (hidden, chosen, weights), "linear layer": (hidden,)}.items():
            milliseconds, outputs = {}, []
            for _ in range(1 + min(args.repeats, 5)):  # the first is not counted
                for way, context in {"torch": torchs_conversion, "table": contextlib.nullcontext}.items():
                    with context():
                        started = time.perf_counter()
                        outputs.append(layers[name](*inputs))
                        milliseconds.setdefault(way, []).append(1e3 * (time.perf_counter() - started))
            middle = {way: statistics.median(values[1:]) for way, values in milliseconds.items()}
            columns = " | ".join(f"{middle[way]:,.1f} ({min(values[1:]):,.1f})" for way, values in milliseconds.items())
            same = all(torch.equal(output.view(torch.uint8), outputs[0].view(torch.uint8)) for output in outputs)
            hit = len(chosen.unique()) if name == "experts" else ""
            ratio = middle["torch"] / middle["table"]
            print(f"| {name}, {str(dtype)[6:]} | {tokens} | {hit} | {columns} | {ratio:.1f} | {'yes' if same else 'NO'} |", flush=True)


def main() -> None:
    args = parse()
    if args.load:
        load(*args.load) if args.part == "memory" else load_layers(*args.load[:2])
        return
    transformers.utils.logging.disable_progress_bar()
    print(f"{heading(__file__, sys.argv[1:], machine('cuda' if torch.cuda.is_available() else 'cpu'))}\n")
    if args.part == "bytes":
        print_bytes()
    elif args.part == "memory":
        print_memory()
    elif args.part == "accuracy":
        print_accuracy(args)
    elif args.part == "cpu":
        print_cpu(args)
    elif args.part == "load":
        print_load()
    else:
        print_time(args)


if __name__ == "__main__":
    main()
