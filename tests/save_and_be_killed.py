"""Saves a second checkpoint over a first one in processes that are killed, and prints as JSON what can be loaded each time.

    python tests/save_and_be_killed.py FOLDER TIMES CASE...

TIMES 0: before every single change in the folder. Else at so many random moments of a process that saves both by turns. A child is forked
from this process, which has imported everything. Weights are one number everywhere, so that a mixture shows.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, DiffusionGemmaForBlockDiffusion
from transformers.utils import logging

import train
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FP8Config, default_checkpoint
from modeling_diffusiongemma.console.export import run as export
from modeling_diffusiongemma.quantize import quantize_checkpoint
from modeling_diffusiongemma.weights.saving import finish

SMALL = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")
OURS, AUTO, ORACLE = (
    kind.from_pretrained for kind in (DiffusionGemmaForMaskedBlockLM, AutoModelForCausalLM, DiffusionGemmaForBlockDiffusion)
)


def constant(value, limit=None, **config):
    """A model of one number, which also is its limit of tokens."""
    model = DiffusionGemmaForMaskedBlockLM(tiny_config(**config, **SMALL)).eval()
    model.generation_config.max_new_tokens = limit or int(value)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def numbers(tensors):
    return sorted({round(float(value), 3) for tensor in tensors for value in (tensor.min(), tensor.max())})


def about(model):
    return [*numbers(model.state_dict().values()), model.config.canvas_length, model.generation_config.max_new_tokens]


class Saved:
    """Two models, each saved in its own way."""

    every = 1  # before how many changes a process is killed once

    def __init__(self, folder, old=(), new=(), limit=None, **config):
        self.models = constant(1.0, limit), constant(2.0, limit, **config)
        self.arguments = dict(old), dict(new)

    def save(self, which, folder):
        self.models[which].save_pretrained(folder, **self.arguments[which])

    def looks(self, folder):
        """What others see comes first, before anything here can finish an interrupted save."""
        variant = {name: value for name, value in self.arguments[0].items() if name == "variant"}
        loads = {"oracle": ORACLE, "auto": AUTO, "ours": OURS}
        return {name: lambda load=load: about(load(folder, **variant)) for name, load in loads.items()}


class Code(Saved):
    """With and without code."""

    def looks(self, folder):
        def ours():
            model = OURS(folder)
            return [*about(model), sorted(getattr(model.config, "auto_map", ())), len(list(folder.glob("modeling_*.py"))) > 20]

        return {"ours": ours}


class Adapters(Saved):
    """Of a base model elsewhere, with other ranks and numbers."""

    def __init__(self, folder):
        base = folder.with_name("base")
        constant(3.0).save_pretrained(base)
        self.models, self.arguments = [], ({}, {})
        for rank in (1, 2):
            model = OURS(base)
            model.add_adapter(LoraConfig(target_modules=r"model\.decoder\.layers.*q_proj", r=rank))
            for name, tensor in model.named_parameters():
                if "lora" in name:
                    torch.nn.init.constant_(tensor, rank)
            self.models.append(model)

    def looks(self, folder):
        def adapters(model):
            found = {name: tensor for name, tensor in model.named_parameters() if "lora" in name}
            return [*numbers(found.values()), sorted({min(tensor.shape) for tensor in found.values()})]

        def direct():
            model = OURS(folder.with_name("base"))
            model.load_adapter(folder)
            return adapters(model)

        return {"auto": lambda: adapters(AUTO(folder)), "ours": direct}


class FP8(Saved):
    """In the published FP8 layout."""

    def __init__(self, folder):
        super().__init__(folder, {"max_shard_size": "30KB"}, {"max_shard_size": "30KB"})
        for which, model in enumerate(self.models):
            path = folder.with_name(f"plain{which}")
            model.to(torch.bfloat16).save_pretrained(path)
            self.models = *self.models[:which], OURS(path, quantization_config=FP8Config()), *self.models[which + 1 :]

    def looks(self, folder):
        return {name: lambda load=load: fp8_numbers(load(folder)) for name, load in (("auto", AUTO), ("ours", OURS))}


def fp8_numbers(model):
    model = model.dequantize()
    return [*numbers(tensor for name, tensor in model.state_dict().items()), model.generation_config.max_new_tokens]


class Quantized(FP8):
    """By the command, over what the command made of another model."""

    every = 2

    def __init__(self, folder):
        self.sources = [folder.with_name(f"source{which}") for which in range(2)]
        for which, source in enumerate(self.sources):
            constant(which + 1.0).to(torch.bfloat16).save_pretrained(source, max_shard_size="30KB")

    def save(self, which, folder):
        quantize_checkpoint(self.sources[which], folder)


class Trained(Saved):
    """By the training script: weights, tokenizer and what training needs to go on."""

    every = 3

    def save(self, which, folder):
        tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
        optimizer = train.Optimizers(self.models[which], lr=0.1, muon=True)
        recipe = SimpleNamespace(tokenizer=tokenizer)
        train.save(folder, recipe, self.models[which], optimizer, which + 1, random.Random(0), 0.0, [])

    def looks(self, folder):
        def ours():
            finish(folder / "checkpoint")
            state = torch.load(folder / "checkpoint" / "state.pt", weights_only=False)
            return [*about(OURS(folder / "checkpoint")), state["step"]]

        return {"ours": ours}


class Exported(Saved):
    """By the command, with tokenizers that differ."""

    every = 60  # of some 250, each with a model to load first

    def __init__(self, folder):
        super().__init__(folder)
        for which, model in enumerate(self.models):
            path = folder.with_name(f"checkpoint{which}")
            model.save_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
            tokenizer.model_max_length = which + 1
            tokenizer.save_pretrained(path)

    def save(self, which, folder):
        model = SimpleNamespace(path=str(folder.with_name(f"checkpoint{which}")))
        export(argparse.Namespace(folder=str(folder), overwrite=True, model=model, dtype="auto", max_shard_size="60KB", json=True))

    def looks(self, folder):
        def ours():
            model = OURS(folder)  # finishes
            return [*about(model), AutoTokenizer.from_pretrained(folder).model_max_length]

        return {"ours": ours}


SHARDS = {"max_shard_size": "60KB"}
CASES = {
    "weights alone": lambda folder: Saved(folder, limit=7),
    "equal shards": lambda folder: Saved(folder, SHARDS, SHARDS),
    "shards to one file": lambda folder: Saved(folder, SHARDS),
    "one file to shards": lambda folder: Saved(folder, {"variant": "mine"}, {"variant": "mine"} | SHARDS),
    "other config": lambda folder: Saved(folder, canvas_length=20),
    "code": lambda folder: Code(folder, {"remote_code": True}),
    "adapters": Adapters,
    "fp8": FP8,
    "quantized": Quantized,
    "trained": Trained,
    "exported": Exported,
}


def looked(look):
    """What `look` finds, else what was wrong."""
    try:
        return look()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def name_of(path):
    """A file's path; of what was not finished as far as its kind is named."""
    hidden = [place for place, part in enumerate(path.parts) if part[0] == "."]
    return "/".join(path.parts[: hidden[0] + 1]).split("-")[0] if hidden else path.as_posix()


def names(folder):
    return sorted(name_of(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.name[0] == ".")


def contents(folder):
    """What loading may depend on: of what was not finished, that it is there; of what is being moved everything."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if not path.is_dir()}
    written = {name: None for name in map(name_of, found) if unfinished(name)}
    return written | {str(name): path.read_bytes() for name, path in found.items() if name_of(name) not in written}


def unfinished(name):
    """Whether a file of this `name_of` belongs to what is being written."""
    return ".saving" in name or ".quantizing" in name


def in_child(run):
    """Forks a process that does `run()`. Its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def be_killed_before(count, folder):
    """From now on this process kills itself before its `count`-th change in `folder`."""
    left = [count]

    def watch(event, arguments):
        if event not in EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def report(name, case, folder, code, looks=()):
    found = {"case": name, "child": code, "files": names(folder)}
    for look in looks:
        found[look] = looked(case.looks(folder)[look])
    print(json.dumps(found), flush=True)


def run(name, folder, times):
    original = folder.with_name("original")
    case = CASES[name](folder)
    in_child_wait(lambda: case.save(0, original))
    original.mkdir(exist_ok=True)
    (original / "mine.txt").write_text("mine")
    shutil.copytree(original, folder)
    seen, code = [], None
    for count in range(1, times + 1) if times else range(1, 1000, case.every):
        if not times:
            shutil.rmtree(folder)
            shutil.copytree(original, folder)

            def save(count=count):
                be_killed_before(count, folder)
                case.save(1, folder)
        else:

            def save():
                while True:
                    case.save(1, folder)
                    case.save(0, folder)

        child = in_child(save)
        if times:
            time.sleep(random.uniform(0.02, 0.2))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        state = contents(folder)
        if state not in seen or times:
            seen.append(state)
            report(name, case, folder, code, case.looks(folder) if not times else ["ours"])
        if code >= 0:
            break
    for _ in range(3):  # a killed process may hold its lock a moment longer: what it left is then the next save's to remove
        code = in_child_wait(lambda: case.save(0, folder))
        if not any(map(unfinished, names(folder))):
            break
    report(name, case, folder, code, ["ours"])


def in_child_wait(run):
    return os.waitstatus_to_exitcode(os.waitpid(in_child(run), 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for case in sys.argv[3:]:
        started = time.time()
        place = Path(sys.argv[1]) / case.replace(" ", "_")
        place.mkdir()
        run(case, place / "saved", int(sys.argv[2]))
        print(f"{case}: {time.time() - started:.1f} s", file=sys.stderr, flush=True)
