// Take away: each card checks itself as it changes; jobs and certificates come as events.
import { offer, takeFile } from "./answers.js";
import { csrf, keepingFocus, make, post } from "./page.js";
import { bytes } from "./svg.js";

const root = document.getElementById("take");
const by = (id) => document.getElementById(id);
let sizes = null;

function fields(form) {
  const found = {};
  for (const [name, value] of new FormData(form)) if (name !== "csrf") found[name] = value;
  return found;
}

function sizeOf(form) {
  const way = form.dataset.way;
  const quant = form.elements.quant;
  const said = form.querySelector(".size");
  if (sizes) said.textContent = quant ? sizes.quants[quant.value] || "" : sizes.sizes[way] || "";
}

async function check(form) {
  const number = (form.checks = (form.checks || 0) + 1);
  const name = form.elements.name;
  if (form.dataset.way === "gguf") name.placeholder = name.placeholder.replace(/-[a-z0-9_]+\.gguf$/, `-${form.elements.quant.value}.gguf`);
  sizeOf(form);
  let found;
  try { found = await post(`${root.dataset.run}/${form.dataset.way}/check`, fields(form)); } catch (error) { found = { missing: error.message, command: "" }; }
  if (number !== form.checks) return;
  form.querySelector("button.primary").disabled = Boolean(found.missing);
  form.querySelector(".missing").textContent = found.missing;
  const shown = form.parentElement.querySelector(".cmd");
  shown.hidden = !found.command;
  shown.querySelector("code").textContent = found.command;
}

function command(text, purpose) {
  return make("div", { class: "cmd" }, make("code", {}, text), make("p", {}, purpose), make("button", { type: "button", class: "copy", "aria-label": `Copy: ${purpose}` }, "Copy"));
}

const STATES = { waiting: "waits in the queue", running: "in work", done: "done and compared", stopped: "stopped", failed: "failed", killed: "was ended from outside", cancelled: "taken out of the queue" };

function certificate(found) {
  const lines = found.checks.map((one) => make("li", {}, make("span", { class: one.passed ? "pill pass" : "pill fail" }, one.passed ? "pass" : "fail"), ` ${one.words.replace(/^(pass|FAIL)\s+/, "")}`));
  const missing = found.unchecked.map((line) => make("li", { class: "soft" }, line));
  return make("div", { class: `certificate-of ${found.passed ? "pass" : "fail"}` }, make("p", { class: `stamp ${found.passed ? "pass" : "fail"}` }, `Certificate: ${found.verdict}`), make("details", {}, make("summary", {}, "What was compared"), make("ul", {}, ...lines, ...missing)));
}

/** A form that answers the rows of a job once more, with what its message advises. */
function again(one) {
  const hidden = Object.entries({ csrf, once: one.name, ...one.again }).map(([name, value]) => make("input", { type: "hidden", name, value }));
  return make("form", { method: "post", action: `${root.dataset.run}/answer` }, ...hidden, make("button", { type: "submit", class: "remedy" }, one.again_words));
}

/** A form that carries out what was refused because of another content than the certificate's. */
function uncertified(one) {
  const hidden = Object.entries({ csrf, once: `${one.name}-uncertified`, job: one.name }).map(([name, value]) => make("input", { type: "hidden", name, value }));
  return make("form", { method: "post", action: `${root.dataset.run}/uncertified` }, ...hidden, make("button", { type: "submit" }, "Go on uncertified"), make("span", { class: "soft" }, " The result says what differs."));
}

/** What deletes a file of answers for good, after a second click. */
function forgetting(one) {
  const form = make("form", { method: "post", action: `${root.dataset.run}/saved/${encodeURIComponent(one.name)}/delete` }, make("input", { type: "hidden", name: "csrf", value: csrf }), make("button", { type: "submit", class: "danger" }, "Delete for good"));
  return make("details", { class: "change" }, make("summary", { "aria-label": `Delete ${one.saves} …` }, "Delete …"), make("div", {}, make("p", {}, `The copy of ${one.saves} in this studio is deleted. Files that you saved stay.`), form));
}

function job(one, open) {
  const parts = [make("p", {}, make("b", {}, one.title), " ", make("span", { class: "pill" }, one.counted ? "done" : STATES[one.state]), one.counted ? ` ${one.counted}` : one.state === "done" && one.bytes ? ` ${bytes(one.bytes)} in ` : "", one.state === "done" && one.out && !one.counted ? make("code", {}, one.out) : "")];
  if (one.state === "running" || one.state === "waiting") {
    const stop = make("form", { method: "post", action: `/jobs/${encodeURIComponent(one.name)}/stop` }, make("input", { type: "hidden", name: "csrf", value: csrf }), make("button", { type: "submit", "aria-label": `Cancel ${one.title}` }, "Cancel"));
    stop.addEventListener("submit", (event) => { event.preventDefault(); post(stop.getAttribute("action")).catch((error) => { stop.append(make("span", { class: "problem" }, error.message)); }); });
    parts.push(make("div", { class: "busy" }, make("progress", { "aria-label": one.title }), make("span", { class: "soft" }, one.last), stop));
  }
  if (one.certificate && !one.certificate.passed && one.state !== "running") parts.push(make("p", { class: "warning" }, `Do not use it: what was written answers differently from what was trained. ${one.advice}`));
  else if (one.error) parts.push(make("p", { class: "warning message" }, one.error));
  if (one.saves && one.certificate?.passed !== false) parts.push(make("p", {}, make("a", { class: "button primary", href: `${root.dataset.run}/saved/${encodeURIComponent(one.name)}`, download: one.saves }, `Save ${one.saves}`), one.held ? forgetting(one) : ""));
  if (Object.keys(one.again).length) parts.push(again(one));
  if (one.uncertified) parts.push(uncertified(one));
  if (one.certificate && one.state !== "running") parts.push(certificate(one.certificate));
  parts.push(...one.use.map(([text, purpose]) => command(text, purpose)));
  const printed = one.log ? make("pre", { tabindex: "0", role: "group", "aria-label": "Log" }, make("code", {}, one.log)) : "";
  parts.push(make("details", open ? { open: "" } : {}, make("summary", {}, "The command, and what it printed"), make("div", {}, command(one.command, "The same on the command line"), printed)));
  return make("article", { class: "card taken", id: `job-${one.name}`, "data-state": one.state, "aria-label": one.title }, ...parts);
}

function take(event) {
  const found = JSON.parse(event.data).jobs;
  const open = new Set([...document.querySelectorAll("#jobs details[open]")].map((one) => `${one.closest("article").id} ${one.querySelector("summary").textContent}`));
  by("jobs-part").hidden = !found.length;
  keepingFocus(by("jobs"), () => {
    by("jobs").replaceChildren(...found.map((one) => job(one)));
    for (const one of document.querySelectorAll("#jobs details")) if (open.has(`${one.closest("article").id} ${one.querySelector("summary").textContent}`)) one.open = true;
  });
  for (const form of document.querySelectorAll(".way-form")) check(form); // a name may be taken now
}

let source = null;
function listen() {
  source = new EventSource(`${root.dataset.run}/events`);
  source.addEventListener("jobs", take);
}

// A browser has six connections to a server: tabs in the background give theirs back.
document.addEventListener("visibilitychange", () => {
  source.close();
  if (!document.hidden) listen();
});
listen();

const counted = new EventSource(`${root.dataset.run}/sizes`);
counted.addEventListener("sizes", (event) => { sizes = JSON.parse(event.data); document.querySelectorAll(".way-form").forEach(sizeOf); });
counted.addEventListener("done", () => counted.close());
const unknown = (message) => { counted.close(); document.querySelectorAll(".size").forEach((said) => { said.textContent = "Its size is not known."; }); if (message) { by("sizes-problem").textContent = message; by("sizes-problem").hidden = false; } };
counted.addEventListener("problem", (event) => unknown(JSON.parse(event.data).message));
counted.onerror = () => unknown("");

for (const form of document.querySelectorAll(".way-form")) {
  let later = 0;
  form.addEventListener("input", () => { clearTimeout(later); later = setTimeout(() => check(form), 250); });
  check(form);
}
const answer = by("answer");
if (answer) {
  let later = 0;
  let asked = 0;
  const ready = async () => {
    const number = ++asked;
    const rows = answer.elements["data.train"].value.trim();
    let found = { missing: "Choose a file first.", command: "" };
    if (rows) try { found = await post(`${root.dataset.run}/answer/check`, fields(answer)); } catch (error) { found.missing = error.message; }
    if (number !== asked) return; // the form has changed meanwhile
    by("answer-it").disabled = Boolean(found.missing);
    by("answer-missing").textContent = found.missing;
    by("answer-same").hidden = !found.command;
    by("answer-same").querySelector("code").textContent = found.command;
  };
  offer(answer, ready);
  takeFile(answer, ready);
  answer.addEventListener("input", () => { clearTimeout(later); later = setTimeout(ready, 250); });
  addEventListener("pageshow", ready);
  ready();
}
by("which")?.addEventListener("change", (event) => { location.href = event.target.value; });
