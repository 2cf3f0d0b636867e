"""A trace as a picture and as a page: what stood at every position after every step, how sure the model was, what was taken back.

The page is one HTML file that plays the denoising in a browser and asks for nothing from elsewhere. Knows no model.
"""

import html
import json
import re
from collections.abc import Sequence
from os import PathLike

from .page import DATA, PAGE, TITLE
from .trace import RowCanvas, Trace

ACCEPTED, CORRECTED, RENOISED = "a", "c", "r"
RARE = 0.001  # the probability below which another id is not told
EMPTY, LINE_END = "\u2205", "\u23ce"


def token_text(tokenizer, token: int) -> str:
    """What is shown of a token: where its text ends a line with a sign of that, and with another where it is empty."""
    return tokenizer.decode([token]).replace("\n", f"{LINE_END}\n") or EMPTY


def states_of(canvas: RowCanvas) -> list[str]:
    """Of each step a letter a position: accepted; corrected, which is accepted and not the token accepted there before; renoised."""
    before, states = [None] * canvas.canvas.shape[1], []
    for ids, accepted in zip(canvas.canvas.tolist(), canvas.accepted.tolist(), strict=True):
        letters = []
        for place, (token, kept) in enumerate(zip(ids, accepted, strict=True)):
            letters.append(RENOISED if not kept else ACCEPTED if before[place] in (None, token) else CORRECTED)
            before[place] = token if kept else before[place]
        states.append("".join(letters))
    return states


class Page(str):
    """The text of an HTML page. A notebook shows the page where one is what a cell ends with."""

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self)}" sandbox="allow-scripts" style="width:100%;height:28rem;border:0"></iframe>'

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # of IPython: what is shown where no page can be
        printer.text(f"an HTML page of {len(self)} characters")


def trace_page(trace: Trace, tokenizer, title: str = "", row: int = 0) -> Page:
    """The HTML page of a row of the trace.

    Args:
        title: what stands above it, such as the prompt; any text.

    Raises:
        ValueError: an empty trace, or a row that it has not.
    """
    canvases = trace.row(row)
    others = [likely_others(canvas) for canvas in canvases]
    ids = {token for canvas in canvases for name in (canvas.canvas, canvas.argmax, canvas.tokens) for token in name.unique().tolist()}
    ids = sorted(ids.union(token for found in others for step in found for position in step for token, _ in position))
    index = {token: place for place, token in enumerate(ids)}
    data = {
        "texts": [token_text(tokenizer, token) for token in ids],
        "canvases": [_data(canvas, found, index) for canvas, found in zip(canvases, others, strict=True)],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    values = {TITLE: html.escape(title or "A canvas being denoised"), DATA: text}
    return Page(re.sub("|".join(values), lambda found: values[found[0]], PAGE))


def likely_others(canvas: RowCanvas) -> list[list[list[tuple[int, float]]]]:
    """Of each step and position the ids beside the best that were recorded, with their probabilities, but those that are rare."""
    if canvas.alternatives is None:
        return [[[] for _ in row] for row in canvas.argmax.tolist()]
    steps = zip(canvas.alternatives.tolist(), canvas.alternative_log_probs.float().exp().tolist(), strict=True)
    return [
        [[pair for pair in zip(ids, chances, strict=True) if pair[1] >= RARE] for ids, chances in zip(*step, strict=True)] for step in steps
    ]


def _data(canvas: RowCanvas, others: list[list[list[tuple[int, float]]]], index: dict[int, int]) -> dict:
    def places(ids: Sequence[int]) -> list[int]:
        return [index[token] for token in ids]

    states, forced = states_of(canvas), ["".join("01"[flag] for flag in row) for row in canvas.forced.tolist()]
    steps = [
        {
            "canvas": places(canvas.canvas[step].tolist()), "argmax": places(canvas.argmax[step].tolist()), "states": states[step],
            "forced": forced[step], "entropy": [round(value, 3) for value in canvas.entropy[step].tolist()],
            "temperature": round(float(canvas.temperature[step]), 4), "seconds": round(float(canvas.seconds[step]), 4),
        }
        for step in range(len(canvas.steps))
    ]  # fmt: skip
    for step, found in zip(steps, others, strict=True):
        step["others"] = {
            place: [[index[token], round(chance, 3)] for token, chance in pairs] for place, pairs in enumerate(found) if pairs
        }
    return {"tokens": places(canvas.tokens.tolist()), "steps": steps}


def draw_trace(trace: Trace, tokenizer, path: str | PathLike, row: int = 0) -> None:
    """Writes a PNG of a row: kept tokens from left to right, steps from top to bottom, a later canvas below. Coloured by entropy; a dot
    where the position is accepted, a cross where its argmax changed after it had been accepted. Up to 160 tokens are written below.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an empty trace, a row that it has not, or one that keeps no token.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed, which draws a trace; expected it: pip install 'modeling-diffusiongemma[bench]'"
        ) from error
    canvases = trace.kept(row)
    width, height = max(len(canvas.tokens) for canvas in canvases), sum(len(canvas.steps) + 6 for canvas in canvases)
    most = max(0.1, max(float(canvas.entropy[:, : len(canvas.tokens)].max()) for canvas in canvases))
    figure = Figure(figsize=(min(max(0.24 * width + 2.2, 7), 40), min(max(0.24 * height, 2.8), 40)), layout="constrained", dpi=120)
    axes = figure.subplots(len(canvases), squeeze=False, height_ratios=[len(canvas.steps) + 3 for canvas in canvases])[:, 0]
    for place, (axis, canvas) in enumerate(zip(axes, canvases, strict=True)):
        count = len(canvas.tokens)
        image = axis.imshow(
            canvas.entropy[:, :count].float().numpy(), cmap="YlOrBr", vmin=0, vmax=most, aspect="auto", interpolation="nearest"
        )
        accepted, changed = canvas.accepted[:, :count], canvas.revised()
        for flags, style in ((accepted & ~changed, {"s": 9, "c": "#14663a"}), (changed, {"s": 34, "c": "#a21caf", "marker": "x"})):
            steps, positions = flags.nonzero(as_tuple=True)
            axis.scatter(positions.numpy(), steps.numpy(), **style)
        title = "" if len(canvases) == 1 else f"canvas {place + 1}: "
        axis.set_title(f"{title}{canvas.wasted()} of {len(canvas.steps)} steps after the answer stood", fontsize=9, loc="left")
        axis.set_ylabel("step")
        axis.yaxis.get_major_locator().set_params(integer=True)
        if count <= 160:
            texts = [
                token_text(tokenizer, token).replace("\n", "").replace(" ", "\u2423").replace("$", r"\$")
                for token in canvas.tokens.tolist()
            ]
            axis.set_xticks(range(count), texts, rotation=90, fontsize=8, family="monospace")
        axis.set_xlim(-0.5, count - 0.5)
    figure.colorbar(image, ax=list(axes), label="entropy, nats", fraction=0.03, aspect=40, pad=0.01)
    figure.supxlabel("dot: accepted by the step; cross: changed after it had been accepted", fontsize=8)
    figure.savefig(path, format="png")


__all__ = ["Page", "draw_trace", "token_text", "trace_page"]
