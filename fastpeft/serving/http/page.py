"""The page at /: what /metrics says, for people. It loads nothing from elsewhere, and keeps nothing."""

_SECONDS = 2

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.2rem; margin: 0 0 1rem; }
#state { font-weight: normal; opacity: .7; }
#tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; }
.tile { border: 1px solid #8885; border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.tile span { opacity: .7; }
svg { width: 100%; height: 5rem; margin: 1rem 0; border-bottom: 1px solid #8885; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #8883; text-align: right; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.bad { color: #c33; }
"""

# Names of adapters are only ever set as text, never as HTML.
_SCRIPT = """
"use strict";
const line = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\\{(.*)\\})? (\\S+)/;
const label = /([a-zA-Z_]+)="((?:[^"\\\\]|\\\\.)*)"/g;
const history = [];
let before = null;

function parse(text) {
  const rows = [];
  for (const each of text.split("\\n")) {
    const found = line.exec(each);
    if (!found) continue;
    const labels = {};
    for (const [, key, value] of (found[2] || "").matchAll(label)) labels[key] = value;
    rows.push({name: found[1].replace(/^fastpeft_/, ""), labels, value: Number(found[3])});
  }
  return rows;
}

function sum(rows, name, test = () => true) {
  return rows.filter(row => row.name === name && test(row.labels)).reduce((total, row) => total + row.value, 0);
}

const failed = labels => Number(labels.status) >= 400 && labels.status !== "499";
const shown = value => value.toLocaleString("en", {maximumFractionDigits: value < 100 ? 1 : 0});

function cell(row, text, bad) {
  const made = row.insertCell();
  made.textContent = text;
  if (bad) made.className = "bad";
}

function show(now) {
  const rows = now.rows;
  const seconds = before ? (now.time - before.time) / 1000 : 0;
  const rate = (name, test) => before && seconds > 0
    ? Math.max(0, sum(rows, name, test) - sum(before.rows, name, test)) / seconds : 0;
  const speed = rate("generated_tokens_total");
  const errors = sum(rows, "requests_total", failed);
  const tiles = {
    "tokens a second": shown(speed),
    "prompt tokens a second": shown(rate("prompt_tokens_total")),
    "running": shown(sum(rows, "running_rows")),
    "waiting": shown(sum(rows, "queue_length")),
    "slots in use": sum(rows, "resident_adapters") + " of " + sum(rows, "slots"),
    "adapters": shown(sum(rows, "known_adapters")),
    "requests": shown(sum(rows, "requests_total")),
    "errors": shown(errors),
  };
  const grid = document.getElementById("tiles");
  grid.replaceChildren();
  for (const [name, value] of Object.entries(tiles)) {
    const tile = document.createElement("div"), number = document.createElement("b");
    const what = document.createElement("span");
    tile.className = "tile";
    number.textContent = value;
    if (name === "errors" && errors) number.className = "bad";
    what.textContent = name;
    tile.append(number, what);
    grid.append(tile);
  }
  history.push(speed);
  if (history.length > 150) history.shift();
  const most = Math.max(1, ...history);
  document.getElementById("speed").setAttribute("points",
    history.map((value, i) => `${i / 149 * 100},${29 - value / most * 28}`).join(" "));
  const body = document.getElementById("adapters");
  body.replaceChildren();
  for (const name of [...new Set(rows.map(row => row.labels.adapter).filter(Boolean))].sort()) {
    const own = labels => labels.adapter === name, row = body.insertRow();
    const wrong = sum(rows, "requests_total", labels => own(labels) && failed(labels));
    cell(row, name);
    cell(row, shown(sum(rows, "requests_total", own)));
    cell(row, shown(wrong), wrong > 0);
    cell(row, shown(sum(rows, "prompt_tokens_total", own)));
    cell(row, shown(sum(rows, "generated_tokens_total", own)));
    cell(row, shown(rate("generated_tokens_total", own)));
  }
  before = now;
}

async function tick() {
  const state = document.getElementById("state");
  try {
    const response = await fetch("metrics", {cache: "no-store"});
    if (!response.ok) throw new Error(response.status);
    show({rows: parse(await response.text()), time: performance.now()});
    state.textContent = "";
  } catch (error) {
    state.textContent = "no answer: " + error.message;
  }
  setTimeout(tick, SECONDS * 1000);
}
tick();
"""

HTML = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastpeft</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>fastpeft <span id="state"></span></h1>
<div id="tiles"></div>
<svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label="tokens a second, the last five minutes">
<polyline id="speed"></polyline>
</svg>
<table>
<thead><tr>
<th>adapter</th><th>requests</th><th>errors</th><th>prompt tokens</th><th>tokens</th><th>tokens a second</th>
</tr></thead>
<tbody id="adapters"></tbody>
</table>
<noscript>This page reads /metrics with a script of its own.</noscript>
<script>{_SCRIPT.replace("SECONDS", str(_SECONDS))}</script>
</body>
</html>
"""
