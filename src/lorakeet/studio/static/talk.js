// A chat with two sides: the base and the mix of adapters. Replies come as they are written, with the probability of each token.
import { csrf, make, post } from "./page.js";

const by = (id) => document.getElementById(id);
const talk = by("talk");
const sides = { base: [], adapter: [] }; // the messages of each side
let running = null;

async function wait() {
  let found = { state: "starting" }; // as long as the studio does not answer
  try { found = await (await fetch("/try/state")).json(); } catch { by("state").dataset.lost = "true"; }
  if (found.state === "starting") { setTimeout(wait, 700); return; }
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
  const others = entry.top_logprobs.filter((other) => other.token !== entry.token).map((other) => `“${other.token}” ${percent(other.logprob)}`);
  return `“${entry.token}” had ${percent(entry.logprob)}${others.length ? `; instead: ${others.join(", ")}` : ""}`;
}

function tokenOf(text, entry) {
  const chance = Math.exp(entry.logprob);
  const level = chance > 0.9 ? "sure" : chance > 0.5 ? "likely" : chance > 0.1 ? "unsure" : "rare";
  return make("span", { class: `tok ${level}`, title: words(entry) }, text);
}

async function reply(side, place) {
  const system = by("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...sides[side]];
  const fields = { messages: JSON.stringify(messages), weights: JSON.stringify(side === "base" ? {} : weights()) };
  for (const name of ["temperature", "max_tokens", "seed"]) fields[name] = by(name).value;
  const response = await fetch("/try/say", {
    method: "POST", signal: running.signal, body: new URLSearchParams(fields),
    headers: { "content-type": "application/x-www-form-urlencoded", "x-csrf": csrf, accept: "application/json" },
  });
  if (!response.ok) throw new Error((await response.json()).message);
  let text = "";
  for await (const found of events(response)) {
    if (found.error) throw new Error(found.error.message);
    for (const choice of found.choices) {
      const piece = choice.delta?.content || "";
      const entry = choice.logprobs?.content?.[0];
      text += piece;
      if (piece) place.append(entry ? tokenOf(piece, entry) : piece);
    }
  }
  if (!text) place.append(make("i", { class: "soft" }, "(it wrote nothing)"));
  sides[side].push({ role: "assistant", content: text });
}

async function ask(text) {
  const holder = by("conversation");
  holder.append(make("p", { class: "said" }, text));
  const places = {};
  for (const side of ["base", "adapter"]) {
    sides[side].push({ role: "user", content: text });
    places[side] = make("div", { class: "reply", tabindex: "0", "aria-label": `Reply of the ${side}` });
    holder.append(make("section", { class: `side ${side}` }, make("h3", {}, side === "base" ? "Base" : "Adapter"), places[side]));
  }
  running = new AbortController();
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
  }
}

function send(event) {
  event?.preventDefault();
  if (running) { running.abort(); return; }
  const text = by("prompt").value.trim();
  if (!text) { by("prompt").focus(); return; }
  by("prompt").value = "";
  ask(text);
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
  by("example")?.addEventListener("click", (event) => { by("prompt").value = event.currentTarget.dataset.text; });
  by("again").addEventListener("click", () => { sides.base = []; sides.adapter = []; by("conversation").replaceChildren(); });
  by("add")?.addEventListener("click", add);
  by("conversation").addEventListener("mouseover", (event) => { if (event.target.classList.contains("tok")) by("token").textContent = event.target.title; });
  by("conversation").addEventListener("keydown", walk);
  document.addEventListener("input", slide);
}
