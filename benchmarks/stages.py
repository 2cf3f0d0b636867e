"""Where the time of a canvas pass goes: a clock that knows in which stage a model is.

Stages nest, and time belongs to the innermost. On CUDA a mark is an event in the stream, so nothing waits while the model
runs; what lies between two marks includes gaps in which the device waits for the host. Modules are found under the names of the
released checkpoint, which both implementations have.
"""

import contextlib
import functools
import inspect
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from unittest.mock import patch

import torch

STAGES = ("attention", "dense MLP", "router and experts", "norms and residuals", "vocabulary pass", "sampling", "rest")
PREFILL = "prefill"  # everything in it, and not counted
OF_MODULE = {"self_attn": "attention", "mlp": "dense MLP", "router": "router and experts", "experts": "router and experts"}
# Functions of `generation`, by the module they stand in.
OF_FILE = {
    "generation.vocabulary.walk": "vocabulary pass",
    "generation.rules.prediction": "vocabulary pass",
    "generation.rules.state": "sampling",
}


class StageClock:
    """Attributes time to the stage last entered and not left; inside the prompt pass, to that."""

    def __init__(self, device: torch.device):
        self.device, self.stack, self.marks = device, ["rest"], []

    def mark(self) -> None:
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((self.stack[-1], moment))  # what ends here belonged to that stage

    def enter(self, stage: str) -> None:
        self.mark()
        self.stack.append(PREFILL if self.stack[-1] == PREFILL else stage)

    def leave(self) -> None:
        self.mark()
        self.stack.pop()

    def take(self) -> Counter:
        """Milliseconds by stage since the first mark; starts anew."""
        self.mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent: Counter = Counter()
        for (_, before), (stage, after) in zip(self.marks, self.marks[1:], strict=False):
            spent[stage] += before.elapsed_time(after) if self.device.type == "cuda" else 1000 * (after - before)
        self.marks.clear()
        return spent

    def around(self, function, stage: str):
        """`function`, as a stage."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            self.enter(stage)
            result = function(*args, **kwargs)
            self.leave()
            return result

        return timed


@contextlib.contextmanager
def watch_stages(model, side: str) -> Iterator[StageClock]:
    """Makes `model` tell the stage it is in, for the length of the block.

    Ours tells all of them. In transformers' model everything of a step outside of the layers, the soft embedding included, is
    "vocabulary pass".
    """
    clock = StageClock(model.device)
    with contextlib.ExitStack() as stack:

        def watch(owner, name: str, stage: str) -> None:
            stack.enter_context(patch.object(owner, name, clock.around(getattr(owner, name), stage)))

        for layer in model.model.decoder.layers:
            watch(layer, "forward", "norms and residuals")
            for name, stage in OF_MODULE.items():
                watch(getattr(layer, name), "forward", stage)
        if side == "transformers":
            watch(model, "_denoising_step", "vocabulary pass")
            watch(model.model.encoder, "forward", PREFILL)
        else:
            watch(model.model, "prefill", PREFILL)
            # The dense way; a model whose own method is another's no longer walks the vocabulary, so one that does is left as it is.
            for name in () if model.why_dense(model.device) is None else ("compute_logits", "soft_embed"):
                watch(model, name, "vocabulary pass")
            for file, module in list(sys.modules.items()):
                for name, value in list(vars(module).items()) if file.startswith("generation.") else ():
                    stage = OF_FILE.get(value.__module__) if inspect.isfunction(value) else None
                    if stage is not None and value.__module__ != file:  # as the file that calls it knows it
                        watch(module, name, stage)
        yield clock


def stage_times(model, side: str, batch: dict, settings: dict, rounds: int = 3) -> dict[str, float]:
    """Milliseconds per canvas pass by stage, medians over `rounds` canvases; what a canvas needs once is spread over its steps.

    Args:
        settings: of `generate`; `max_denoising_steps` fixed ones.

    Raises:
        RuntimeError: a stage that must take time took none, so the clock does not see it.
    """
    spent = []
    with watch_stages(model, side) as clock:
        for _ in range(rounds + 1):  # the first warms up
            clock.mark()
            model.generate(**batch, max_new_tokens=model.config.canvas_length, disable_compile=True, **settings)
            spent.append(clock.take())
    stages = [stage for stage in STAGES if stage != "sampling" or side == "ours"]
    if blind := [stage for stage in stages if spent[0][stage] == 0]:
        raise RuntimeError(f"{side}: no time was seen in {blind}; expected `stages.py` to know where they stand")
    return {stage: statistics.median(one[stage] for one in spent[1:]) / settings["max_denoising_steps"] for stage in stages}
