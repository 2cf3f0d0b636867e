"""The shipped checkpoints as recipes: tokenizer, configuration, training batches, held-out evaluation.

A recipe knows its data; `train.py` knows how to train. Sources: FACTS of the published training recipe in
`modeling_diffusiongemma/training/loss.py`; sizes chosen for two CPU cores and a file below 20 MB.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import DiffusionGemmaConfig, PreTrainedTokenizerFast

from generation import Template, ToolCalls
from jobs import CALLS, DECISION_JOBS, TEXT_JOBS, sudoku
from jobs.calls import JOIN, call_for
from jobs.days import draw_over_short_month
from jobs.note_variety import draw_varied
from jobs.tokenizer import SPECIAL_IDS, build_tokenizer
from modeling_diffusiongemma import BlockDiffusionCollator

# transformers turns `vision_config: null` into a full-size vision tower; a tiny one keeps every runtime able to load us.
TINY_VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 64,
}  # fmt: skip


def progress(total: int, unit: str, what: str, **kwargs) -> tqdm:
    """A bar on standard error; where that is no terminal, a line about every half minute."""
    return tqdm(total=total, unit=unit, desc=what, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30, **kwargs)


def small_config(vocab_size: int, hidden_size: int, layers: int, canvas_length: int, rope_theta: float, **ids) -> DiffusionGemmaConfig:
    """A small DiffusionGemma: every third layer attends fully, four experts of which two are active."""
    types = ["full_attention" if place % 3 == 2 or place == layers - 1 else "sliding_attention" for place in range(layers)]
    heads = hidden_size // 32
    text = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers, "layer_types": types,
        "num_attention_heads": heads, "num_key_value_heads": heads, "num_global_key_value_heads": heads,
        "head_dim": 32, "global_head_dim": 32, "intermediate_size": 2 * hidden_size,
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": hidden_size // 2,
        "sliding_window": 512, "max_position_embeddings": 8192, "use_bidirectional_attention": "vision",
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": rope_theta},
            "full_attention": {"rope_type": "proportional", "rope_theta": rope_theta, "partial_rotary_factor": 0.5},
        },
    }  # fmt: skip
    return DiffusionGemmaConfig(text_config=text, vision_config=TINY_VISION, canvas_length=canvas_length, **ids)


def given_side(pair: str, side: str) -> Template:
    """A pair "digits = words" of which `side` is a blank."""
    digits, words = pair.split(" = ")
    return Template("{digits:4} = " + words if side == "digits" else digits + " = {words}")


class TextRecipe:
    """The first six exact text jobs in chat form, on a canvas of 256 (trained mostly on narrower ones)."""

    name = "text"
    jobs = TEXT_JOBS
    canvas = 256
    start = None  # the checkpoint to begin with; None: random weights
    overrides = {}  # of its config
    takes_data = False  # it draws its examples
    # canvases the model wrote itself: (from which share of the steps on, in what share of the batches, at most how many steps deep)
    rollouts = None  # of notes they changed nothing: what is wrong there is the copy of a word never seen
    defaults = {"hidden_size": 192, "layers": 6, "batch_size": 64}
    # canvas, padded length of prompt and response, share of the batches: few shapes, so that each compiles once
    SHORT, NOTES, WIDE = (16, 56), (64, 112), (256, 112)
    NOTE_SHARE = 0.45
    WEIGHTS = {
        "date": 1,
        "number_to_words": 2,
        "words_to_number": 1,
        "units": 3,
        "sort": 3,
    }  # of the others: harder ones more often
    WIDE_FROM, WIDE_SHARE = 0.72, 0.5  # the released canvas length comes in the last part of training

    def __init__(self, data: str | None = None):
        self.tokenizer = build_tokenizer(640)
        self.end = SPECIAL_IDS["<turn|>"]

    def config(self, hidden_size: int, layers: int) -> DiffusionGemmaConfig:
        return small_config(
            len(self.tokenizer), hidden_size, layers, self.canvas, 10_000.0, eos_token_id=[1, 106],
            image_token_id=SPECIAL_IDS["<|image|>"], boi_token_id=SPECIAL_IDS["<|image>"], eoi_token_id=SPECIAL_IDS["<image|>"],
        )  # fmt: skip

    def generation_config(self) -> dict:
        return {"max_new_tokens": self.canvas, "eos_token_id": [1, 106, 50], "pad_token_id": 0}

    def encode(self, prompts: list[str]) -> list[list[int]]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def encode_answers(self, pairs: list[tuple[str, str]]) -> list[list[int]]:
        """The answers of some pairs, with their ends."""
        answers = self.tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
        return [[*answer, self.end] for answer in answers]

    def batch(self, rng: random.Random, size: int, progress: float) -> tuple[dict[str, torch.Tensor], dict]:
        """Model inputs of `size` training examples, and how the loss is to take them."""
        notes = rng.random() < self.NOTE_SHARE
        canvas, length = self.NOTES if notes else self.SHORT
        if progress >= self.WIDE_FROM and rng.random() < self.WIDE_SHARE:
            canvas, length = self.WIDE
            size = max(1, size // 3)
        pairs = []
        while len(pairs) < size:
            name = "note_to_json" if notes else rng.choices([*self.WEIGHTS], weights=[*self.WEIGHTS.values()])[0]
            pairs.append(TEXT_JOBS[name].sample(rng, "train"))
        return self.collate(pairs, canvas, length), {"canvas_length": canvas, "causal": True}

    def collate(self, pairs: list[tuple[str, str]], canvas: int, length: int, head: int | None = None) -> dict[str, torch.Tensor]:
        """Inputs of those pairs whose answer fits a canvas, and which fit into `length` tokens, to which all are padded; answers begin
        behind `head` tokens, where it is given."""
        prompts = self.encode([prompt for prompt, _ in pairs])
        answers = self.encode_answers(pairs)
        fitting = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(p) + len(a) <= length and len(a) <= canvas]
        if head is None:
            return BlockDiffusionCollator(pad_token_id=0, pad_to_multiple_of=length)(fitting)
        return self.behind([(p, a) for p, a in fitting if len(p) <= head and len(a) <= length - head], length, head)

    def behind(self, pairs: list[tuple[list[int], list[int]]], length: int, head: int) -> dict[str, torch.Tensor]:
        """Inputs of prompts and answers as ids, all padded to `length` tokens and so that answers begin behind `head`."""
        padded = [([0] * (head - len(p)) + p, a) for p, a in pairs]
        inputs = BlockDiffusionCollator(pad_token_id=0, pad_to_multiple_of=length)(padded)
        for row, (p, _) in enumerate(pairs):
            inputs["attention_mask"][row, : head - len(p)] = 0
        return inputs

    def decode(self, sequences: torch.Tensor) -> list[str]:
        """Generated ids `(n, T)` as answers."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)

    def groups(self, drawn: dict[str, list[tuple[str, str]]]) -> dict[str, tuple[list, list | None, Callable | None]]:
        """What is evaluated, by name: pairs, the constraint of each, and what judges an answer, which otherwise must be the pair's."""
        found = {name: (pairs, None, self.jobs[name].check) for name, pairs in drawn.items()}
        for side in ("words", "digits") if "number_pair" in drawn else ():
            found[f"{side} filled in"] = (drawn["number_pair"], [given_side(pair, side) for _, pair in drawn["number_pair"]], None)
        return found

    def evaluate(
        self, model, count: int, seed: int = 0, split: str = "test", batch_size: int = 50, **settings
    ) -> dict[str, dict[str, float]]:
        """Exact answers by each job's checker on `count` unseen inputs a job, some under constraints (`groups`); input i is generated with
        the seed `seed + i`, so that a result does not depend on the batch size."""
        rng, results = random.Random(seed), {}
        drawn = {name: [job.sample(rng, split) for _ in range(count)] for name, job in self.jobs.items()}
        groups = self.groups(drawn)
        bar = progress(count * len(groups), "case", "evaluating")
        for name, (cases, constraints, check) in groups.items():
            given = ([prompt for prompt, _ in cases], constraints, seed, batch_size)
            answers, steps, per_forward = self.answer(model, *given, told=bar.update, **settings)
            verdicts = [
                check(prompt, answer) if check else answer == response for (prompt, response), answer in zip(cases, answers, strict=True)
            ]
            results[name] = {
                "exact": sum(verdicts) / count,
                "cases": count,
                "steps": np.mean(steps).item(),
                "tokens_per_forward": np.mean(per_forward).item(),
            }
        bar.close()
        return results

    def answer(
        self, model, prompts: list[str], constraints: list | None = None, seed: int = 0, batch_size: int = 50,
        told: Callable[[int], object] = lambda count: None, **settings,
    ) -> tuple[list[str], list[int], list[float]]:  # fmt: skip
        """Answers to prompts, each under its constraint where there are any, and the denoising steps and tokens per forward of each; `told`
        how many of them come with every batch."""
        answers, steps, per_forward = [], [], []
        for first in range(0, len(prompts), batch_size):
            some = slice(first, first + batch_size)
            part = self.tokenizer.pad({"input_ids": self.encode(prompts[some])}, return_tensors="pt")
            seeds = [seed + first + place for place in range(part["input_ids"].shape[0])]
            demanded = {"constraint": constraints[some], "tokenizer": self.tokenizer} if constraints else {}
            output = model.generate(**part, seed=seeds, return_dict_in_generate=True, **demanded, **settings)
            answers += self.decode(output.sequences[:, part["input_ids"].shape[1] :])
            steps += output.denoising_steps.tolist()
            per_forward += output.tokens_per_forward.tolist()
            told(len(seeds))
        return answers, steps, per_forward


class Shape(NamedTuple):
    """Batches of one shape, which compiles once: jobs with their weights, on a `canvas`, padded to `length` and so that answers begin
    behind `head` tokens, of so many `rows`; what share of all batches they are, and in what share of them the causal loss is learned too
    (which without a `head` is all: the prompt pass is as long as the prompts where it is not)."""

    share: float
    jobs: dict[str, int]
    canvas: int
    length: int
    rows: int
    causal: float = 1.0
    head: int | None = None


class TextFurtherRecipe(TextRecipe):
    """What the text checkpoint learned after its first six jobs, from which it goes on: answers that fill the canvas, numbers whose words
    and digits tell each other, and notes in more wordings and of more words."""

    name = "text-further"
    start = "text"
    SHORT_JOBS = {"date": 2, "number_to_words": 2, "words_to_number": 2, "units": 3, "sort": 3, "number_pair": 4}
    SHAPES = (
        Shape(0.50, {"days": 1}, 256, 288, 8, 0.25, head=46),
        Shape(0.23, {"note_to_json": 1}, 64, 144, 32),
        Shape(0.12, SHORT_JOBS, 24, 64, 64),
        Shape(0.15, {**SHORT_JOBS, "note_to_json": 16}, 256, 144, 12, 0.5, head=88),
    )
    HARDER = {"note_to_json": (0.7, draw_varied), "days": (0.5, draw_over_short_month)}  # what share of a job's examples is drawn otherwise

    def draw(self, rng: random.Random, name: str) -> tuple[str, str]:
        """One training example of a job."""
        share, draw = self.HARDER.get(name, (0.0, None))
        return draw(rng) if rng.random() < share else TEXT_JOBS[name].sample(rng, "train")

    def batch(self, rng: random.Random, size: int, progress: float) -> tuple[dict[str, torch.Tensor], dict]:
        shape = rng.choices(self.SHAPES, weights=[shape.share for shape in self.SHAPES])[0]
        names = rng.choices([*shape.jobs], weights=[*shape.jobs.values()], k=max(1, shape.rows * size // self.defaults["batch_size"]))
        pairs = [self.draw(rng, name) for name in names]
        options = {"canvas_length": shape.canvas, "causal": rng.random() < shape.causal}
        return self.collate(pairs, shape.canvas, shape.length, shape.head), options


class DecisionsRecipe(TextRecipe):
    """Questions about a state, some of which have no certain answer, on a canvas of 32: what probabilities can be judged by."""

    name = "decisions"
    jobs = DECISION_JOBS
    canvas = 32
    defaults = {"hidden_size": 128, "layers": 6, "batch_size": 32}
    LENGTH = 144  # of prompt and answer, in tokens

    def batch(self, rng: random.Random, size: int, progress: float) -> tuple[dict[str, torch.Tensor], dict]:
        pairs = [rng.choice([*self.jobs.values()]).sample(rng, "train") for _ in range(size)]
        return self.collate(pairs, self.canvas, self.LENGTH), {"canvas_length": self.canvas, "causal": True}


class ToolsRecipe(TextRecipe):
    """Calls of the functions that a prompt declares, from the text checkpoint on, which can copy words and write dates."""

    name = "tools"
    start = "text"
    overrides = {"canvas_length": 96}
    jobs = {"calls": CALLS}
    canvas = 96
    SHAPES = ((0.6, 160, 1.3), (0.4, 256, 0.8))  # share of the batches, tokens of the longest prompt, rows as a share of the batch size
    defaults = {"hidden_size": 192, "layers": 6, "batch_size": 24}
    CAUSAL = 0.25  # in what share of the batches the causal loss is learned too

    def __init__(self, data: str | None = None):
        self.tokenizer = build_tokenizer(640, tools=True)

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """One training example."""
        return CALLS.sample(rng, "train")

    def chat(self, prompt: str, response: str | None = None) -> tuple[list[dict], list[dict]]:
        """Messages and tools of an example, with the response as the last message where it is given."""
        given = json.loads(prompt)
        chat = [{"role": "user", "content": given["request"]}]
        if "result" in given:
            chat.append({"role": "assistant", "tool_calls": [{"function": call_for(given["request"], given["tools"])}]})
            chat.append({"role": "tool", "content": given["result"]})
        if response is not None:
            said = json.loads(response)
            answer = {"content": said} if isinstance(said, str) else {"tool_calls": [{"function": call} for call in said]}
            chat.append({"role": "assistant", **answer})
        return chat, given["tools"]

    def render(self, prompt: str, response: str | None = None) -> str:
        chat, tools = self.chat(prompt, response)
        return self.tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=response is None, tokenize=False)

    def encode(self, prompts: list[str]) -> list[list[int]]:
        return self.tokenizer([self.render(prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]

    def encode_answers(self, pairs: list[tuple[str, str]]) -> list[list[int]]:
        """What the template writes behind a prompt, and behind calls the id that waits for their results."""
        texts = [self.render(*pair)[len(self.render(pair[0])) :].rstrip("\n") for pair in pairs]
        texts = [text if text.endswith("<turn|>") else text + "<|tool_response>" for text in texts]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def batch(self, rng: random.Random, size: int, progress: float) -> tuple[dict[str, torch.Tensor], dict]:
        ((_, head, rows),) = rng.choices(self.SHAPES, weights=[share for share, _, _ in self.SHAPES])
        pairs = []
        while len(pairs) < int(rows * size):  # always as many, so that each shape is compiled once
            drawn = self.draw(rng)
            (prompt,), (answer,) = self.encode([drawn[0]]), self.encode_answers([drawn])
            if len(prompt) <= head and len(answer) <= self.canvas:
                pairs.append((prompt, answer))
        inputs = self.behind(pairs, head + self.canvas, head)
        return inputs, {"canvas_length": self.canvas, "causal": rng.random() < self.CAUSAL}

    def decode(self, sequences: torch.Tensor) -> list[str]:
        """The calls of an answer, or its text, as JSON; of what cannot be read the reason."""
        found = []
        for row in sequences:
            try:
                answer = self.tokenizer.parse_response(row.tolist(), prefix="")
            except ValueError as error:
                found.append(f"not read: {error}")
            else:
                calls = [call["function"] for call in answer.get("tool_calls", ())]
                found.append(json.dumps(calls or answer.get("content", "")))
        return found

    def groups(self, drawn: dict[str, list[tuple[str, str]]]) -> dict[str, tuple[list, list | None, Callable | None]]:
        """As drawn, and again with nothing but text and calls that fit."""
        constraints = self.constraints([prompt for prompt, _ in drawn["calls"]])
        return super().groups(drawn) | {"calls under a constraint": (drawn["calls"], constraints, CALLS.check)}

    @staticmethod
    def constraints(prompts: list[str]) -> list[ToolCalls]:
        """What each answer may be: text, or calls of the prompt's functions."""
        return [ToolCalls(json.loads(prompt)["tools"]) for prompt in prompts]


class ToolsFurtherRecipe(ToolsRecipe):
    """What the tools checkpoint learned after its first recipe, from which it goes on: two things at once more often, and canvases it wrote
    itself, on which letters and whole tokens had been lost or doubled."""

    name = "tools-further"
    start = "tools"
    rollouts = (0.0, 0.5, 24)
    SHAPES = ((1.0, 256, 1.0),)  # rows of a rollout come and go one by one
    TWO_SHARE = 0.4

    def draw(self, rng: random.Random) -> tuple[str, str]:
        two = rng.random() < self.TWO_SHARE
        while True:
            prompt, response = CALLS.sample(rng, "train")
            if (JOIN in prompt) == two:
                return prompt, response


class SudokuRecipe:
    """Sudoku 9x9: 81 cells in the prompt, the solution on a canvas of 81."""

    name = "sudoku"
    start = None
    overrides = {}
    takes_data = True
    rollouts = (0.5, 0.75, 24)
    defaults = {"hidden_size": 128, "layers": 6, "batch_size": 64}
    CELLS = 81

    def __init__(self, data: str | None = None):
        self.tokenizer = self._tokenizer()
        self.puzzles = None
        if data is not None:
            if not Path(data).is_file():
                raise ValueError(f"`data` is {data!r}; expected the file that `python examples/jobs/sudoku.py make` wrote")
            stored = np.load(data)
            self.puzzles, self.solutions = stored["puzzles"], stored["solutions"]

    @staticmethod
    def _tokenizer() -> PreTrainedTokenizerFast:
        """One token a cell; blanks may be written '.', '0' or '_', and white space is dropped."""
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", ".", *"123456789", "<|image|>"]
        tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"[0_]"), "."), normalizers.Replace(Regex(r"\s"), "")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", mask_token="<mask>",
            padding_side="left", model_max_length=512, clean_up_tokenization_spaces=False, processor_class="TokenizersBackend",
            chat_template="{{ bos_token }}{{ messages[-1]['content'] }}",
        )  # fmt: skip

    def config(self, hidden_size: int, layers: int) -> DiffusionGemmaConfig:
        # 0.698^-16: frequencies fall by 2 pi / 9 each, so that periods of 9, 27 and 81 cells (row, band, grid) are among them
        return small_config(16, hidden_size, layers, self.CELLS, 315.0, eos_token_id=[1], image_token_id=15, boi_token_id=3, eoi_token_id=3)

    def generation_config(self) -> dict:
        return {"max_new_tokens": self.CELLS, "eos_token_id": [1], "pad_token_id": 0}

    def encode(self, grids: np.ndarray) -> torch.Tensor:
        """Token ids of grids `(n, 81)`: id 5 is '.', 5 + d is the digit d."""
        return torch.from_numpy(grids.astype(np.int64)) + 5

    def batch(self, rng: random.Random, size: int, progress: float) -> tuple[dict[str, torch.Tensor], dict]:
        """Model inputs of `size` training examples, and how the loss is to take them."""
        if self.puzzles is None:
            raise ValueError("`data` is None; expected the file that `python examples/jobs/sudoku.py make` wrote")
        puzzles, solutions = self.draw(np.random.default_rng(rng.getrandbits(64)), size)
        bos = torch.full((size, 1), 2)
        input_ids = torch.cat((bos, self.encode(puzzles), self.encode(solutions)), dim=1)
        labels = torch.cat((torch.full((size, 1 + self.CELLS), -100), input_ids[:, 1 + self.CELLS :]), dim=1)
        return {"input_ids": input_ids, "labels": labels}, {"canvas_length": self.CELLS, "causal": False}

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Puzzles and solutions of `size` training examples, `(size, 81)` each."""
        return sudoku.sample_training(self.puzzles, self.solutions, size, rng)

    def evaluate(self, model, count: int, seed: int = 0, split: str = "test", batch_size: int = 50, **settings) -> dict:
        """Solved puzzles out of `count` newly generated ones with 26 to 36 clues, by the real checker, and by difficulty."""
        rng, groups = random.Random(1_000_003 + seed), {}
        puzzles = []
        with progress(count, "puzzle", "making puzzles") as bar:
            while len(puzzles) < count:
                puzzles.append(sudoku.generate(rng, rng.randint(26, 36))[0])
                bar.update()
        puzzles, bar = np.stack(puzzles), progress(count, "puzzle", "solving them")
        for first in range(0, count, batch_size):
            part = puzzles[first : first + batch_size]
            prompts = torch.cat((torch.full((len(part), 1), 2), self.encode(part)), dim=1)
            seeds = [seed + first + place for place in range(len(part))]
            output = model.generate(prompts, seed=seeds, return_dict_in_generate=True, **settings)
            answers = self.tokenizer.batch_decode(output.sequences[:, prompts.shape[1] :], skip_special_tokens=True)
            for place, (puzzle, answer) in enumerate(zip(part, answers, strict=True)):
                right = sudoku.is_solution(puzzle, answer)
                level = "singles only" if sudoku.singles_only(puzzle) else "needs search"
                row = (right, output.denoising_steps[place].item(), output.tokens_per_forward[place].item())
                for group in ("all", level):
                    groups.setdefault(group, []).append(row)
            bar.update(len(part))
        bar.close()
        means = {group: np.mean(rows, axis=0).tolist() for group, rows in groups.items()}
        return {
            group: {"exact": exact, "cases": len(groups[group]), "steps": steps, "tokens_per_forward": per_forward}
            for group, (exact, steps, per_forward) in means.items()
        }


class SudokuFurtherRecipe(SudokuRecipe):
    """What the Sudoku checkpoint learned after its first recipe, from which it goes on: puzzles nearly as they are asked, on canvases
    it wrote itself. Half are such as singles do not solve; to these nothing is revealed, since with a few cells more singles do."""

    name = "sudoku-further"
    start = "sudoku"
    rollouts = (0.0, 0.75, 40)
    EXTRA_CLUES = (0, 6)  # for the others
    SEARCH_SHARE = 0.5

    def __init__(self, data: str | None = None):
        super().__init__(data)
        if self.puzzles is not None:
            print("telling puzzles that need search from the others", file=sys.stderr, flush=True)
            self.search = np.array([place for place, puzzle in enumerate(self.puzzles) if not sudoku.singles_only(puzzle)])

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        hard = rng.binomial(size, self.SEARCH_SHARE)
        pools = ((self.search, hard, (0, 0)), (slice(None), size - hard, self.EXTRA_CLUES))
        drawn = [sudoku.sample_training(self.puzzles[pool], self.solutions[pool], n, rng, clues) for pool, n, clues in pools]
        return tuple(np.concatenate(boards) for boards in zip(*drawn, strict=True))


RECIPES = {
    recipe.name: recipe
    for recipe in (TextRecipe, TextFurtherRecipe, DecisionsRecipe, ToolsRecipe, ToolsFurtherRecipe, SudokuRecipe, SudokuFurtherRecipe)
}

__all__ = [
    "RECIPES",
    "DecisionsRecipe",
    "SudokuFurtherRecipe",
    "SudokuRecipe",
    "TextFurtherRecipe",
    "TextRecipe",
    "ToolsFurtherRecipe",
    "ToolsRecipe",
    "progress",
    "small_config",
]
