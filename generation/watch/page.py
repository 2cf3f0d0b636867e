"""The page that plays a trace: one HTML file without anything from elsewhere. `pictures` puts the data in."""

DATA = "@@DATA@@"  # where the trace goes, as JSON in which no `<` is left
TITLE = "@@TITLE@@"  # escaped

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@@TITLE@@</title>
<link rel="icon" href="data:,">
<style>
:root {
  --paper: #fafaf9; --ink: #1c1917; --dim: #6b6560; --line: #d6d3d1; --panel: #ffffff; --heat: 217, 119, 6;
  --accepted: #14663a; --corrected: #a21caf; --renoised: #9a4b06; --focus: #2563eb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161412; --ink: #e7e5e4; --dim: #a8a29e; --line: #44403c; --panel: #211e1c;
    --accepted: #6ee7a0; --corrected: #f0a5fb; --renoised: #fbbf60; --focus: #7aa7ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.1rem; margin: 0 0 .75rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.controls { display: flex; gap: .75rem; align-items: center; }
button { min-width: 4.5rem; padding: .5rem; font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: .4rem; cursor: pointer; }
input[type=range] { flex: 1; min-width: 0; height: 2.5rem; accent-color: var(--focus); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
#where { margin: .25rem 0 .5rem; color: var(--dim); font-variant-numeric: tabular-nums; }
#text { min-height: 6rem; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: .4rem;
  font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
#text span { padding: .15em 0; border-radius: .15em; cursor: default; background: rgba(var(--heat), calc(var(--entropy) * .55)); }
#text .past { color: var(--dim); }
.accepted { color: var(--accepted); }
.corrected { color: var(--corrected); font-weight: bold; }
.renoised { color: var(--renoised); font-style: italic; }
.forced { text-decoration: underline dotted; text-underline-offset: .25em; }
#text .chosen { outline: 2px solid var(--focus); }
#about { min-height: 4.5em; margin: .5rem 0; color: var(--dim); overflow-wrap: anywhere; white-space: pre-wrap; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; }
.heat { padding: 0 .4em; background: linear-gradient(90deg, transparent, rgba(var(--heat), .55)); }
</style>
</head>
<body>
<main>
<h1>@@TITLE@@</h1>
<div class="controls">
  <button id="play" type="button">Play</button>
  <input id="step" type="range" min="0" value="0" aria-label="denoising step">
</div>
<p id="where" aria-live="polite"></p>
<div id="text"></div>
<p id="about"></p>
<div class="legend">
  <span class="accepted">accepted by the step</span>
  <span class="corrected">accepted, and other than before</span>
  <span class="renoised">renoised; the best guess</span>
  <span class="forced">forced by the constraint</span>
  <span class="heat">entropy: none to the most</span>
  <label><input id="whole" type="checkbox"> what lies behind the end</label>
</div>
</main>
<script id="trace" type="application/json">@@DATA@@</script>
<script>
"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const [play, slider, where, text, about, whole] =
  ["play", "step", "where", "text", "about", "whole"].map((id) => document.getElementById(id));
const frames = trace.canvases.flatMap((canvas, place) => canvas.steps.map((step, index) => ({canvas, place, step, index})));
const kinds = {a: "accepted", c: "corrected", r: "renoised"};
const highest = Math.max(1e-6, ...frames.flatMap((frame) => frame.step.entropy));
let timer = null, chosen = null;
slider.max = frames.length - 1;

function words(id) { return trace.texts[id]; }

function show() {
  const {canvas, place, step, index} = frames[slider.value];
  text.replaceChildren();
  for (const before of trace.canvases.slice(0, place)) {
    const past = document.createElement("span");
    past.className = "past";
    past.textContent = before.tokens.map(words).join("");
    text.append(past);
  }
  const count = whole.checked ? step.argmax.length : canvas.tokens.length;
  for (let position = 0; position < count; position++) {
    const kind = kinds[step.states[position]];
    const span = document.createElement("span");
    span.dataset.position = position;
    span.className = kind + (step.forced[position] === "1" ? " forced" : "") + (position === chosen ? " chosen" : "");
    span.style.setProperty("--entropy", Math.sqrt(step.entropy[position] / highest).toFixed(3));
    span.textContent = words(kind === "renoised" ? step.argmax[position] : step.canvas[position]);
    text.append(span);
  }
  const time = step.seconds < 1 ? `${(1000 * step.seconds).toFixed(0)} ms` : `${step.seconds.toFixed(1)} s`;
  const many = trace.canvases.length > 1 ? `canvas ${place + 1} of ${trace.canvases.length}, ` : "";
  const kept = [...step.states.slice(0, count)].filter((state) => state !== "r").length;
  where.textContent = `${many}step ${index + 1} of ${canvas.steps.length} \\u00b7 ${kept} of ${count} accepted`
    + ` \\u00b7 temperature ${step.temperature.toFixed(2)} \\u00b7 ${time}`;
  tell(canvas, step, index);
}

function tell(canvas, step, index) {
  if (chosen === null || chosen >= step.argmax.length) {
    about.textContent = "\\u2190 \\u2192 a step, space plays. Point at a token, or tap it, for its entropy and what stood there.";
    return;
  }
  const best = step.argmax[chosen], held = step.canvas[chosen];
  let since = index;
  while (since > 0 && canvas.steps[since - 1].argmax[chosen] === best) since--;
  const noise = held === best ? "" : `, the canvas holds ${JSON.stringify(words(held))}`;
  const seen = canvas.steps.slice(0, index + 1).map((one) => one.argmax[chosen]);
  const changes = seen.filter((id, place) => place === 0 || id !== seen[place - 1]).map((id) => JSON.stringify(words(id)));
  const others = (step.others[chosen] ?? []).map(([id, chance]) => `${JSON.stringify(words(id))} ${(100 * chance).toFixed(1)}%`);
  about.textContent = `position ${chosen}: ${JSON.stringify(words(best))} since step ${since + 1}${noise};`
    + ` ${kinds[step.states[chosen]]}${step.forced[chosen] === "1" ? ", forced" : ""}, entropy ${step.entropy[chosen].toFixed(3)} nats`
    + (others.length ? `\\nor: ${others.join(", ")}` : "")
    + (changes.length > 1 ? `\\nso far: ${changes.join(" \\u2192 ")}` : "");
}

function go(to) {
  slider.value = to;
  show();
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "Play";
}

function toggle() {
  if (timer !== null) return stop();
  if (+slider.value === frames.length - 1) go(0);
  play.textContent = "Pause";
  timer = setInterval(() => {
    go(+slider.value + 1);
    if (+slider.value === frames.length - 1) stop();
  }, 600);
}

function choose(event) {
  const span = event.target.closest("[data-position]");
  if (!span) return;
  chosen = +span.dataset.position;
  for (const other of text.querySelectorAll(".chosen")) other.classList.remove("chosen");
  span.classList.add("chosen");
  const {canvas, step, index} = frames[slider.value];
  tell(canvas, step, index);
}

play.addEventListener("click", toggle);
slider.addEventListener("input", () => { stop(); show(); });
whole.addEventListener("change", show);
text.addEventListener("pointerover", choose);
text.addEventListener("click", choose);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.matches("button, input[type=checkbox]")) return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) { stop(); go(+slider.value + by); } else if (event.key === " ") toggle(); else return;
  event.preventDefault();
});
show();
</script>
</body>
</html>
"""

__all__ = ["DATA", "PAGE", "TITLE"]
