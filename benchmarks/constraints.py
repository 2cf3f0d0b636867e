"""Constraints in numbers: how they are compiled, what they add to a denoising step, what they do to answers, and whether they hold.

    python benchmarks/constraints.py compile                         # a vocabulary of 262,144 ids, from nothing and from the cache
    python benchmarks/constraints.py step                            # a step's head with and without; minutes
    python benchmarks/constraints.py step --vocab-size 32768 --states 16 1024 --only "calls of 5 functions" --batch 1 --cpu-time
    python benchmarks/constraints.py notes                           # held-out notes of the shipped checkpoint; minutes
    python benchmarks/constraints.py notes --settings released --ways free schema
    python benchmarks/constraints.py many --count 2000               # random languages, models and settings; half an hour
    python benchmarks/constraints.py many --count 150 --first 600

Every part prints its table with hardware and versions, to be pasted into RESULTS.md; `--quick` is a smoke run whose numbers mean nothing.

`compile`: where outlines-core 0.2 is installed, its `Index` is built of the same language and vocabulary: its time, and by how much ours is
shorter; its regular expression of a schema differs in details, so its states do, too.
`step`: a round is a step's head without a constraint and one with, in turns, over 256 positions of hidden size 256; medians over the
rounds, and of the ratios of each round with lowest and highest. "flat": random hidden states, of which every id has a share, at the
released temperature of a first step; "peaked": each position is nearly certain of a token of a text of the language, at that
of a last step. Random automata have the form of a schema's.
`notes`: exact as the job's checker says; valid by `json`, types and `datetime`. "posterior": what is measured and fed back is the posterior
of the whole canvas instead of the model's probabilities.
`many`: see `random_languages.py`. Exits with 1 where a text does not fit.
"""

import argparse
import collections
import datetime
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from generation import Choice, JsonSchema, Regex, Template, ToolCalls
from generation.constraints import compiled
from generation.constraints.automaton import Automaton, closed, make_automaton
from generation.constraints.compiled import FOLDER, compile_constraint
from generation.constraints.languages import Language
from generation.constraints.lattice import Solution, make_lattice
from generation.constraints.tokens import token_bytes
from generation.loop import constrained
from generation.rules.draws import BatchDraws
from generation.vocabulary.classes import CHANCES, Chosen, ClassSums, ClassWalk
from generation.vocabulary.segments import make_orders
from generation.vocabulary.walk import VocabularyHead, streamed_prediction
from made_up_vocabulary import LEAST, made_up_tokenizer
from measure import heading, machine, markdown, number, say
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint
from random_languages import KINDS, load_models, random_texts
from random_model import bytes_per_pass, full_size_config

from jobs import TEXT_JOBS  # isort: skip (its folder is put on the path by `measure`)
from recipes import TextRecipe  # isort: skip

NAMES = ("name", "age", "price", "active", "colour", "title", "year", "weight", "hidden", "size", "city", "count", "rating", "open", "kind",
         "author", "pages", "width", "new", "state")  # fmt: skip
TYPES = ({"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"enum": ["red", "green", "blue"]})
DATE, MAIL = r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,4}"


def record(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


FIELDS = JsonSchema(record({name: TYPES[place % 5] for place, name in enumerate(NAMES)}), whitespace="spaced")
# Four arguments each, a string, an integer, a number and one of three words or a truth value among them.
CALLS = ToolCalls([{"name": f"call_{first}", "parameters": record({NAMES[place]: TYPES[place % 5] for place in range(first, first + 4)})}
                   for first in range(0, 20, 4)])  # fmt: skip
LANGUAGES: dict[str, Language] = {
    "ISO date": Regex(DATE),
    "mail address": Regex(MAIL),
    "word of at most 100 letters": Regex(r"[A-Za-z]{1,100}"),
    "object of 20 fields": FIELDS,
    "array of objects of 2 fields": JsonSchema({"type": "array", "items": record(dict(zip(NAMES, TYPES[:2], strict=False)))}, "spaced"),
    "5 strings of at most 20": JsonSchema(record({name: {"type": "string", "maxLength": 20} for name in NAMES[:5]}), "spaced"),
    "choice of 100": Choice([f"{name} {place}" for name in NAMES for place in range(5)]),
    "calls of 5 functions": CALLS,
    "template of 2 blanks and a date": Template("Dear {who:1-8}, your order {what:1-6} of {day} is sent.", day=Regex(DATE)),
}  # fmt: skip
POSITIONS, HIDDEN, EDGES, STOP, PAD = 256, 256, 7, 1, 0  # 3,109 edges of 456 states: 7 of each
NOTE = {
    "type": "object", "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "quantity": {"type": "integer"}, "item": {"type": "string"}, "price": {"type": "number"},
                   "date": {"type": "string", "format": "date"}},
}  # fmt: skip
SETTINGS = {
    "released": {}, "greedy": {"do_sample": False}, "2 steps": {"max_denoising_steps": 2}, "temperature 2": {"temperature": 2.0},
    "temperature 3, 4 steps": {"temperature": 3.0, "max_denoising_steps": 4},
}  # fmt: skip
WAYS = ("free", "schema", "posterior")
NOTES_AT_ONCE = 25


# compile


def theirs(tokens: list[bytes | None]) -> Callable[[Language], float] | None:
    """What gives the seconds that outlines-core takes for a language; None where it is not installed."""
    try:
        from outlines_core import Index, Vocabulary
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        return None
    ids: dict[bytes, list[int]] = {}
    for index, token in enumerate(tokens):
        if token:
            ids.setdefault(token, []).append(index)
    vocabulary = Vocabulary(0, ids)

    def seconds(language: Language) -> float:
        start = time.perf_counter()
        pattern = language.pattern if isinstance(language, Regex) else build_regex_from_schema(json.dumps(language.schema), "[ ]")
        Index(pattern, vocabulary)
        return time.perf_counter() - start

    return seconds


def time_compile(language: Language, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> float:
    """Milliseconds; nothing is in memory but the bytes of the vocabulary."""
    for known in compiled._memory()[tokenizer].values():
        known.automata.clear()
    start = time.perf_counter()
    compile_constraint(language, tokenizer, vocab_size)
    return 1000 * (time.perf_counter() - start)


def print_compile(args: argparse.Namespace) -> None:
    tokenizer, rows = made_up_tokenizer(vocab_size := args.vocab_size[-1]), []
    start = time.perf_counter()
    tokens = token_bytes(tokenizer)
    print(f"The bytes of all {vocab_size:,} ids, once for a tokenizer and a process: {1000 * (time.perf_counter() - start):.0f} ms.\n")
    other = theirs(tokens)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        compile_constraint(Choice(["warms up"]), tokenizer, vocab_size)
        for name in args.only:
            language = LANGUAGES[name]
            first, again = (time_compile(language, tokenizer, vocab_size) for _ in range(2))
            made = compile_constraint(language, tokenizer, vocab_size)
            row = [name, *(f"{count:,}" for count in (made.states, made.kinds, len(made.source))), number(first), number(again)]
            if other and isinstance(language, Regex | JsonSchema):
                seconds = other(language)
                row += [number(1000 * seconds), f"{1000 * seconds / first:.0f}x"]
            rows.append(row + ["", ""] * (other is not None and len(row) == 6))
    header = ["language", "states", "classes", "edges by class", "compiled, ms", "from the cache, ms"]
    print(markdown(header + ["outlines-core's index, ms", "as long"] * (other is not None), rows))


# step


def random_automaton(vocab_size: int, states: int, classes: int) -> Automaton:
    """A chain with as many edges elsewhere as a schema has: most ids in one class, which half of the states take to themselves."""
    numbers = torch.Generator().manual_seed(0)
    kinds = torch.where(torch.rand(vocab_size, generator=numbers) < 0.6, 1, torch.randint(classes, (vocab_size,), generator=numbers))
    kinds[: max(2, vocab_size // 50)] = 0  # special ids
    kinds[-classes:] = torch.arange(classes)  # at least one id each
    source, step = torch.arange(states).repeat_interleave(EDGES), torch.arange(EDGES).repeat(states)
    kind = 2 + (torch.randint(classes, (states,), generator=numbers)[:, None] + torch.arange(EDGES)).flatten() % (classes - 2)
    target = torch.randint(states, (len(source),), generator=numbers)
    target = torch.where(step == 0, (source + 1).clamp(max=states - 1), target)
    again = (source % 2 == 0) & (step == EDGES - 1)
    kind, target = torch.where(again, 1, kind), torch.where(again, source, target)
    return closed(make_automaton(kinds, source, kind, target, torch.arange(states) == states - 1), [STOP], PAD)


class Step:
    """The head of a step of a batch whose rows all have one automaton."""

    def __init__(self, weight: torch.Tensor, automaton: Automaton, batch_size: int):
        self.weight = weight
        self.head = VocabularyHead(weight, 30.0, torch.tensor(weight.shape[1] ** 0.5, dtype=weight.dtype))
        self.lattice = make_lattice([automaton] * batch_size, weight.device)
        self.orders = make_orders([automaton.classes] * batch_size, weight.device)
        self.state, self.left = torch.zeros(batch_size, dtype=torch.int64), automaton.states  # any text fits
        self.numbers = torch.Generator().manual_seed(1)
        self.temperature = 0.8
        self.hidden = torch.randn((batch_size, POSITIONS, weight.shape[1]), generator=self.numbers).to(weight.dtype)
        self.possible = self.lattice.possible(POSITIONS, self.state, self.left)  # once for all steps of a canvas
        self.argmax = torch.full((batch_size, POSITIONS), PAD, dtype=torch.int64)  # of the last step

    def certain(self) -> "Step":
        """The hidden states become such that each position is nearly certain of a token of a text of the language."""
        self.temperature = 0.4
        self.hidden = 50 * self.weight[self.bound(time.perf_counter)[1].sample]
        return self

    def free(self, clock: Callable[[], float]) -> float:
        """Seconds without a constraint."""
        start = clock()
        streamed_prediction(self.hidden, self.head, self.temperature, BatchDraws(self.numbers))
        return clock() - start

    def bound(self, clock: Callable[[], float]) -> tuple[list[float], object]:
        """Seconds of the first walk, the lattice and the second walk, and the prediction."""
        times = [clock()]
        chance = torch.rand((*self.hidden.shape[:2], CHANCES), generator=self.numbers)
        given = (self.orders, POSITIONS, None, None, self.possible, self.argmax)
        walk = ClassWalk(self.hidden, self.head, self.temperature, *given)
        sums = walk.sums()
        times.append(clock())
        solution = self.lattice.solve(sums.log_mass, sums.best, self.state, self.left, chance[..., :2])
        chosen = constrained.chosen(sums, solution, self.possible)
        times.append(clock())
        prediction = walk.draw(sums, chosen, chance, PAD)
        times.append(clock())
        self.argmax = prediction.argmax
        if bool(prediction.bad.any()):
            raise RuntimeError("no canvas is accepted; expected an automaton that accepts some")
        return [after - before for before, after in zip(times, times[1:], strict=False)], prediction


def time_step(step: Step, rounds: int, clock: Callable[[], float]) -> list[str]:
    """Cells: milliseconds without, with, of the three stages, and the ratio."""
    free, bound = [], []
    for index in range(rounds + 1):  # the first warms up
        for way in ("free", "bound") if index % 2 else ("bound", "free"):
            if way == "free":
                free.append(step.free(clock))
            else:
                bound.append(step.bound(clock)[0])
    free, bound = free[1:], bound[1:]
    ratios = [sum(stages) / alone for alone, stages in zip(free, bound, strict=True)]
    stages = [1000 * statistics.median(times) for times in zip(*bound, strict=True)]
    with_constraint = 1000 * statistics.median(map(sum, bound))
    cells = [number(1000 * statistics.median(free)), number(with_constraint), *map(number, stages)]
    return [*cells, f"**{statistics.median(ratios):.2f}x** ({min(ratios):.2f} to {max(ratios):.2f})"]


@torch.no_grad()
def print_step(args: argparse.Namespace) -> None:
    clock, rows = time.thread_time if args.cpu_time else time.perf_counter, []
    for vocab_size in args.vocab_size:
        automata = {}
        for name in args.only if vocab_size >= LEAST else ():
            automata[name] = closed(compile_constraint(LANGUAGES[name], made_up_tokenizer(vocab_size), vocab_size), [STOP], PAD)
        for states, kinds in [(states, kinds) for states in args.states for kinds in args.classes]:
            automata[f"random, {states}, {kinds}"] = random_automaton(vocab_size, states, kinds)
        for dtype in args.dtype:
            numbers = torch.Generator().manual_seed(0)
            weight = (torch.randn((vocab_size, HIDDEN), generator=numbers) * 0.05).to(getattr(torch, dtype))
            for name, automaton in automata.items():
                for batch_size in args.batch:
                    for canvas in args.canvas:
                        say(f"{vocab_size:,} ids, {dtype}, {name}, batch {batch_size}, {canvas}")
                        step = Step(weight, automaton, batch_size)
                        step = step.certain() if canvas == "peaked" else step
                        about = [f"{vocab_size:,}", dtype, name.partition(",")[0], automaton.states, automaton.kinds, len(automaton.source),
                                 len(automaton.bundled.source)]  # fmt: skip
                        rows.append([*about, batch_size, canvas, *time_step(step, args.rounds, clock)])
    print(f"Milliseconds of {'CPU' if args.cpu_time else 'wall-clock'} time, {args.rounds} rounds.\n")
    header = ["ids", "dtype", "language", "states", "classes", "edges by class", "edges", "batch", "canvas", "free", "constrained",
              "first walk", "lattice", "second walk", "constrained / free"]  # fmt: skip
    print(markdown(header, rows))
    print(f"\n{at_released_sizes()}")


def at_released_sizes() -> str:
    """What a ratio of the head means for a canvas pass there: computed."""
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(full_size_config()).to(torch.bfloat16)
    found = bytes_per_pass(model, 1, 1024, 1)
    share = found["vocabulary pass"] / sum(found.values())
    grown = ", ".join(f"{ratio}x the head is {1 + share * (ratio - 1):.3f}x the pass" for ratio in (1.25, 1.5, 2))
    return (
        f"Computed for the released sizes, bf16, prompt of 1,024: of the {sum(found.values()) / 1e9:.1f} GB that a canvas pass reads at "
        f"least, the head and the soft embedding are {share:.1%}; where bytes are what takes the time, {grown}, and the lattice is added."
    )


# notes


def posterior_chosen(sums: ClassSums, solution: Solution, possible: torch.Tensor) -> Chosen:
    """`constrained.chosen`, but for what is measured and fed back: the posterior of the whole canvas."""
    return Chosen(solution.posterior, solution.sample, solution.best, constrained.lost(solution))


def is_note(answer: str) -> bool:
    """Whether it is JSON of the schema, its names in this order."""
    types = {"name": str, "quantity": int, "item": str, "price": (int, float), "date": str}
    try:
        found = json.loads(answer)
        if not isinstance(found, dict) or [name for name in types if name in found] != list(found):
            return False
        datetime.date.fromisoformat(found.get("date", "2000-01-01"))
    except (TypeError, ValueError):
        return False
    return all(isinstance(value, types[name]) and not isinstance(value, bool) for name, value in found.items())


def write_notes(model, tokenizer, prompts: list[str], way: str, settings: dict) -> tuple[list[str], list[int]]:
    """Answers, and the canvas passes that each took."""
    answers, passes, recipe = [], [], TextRecipe()
    constraint = None if way == "free" else JsonSchema(NOTE)
    usual = constrained.chosen, constrained.solve
    if way == "posterior":
        constrained.chosen, constrained.solve = posterior_chosen, functools.partial(constrained.solve, posterior=True)
    try:
        for first in range(0, len(prompts), NOTES_AT_ONCE):
            batch = tokenizer.pad({"input_ids": recipe.encode(prompts[first : first + NOTES_AT_ONCE])}, return_tensors="pt")
            count = len(batch["input_ids"])
            seeds = {} if settings.get("do_sample") is False else {"seed": list(range(first, first + count))}
            found = model.generate(
                **batch, **seeds, **settings, constraint=constraint, tokenizer=tokenizer, canvas_length=64, max_new_tokens=64,
                return_dict_in_generate=True,
            )  # fmt: skip
            answers += tokenizer.batch_decode(found.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            passes += found.denoising_steps.tolist()
    finally:
        constrained.chosen, constrained.solve = usual
    return answers, passes


@torch.no_grad()
def print_notes(args: argparse.Namespace) -> None:
    path, numbers = default_checkpoint(), random.Random(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer, job = AutoTokenizer.from_pretrained(path, padding_side="left"), TEXT_JOBS["note_to_json"]
    prompts, rows = [job.sample(numbers, "test")[0] for _ in range(args.count)], []
    for name in args.settings:
        free: list[str] = []
        for way in args.ways:
            say(f"{name}, {way}")
            start = time.perf_counter()
            answers, passes = write_notes(model, tokenizer, prompts, way, SETTINGS[name])
            seconds = time.perf_counter() - start
            exact, valid = (sum(map(judge, prompts, answers)) for judge in (job.check, lambda prompt, answer: is_note(answer)))
            same = ""
            if way == "free":
                free = answers
            elif free:
                pairs = [one == other for one, other in zip(free, answers, strict=True) if is_note(one)]
                same = f"{sum(pairs)} of {len(pairs)}"
            rows.append([name, way, exact, valid, f"{statistics.mean(passes):.2f}", same, f"{seconds:.1f}"])
    print(f"{args.count} held-out notes, canvas 64, batches of {NOTES_AT_ONCE}, float32\n")
    header = ["setting", "constraint", "exact", "valid", "passes", "as free, of those valid there", "seconds"]
    print(markdown(header, rows))


# many


@torch.no_grad()
def print_many(args: argparse.Namespace) -> bool:
    """Whether all of them fit."""
    models, tokenizer, trained = load_models(getattr(torch, args.dtype[0]))
    seed, refused, wrong = args.first, [], []
    count, fits, ways = (collections.Counter() for _ in range(3))
    while count.total() < args.count:
        written, too_large = random_texts(seed, models, tokenizer, trained)
        refused += too_large
        for one in written[: args.count - count.total()]:
            count[one.case.kind] += 1
            fits[one.case.kind] += one.wrong is None
            ways[one.settings.get("decoding", "diffusion")] += 1
            if one.wrong is not None:
                wrong.append(f"seed {seed}, row {one.row}: {one.wrong}: {one.text!r} of {one.case.language!r} with {one.settings}")
        seed += 1
    rows = [[kind, f"{count[kind]:,}", f"{fits[kind]:,}"] for kind in KINDS if count[kind]]
    print(markdown(["language", "texts", "fit"], [*rows, ["**all**", f"{count.total():,}", f"{fits.total():,}"]]))
    about = ", ".join(f"{way} {total:,}" for way, total in ways.most_common())
    print(f"\nSeeds {args.first} to {seed - 1}; {about}. Languages refused as too large and drawn again: {len(refused)}.")
    print("\n".join(wrong), file=sys.stderr)
    return not wrong


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["compile", "step", "notes", "many"])
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's; compile, notes and many: 1)")
    parser.add_argument("--vocab-size", type=int, nargs="+", help="compile: one (262144); step: (640 32768 262144)")
    parser.add_argument("--only", nargs="*", choices=list(LANGUAGES), help="compile: languages (all); step: (object of 20 fields)")
    parser.add_argument("--states", type=int, nargs="*", default=[16, 128, 1024], help="step: of random automata (16 128 1024)")
    parser.add_argument("--classes", type=int, nargs="+", default=[147], help="step: of random automata (147)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="step: (1 4)")
    parser.add_argument("--canvas", nargs="+", choices=["flat", "peaked"], default=["flat", "peaked"], help="step: (both)")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="step: (float32 bfloat16); many: one (float32)")
    parser.add_argument("--rounds", type=int, default=5, help="step: (5)")
    parser.add_argument("--cpu-time", action="store_true", help="step: of one thread, instead of wall-clock time: on a busy machine")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="notes: (all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="notes: (all)")
    parser.add_argument("--count", type=int, help="notes: how many (200); many: texts (2000)")
    parser.add_argument("--first", type=int, default=0, help="many: the first seed (0); a seed is a call of up to 3 texts")
    args = parser.parse_args(arguments)
    if args.quick:
        args.vocab_size, args.only, args.states, args.batch, args.rounds = args.vocab_size or [LEAST], ["ISO date"], [16], [1], 1
        args.settings, args.count = ["2 steps"], args.count or 3
    if args.only is None:
        args.only = ["object of 20 fields"] if args.part == "step" else list(LANGUAGES)
    sizes = {"compile": [262_144], "step": [640, 32_768, 262_144]}
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.part == "step" else ["float32"])
    if args.part == "many" and len(args.dtype) > 1:
        parser.error(f"`--dtype` is {args.dtype}; expected one for `many`")
    args.vocab_size = args.vocab_size or sizes.get(args.part, [LEAST])
    args.count = args.count or {"notes": 200}.get(args.part, 2000)
    if args.part == "compile" and (len(args.vocab_size) > 1 or args.vocab_size[0] < LEAST):
        parser.error(f"`--vocab-size` is {args.vocab_size}; expected one of at least {LEAST}, which holds bytes and punctuation")
    if min(args.classes) < EDGES + 2 or min(args.vocab_size) < 2 * max(args.classes):
        parser.error(f"`--classes` is {args.classes}; expected at least {EDGES + 2} of them, and at most half as many as ids")
    if args.cpu_time and args.threads not in (None, 1):
        parser.error("`--cpu-time` counts one thread; expected --threads 1 or none")
    if args.threads is None and (args.cpu_time or args.part != "step"):
        args.threads = 1
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{heading(__file__, arguments, machine('cpu'))}\n")
    done = {"compile": print_compile, "step": print_step, "notes": print_notes, "many": print_many}[args.part](args)
    if done is False:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
