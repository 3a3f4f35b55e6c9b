// Small charts as SVG, drawn by hand: axes with round ticks, lines, intervals, bars; each with a title and a table of its numbers.
import { make } from "./page.js";

const NS = "http://www.w3.org/2000/svg";

/** An SVG element. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A number for people: 3 digits that count, no exponent for usual sizes. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

/** Bytes for people. */
export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const [size, unit] = count >= 2 ** 30 ? [2 ** 30, "GiB"] : count >= 2 ** 20 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
  return `${(count / size).toFixed(unit === "GiB" ? 2 : 0)} ${unit}`;
}

/** Seconds for people. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

/** Round ticks over a range: {low, high, ticks}. */
export function axis(values, { zero = false, count = 5 } = {}) {
  const finite = values.filter(Number.isFinite);
  if (zero) finite.push(0);
  let low = finite.length ? finite.reduce((a, b) => Math.min(a, b)) : 0;
  let high = finite.length ? finite.reduce((a, b) => Math.max(a, b)) : 1;
  const span = high - low || Math.abs(high) || 1;
  low -= zero && low === 0 ? 0 : 0.05 * span;
  high += 0.05 * span;
  const raw = (high - low) / count;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = size * ([1, 2, 2.5, 5, 10].find((factor) => factor * size >= raw) || 10);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9 * step; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return { low, high, ticks };
}

/** The values without the highest few, where those would flatten all others. */
export function usual(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const kept = sorted.slice(0, Math.max(1, Math.ceil(sorted.length * 0.98)));
  const much = sorted.length && sorted.at(-1) - sorted[0] > 2 * (kept.at(-1) - kept[0]);
  return much ? kept : sorted;
}

/**
 * A chart of lines. `series`: [{name, kind, points: [{x, y, low, high}], dots}], `lines`: [{y, name, kind}] across.
 * `name` is its title, `says` its description for those who do not see it. It is drawn again when its place changes its width.
 */
export function lineChart(chart) {
  let drawing = drawn(chart, 800);
  const figure = make("figure", { class: "plotted" }, drawing, legend(chart.series), tableOf(chart));
  let last = 800;
  new ResizeObserver(([entry]) => {
    const width = Math.max(280, Math.round(entry.contentRect.width));
    if (width === last || !entry.contentRect.width) return;
    last = width;
    const next = drawn(chart, width);
    drawing.replaceWith(next);
    drawing = next;
  }).observe(figure);
  return figure;
}

function drawn({ name, says, series, lines = [], across = "step" }, width) {
  const height = Math.round(Math.min(380, Math.max(230, width / 2.6)));
  const left = 52, right = 14, top = 12, bottom = 40;
  const points = series.flatMap((one) => one.points);
  const ys = axis(usual([...points.flatMap((p) => [p.y, p.low ?? NaN, p.high ?? NaN]), ...lines.map((line) => line.y)]));
  const last = Math.max(1, ...points.map((p) => p.x));
  const xs = { ...axis([0, last], { zero: true, count: width < 500 ? 3 : 6 }), low: 0, high: last };
  const x = (value) => left + (width - left - right) * (value - xs.low) / (xs.high - xs.low);
  const y = (value) => top + (height - top - bottom) * (1 - (Math.min(ys.high, Math.max(ys.low, value)) - ys.low) / (ys.high - ys.low));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${name}. ${says}` });
  for (const tick of ys.ticks.filter((tick) => tick >= ys.low)) {
    drawing.append(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "tick" }));
    drawing.append(svg("text", { x: left - 8, y: y(tick) + 4, class: "label end" }, short(tick)));
  }
  for (const tick of xs.ticks.filter((tick) => tick <= last && Number.isInteger(tick)))
    drawing.append(svg("text", { x: x(tick), y: height - 20, class: "label middle" }, short(tick)));
  drawing.append(svg("text", { x: left + (width - left - right) / 2, y: height - 3, class: "label middle" }, across));
  for (const line of lines) {
    drawing.append(svg("line", { x1: left, x2: width - right, y1: y(line.y), y2: y(line.y), class: `across ${line.kind}` }));
    drawing.append(svg("text", { x: width - right - 4, y: y(line.y) + 15, class: "label end" }, line.name));
  }
  for (const one of series) {
    const usable = one.points.filter((p) => Number.isFinite(p.y));
    for (const p of usable.filter((p) => Number.isFinite(p.low) && Number.isFinite(p.high)))
      drawing.append(svg("line", { x1: x(p.x), x2: x(p.x), y1: y(p.low), y2: y(p.high), class: `whisker ${one.kind}` }));
    if (usable.length > 1)
      drawing.append(svg("polyline", { points: usable.map((p) => `${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}`).join(" "), class: one.kind }));
    if (one.dots || usable.length === 1)
      for (const p of usable) drawing.append(svg("circle", { cx: x(p.x), cy: y(p.y), r: 4, class: `dot ${one.kind}` }, svg("title", {}, `${one.name}, ${across} ${p.x}: ${short(p.y)}`)));
  }
  return drawing;
}

function legend(series) {
  const list = make("ul", { class: "legend" });
  for (const one of series) list.append(make("li", {}, make("span", { class: `swatch ${one.kind}` }), one.name));
  return list;
}

/** The numbers of a chart as a table, behind a summary. */
export function tableOf({ name, series, across }) {
  const rows = new Map();
  series.forEach((one, index) => one.points.forEach((p) => {
    if (!rows.has(p.x)) rows.set(p.x, new Array(series.length).fill(null));
    rows.get(p.x)[index] = p;
  }));
  const sorted = [...rows].sort((a, b) => a[0] - b[0]);
  const each = Math.max(1, Math.ceil(sorted.length / 60));
  const body = make("tbody");
  const cell = (p) => (p === null ? "" : Number.isFinite(p.low) ? `${short(p.y)} (${short(p.low)} to ${short(p.high)})` : short(p.y));
  sorted.filter((row, index) => index % each === 0 || index === sorted.length - 1).forEach(([at, cells]) => {
    body.append(make("tr", {}, make("th", { scope: "row" }, short(at)), ...cells.map((p) => make("td", {}, cell(p)))));
  });
  const head = make("tr", {}, make("th", { scope: "col" }, across), ...series.map((one) => make("th", { scope: "col" }, one.name)));
  const table = make("table", {}, make("caption", {}, name), make("thead", {}, head), body);
  return make("details", { class: "numbers-of" }, make("summary", {}, "The numbers"), make("div", { class: "scroll" }, table));
}

/** A bar that is filled up to a value, with the limit drawn in. */
export function meter({ name, value, limit, text }) {
  const most = Math.max(value || 0, limit || 0) || 1;
  const drawing = svg("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", class: "bar-chart", role: "img", "aria-label": `${name}: ${text}` });
  drawing.append(svg("rect", { x: 0, y: 0, width: 100, height: 6, class: "trough" }));
  drawing.append(svg("rect", { x: 0, y: 0, width: (100 * (value || 0)) / most, height: 6, class: limit && value > limit ? "fill over" : "fill" }));
  if (limit) drawing.append(svg("rect", { x: Math.min(99.4, (100 * limit) / most), y: 0, width: 0.6, height: 6, class: "limit" }));
  return make("figure", { class: "plotted" }, drawing, make("figcaption", {}, text));
}
