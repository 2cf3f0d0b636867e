"""Changes the steps of a canvas by `callback_on_step_end`: pins tokens, ends a canvas early, or takes exactly so many steps.

python examples/change_a_step.py
python examples/change_a_step.py --prompt "To JSON: 12 lamps for Ida, due 4 May 2026." --pin '{"name": "Ada' --seed 1
"""

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from modeling_diffusiongemma import default_checkpoint

CANVAS = 64  # tokens
STEPS = 12  # of the canvases that take exactly so many


class Pin:
    """Holds the first tokens of a canvas at `ids`: in the canvas, which the next pass reads, and in the argmax, which is committed."""

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids, dtype=torch.int64)

    def __call__(self, model, step: int, noise_proportion: float, state: dict) -> dict:
        return {name: self.put(state[name]) for name in ("canvas", "argmax")}

    def put(self, canvas: torch.Tensor) -> torch.Tensor:
        ids = self.ids.to(canvas.device).expand(len(canvas), -1)
        return torch.cat((ids, canvas[:, ids.shape[1] :]), dim=1)

    def noise(self, vocab_size: int, seed: int) -> torch.Tensor:
        """A first canvas of noise that holds them, too: the first pass reads it before any callback is asked."""
        noise = torch.randint(vocab_size, (1, CANVAS), generator=torch.Generator().manual_seed(seed))
        return self.put(noise)


class EndWhenParsed:
    """Ends rows whose argmax is a JSON object of accepted tokens alone, and lets no other end. What parses need not be right: without
    asking what is accepted, rows end as soon as quotes and braces match."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]):
        self.tokenizer, self.ends = tokenizer, set(ends)

    def __call__(self, model, step: int, noise_proportion: float, state: dict) -> dict:
        parsed = [self.parses(*row) for row in zip(state["argmax"].tolist(), state["accepted"].tolist(), strict=True)]
        return {"finished": torch.tensor(parsed, dtype=torch.bool, device=state["finished"].device)}

    def parses(self, ids: list[int], accepted: list[bool]) -> bool:
        length = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        try:
            return all(accepted[:length]) and isinstance(json.loads(self.tokenizer.decode(ids[:length])), dict)
        except ValueError:
            return False


def end_after(steps: int):
    """Ends every row after so many steps, of a schedule that is as long as before."""

    def callback(model, step: int, noise_proportion: float, state: dict) -> dict | None:
        return {"finished": torch.ones_like(state["finished"])} if step + 1 >= steps else None

    return callback


class Show:
    """Prints the draft of every step as another callback leaves it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, callback=None):
        self.tokenizer, self.callback = tokenizer, callback

    def __call__(self, model, step: int, noise_proportion: float, state: dict) -> dict | None:
        changed = self.callback(model, step, noise_proportion, state) if self.callback else None
        draft = (changed or {}).get("argmax", state["argmax"])[0]
        print(f"  step {step + 1:2}  noise {noise_proportion:.2f}  {self.tokenizer.decode(draft, skip_special_tokens=True)}")
        return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Write as JSON: Edwin, 17 Oct 2039: 37 bulbs at $59.21.")
    parser.add_argument("--pin", default='{"name": "Edwin", "quantity": 73', help="what the answer is to begin with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    pin = Pin(tokenizer(args.pin, add_special_tokens=False)["input_ids"])
    pinned = {"decoder_input_ids": pin.noise(model.config.text_config.vocab_size, args.seed)}
    exactly = {"max_denoising_steps": STEPS, "stability_threshold": None}  # None: never stop early
    ways = {
        "as it is": (None, {}),
        f"pinned to {args.pin!r}": (pin, pinned),
        "ended as soon as the draft parses": (EndWhenParsed(tokenizer, model.generation_config.eos_token_id), {}),
        f"exactly {STEPS} steps": (None, exactly),
        f"the first 3 of these {STEPS}": (end_after(3), exactly),
    }
    print(args.prompt)
    for name, (callback, settings) in ways.items():
        print(f"\n{name}:")
        output = model.generate(
            **inputs, callback_on_step_end=Show(tokenizer, callback), seed=args.seed, canvas_length=CANVAS, max_new_tokens=CANVAS,
            return_dict_in_generate=True, **settings,
        )  # fmt: skip
        answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {int(output.denoising_steps[0])} steps: {answer}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
