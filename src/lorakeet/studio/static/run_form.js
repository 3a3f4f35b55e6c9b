// The form of a new run: what is missing, and the command and the file that do the same, as the form changes.
import { csrf, post } from "./page.js";

const form = document.getElementById("prepare");
const start = document.getElementById("start");
const missing = document.getElementById("missing");
const same = document.getElementById("same");
const [command, file] = same.querySelectorAll("code");
let asked = 0;
let later = 0;

function filled() {
  const fields = {};
  for (const [name, value] of new FormData(form)) if (name !== "csrf" && name !== "once" && typeof value === "string" && value.trim()) fields[name] = value;
  return fields;
}

async function check() {
  const own = ++asked;
  const fields = filled();
  let found;
  try { found = await post("/run-check", fields); } catch (error) { found = { problems: [error.message] }; }
  if (own !== asked) return; // the form has changed meanwhile
  const good = found.problems.length === 0;
  start.disabled = !good;
  start.textContent = good ? "Start the run" : fields["model.path"] ? (fields["data.train"] ? "Not ready yet" : "Choose rows first") : "Choose a model first";
  missing.textContent = good || !fields["model.path"] || !fields["data.train"] ? "" : found.problems.join(" ");
  document.getElementById("columns").hidden = good || !fields["data.train"];
  same.hidden = !good;
  if (good) { command.textContent = found.command; file.textContent = found.file; }
  history.replaceState(null, "", `/run?${new URLSearchParams(fields)}`);
}

function soon() {
  clearTimeout(later);
  later = setTimeout(check, 250);
}

async function upload(event) {
  const chosen = event.target.files[0];
  const said = document.getElementById("uploaded");
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
  if (response.ok) { form.elements["data.train"].value = found.path; check(); }
}

form.elements["model.path"].setAttribute("list", "models");
form.elements["data.train"].setAttribute("list", "rows");
form.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-fill]");
  if (!chip) return;
  form.elements[chip.dataset.fill].value = chip.dataset.value;
  check();
});
form.addEventListener("input", soon);
form.addEventListener("change", soon);
form.addEventListener("submit", () => { setTimeout(() => { start.disabled = true; }); }); // after the form was read
addEventListener("pageshow", (event) => { if (event.persisted) check(); });
document.getElementById("upload").addEventListener("change", upload);
check();
