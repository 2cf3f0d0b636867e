"""The animated SVG of a trace: well-formed, alone in one file, every step in its place and time, looked at in a browser."""

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from test_trace import BROWSERS, hand_made

from generation.watch.animation import MOST, Token, columns, draw_animation, lay_out, visible

NAME = "{http://www.w3.org/2000/svg}"


class Words:
    """A tokenizer of ten words, of which 4 ends a text."""

    TEXTS = ["", "{", " one", " two", "<end>", "three", " six", " five", "\n", "}"]

    def decode(self, ids, skip_special_tokens=False):
        return "" if skip_special_tokens and ids == [4] else self.TEXTS[ids[0] % 10]


class Ids:
    def decode(self, ids, skip_special_tokens=False):
        return f"[{ids[0]}]"


def frames_of(svg):
    """The texts of each step, its label first."""
    (film,) = ElementTree.fromstring(svg).findall(f".//{NAME}g[@class='film']")
    return [[text for text in frame.iter(f"{NAME}text")] for frame in film]


def two_canvases():
    trace = hand_made()
    trace.canvases *= 2
    return trace


def test_each_step_shows_its_tokens_and_what_became_of_them():
    """The states that `test_page_says_what_an_accepted_token_was_before` has: of kept positions aarr, acrr, arar and acaa."""
    frames = frames_of(draw_animation(hand_made(), Ids(), "title"))
    assert [[(text.get("class"), text.text) for text in frame[1:]] for frame in frames] == [
        [("a", "[1][2]"), ("r", "[3][4]")],
        [("a", "[1]"), ("c", "[5]"), ("r", "[3][4]")],
        [("a", "[1]"), ("r", "[2]"), ("a", "[6]"), ("r", "[4]")],
        [("a", "[1]"), ("c", "[2]"), ("a", "[6][4]")],
    ]
    assert [frame[0].text for frame in frames] == [
        f"step {step} of 4 \u00b7 {kept} of 4 accepted" for step, kept in enumerate((2, 2, 2, 4), 1)
    ]


def test_end_of_the_text_is_not_drawn_and_earlier_canvases_stand_before():
    frames = frames_of(draw_animation(two_canvases(), Words()))
    assert len(frames) == 8 and frames[0][0].text.startswith("canvas 1 of 2, step 1 of 4")
    assert "".join(text.text for text in frames[3][1:]) == "{ one six"
    assert [(text.get("class"), text.text) for text in frames[7][1:]][0] == ("p", "{ one six")
    assert "".join(text.text for text in frames[7][1:]) == "{ one six{ one six"


def test_entropy_is_drawn_behind_a_token_and_forced_ones_are_underlined():
    trace = hand_made()
    trace.canvases[0].entropy[0, 0] = torch.tensor([0, 0.005, 0.125, 0.5, 9])
    trace.canvases[0].entropy[1:] = 0
    trace.canvases[0].forced[1, 0, 0] = True
    svg = draw_animation(trace, Ids())
    (film,) = ElementTree.fromstring(svg).findall(f".//{NAME}g[@class='film']")
    levels = [[rect.get("class") for rect in frame.iter(f"{NAME}rect") if rect.get("class") != "bar"] for frame in film]
    assert levels == [["h h1", "h h4", "h h8"], [], [], []]
    assert [text.get("class") for text in frames_of(svg)[1][1:]] == ["a f", "c", "r"] and "forced by the constraint" in svg
    assert "forced by the constraint" not in draw_animation(hand_made(), Ids())


def test_hostile_text_stays_text_and_nothing_comes_from_elsewhere():
    class Hostile:
        def decode(self, ids, skip_special_tokens=False):
            return "</text><script>alert(1)</script>&\x00\t\ufffe\ud800"

    title = '"><script>alert(2)</script> \x1b[0m'
    svg = draw_animation(hand_made(), Hostile(), title)
    names = {element.tag.removeprefix(NAME) for element in ElementTree.fromstring(svg.encode()).iter()}
    assert names == {"svg", "style", "rect", "g", "text"}
    assert not re.search(r"href|url\(|@import|https?://(?!www\.w3\.org/2000/svg\")|<script", svg)
    texts = "".join(text.text for text in frames_of(svg)[0][1:])
    assert texts.replace("\n", "") == "</text><script>alert(1)</script>&\u2400\u2409\ufffd\ufffd" * 4
    assert "alert(2)</script> \u241b[0m" in ElementTree.fromstring(svg).get("aria-label")


def test_lines_are_broken_between_tokens_at_line_ends_and_in_a_token_that_is_too_long():
    def drawn(*texts):
        pieces = lay_out([Token(text, "a", False, 0) for text in texts])
        assert all(piece.start + piece.width <= MOST for piece in pieces)
        return [(piece.line, piece.start, piece.text) for piece in pieces]

    full = "x" * (MOST - 3)
    assert drawn(full[:30], full[30:], " and", " so") == [(0, 0, full), (1, 0, "and so")]
    assert drawn("one\n", "two\n\nthree") == [(0, 0, "one"), (1, 0, "two"), (3, 0, "three")]
    assert drawn("y" * (2 * MOST)) == [(0, 0, "y" * MOST), (1, 0, "y" * MOST)]
    assert drawn("\u6587" * MOST) == [(0, 0, "\u6587" * (MOST // 2)), (1, 0, "\u6587" * (MOST // 2))]
    assert columns("e\u0301\u6587a") == 4 and visible("a\nb\x85") == "a\nb\ufffd"
    assert [piece.kind for piece in lay_out([Token("a", "a", False, 0), Token("b", "a", False, 3), Token("c", "r", False, 3)])] == [
        "a",
        "a",
        "r",
    ]


def test_one_step_does_not_move():
    trace = hand_made()
    trace.canvases[0].taken[1:] = False
    svg = draw_animation(trace, Ids())
    assert len(frames_of(svg)) == 1 and "animation" not in svg


@pytest.mark.parametrize("name, value", [("seconds", 0), ("seconds", float("nan")), ("pause", -1), ("pause", float("inf")), ("row", 1)])
def test_argument_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected"):
        draw_animation(hand_made(), Ids(), **{name: value})


def test_row_without_a_token_is_named():
    trace = hand_made()
    trace.canvases[0].lengths.zero_()
    with pytest.raises(ValueError, match="`row` is 0, which keeps no token"):
        draw_animation(trace, Ids())


DRIVE = """<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push(event.message));
addEventListener("load", () => {
  const film = document.querySelector(".film"), pane = film.parentElement.getScreenCTM();
  const top = pane.f, bottom = pane.f + +film.parentElement.getAttribute("height");
  const [animation] = document.getAnimations(), {duration, iterations} = animation.effect.getComputedTiming();
  animation.pause();
  const shown = () => [...film.children].flatMap((frame, place) => {
    const box = frame.getBoundingClientRect();
    return box.bottom > top && box.top < bottom ? [[place, box.top >= top && box.bottom <= bottom]] : [];
  });
  const seen = [];
  for (const time of TIMES) { animation.currentTime = 1000 * time; seen.push(shown()); }
  animation.cancel();
  film.style.animation = "none";
  seen.push(shown());
  const wide = [...document.querySelectorAll("text")].map((text) => text.getBoundingClientRect().right);
  const inside = Math.max(...wide) <= document.querySelector("svg").getBoundingClientRect().right;
  document.documentElement.dataset.seen = JSON.stringify([seen, duration, iterations === Infinity, inside, problems]);
});
</script>"""


def test_browser_shows_one_step_at_a_time_whole_and_the_last_one_where_nothing_moves(tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    svg = draw_animation(two_canvases(), Words(), "a title " * 20, seconds=0.5, pause=1.5)
    times = [*(0.5 * step + 0.05 for step in range(8)), *(0.5 * step - 0.05 for step in range(1, 9)), 5.4, 5.6]
    page = tmp_path / "page.html"
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">{svg}{DRIVE.replace("TIMES", json.dumps(times))}',
        encoding="utf-8",
    )
    (tmp_path / "alone.svg").write_text(svg, encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom",
    ]  # fmt: skip
    outputs = []
    for file in (page, tmp_path / "alone.svg"):
        done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
        outputs.append(done.stdout)
    shown, duration, forever, inside, problems = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', outputs[0])[1]))
    assert shown == [[[step, True]] for step in [*range(8), *range(8), 7, 0, 7]]
    assert duration == 5500 and forever and inside and problems == []
    assert "parsererror" not in outputs[1] and "canvas 2 of 2, step 4 of 4" in outputs[1]


def test_console_writes_it(console, tmp_path):
    narrow = ["--set", "canvas_length=16", "--max-new-tokens", "16", "--seed", "0"]
    code, out, err = console("trace", "Write 3 March 1998 as an ISO date.", *narrow, "--svg", str(tmp_path / "out.svg"))
    assert code == 0, err
    frames = frames_of((tmp_path / "out.svg").read_text(encoding="utf-8"))
    assert all(len(frame) > 1 for frame in frames) and frames[-1][0].text.startswith(f"step {len(frames)} of {len(frames)}")
    code, out, err = console("trace", "hello", "--svg", str(tmp_path / "nowhere" / "out.svg"))
    assert code == 2 and "`--svg` is" in err and "expected a file in a folder that is there" in err
