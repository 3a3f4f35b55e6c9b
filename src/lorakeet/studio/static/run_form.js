// The form of a new run: what is missing, and the command and the file that do the same, as the form changes.
import { by, filledOf, offer, remedyButtons, showSame, takeFile } from "./answers.js";
import { post } from "./page.js";

const form = document.getElementById("prepare");
const start = document.getElementById("start");
const missing = document.getElementById("missing");
const same = document.getElementById("same");
let asked = 0;
let later = 0;

function filled() {
  return filledOf(form, ["csrf", "once"]);
}

async function check() {
  const own = ++asked;
  const fields = filled();
  const changed = Object.entries(fields).filter(([path]) => !["model.path", "data.train", "out"].includes(path)).map(([path, value]) => `${form.elements[path].labels?.[0]?.firstChild.textContent.trim() || path} ${value}`);
  let found;
  try { found = await post("/run-check", fields); } catch (error) { found = { problems: [error.message] }; }
  if (own !== asked) return; // the form has changed meanwhile
  const good = found.problems.length === 0;
  start.disabled = !good;
  start.textContent = good ? "Start the run" : fields["model.path"] ? (fields["data.train"] ? "Not ready yet" : "Choose rows first") : "Choose a model first";
  missing.textContent = good || !fields["model.path"] || !fields["data.train"] ? "" : found.problems.join(" ");
  document.getElementById("columns").hidden = !found.of_rows || !fields["data.train"];
  for (const field of form.querySelectorAll("[name]")) {
    const wrong = found.problems.some((problem) => problem.startsWith(`${field.name} `));
    if (wrong) field.setAttribute("aria-invalid", "true"); else field.removeAttribute("aria-invalid");
    field.closest(".field")?.classList.toggle("wrong", wrong);
    for (let part = wrong ? field.closest("details") : null; part; part = part.parentElement.closest("details")) part.open = true;
  }
  document.getElementById("remedies").replaceChildren(...remedyButtons(form, found.remedies, check));
  same.hidden = !good;
  if (good) showSame(found);
  by("set").textContent = changed.length ? `Set already: ${changed.join("; ")}. All else is as it comes.` : "";
  history.replaceState(null, "", `/run?${new URLSearchParams(fields)}`);
}

function soon() {
  clearTimeout(later);
  later = setTimeout(check, 250);
}

offer(form, check);
takeFile(form, check);
form.addEventListener("input", soon);
form.addEventListener("change", soon);
form.addEventListener("submit", () => { setTimeout(() => { start.disabled = true; }); }); // after the form was read
addEventListener("pageshow", (event) => { if (event.persisted) check(); });
check();
