// What Fit, Data and Run share: fields that a click or a file fills, and answers to a form that come as a stream.
import { csrf, make } from "./page.js";

const SILENT = "The studio does not answer. Is it still running?";

export const by = (id) => document.getElementById(id);

/** Offers models and rows in the form's fields, and fills a field from a chip; then calls `changed`. */
export function offer(form, changed) {
  form.elements["model.path"].setAttribute("list", "models");
  form.elements["data.train"].setAttribute("list", "rows");
  form.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-fill]");
    if (!chip) return;
    form.elements[chip.dataset.fill].value = chip.dataset.value;
    changed();
  });
}

/** Copies a chosen file into the studio's folder, and takes it as the rows; then calls `changed`. */
export function takeFile(form, changed) {
  by("upload").addEventListener("change", async (event) => {
    const chosen = event.target.files[0];
    const said = by("uploaded");
    if (!chosen) return;
    said.textContent = "Copies it into the studio's folder …";
    let response;
    let found;
    try {
      response = await fetch(`/rows/${encodeURIComponent(chosen.name)}`, { method: "PUT", headers: { "x-csrf": csrf, accept: "application/json" }, body: chosen });
      found = await response.json();
    } catch {
      said.textContent = "It could not be copied: the studio does not answer, or the file has changed. Choose it again.";
      return;
    }
    said.textContent = response.ok ? `Copied: ${chosen.name}` : found.message;
    if (response.ok) { form.elements["data.train"].value = found.path; changed(); }
  });
}

/** Says what stands in the way of an answer; an empty list says nothing. */
export function sayProblems(list, sentence, state) {
  const shown = list.length ? [make("div", { class: "warning problems", role: "alert" }, make("ul", {}, ...list.map((line) => make("li", { class: "message" }, line))))] : [];
  by("problems").replaceChildren(...shown);
  if (list.length) say(sentence, state);
}

/** The answer in one sentence. */
export function say(sentence, state) {
  by("sentence").textContent = sentence;
  by("sentence").dataset.state = state;
}

/** Shows the command and the run file that do the same. */
export function showSame(found) {
  const [command, file] = by("same").querySelectorAll("code");
  command.textContent = found.command;
  file.textContent = found.file;
}

/** The answers to a form, one question at a time. `problems` shows a list of them; `ask` is called where the form is sent. */
export class Answers {
  constructor(form, ask, problems) {
    this.problems = problems;
    this.source = null;
    this.clock = 0;
    if (matchMedia("(max-width: 899px)").matches) for (const part of form.querySelectorAll("details")) part.open = false; // so that the answer is near
    form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
    by("cancel").addEventListener("click", () => { this.stop(); say("Cancelled.", "none"); });
  }

  /** Closes the stream, which ends its work. */
  stop() {
    if (this.source) this.source.close();
    this.source = null;
    clearInterval(this.clock);
    by("busy").hidden = true;
  }

  /** Opens the stream at `address`. `shown` has a function by the name of an event; `waits` words the seconds until now. */
  open(address, shown, waits) {
    const since = Date.now();
    const tick = () => { by("waited").textContent = waits((Date.now() - since) / 1000); };
    tick();
    this.clock = setInterval(tick, 500);
    by("busy").hidden = false;
    this.source = new EventSource(address);
    for (const [name, show] of Object.entries(shown)) this.source.addEventListener(name, (event) => show(JSON.parse(event.data)));
    this.source.addEventListener("problems", (event) => { this.stop(); this.problems(JSON.parse(event.data).problems); });
    this.source.addEventListener("done", () => this.stop());
    this.source.onerror = () => { this.stop(); this.problems([SILENT]); };
  }
}
