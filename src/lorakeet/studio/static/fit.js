// Will it fit: each change of the form opens a new stream of answers, and closes the one before, which ends its work.
import { Answers, by, filledOf, offer, remedyButtons, say, sayProblems, setFields, showSame, takeFile } from "./answers.js";
import { make } from "./page.js";
import { duration, svg } from "./svg.js";

const form = document.getElementById("fit");
const KINDS = ["base", "saved activations", "adapter", "moments", "gradients", "logits", "scratch", "runtime", "allocator"];
const answers = new Answers(form, ask, problems);
let later = 0;

function filled() {
  const fields = filledOf(form);
  if (form.elements.machine.value !== "budget") delete fields["memory.budget"];
  return { ...fields, machine: form.elements.machine.value };
}

function stack(bar, limit, limitWords) {
  const most = Math.max(bar.bytes, limit || 0) * 1.02;
  const says = bar.kinds.map((one) => `${one.words} ${one.size}`).join(", ");
  const drawing = svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", class: "stack", role: "img", "aria-label": `${bar.size} at most, ${bar.phase}: ${says}${limitWords ? `; ${limitWords}` : ""}` });
  if (limit) drawing.append(svg("rect", { x: 0, y: 0, width: (100 * limit) / most, height: 10, class: "free" }));
  let place = 0;
  for (const one of bar.kinds) {
    const width = (100 * one.bytes) / most;
    drawing.append(svg("rect", { x: place, y: 0, width: Math.max(0.15, width - 0.15), height: 10, class: `k${KINDS.indexOf(one.kind)}` }, svg("title", {}, `${one.words}: ${one.size}`)));
    place += width;
  }
  if (limit) drawing.append(svg("rect", { x: (100 * limit) / most - 0.25, y: -1.5, width: 0.5, height: 13, class: "limit" }));
  const names = make("ul", { class: "stack-names" }, ...bar.kinds.map((one) => make("li", {}, make("span", { class: `hue k${KINDS.indexOf(one.kind)}` }), one.words, make("b", {}, one.size))));
  const ends = make("p", { class: "stack-ends" }, make("span", {}, `${bar.size} at most, ${bar.phase}`), make("span", {}, limitWords ? `up to the upright line: ${limitWords}` : ""));
  return make("figure", { class: "plotted" }, drawing, ends, names);
}

function use(settings) {
  setFields(form, settings);
  placeSliders();
  ask();
}

function helping(list) {
  if (!list.length) return [];
  const items = list.map((one) => {
    const button = Object.keys(one.settings).length ? make("button", { type: "button", "aria-label": `Use ${one.words}` }, "Use this") : "";
    if (button) button.addEventListener("click", () => use(one.settings));
    return make("li", {}, make("span", {}, one.words), make("span", { class: one.fits ? "pill better" : "pill none" }, `${one.size}, ${one.fits ? "fits" : "still too much"}`), button);
  });
  return [make("h3", {}, "What would help"), make("ul", { class: "helping" }, ...items)];
}

function show(part) {
  by("found").classList.remove("old");
  say(part.sentence, part.state);
  by("way").hidden = !part.way;
  by("way").textContent = part.way;
  const drawn = [stack(part.bar, part.limit, part.limit_words)];
  if (part.whole) drawn.push(make("details", {}, make("summary", {}, `With everything in memory it would be ${part.whole.size}`), make("div", {}, stack(part.whole, part.limit, part.limit_words))));
  by("bar").replaceChildren(...drawn);
  by("time").textContent = `${part.time} ${part.trained}.`;
  by("helping").replaceChildren(...helping(part.helping));
  by("more").hidden = !part.printed;
  by("printed").textContent = part.printed || "";
  by("go-on").hidden = !form.elements["data.train"].value;
}

function problems(list, remedies) {
  sayProblems(list, "It cannot be planned like this.", "none", remedyButtons(form, remedies, ask));
}

function ask() {
  clearTimeout(later);
  answers.stop();
  const fields = filled();
  const query = new URLSearchParams(fields);
  history.replaceState(null, "", `/fit?${query}`);
  query.delete("machine");
  by("go-on").href = `/run?${query}`;
  by("go-on").hidden = true; // until there is an answer
  by("own-budget").hidden = form.elements.machine.value !== "budget";
  problems([]);
  if (!fields["model.path"] || (fields.machine === "budget" && !fields["memory.budget"])) return;
  by("found").classList.add("old");
  let doing = "Counts what the run would take";
  say(`${doing} …`, "none");
  const same = (found) => { showSame(found); by("run-file").hidden = !found.file; by("same").hidden = false; };
  const waits = (seconds) => (seconds > 1 ? `${doing}, for ${duration(seconds)}` : "");
  const part = (found) => { doing = "Plans the run"; show(found); };
  answers.open(`/fit/events?${new URLSearchParams(fields)}`, { same, part, say(found) { doing = found.say; } }, waits);
}

function soon() {
  clearTimeout(later);
  later = setTimeout(ask, 200);
}

function placeSliders() {
  for (const slider of document.querySelectorAll(".slider")) {
    const value = Number(by(slider.dataset.for).value || slider.dataset.default);
    if (value > 0) slider.value = Math.round(Math.log2(value));
    slider.setAttribute("aria-valuetext", String(value));
  }
}

offer(form, ask);
takeFile(form, ask);
form.addEventListener("input", (event) => {
  if (event.target.dataset.for) { by(event.target.dataset.for).value = 2 ** event.target.value; event.target.setAttribute("aria-valuetext", String(2 ** event.target.value)); } else placeSliders();
  soon();
});
placeSliders();
ask();
