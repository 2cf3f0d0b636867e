"""`callback_on_step_end`: the hook of `generate` that may change a step, as a watcher.

It is called in the form that Diffusers' pipelines have, `callback(model, step, noise_proportion, state) -> dict or None`, with the rows
that go on: neither those that had finished before this step, nor those that have ended, however long they stay in the batch. So it is
called alike for a row alone and in any batch, and no row that is finished can change. To know which they are, the host waits for the
device at every step. Knows nothing of the loop.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..arguments import floats, integers, read, shown
from ..checks import check_ids, check_shape, embed_conditioning
from ..rules.prediction import Prediction
from ..rules.state import CanvasState
from .watcher import StreamerWatcher, Watcher

OF_STATE = ("canvas", "argmax", "soft_embeds", "accepted", "entropy", "log_probs", "changed_at", "revisions", "passes", "finished")
OF_PREDICTION = {"sample": "sample", "logits": "shaped"}  # by the names they have here
ALWAYS = ("rows", "canvas_index")
NAMES = (*OF_STATE, *OF_PREDICTION)
MAY_CHANGE = ("canvas", "argmax", "soft_embeds", "self_conditioning_logits", "finished")


class StepCallback(Watcher):
    """Calls a function at the end of every denoising step, and makes what it changes the state.

    Args:
        callback: `(model, step, noise_proportion, state) -> dict or None`. `step` counts up from 0 inside a canvas; `noise_proportion` is
            that of the canvas which the step leaves, `1 - (step + 1) / max_denoising_steps`: 0 after the last. `state` holds, of the b
            rows that go on, copies of

            - `canvas` int64 (b, C), what the next canvas pass reads; `argmax` int64 (b, C), what is committed when the row finishes;
              `soft_embeds` (b, C, D), the self-conditioning of the next pass, in the model's dtype;
            - `finished` bool (b,), rows that the stopping rules end with this step;
            - what the step was: `sample` int64, the denoiser's tokens; `accepted` bool; `entropy` and `log_probs` of the argmax, float32
              nats; `changed_at`, the step since which the argmax stands, and `revisions`, int64, each (b, C); `passes` int64 (b,);
            - `rows` int64 (b,), their places in the batch, and `canvas_index`, an int: always there;
            - `logits` float32 (b, C, V), shaped by temperature and filters: only where `names` asks for them.

            What the dict holds in the end counts, and over it what is returned: `canvas`, `argmax`, `soft_embeds` and `finished` may
            change, and `self_conditioning_logits` (b, C, V) or (C, V) may be said instead of `soft_embeds`. `finished` has the last word on
            the stopping rules: True ends a row with its `argmax` as it is, False lets one go on that they would end.
        names: what `state` holds beside `rows` and `canvas_index`. Default: all but `logits`.

    Raises:
        ValueError: a name that there is not; from `step`, what the callback changed that may not be, or not to that.
    """

    def __init__(self, callback: Callable, names: Sequence[str] | None, model, max_denoising_steps: int):
        wrong = [name for name in names or () if name not in (*NAMES, *ALWAYS)]
        if wrong:
            raise ValueError(f"`callback_on_step_end_tensor_inputs` holds {wrong}; expected names among {[*NAMES, *ALWAYS]}")
        self.callback, self.model, self.max_denoising_steps = callback, model, max_denoising_steps
        self.names = [name for name in NAMES if (name != "logits" if names is None else name in names)]
        self.wants_logits, self.canvas_index = "logits" in self.names, -1

    def start(self, prompt: torch.Tensor) -> None:
        self.ended = prompt.new_zeros(prompt.shape[0], dtype=torch.bool)  # which rows of the batch are written no further

    def commit(self, tokens, lengths, finish_reasons) -> None:
        self.ended = torch.tensor([reason is not None for reason in finish_reasons], dtype=torch.bool, device=self.ended.device)

    def step(self, canvas_index, step, places, state, prediction) -> CanvasState | None:
        if canvas_index != self.canvas_index:
            self.canvas_index, self.finished = canvas_index, self.ended
        stood = state.passes.to(places.device) == 0  # rows whose constraint took the canvas that was given as it is
        going = (~(self.finished[places] | stood)).nonzero().flatten()  # an ended row that cannot leave is denoised, too
        if len(going) == 0:
            return None
        here = going.to(state.canvas.device)
        some = state if len(going) == len(places) else state.select(here)
        some = some._replace(**self._changes(step, places[going], some, prediction, here))
        self.finished = self.finished.index_copy(0, places[going], some.finished.to(places.device))
        return state.place(here, some)

    def _changes(
        self, step: int, rows: torch.Tensor, state: CanvasState, prediction: Prediction, here: torch.Tensor
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """What the callback makes of the rows that go on; `here` int64 (b,), where they stand in the prediction."""
        found = {name: getattr(state, name) for name in self.names if name in OF_STATE}
        found |= {name: getattr(prediction, OF_PREDICTION[name])[here] for name in self.names if name in OF_PREDICTION}
        with torch.inference_mode(False):  # where tensors count how often they were changed in place
            handed = {name: tensor.clone() for name, tensor in (found | {"rows": rows}).items()}
        handed["canvas_index"] = self.canvas_index
        before = {name: changes_of(value) for name, value in handed.items()}
        given = dict(handed)
        returned = self.callback(self.model, step, 1 - (step + 1) / self.max_denoising_steps, given)
        if returned is not None and not isinstance(returned, Mapping):
            raise ValueError(f"`callback_on_step_end` returned {shown(returned)}; expected None, or a dict of what it changes")
        after = {**given, **(returned or {})}
        changed = {
            name: value for name, value in after.items() if value is not handed.get(name) or changes_of(value) != before.get(name)
        }  # fmt: skip
        if wrong := sorted(str(name) for name in changed if name not in MAY_CHANGE):
            raise ValueError(f"`callback_on_step_end` changed {wrong}; expected changes of {list(MAY_CHANGE)} alone")
        try:
            return self._read(changed, state)
        except ValueError as error:
            raise ValueError(f"what `callback_on_step_end` changed: {error}") from error

    def _read(self, changed: dict[str, Any], state: CanvasState) -> dict[str, torch.Tensor]:
        """The fields of a state, checked."""
        vocab_size, fields = self.model.config.get_text_config().vocab_size, {}
        if {"soft_embeds", "self_conditioning_logits"} <= changed.keys():
            raise ValueError("`soft_embeds` and `self_conditioning_logits` are both given; expected one of them")
        for name, value in changed.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"`{name}` is {shown(value)}; expected a tensor")
            if value.device != state.canvas.device:
                raise ValueError(f"`{name}` is on {value.device}; expected {state.canvas.device}, where the canvas is")
            if name == "self_conditioning_logits":
                logits = read(name, value, floats("(rows, canvas_length, vocab_size)", 2, 3))
                soft_embeds = embed_conditioning(self.model, logits, (*state.canvas.shape, vocab_size))
                fields["soft_embeds"] = soft_embeds.to(state.soft_embeds.dtype)  # under autocast it comes in other bits
                continue
            old = getattr(state, name)
            if name in ("canvas", "argmax"):
                value = read(name, value, integers("(rows, canvas_length)", 2))
                check_ids(name, value, vocab_size)
            check_shape(name, value, tuple(old.shape))
            if value.dtype != old.dtype:
                raise ValueError(f"`{name}` is {value.dtype}; expected {old.dtype}")
            fields[name] = value
        return fields


def gather_watchers(model, max_denoising_steps: int, given: Mapping[str, Any]) -> list[Watcher]:
    """Who is told of a step, one after the other: each sees what those before made of it. `given`: the arguments of `generate`.

    Raises:
        ValueError: names of what a callback gets without the callback, or as `StepCallback`.
    """
    callback, names, streamer = (given[name] for name in ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "streamer"))
    if names is not None and callback is None:
        raise ValueError("`callback_on_step_end_tensor_inputs` is given; expected `callback_on_step_end` with it, which gets them")
    first = [] if callback is None else [StepCallback(callback, names, model, max_denoising_steps)]
    return [*first, *([] if streamer is None else [StreamerWatcher(streamer)]), *(given["watcher"] or [])]


def changes_of(value: Any) -> int | None:
    """How often a tensor was changed in place."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


__all__ = ["MAY_CHANGE", "NAMES", "StepCallback", "gather_watchers"]
