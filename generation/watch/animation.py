"""A trace as an animated SVG: one file without script or anything from elsewhere, so that a page may show it as an image, GitHub's too.

Every denoising step is drawn once, and CSS shows one at a time, in one place. Where nothing may move, or nothing can, it is the last.
Colours follow the reader's light or dark. Knows no model.
"""

import base64
import math
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .pictures import ACCEPTED, CORRECTED, RENOISED, states_of, token_text
from .screens import LEGEND as WORDS
from .trace import RowCanvas, Trace

WIDTH, HEIGHT, SIZE, MARGIN = 8.4, 24, 14, 16  # of a letter, a line, the font and the border, pixels
MOST, LEAST = 72, 54  # letters in a line: what a phone still shows legibly, and what the legend needs
LEVELS = 8  # of entropy, drawn behind a token
PAST = "p"
LEGEND = {ACCEPTED: WORDS["accepted"], CORRECTED: WORDS["corrected"], RENOISED: WORDS["renoised"]}
STYLE = """\
svg{--paper:#fafaf9;--ink:#1c1917;--dim:#6b6560;--line:#d6d3d1;--heat:#d97706;--a:#14663a;--c:#a21caf;--r:#9a4b06}
@media (prefers-color-scheme:dark){svg{--paper:#161412;--ink:#e7e5e4;--dim:#a8a29e;--line:#44403c;--a:#6ee7a0;--c:#f0a5fb;--r:#fbbf60}}
text{fill:var(--ink);white-space:pre}
.a{fill:var(--a)}.c{fill:var(--c);font-weight:bold}.r{fill:var(--r);font-style:italic}.p,.d{fill:var(--dim)}.t{font-weight:bold}
.f{text-decoration:underline}.h{fill:var(--heat)}.box{fill:var(--paper);stroke:var(--line)}.bar{fill:var(--dim)}
"""


class Piece(NamedTuple):
    """What is drawn alike in one line: columns from `start`, in letters; `kind`: a state, or `PAST`; `level`: of entropy."""

    line: int
    start: int
    width: int
    text: str
    kind: str
    forced: bool
    level: int


class Token(NamedTuple):
    """What is shown at a position after a step; `text` may end a line."""

    text: str
    kind: str
    forced: bool
    level: int


class Animation(str):
    """The text of an SVG. A notebook shows the picture where one is what a cell ends with."""

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" style="max-width:100%">'

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # of IPython: what is shown where no picture can be
        printer.text(f"an SVG of {len(self)} characters")


def draw_animation(trace: Trace, tokenizer, title: str = "", row: int = 0, seconds: float = 0.9, pause: float = 4.0) -> Animation:
    """The SVG of a row: the text after every step, each position coloured by what became of it and, behind it, by its entropy.

    Args:
        title: what stands above it, such as the prompt; any text.
        seconds: how long a step is shown. pause: how much longer the last one is, after which the first comes again.

    Raises:
        ValueError: an empty trace, a row that it has not, or one that keeps no token; times that are not above 0, or below it.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"`seconds` is {seconds!r}; expected a number above 0, the time that a step is shown")
    if not (math.isfinite(pause) and pause >= 0):
        raise ValueError(f"`pause` is {pause!r}; expected 0 or a number above, the time that the last step is shown longer")
    canvases = trace.kept(row)
    most = max(1e-6, max(float(canvas.entropy[:, : len(canvas.tokens)].max()) for canvas in canvases))
    frames, past = [], []
    for place, canvas in enumerate(canvases):
        steps = steps_of(canvas, tokenizer, most)
        for index, tokens in enumerate(steps):
            many = "" if len(canvases) == 1 else f"canvas {place + 1} of {len(canvases)}, "
            kept = sum(token.kind != RENOISED for token in tokens)
            frames.append((f"{many}step {index + 1} of {len(steps)} \u00b7 {kept} of {len(tokens)} accepted", lay_out([*past, *tokens])))
        committed = canvas.tokens[: len(steps[-1])].tolist()
        past += [Token(visible(token_text(tokenizer, token)), PAST, False, 0) for token in committed]
    return Animation(_svg(frames, title or "A canvas being denoised", seconds, pause))


def steps_of(canvas: RowCanvas, tokenizer, most: float) -> list[list[Token]]:
    """What each step made of the positions that are kept, but for the special tokens that end them; `most`: the highest entropy, nats."""
    kept = canvas.tokens.tolist()
    while len(kept) > 1 and not tokenizer.decode([kept[-1]], skip_special_tokens=True):
        kept.pop()
    levels = (canvas.entropy[:, : len(kept)].float().clamp(min=0) / most).sqrt().mul(LEVELS).round().int().tolist()
    rows = zip(canvas.canvas.tolist(), canvas.argmax.tolist(), states_of(canvas), canvas.forced.tolist(), levels, strict=True)
    return [
        [
            Token(visible(token_text(tokenizer, best if state == RENOISED else held)), state, flag, level)
            for held, best, state, flag, level in zip(ids, argmax, states, forced, level_row, strict=False)
        ]
        for ids, argmax, states, forced, level_row in rows
    ]


def visible(text: str) -> str:
    """The text with signs for control characters, and U+FFFD for what XML cannot hold; line ends stay."""

    def letter(one: str) -> str:
        code = ord(one)
        if code < 32 and one != "\n":
            return chr(0x2400 + code)
        return "\ufffd" if 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE else one

    return "".join(map(letter, text))


def columns(text: str) -> int:
    """How many letters wide it is: those of East Asia two, what combines with the one before none."""
    wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def lay_out(tokens: Sequence[Token]) -> list[Piece]:
    """Lines of at most `MOST` letters, a token whole in one where it fits, and without its space where that would begin one. What is drawn
    alike and stands together is one piece."""
    pieces, line, column = [], 0, 0
    for token in tokens:
        for place, text in enumerate(token.text.split("\n")):
            if place:
                line, column = line + 1, 0
            for chunk in (text[start : start + MOST // 2] for start in range(0, len(text), MOST // 2)):
                width = columns(chunk)
                if column and column + width > MOST:
                    line, column, chunk = line + 1, 0, chunk.removeprefix(" ")
                    width = columns(chunk)
                style, last = (token.kind, token.forced, token.level), pieces[-1] if pieces else None
                if last and last.line == line and last[4:] == style:
                    pieces[-1] = last._replace(width=last.width + width, text=last.text + chunk)
                else:
                    pieces.append(Piece(line, column, width, chunk, *style))
                column += width
    return pieces


def _svg(frames: list[tuple[str, list[Piece]]], title: str, seconds: float, pause: float) -> str:
    heading = lay_out([Token(word, "t", False, 0) for word in visible(" ".join(title.split())).replace(" ", "\n ").split("\n")])
    pieces = [piece for _, drawn in frames for piece in drawn]
    letters = max(LEAST, *(piece.start + piece.width for piece in (*heading, *pieces)))
    top, tall = MARGIN + (heading[-1].line + 1) * HEIGHT, (max(piece.line for piece in pieces) + 2) * HEIGHT + 16
    forced = any(piece.forced for piece in pieces)
    width, height = math.ceil(letters * WIDTH + 2 * MARGIN), top + tall + (2 + forced) * HEIGHT + MARGIN
    style, body = [STYLE], [_drawn(piece, MARGIN) for piece in heading]
    style += [f".h{level}{{fill-opacity:{0.55 * level / LEVELS:.2f}}}" for level in range(1, LEVELS + 1)]
    # One strip of all steps behind a window: it is moved by one animation, so that no two are ever seen at once.
    style.append(f"\n.film{{transform:translateY({-(len(frames) - 1) * tall}px)}}")
    if len(frames) > 1:
        total = len(frames) * seconds + pause
        moves = "".join(f"{100 * place * seconds / total:.3f}%{{transform:translateY({-place * tall}px)}}" for place in range(len(frames)))
        style.append(f"\n.film{{animation:film {total:g}s step-end infinite}}\n@keyframes film{{{moves}}}")
        style.append("\n@media (prefers-reduced-motion:reduce){.film{animation:none}}")
    body.append(f'<svg x="0" y="{top}" width="{width}" height="{tall}"><g class="film">')
    for place, (label, drawn) in enumerate(frames):
        over, done = place * tall, (width - 2 * MARGIN) * (place + 1) / len(frames)
        body.append("<g>" + _words(MARGIN, over + HEIGHT - 7, label, columns(label), "d"))
        body.append(f'<rect class="bar" x="{MARGIN}" y="{over + HEIGHT}" width="{done:.1f}" height="2"/>')
        body += [_drawn(piece, over + HEIGHT + 8) for piece in drawn]
        body.append("</g>")
    body.append("</g></svg>")
    y, x = top + tall, MARGIN + (len(LEGEND[RENOISED]) + 2) * WIDTH
    body.append(_words(MARGIN, y + HEIGHT - 7, LEGEND[ACCEPTED], len(LEGEND[ACCEPTED]), ACCEPTED))
    body.append(_words(MARGIN + (len(LEGEND[ACCEPTED]) + 2) * WIDTH, y + HEIGHT - 7, LEGEND[CORRECTED], len(LEGEND[CORRECTED]), CORRECTED))
    y += HEIGHT
    body.append(_words(MARGIN, y + HEIGHT - 7, LEGEND[RENOISED], len(LEGEND[RENOISED]), RENOISED))
    body.append(_words(x, y + HEIGHT - 7, "entropy", 7, "d"))
    body += [_heat(x + (7 + level) * WIDTH, y, 1, level) for level in range(1, LEVELS + 1)]
    body.append(_words(x + (9 + LEVELS) * WIDTH, y + HEIGHT - 7, "the most", 8, "d"))
    if forced:
        body.append(_words(MARGIN, y + 2 * HEIGHT - 7, "forced by the constraint", 24, "d f"))
    about = escape(visible(f"{title}: the answer after each of {len(frames)} denoising steps"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{about}" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{SIZE}" xml:space="preserve">\n'
        f"<style>\n{''.join(style)}\n</style>\n"
        f'<rect class="box" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _drawn(piece: Piece, top: float) -> str:
    x, y = MARGIN + piece.start * WIDTH, top + piece.line * HEIGHT
    behind = _heat(x, y, piece.width, piece.level) if piece.level and piece.width else ""
    return behind + _words(x, y + HEIGHT - 7, piece.text, piece.width, piece.kind + " f" * piece.forced)


def _heat(x: float, y: float, width: int, level: int) -> str:
    return f'<rect class="h h{level}" x="{x:.1f}" y="{y + 2}" width="{width * WIDTH:.1f}" height="20"/>'


def _words(x: float, y: float, text: str, width: int, kind: str) -> str:
    """Text as wide as it is in our font, whatever the reader's is."""
    length = f' textLength="{width * WIDTH:.1f}"' if width else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y}"{length}>{escape(text)}</text>'


__all__ = ["Animation", "draw_animation"]
