"""The style sheet of the page: light and dark, phone and paper.

The colours of the series can be told apart by the colour-blind: those of Okabe and Ito 2008, darkened or
lightened until they stand out from the paper.
"""

from __future__ import annotations

STYLE = """
:root {
  --paper: #fff; --ink: #1c2024; --soft: #5c6570; --rule: #dfe3e8; --grid: #e9ecef; --warn: #9a3b00;
  --s0: #0072b2; --s1: #d55e00; --s2: #00875f; --s3: #b0568f; --s4: #332288; --s5: #a07000; --s6: #666;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e6e9ed; --soft: #9aa4b0; --rule: #333a42; --grid: #282d34; --warn: #ffab70;
    --s0: #56b4e9; --s1: #ff8c42; --s2: #2fcb9b; --s3: #e79ac6; --s4: #a9b1ff; --s5: #f0c04a; --s6: #b5b5b5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 var(--font); -webkit-text-size-adjust: 100%;
}
main { max-width: 1160px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 8px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 14px; margin: 26px 0 6px; }
p { margin: 0 0 10px; max-width: 84ch; }
header p { color: var(--soft); font-size: 17px; margin: 0; }
ul { margin: 0 0 10px; padding-left: 20px; }
li { margin: 2px 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: 13px; margin-top: 8px; max-width: 100ch; }
.warn { color: var(--warn); font-weight: 600; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { padding-right: 2px; }
thead th {
  white-space: normal; vertical-align: bottom; border-bottom: 1px solid var(--rule);
  font-size: 12.5px; line-height: 1.3; color: var(--soft);
}
tbody th { font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0; }
.results td:nth-child(2), .results th:nth-child(2) { text-align: left; }
.results td:nth-child(2) { white-space: normal; line-height: 1.3; min-width: 100px; }
.results tbody th { white-space: normal; line-height: 1.3; min-width: 110px; text-indent: -18px; }
.results tbody th:first-child { padding-left: 18px; }
td small { font-size: 12px; color: var(--soft); }
td.none { color: var(--soft); }
.swatch {
  display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  background: currentColor; margin-right: 8px; text-indent: 0;
}

.key {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px;
  padding: 0; margin: 12px 0 4px; font-size: 14px;
}
.key li { display: flex; align-items: center; }
.sample { flex: none; width: 34px; height: 12px; margin-right: 7px; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr));
  gap: 14px 18px; margin-top: 10px;
}
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 13px; font-weight: 600; padding-left: 38px; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 10px var(--font); fill: var(--soft); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; }
.mid { text-anchor: middle; }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis, .tick { stroke: var(--soft); stroke-width: 1; fill: none; }
.line { fill: none; stroke: currentColor; stroke-linejoin: round; }
.range { fill: none; stroke: currentColor; opacity: 0.4; }
circle, polygon { fill: currentColor; }
circle.hit { fill: transparent; }
.dot:hover .hit { fill: currentColor; opacity: 0.35; }
.plain { color: var(--ink); }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--s5); } .s6 { color: var(--s6); }
.swatch.plain { background: var(--ink); }

.dots {
  display: grid; grid-template-columns: fit-content(30%) 1fr max-content; column-gap: 14px;
  align-items: center; max-width: 860px; font-size: 14px;
}
.dots .name { overflow-wrap: anywhere; line-height: 1.25; }
.dots .value { text-align: right; font-variant-numeric: tabular-nums; }
.track { width: 100%; height: 26px; display: block; }
.ruler { width: 100%; height: 16px; display: block; overflow: visible; }

dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
dd ul { padding: 0; margin: 0; list-style: none; }
.probe { margin: 18px 0 22px; break-inside: avoid; }
.probe h3 { margin: 0 0 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.probe dt { white-space: nowrap; color: var(--ink); }
.probe dd { white-space: pre-wrap; max-width: 90ch; }
.same { color: var(--soft); }
.kind { color: var(--soft); font-size: 12px; font-weight: 400; white-space: nowrap; }
.kind::before { content: "· "; }
details { margin-top: 36px; }
summary { cursor: pointer; font-weight: 600; }
details .wide { max-height: 480px; overflow: auto; margin-top: 10px; }
details table { font-size: 12.5px; }
details th, details td { padding: 3px 10px; font-weight: 400; }
details thead th { position: sticky; top: 0; background: var(--paper); z-index: 1; }

@media (max-width: 600px) {
  main { padding: 20px 16px 40px; }
  h1 { font-size: 23px; }
  header p { font-size: 15px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 10px; }
  .results tbody th { min-width: 104px; }
  .panels { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
  details th:first-child { position: static; }
}
@media print {
  :root {
    --paper: #fff; --ink: #000; --soft: #444; --rule: #bbb; --grid: #ddd; --warn: #9a3b00;
    --s0: #0072b2; --s1: #d55e00; --s2: #00875f; --s3: #b0568f; --s4: #332288; --s5: #a07000; --s6: #666;
  }
  @page { margin: 14mm; }
  body { font-size: 10pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  .results { font-size: 7.5pt; }
  .results th, .results td, .results td:nth-child(2) { padding: 3px 4px; min-width: 0; }
  .results thead th, td small { font-size: 7pt; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  h2, h3, .key { break-after: avoid; }
  h2 { margin-top: 22px; }
  tr, .dots { break-inside: avoid; }
  details { display: none; }
}
"""
