"""The page of `attnzoo maps`: A of some layers, head by head, with the tokens on its axes."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from attnzoo.report.document import document
from attnzoo.report.heatmaps import LEAST, MOST, NEGATIVE, NOTHING

#: Steps of the colour scale, by the logarithm, for numbers above 0 and as many below.
STEPS = 127
STYLE = """<style>
.controls { display: flex; flex-wrap: wrap; gap: 0.6rem 1.2rem; align-items: end; margin: 1rem 0; }
.controls label { font-size: 0.9rem; color: var(--soft); display: grid; gap: 0.2rem; }
select { font: inherit; padding: 0.25rem 0.5rem; max-width: 100%; color: inherit;
  background: var(--raised); border: 1px solid var(--faint); border-radius: 6px; }
.map { overflow: auto; max-height: 85vh; border: 1px solid var(--faint); border-radius: 6px; }
.map canvas { display: block; }
#said { min-height: 3.2em; margin: 0.6rem 0; overflow-wrap: anywhere; }
.scale { height: 0.8rem; border-radius: 3px; max-width: 24rem; }
.ends { display: flex; justify-content: space-between; max-width: 24rem; }
.chip { display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 3px;
  vertical-align: -0.1rem; margin-right: 0.3rem; }
.chips span { margin-right: 1.2rem; }
</style>"""
SCRIPT = """<script>
const data = JSON.parse(document.getElementById("data").textContent);
const layer = document.getElementById("layer"), head = document.getElementById("head");
const canvas = document.getElementById("canvas"), said = document.getElementById("said");
const n = data.tokens.length, labelled = n <= 160, cell = Math.max(3, Math.min(22, 720 / n | 0));
const side = labelled ? 110 : 0, ratio = window.devicePixelRatio || 1;
let values = null, chosen = null;
function decoded(text) {
  return Int8Array.from(atob(text), letter => letter.charCodeAt(0) << 24 >> 24);
}
function colour(step) {
  return step === 0 ? data.nothing : step < 0 ? data.negative : data.palette[step - 1];
}
function number(step) {
  if (step === 0) return "0";
  const place = (Math.abs(step) - 1) / (data.steps - 1);
  const size = Math.exp(data.low + place * (data.high - data.low));
  return (step < 0 ? "-" : "") + size.toPrecision(2);
}
function clipped(token) { return token.length > 14 ? token.slice(0, 13) + "\\u2026" : token; }
function draw() {
  const width = side + n * cell, height = side + n * cell;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
    paint.fillStyle = colour(values[i * n + j]);
    paint.fillRect(side + j * cell, side + i * cell, cell, cell);
  }
  if (labelled) {
    paint.fillStyle = getComputedStyle(document.body).color;
    paint.font = Math.max(7, Math.min(12, cell)) + "px system-ui, sans-serif";
    paint.textBaseline = "middle";
    data.tokens.forEach((token, i) => {
      const middle = side + (i + 0.5) * cell;
      paint.textAlign = "right";
      paint.fillText(clipped(token), side - 5, middle);
      paint.save();
      paint.translate(middle, side - 5);
      paint.rotate(-Math.PI / 2);
      paint.textAlign = "left";
      paint.fillText(clipped(token), 0, 0);
      paint.restore();
    });
  }
  if (chosen) {
    paint.strokeStyle = getComputedStyle(document.body).color;
    paint.strokeRect(side + chosen[1] * cell, side + chosen[0] * cell, cell, cell);
  }
}
function tell(i, j) {
  chosen = [i, j];
  const row = Array.from(values.subarray(i * n, i * n + n));
  const order = row.map((step, at) => [step, at]);
  order.sort((a, b) => b[0] - a[0]);
  const most = order.slice(0, 5).filter(pair => pair[0] !== 0);
  said.textContent = "Token " + i + " \\u201c" + data.tokens[i] + "\\u201d gives token " + j +
    " \\u201c" + data.tokens[j] + "\\u201d the weight " + number(values[i * n + j]) +
    ". It gives most to: " + most.map(([step, at]) => "\\u201c" + data.tokens[at] + "\\u201d (" +
    at + ") " + number(step)).join(", ") + ".";
  draw();
}
function show() {
  const maps = data.layers[layer.selectedIndex].heads;
  if (head.options.length !== maps.length) {
    head.replaceChildren(...maps.map((_, at) => new Option(at)));
  }
  values = decoded(maps[head.selectedIndex < 0 ? 0 : head.selectedIndex]);
  if (chosen) tell(...chosen); else draw();
}
canvas.addEventListener("pointermove", event => {
  const box = canvas.getBoundingClientRect();
  const j = Math.floor((event.clientX - box.left - side) / cell);
  const i = Math.floor((event.clientY - box.top - side) / cell);
  if (i >= 0 && j >= 0 && i < n && j < n) tell(i, j);
});
layer.addEventListener("change", show);
head.addEventListener("change", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
show();
</script>"""


@dataclass(frozen=True)
class LayerMap:
    """A of one layer.

    name: what its list says, such as "3: model.layers.3.self_attn, sliding_window"
    weights: (heads, tokens, tokens)
    """

    name: str
    weights: Tensor


def map_page(title: str, tokens: Sequence[str], layers: Sequence[LayerMap]) -> str:
    """A page that needs nothing else, with a list of layers and one of heads.

    title: of the page
    tokens: of the text, in order
    layers: one or more
    """
    found = [{"heads": [encoded(head) for head in layer.weights]} for layer in layers]
    data = {
        "tokens": list(tokens),
        "layers": found,
        "palette": palette(),
        "negative": NEGATIVE,
        "nothing": NOTHING,
        "low": math.log(LEAST),
        "high": math.log(MOST),
        "steps": STEPS,
    }
    return document(title, _lead(), STYLE + _body(layers, data) + SCRIPT)


def encoded(weights: Tensor) -> str:
    """A as steps of the colour scale, one byte each, in base64: 0 is 0, 1 to `STEPS` lie between
    `LEAST` and `MOST` by their logarithm, and below 0 stands what is negative."""
    size = weights.abs().double()
    place = (size.clamp(LEAST, MOST).log() - math.log(LEAST)) / (math.log(MOST) - math.log(LEAST))
    steps = (1 + place * (STEPS - 1)).round() * weights.sign()
    return base64.b64encode(steps.to(torch.int8).numpy().tobytes()).decode("ascii")


def palette() -> list[str]:
    """The colours of the steps."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours = colormaps["viridis"]
    return [to_hex(colours(step / (STEPS - 1))) for step in range(STEPS)]


def _lead() -> str:
    return (
        "Row i shows how much token i takes from every token before or after it: a row of A, and "
        "out = A·v. Point at a square to read it; colours go by the logarithm."
    )


def _body(layers: Sequence[LayerMap], data: Mapping[str, object]) -> str:
    names = "".join(f"<option>{escape(layer.name)}</option>" for layer in layers)
    colours = ", ".join(palette()[::9])
    negative = any(bool((layer.weights < 0).any()) for layer in layers)
    chips = [f'<span><i class="chip" style="background:{NOTHING}"></i>0</span>']
    if negative:
        chips.append(f'<span><i class="chip" style="background:{NEGATIVE}"></i>below 0</span>')
    told = json.dumps(data).replace("<", "\\u003c")
    return (
        f'<div class="controls"><label>Layer<select id="layer">{names}</select></label>'
        '<label>Head<select id="head"></select></label></div>\n'
        f'<div class="scale" style="background:linear-gradient(90deg, {colours})"></div>\n'
        f'<div class="ends soft"><span>{LEAST:g} or less</span>'
        f"<span>{MOST:g} or more</span></div>\n"
        f'<p class="chips soft">{"".join(chips)}</p>\n'
        '<p id="said" aria-live="polite">Point at a square.</p>\n'
        '<div class="map"><canvas id="canvas" role="img" aria-label="A, queries down, keys '
        'across"></canvas></div>\n<noscript><p>This page draws with JavaScript.</p></noscript>\n'
        f'<script type="application/json" id="data">{told}</script>\n'
    )
