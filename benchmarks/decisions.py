"""Decisions in numbers: how good their probabilities are, by reads, by steps, calibrated and not, and against the causal pass.

    python benchmarks/decisions.py                              # 400 held-out requests of the shipped checkpoint; minutes on a core
    python benchmarks/decisions.py --cases 100 --png reliability.png
    python benchmarks/decisions.py --checkpoint runs/mine --save  # and writes the calibration into its decision.json

Requests of `jobs.decisions`, whose answers have known probabilities: of bags of marbles, two amounts, shares of seats. The calibration is
fitted on as many held-out requests of another seed (`--fit`), with the true probabilities, by type of question. `causal`: the labels'
next-token probabilities in the causal pass behind the prompt and the answer so far, as transformers' pipeline asks models without a
method for decisions. One by one: every question a request of its own, where there are two; the same: both say the same best answer.

Columns: accuracy, the mean true probability of the best option, which can be as high as the line above the table says; log-likelihood in
nats; Brier score; distance, the mean absolute one from the true probability of an option; expected calibration error over 10 bins.
`--quick` is a smoke run whose numbers mean nothing.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import Calibration, Choice, fit_calibration, judge
from generation.decisions.judging import confidences, draw_reliability
from measure import heading, machine, markdown
from modeling_diffusiongemma import default_checkpoint

from jobs.decisions import draw_request, labels, render, truth  # isort: skip (its folder is put on the path by `measure`)

READS = 8
HEADER = ["read by", "calibrated", "accuracy", "log-likelihood", "Brier", "distance", "calibration error"]


class Case(NamedTuple):
    """A question: type, scores float64 (reads, options), and true probabilities."""

    name: str
    kind: str
    scores: torch.Tensor
    true: torch.Tensor


class Reader:
    """A checkpoint that is asked, and the seconds it took."""

    def __init__(self, path: str, canvas_length: int | None):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.canvas_length = canvas_length or self.model.config.canvas_length

    def ask(self, request: dict, **how) -> dict[str, torch.Tensor]:
        asked = {name: Choice(labels(question, False)) for name, question in request["questions"].items()}
        chat = [{"role": "user", "content": render(request)}]
        found = self.model.decide(chat, asked, self.tokenizer, canvas_length=self.canvas_length, calibration=Calibration(), **how)
        return {name: answer.scores for name, answer in found.items()}

    @torch.no_grad()
    def ask_causally(self, request: dict) -> dict[str, torch.Tensor]:
        """Next-token log-probabilities of the labels, float64 (1, options), each behind the best labels before."""
        chat = [{"role": "user", "content": render(request)}]
        text, found = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), {}
        for place, (name, question) in enumerate(request["questions"].items()):
            text += f'{", " if place else "{"}"{name}": "'
            marked = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            said = labels(question, False)
            named = [self.tokenizer(text + one, add_special_tokens=False)["input_ids"] for one in said]
            if any(ids[:-1] != marked for ids in named):
                raise ValueError(f"the labels {said} are not single tokens behind {text!r}")
            logits = self.model.causal_logits(torch.tensor([marked]), last_states=1)[0, -1]
            found[name] = logits.double().log_softmax(dim=-1)[[ids[-1] for ids in named]][None]
            text += said[int(found[name].argmax())] + '"'
        return found


def cases(requests: list[dict], ask, **how) -> list[Case]:
    found = []
    for request in requests:
        true, scores = truth(request), ask(request, **how)
        found += [
            Case(name, question["type"], scores[name], torch.tensor(true[name], dtype=torch.float64))
            for name, question in request["questions"].items()
        ]
    return found


def probabilities(asked: list[Case], calibration: Calibration, reads: int) -> list[torch.Tensor]:
    return [calibration.apply(one.scores[:reads], "", one.kind).exp().mean(dim=0) for one in asked]


def fitted(asked: list[Case], reads: int) -> Calibration:
    scores, truths = {}, {}
    for one in asked:
        scores.setdefault(one.kind, []).append(one.scores[:reads])
        truths.setdefault(one.kind, []).append(one.true.tolist())
    return fit_calibration(scores, truths)


def one_by_one(reader: Reader, requests: list[dict], reads: int) -> str:
    """How requests of several questions compare with a request a question."""
    several = [request for request in requests if len(request["questions"]) > 1]
    seconds, best = [0.0, 0.0], [[], []]
    for request in several:
        alone = [{**request, "questions": {name: question}} for name, question in request["questions"].items()]
        for way, asked in enumerate(([request], alone)):
            start = time.perf_counter()
            for one in asked:
                best[way] += [int(scores.softmax(dim=1).mean(dim=0).argmax()) for scores in reader.ask(one, reads=reads).values()]
            seconds[way] += time.perf_counter() - start
    if not several:
        return "No request has more than one question."
    same = sum(one == other for one, other in zip(*best, strict=True))
    return (
        f"Two questions on one canvas against one by one, {len(several)} requests, {reads} reads: the same best answer to {same} of "
        f"{len(best[0])} questions; one by one takes {seconds[1] / seconds[0]:.2f} times as long "
        f"({1000 * seconds[0] / len(several):.0f} ms a request on one canvas)."
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a folder (default: the shipped checkpoint of decisions)")
    parser.add_argument("--cases", type=int, default=400, help="held-out requests that are judged (400)")
    parser.add_argument("--fit", type=int, help="held-out requests that the calibration is fitted on (as many)")
    parser.add_argument("--canvas-length", type=int, help="(the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests that are judged (0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--png", help="a reliability diagram, before and after; needs matplotlib")
    parser.add_argument("--save", action="store_true", help="write the calibration for 4 reads into the checkpoint's decision.json")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args(arguments)
    if args.quick:
        args.cases, args.fit = 6, 6
    args.checkpoint = args.checkpoint or default_checkpoint("decisions")
    args.fit = args.cases if args.fit is None else args.fit
    if min(args.cases, args.fit, args.threads) < 1:
        parser.error("`--cases`, `--fit` and `--threads`: expected at least 1")
    if args.save and not Path(args.checkpoint).is_dir():
        parser.error(f"`--checkpoint` is {args.checkpoint!r}; expected a folder, to save into")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    print(f"{heading(__file__, arguments, machine('cpu'))}\n")
    reader = Reader(args.checkpoint, args.canvas_length)
    rng, others = random.Random(args.seed), random.Random(args.seed + 1_000_000)
    judged, for_fit = ([draw_request(one, "test") for _ in range(count)] for one, count in ((rng, args.cases), (others, args.fit)))
    rows = []

    def add(name: str, asked: list[Case], given: list[Case], reads: int) -> tuple[Calibration, dict]:
        calibration, seen = fitted(given, reads), {}
        for label, each in (("no", Calibration()), ("yes", calibration)):
            said, true = probabilities(asked, each, reads), [one.true for one in asked]
            rows.append([name, label, *(f"{value:.3f}" for value in judge(said, true))])
            seen["after" if label == "yes" else "before"] = confidences(said, true)
        return calibration, seen

    asked, given = cases(judged, reader.ask, reads=READS), cases(for_fit, reader.ask, reads=READS)
    best = sum(float(one.true.max()) for one in asked) / len(asked)
    print(f"{len(judged)} held-out requests, {len(asked)} questions; canvas {reader.canvas_length}, float32; best accuracy {best:.3f}\n")
    for reads in (1, 2, 4, 8):
        calibration, seen = add(f"{reads} {'read' if reads == 1 else 'reads'}, 1 step", asked, given, reads)
        if reads == 4:
            kept, drawn = calibration, seen
    two = [cases(requests, reader.ask, reads=4, steps=2) for requests in (judged, for_fit)]
    add("4 reads, 2 steps", *two, 4)
    causal = [cases(requests, reader.ask_causally) for requests in (judged, for_fit)]
    add("causal", *causal, 1)
    print(markdown(HEADER, rows), "", one_by_one(reader, judged, 4), "", sep="\n")
    for kind, temperature in kept.temperature.items():
        print(f"{kind}: temperature {temperature:.2f}, bias {[round(value, 2) for value in kept.bias[kind]]}")
    if args.png:
        draw_reliability(drawn, args.png)
    if args.save:
        kept.save(args.checkpoint)


if __name__ == "__main__":
    main(sys.argv[1:])
