"""Answers that fill a canvas, by denoising and one token at a time with the same weights: what each way writes in a second.

    python examples/race.py

    1045 tokens of 5 long answers, same weights: 11.4 times as fast by denoising
      denoising              15 passes,    2,114 tokens/s, 5 of 5 right
      one token at a time  1045 passes,      186 tokens/s, 5 of 5 right

Lists of days (`jobs/days.py`), which take 154 to 242 tokens, by the predictor of `sampler="predictor_corrector"`.
`benchmarks/long_answers.py` measures more of them, in batches too.
"""

import argparse
import random
import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from jobs import TEXT_JOBS
from modeling_diffusiongemma import default_checkpoint

JOB = TEXT_JOBS["days"]
# Of lists, 22 in 200 more are right so than by the released settings: benchmarks/RESULTS.md, "Fewer passes".
WAYS = {
    "diffusion": {"sampler": "predictor_corrector", "corrector_steps": 0, "joint_threshold": 0.1},
    "autoregressive": {"decoding": "autoregressive", "do_sample": False},
}
RACED = 5  # answers


class Measured:
    """Sums over calls of one way: seconds of `generate`, tokens without padding, passes (steps, or tokens where there are none)."""

    def __init__(self):
        self.seconds, self.tokens, self.passes, self.right, self.cases = 0.0, 0, 0, 0, 0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def add(self, model, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seeds: list[int], settings: dict) -> None:
        """Answers and judges a batch."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
        started = time.perf_counter()
        output = model.generate(**inputs, seed=seeds, return_dict_in_generate=True, **settings)
        self.seconds += time.perf_counter() - started
        answers = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.right += sum(JOB.check(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
        self.tokens += int(output.lengths.sum())
        self.passes += int(output.denoising_steps.sum()) or int(output.lengths.sum())
        self.cases += len(prompts)


def race(model, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> str:
    """Both ways over the same unseen requests, one at a time, and what came of it in three lines."""
    prompts = [JOB.sample(rng, "test")[0] for _ in range(RACED)]
    found, lines = [], []
    for title, settings in zip(("denoising", "one token at a time"), WAYS.values(), strict=True):
        found.append(each := Measured())
        for prompt in prompts:
            each.add(model, tokenizer, [prompt], [0], settings)
        lines.append(f"  {title:20s}{each.passes:5d} passes, {each.speed:8,.0f} tokens/s, {each.right} of {RACED} right")
    ratio = f"{found[0].speed / found[1].speed:.1f} times as fast by denoising"
    return "\n".join([f"{found[1].tokens} tokens of {RACED} long answers, same weights: {ratio}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="which unseen requests (default: other ones every time)")
    args = parser.parse_args()
    path = default_checkpoint()
    print(race(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), random.Random(args.seed)))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
