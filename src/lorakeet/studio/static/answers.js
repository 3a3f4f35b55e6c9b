// What Fit, Data and Run share: fields that a click or a file fills, and answers to a form that come as a stream.
import { csrf, make, shown } from "./page.js";

const SILENT = "The studio does not answer. Is it still running?";

export const by = (id) => document.getElementById(id);

/** Offers models and rows in the form's fields, and fills a field from a chip; then calls `changed`. */
export function offer(form, changed) {
  form.elements["model.path"]?.setAttribute("list", "models");
  form.elements["data.train"].setAttribute("list", "rows");
  nameCopies(form.elements["data.train"]);
  form.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-fill]");
    if (!chip) return;
    setFields(form, { [chip.dataset.fill]: chip.dataset.value });
    changed();
  });
  form.addEventListener("input", () => mark(form));
  mark(form);
}

/** The field of the rows shows a copied file by its name; what is sent says where the copy lies. */
function nameCopies(sent) {
  sent.seen = sent.cloneNode();
  sent.seen.removeAttribute("name");
  sent.removeAttribute("id"); // which the label names
  sent.type = "hidden";
  sent.after(sent.seen);
  showName(sent);
  sent.seen.addEventListener("input", () => {
    const { folder, name } = sent.copy;
    sent.value = (folder && sent.seen.value.startsWith(name) ? folder : "") + sent.seen.value; // a sheet may follow the name
  });
}

/** Shows the file that is sent, a copy by its name; the folder of the copy is kept for what is typed behind the name. */
function showName(sent) {
  const folder = sent.value.match(/^.*\/\.studio\/rows\//)?.[0] ?? "";
  sent.seen.value = sent.value.slice(folder.length);
  sent.copy = { folder, name: sent.seen.value.replace(/(\.\w+)#.*$/, "$1") };
}

/** Sends a file to the studio; `onShare` is called with the part of it that has arrived. An error has the studio's own message. */
function sent(file, onShare) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch says nothing of what has been sent
    request.open("PUT", `/rows/${encodeURIComponent(file.name)}`);
    request.setRequestHeader("x-csrf", csrf);
    request.setRequestHeader("accept", "application/json");
    request.responseType = "json";
    request.upload.onprogress = (event) => { if (event.lengthComputable) onShare(event.loaded / event.total); };
    request.onerror = () => reject(new Error("It could not be copied: the studio does not answer, or the file has changed. Choose it again."));
    request.onload = () => (request.status < 300 ? resolve(request.response) : reject(new Error(request.response?.message || `The studio answered ${request.status}.`)));
    request.send(file);
  });
}

/** Copies a chosen file into the studio's folder, and takes it as the rows; then calls `changed`. */
export function takeFile(form, changed) {
  const take = async (field) => {
    const chosen = field.files[0];
    const said = by("uploaded");
    if (!chosen) return;
    said.className = "";
    said.textContent = `Copies ${chosen.name} …`;
    try {
      const found = await sent(chosen, (share) => { said.textContent = `Copies ${chosen.name}: ${Math.round(100 * share)} %`; });
      said.textContent = `${chosen.name} is copied; your own file stays as it is.`;
      setFields(form, { "data.train": found.path });
      changed();
    } catch (error) {
      said.className = "problem";
      said.textContent = error.message;
    } finally {
      field.value = ""; // so that the same file, mended meanwhile, can be chosen again
    }
  };
  by("upload").addEventListener("change", (event) => take(event.target));
  take(by("upload")); // it may have been chosen before this script was there
}

/** What is filled in and differs from its default: an address with that is short enough to be passed on. */
export function filledOf(form, left = []) {
  const fields = {};
  for (const [name, value] of new FormData(form)) {
    if (typeof value !== "string" || !value.trim() || left.includes(name)) continue;
    if (form.elements[name].dataset?.default !== value) fields[name] = value;
  }
  return fields;
}

/** Sets fields of the form by their paths; those that it does not show become hidden ones. */
export function setFields(form, settings) {
  const more = settings["data.train"] ? known(form, shown(settings["data.train"])) : {};
  for (const [path, value] of Object.entries({ ...more, ...settings })) {
    let field = form.elements[path];
    if (!field) { field = make("input", { type: "hidden", name: path }); form.append(field); }
    field.value = shown(value); // the studio reads it as it was
    if (field.seen) showName(field);
    field = field.seen || field;
    field.title = field.value;
    field.scrollLeft = field.scrollWidth; // of a long path the end says which file it is
    for (let part = field.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
  }
  mark(form);
}

/** Marks the chips whose value a field has. */
function mark(form) {
  for (const chip of form.querySelectorAll("[data-fill]")) chip.setAttribute("aria-pressed", String(form.elements[chip.dataset.fill].value === chip.dataset.value));
}

const OF_A_FILE = ["data.encoding", "data.delimiter", "data.text_column", "data.label_column", "data.group_column", "data.bad_rows", "data.format", "data.template", "data.rename_labels", "data.near_duplicates"];

/** Keeps in this browser how a file was read, for the next time that it is chosen. */
export function rememberFile(form) {
  const fields = filledOf(form);
  const how = Object.fromEntries(OF_A_FILE.filter((path) => fields[path]).map((path) => [path, fields[path]]));
  try { localStorage.setItem(`rows ${fields["data.train"]}`, JSON.stringify(how)); } catch { /* the browser keeps nothing */ }
}

/** How a file was read before, where nothing is filled in yet. */
function known(form, file) {
  const fields = filledOf(form);
  if (OF_A_FILE.some((path) => fields[path])) return {};
  try { return JSON.parse(localStorage.getItem(`rows ${file}`) || "{}"); } catch { return {}; }
}

/** A button for each thing that one click sets; then it calls `changed`. */
export function remedyButtons(form, remedies, changed) {
  return (remedies || []).map((one) => {
    const button = make("button", { type: "button", class: "remedy" }, one.words);
    button.addEventListener("click", () => { setFields(form, one.settings); changed(); });
    return button;
  });
}

/** Says what stands in the way of an answer, after buttons that mend it, which are for all readers; an empty list says nothing. */
export function sayProblems(list, sentence, state, buttons = []) {
  const mended = buttons.length ? [make("p", {}, "One click does what is advised:"), make("p", { class: "actions" }, ...buttons)] : [];
  const shown = list.length ? [make("div", { class: "warning problems", role: "alert" }, ...mended, make("ul", {}, ...list.map((line) => make("li", { class: "message" }, line))))] : [];
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
    this.source.addEventListener("problems", (event) => { const found = JSON.parse(event.data); this.stop(); this.problems(found.problems, found.remedies); });
    this.source.addEventListener("done", () => this.stop());
    this.source.onerror = () => { this.stop(); this.problems([SILENT]); };
  }
}
