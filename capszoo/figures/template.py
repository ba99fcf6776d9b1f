"""The page of an exploration: its HTML, style and script."""

# The policy is what keeps the promise of a file that loads nothing; plotly saves its images through blob: and data:.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
STYLE = """
:root { --ink: #1c1e21; --soft: #5f6570; --line: #d9dde3; --page: #fff; --band: #f5f6f8; --accent: #1f77b4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --soft: #9aa1ac; --line: #363b43; --page: #16181c; --band: #1f2228; --accent: #6db3e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem; }
p { margin: 0 0 .7rem; color: var(--soft); }
p.empty { padding: 1rem; background: var(--band); border-radius: 6px; margin-top: 2rem; }
a { color: var(--accent); }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--band); border-radius: 6px; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.cautions { margin-top: 1.5rem; padding: .7rem 1rem; background: var(--band); border-left: 4px solid #b9770e; }
.cautions h2 { margin: 0 0 .3rem; font-size: 1rem; }
.cautions ul { margin: 0; padding-left: 1.2rem; }
.facts th { text-align: left; font-weight: 500; color: var(--soft); padding: .1rem 1.2rem .1rem 0; }
.facts th, .facts td { vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.sortable { width: 100%; font-size: 13px; line-height: 1.4; }
.sortable th { padding: 0; background: var(--band); text-align: left; white-space: nowrap; }
.sortable th button { all: unset; cursor: pointer; padding: .45rem .6rem; font-weight: 600; }
.sortable th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
.sortable th[aria-sort=ascending] button::after { content: " \\25B2"; font-size: .7em; }
.sortable th[aria-sort=descending] button::after { content: " \\25BC"; font-size: .7em; }
.sortable td { padding: .35rem .6rem; border-top: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
.sortable td.number { text-align: right; }
.sortable td.text { white-space: normal; overflow-wrap: anywhere; color: var(--soft); }
.sortable td.options { min-width: 20rem; }
.sortable td.reason:not(:empty) { min-width: 10rem; }
.sortable td.text b { font-weight: 500; color: var(--ink); }
tr.front td:first-child { box-shadow: inset 4px 0 var(--accent); font-weight: 600; }
tr:target td { background: var(--band); }
.state { padding: .05rem .5rem; border-radius: 1rem; background: var(--band); }
.state.complete { color: #2f8f4e; } .state.failed { color: #d64545; } .state.stopped { color: #b9770e; }
"""
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const value = row => row.cells[column].dataset.value || row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is missing comes last, either way
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    body.append(...[...body.rows].sort(compare));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  }));
}
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const [ink, page] = ["--ink", "--page"].map(name => style.getPropertyValue(name).trim());
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = {"font.color": ink};
    if (plot.layout.scene) for (const axis of ["xaxis", "yaxis", "zaxis"]) change[`scene.${axis}.color`] = ink;
    if (plot.layout.updatemenus) change["updatemenus[0].bgcolor"] = page;
    Plotly.relayout(plot, change);
    if (plot.id === "tradeoff") Plotly.restyle(plot, {"marker.line.color": ink});
  }
}
if (window.Plotly) {
  paint();
  dark.addEventListener("change", paint);
}
"""
