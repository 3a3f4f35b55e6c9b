// A chat with two sides: the base and the mix of adapters. Replies come as they are written, with the probability of each token.
import { csrf, make, post } from "./page.js";

const by = (id) => document.getElementById(id);
const talk = by("talk");
const sides = { base: [], adapter: [] }; // the messages of each side
const rows = JSON.parse(by("example")?.dataset.rows || "[]"); // that it was measured on
let running = null;
let shown = 0;

async function wait() {
  let found = { state: "starting" }; // as long as the studio does not answer
  try { found = await (await fetch("/try/state")).json(); } catch { by("state").dataset.lost = "true"; }
  if (found.state === "starting") {
    if (found.log) by("state").textContent = `Loads the model … ${found.log}`;
    setTimeout(wait, 700);
    return;
  }
  location.reload();
}

function weights() {
  const found = {};
  for (const slider of document.querySelectorAll("#weights input[type=range]")) found[slider.dataset.run] = Number(slider.value);
  return found;
}

/** The events of an answer, as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "under 0.1 %";
}

function words(entry) {
  const others = entry.top_logprobs.filter((other) => String(other.bytes) !== String(entry.bytes)).map((other) => `“${other.token}” ${percent(other.logprob)}`);
  return `“${entry.token}” had ${percent(entry.logprob)}${others.length ? `; instead: ${others.join(", ")}` : ""}`;
}

function tokenOf(text, entry) {
  const chance = Math.exp(entry.logprob);
  const level = chance > 0.9 ? "sure" : chance > 0.5 ? "likely" : chance > 0.1 ? "unsure" : "rare";
  return make("span", { class: `tok ${level}`, title: words(entry) }, text);
}

/** The choices of a reply to these messages, as they are written, by the adapters with these weights. */
async function* written(messages, mix, signal) {
  const system = by("system").value.trim();
  const whole = [...(system ? [{ role: "system", content: system }] : []), ...messages];
  const fields = { messages: JSON.stringify(whole), weights: JSON.stringify(mix) };
  for (const name of ["temperature", "max_tokens", "seed"]) fields[name] = by(name).value;
  const response = await fetch("/try/say", {
    method: "POST", signal, body: new URLSearchParams(fields),
    headers: { "content-type": "application/x-www-form-urlencoded", "x-csrf": csrf, accept: "application/json" },
  });
  if (!response.ok) throw new Error((await response.json()).message);
  for await (const found of events(response)) {
    if (found.error) throw new Error(found.error.message);
    yield* found.choices;
  }
}

async function reply(side, place) {
  let text = "";
  let cut = false;
  for await (const choice of written(sides[side], side === "base" ? {} : weights(), running.signal)) {
    const piece = choice.delta?.content || "";
    const entry = choice.logprobs?.content?.[0];
    text += piece;
    cut = cut || choice.finish_reason === "length";
    if (piece) place.append(entry ? tokenOf(piece, entry) : piece);
  }
  if (cut) place.append(make("i", { class: "soft" }, ` (cut after ${by("max_tokens").value} tokens)`));
  if (!text) place.append(make("i", { class: "soft" }, "(it wrote nothing)"));
  sides[side].push({ role: "assistant", content: text });
}

let many = null; // while a list of rows is answered

/** The rows of what was pasted, one a line: a cell that a table puts into quotes, since it has several lines, is one. */
function pasted(text) {
  const found = [];
  for (let rest = text; rest;) {
    const cell = /^"((?:[^"]|"")*)"(?:\n|$)/.exec(rest);
    const quoted = cell && /["\n]/.test(cell[1]);
    const line = quoted ? cell[0] : /^[^\n]*\n?/.exec(rest)[0];
    found.push((quoted ? cell[1].replaceAll('""', '"') : line).trim());
    rest = rest.slice(line.length);
  }
  return found.filter(Boolean);
}

/** Why these rows are not answered as they are; empty if nothing is wrong. */
function notRows(lines) {
  if (!lines.length) return "Paste some rows first.";
  const tables = lines.filter((line) => line.includes("\t"));
  const columns = Math.max(...tables.map((line) => line.split("\t").length), 1);
  return lines.length > 1 && 2 * tables.length > lines.length ? `These rows have ${columns} columns. Paste the column of the text alone, or let the whole file be answered.` : "";
}

/** Answers each line by itself, with the adapter alone; the answers can be copied beside their lines in a table. */
async function answerAll() {
  if (many) { many.abort(); return; }
  let lines = pasted(by("many-rows").value);
  const head = by("many-rows").dataset.column;
  const headed = lines.length > 1 && head && lines[0].toLowerCase() === head.toLowerCase();
  if (headed) lines = lines.slice(1);
  const wrong = notRows(lines);
  if (wrong) lines = [];
  const body = by("many-answers").tBodies[0];
  body.replaceChildren();
  by("many-answers").hidden = by("many-copy").hidden = !lines.length;
  by("many-said").textContent = wrong;
  many = new AbortController();
  by("many-start").textContent = "Stop";
  try {
    for (const [number, line] of lines.entries()) {
      by("many-said").textContent = `${number + 1} of ${lines.length}`;
      let text = "";
      let cut = false;
      for await (const choice of written([{ role: "user", content: line }], weights(), many.signal)) {
        text += choice.delta?.content || "";
        cut = cut || choice.finish_reason === "length";
      }
      const note = cut ? `cut after ${by("max_tokens").value} tokens` : "";
      body.append(make("tr", {}, make("td", { class: "wrap" }, line), make("td", { class: "whole" }, text.trim()), make("td", { class: "soft" }, note)));
    }
    if (lines.length) by("many-said").textContent = `All ${lines.length} are answered${headed ? ", without the heading" : ""}.`;
  } catch (error) {
    by("many-said").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  } finally {
    many = null;
    by("many-start").textContent = "Answer all";
  }
}

async function copyAnswers() {
  const cells = [...by("many-answers").tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent.replace(/\s+/g, " ")).join("\t"));
  await navigator.clipboard.writeText(cells.join("\n")).then(() => { by("many-said").textContent = "Copied: paste it into a table."; }, () => { by("many-said").textContent = "The browser does not allow copying; select the table and copy it."; });
}

async function ask(text, expected) {
  const holder = by("conversation");
  holder.append(make("p", { class: "said" }, text, expected ? make("span", { class: "soft" }, ` ${expected}`) : ""));
  const places = {};
  for (const side of ["base", "adapter"]) {
    sides[side].push({ role: "user", content: text });
    places[side] = make("div", { class: "reply", tabindex: "0", role: "group", "aria-label": `Reply of the ${side}` });
    holder.append(make("section", { class: `side ${side}` }, make("h3", {}, side === "base" ? "Base" : "Adapter"), places[side]));
  }
  running = new AbortController();
  by("arrived").textContent = "Both replies are being written.";
  by("send").textContent = "Stop";
  by("again").disabled = true; // what it clears is still written to
  const one = (side) => reply(side, places[side]).catch((error) => {
    if (error.name !== "AbortError") places[side].append(make("p", { class: "problem" }, error.message));
    if (sides[side].at(-1)?.role === "user") sides[side].pop();
  });
  try {
    await Promise.all(["base", "adapter"].map(one));
  } finally {
    running = null;
    by("send").textContent = "Send to both";
    by("again").disabled = false;
    by("arrived").textContent = `Base: ${places.base.textContent} Adapter: ${places.adapter.textContent}`;
  }
}

function send(event) {
  event?.preventDefault();
  if (running) { running.abort(); return; }
  const text = by("prompt").value.trim();
  if (!text) { by("prompt").focus(); return; }
  by("prompt").value = "";
  if (by("alone").checked) for (const side of ["base", "adapter"]) sides[side] = [];
  const row = rows.find((one) => one.text.trim() === text);
  const expected = row ? `Expected: ${row.truth}` : "";
  by("expected").textContent = expected;
  ask(text, expected);
}

function walk(event) {
  const place = event.target.closest(".reply");
  if (!place || !["ArrowRight", "ArrowLeft"].includes(event.key)) return;
  event.preventDefault();
  const tokens = [...place.querySelectorAll(".tok")];
  const at = tokens.findIndex((token) => token.classList.contains("here"));
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, at + (event.key === "ArrowRight" ? 1 : -1)))];
  if (!next) return;
  for (const token of tokens) token.classList.toggle("here", token === next);
  by("token").textContent = next.title;
}

function slide(event) {
  if (event.target.type === "range") event.target.parentElement.querySelector("output").textContent = event.target.value;
}

async function add() {
  const select = by("more");
  const run = select.value;
  if (!run) return;
  try {
    await post("/try/add", { run });
    const slider = make("input", { type: "range", min: "-0.5", max: "2", step: "0.05", value: "0.5", "data-run": run });
    by("weights").insertBefore(make("div", { class: "weight" }, make("label", {}, `${run} `, slider, " ", make("output", {}, "0.5"))), select.parentElement);
    select.selectedOptions[0].remove();
    by("message").hidden = true;
  } catch (error) {
    by("message").textContent = error.message;
    by("message").hidden = false;
  }
}

if (by("state")?.dataset.state === "starting") wait();
if (talk) {
  by("ask").addEventListener("submit", send);
  by("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event); });
  by("example")?.addEventListener("click", () => { by("prompt").value = rows[shown++ % rows.length].text; });
  by("again").addEventListener("click", () => { sides.base = []; sides.adapter = []; by("conversation").replaceChildren(); by("expected").textContent = ""; });
  by("add")?.addEventListener("click", add);
  by("many-start").addEventListener("click", answerAll);
  by("many-copy").addEventListener("click", copyAnswers);
  by("conversation").addEventListener("mouseover", (event) => { if (event.target.classList.contains("tok")) by("token").textContent = event.target.title; });
  by("conversation").addEventListener("keydown", walk);
  document.addEventListener("input", slide);
}
