// A run as it goes on: events of the studio become numbers, a curve and a memory bar. All of it is drawn again after a reload.
import { keepingFocus, make } from "./page.js";
import { bytes, duration, lineChart, meter, short } from "./svg.js";

const live = document.getElementById("live");
const by = (id) => document.getElementById(id);
let records = [];
let seen = "";
let latest = null;
let began = null; // on this browser's own clock

function numbers(run) {
  const shown = [
    ["Step", run.total ? `${run.step} of ${run.total}` : run.step || "–"],
    ...(began === null ? [] : [["Time so far", duration((performance.now() - began) / 1000)]]),
    ["Training time left", run.state === "training" ? run.seconds_left === null ? "known after some steps" : `about ${duration(run.seconds_left)}` : "–"],
    ["Tokens per second", short(run.tokens_per_second)],
    ["Held-out loss of the base", short(run.base)],
    ["Best held-out loss", run.best === null ? "–" : `${short(run.best)} at step ${run.best_step}`],
  ];
  by("numbers").replaceChildren(...shown.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}

function curve(run) {
  const train = records.filter((r) => r.loss !== undefined).map((r) => ({ x: r.step, y: r.loss ?? NaN }));
  const held = records.filter((r) => r.held_out_loss !== undefined).map((r) => ({ x: r.step, y: r.held_out_loss ?? NaN, low: r.low, high: r.high }));
  if (!train.length && !held.length) { by("curve").replaceChildren(make("p", { class: "soft" }, run.can_stop ? "The first numbers come when the model is loaded." : "There are none.")); return; }
  const says = `${train.length} steps, the last loss ${short(train.at(-1)?.y)}; held-out loss ${short(held.at(-1)?.y)}, of the base ${short(run.base)}.`;
  const open = by("curve").querySelector("details")?.open;
  const lines = run.base === null ? [] : [{ y: run.base, name: "base", kind: "base" }];
  keepingFocus(by("curve"), () => {
    by("curve").replaceChildren(lineChart({
      name: "Loss by step", says, lines,
      series: [{ name: "training rows", kind: "train", points: train }, { name: "held-out rows, with interval", kind: "held-out", points: held, dots: true }],
    }));
    if (open) by("curve").querySelector("details").open = true;
  });
}

function memory(run) {
  const text = run.memory === null ? run.can_stop ? "Not known before the first step." : "Not known." : run.budget ? `${bytes(run.memory)} at most, of a budget of ${bytes(run.budget)}.` : `${bytes(run.memory)} at most. No budget was set.`;
  by("memory").replaceChildren(run.memory === null || !run.budget ? make("p", { class: "soft" }, text) : meter({ name: "Memory", value: run.memory, limit: run.budget, text }));
}

function show(run) {
  by("said").textContent = run.state === "waiting" && run.ahead ? `${run.said}, after ${run.ahead} other ${run.ahead === 1 ? "job" : "jobs"}` : run.said;
  by("said").dataset.state = run.state;
  by("message").hidden = !run.message;
  by("message").textContent = run.message;
  by("message").classList.toggle("calm", run.state === "stopped");
  by("doing").hidden = !run.doing;
  by("doing").textContent = run.doing;
  by("another").hidden = run.can_stop;
  by("progress").max = run.total || 1;
  if (run.state === "starting" || run.state === "measuring") by("progress").removeAttribute("value"); // how long it takes is not known
  else by("progress").value = run.step;
  by("stop").hidden = !run.can_stop;
  by("stop").elements.at_once.value = run.state === "stopping";
  by("stop").querySelector("button").textContent = run.stop;
  by("stop").querySelector(".soft").textContent = run.stop_note;
  by("resume").hidden = !run.can_resume;
  by("result").hidden = run.state !== "done";
  document.title = `${run.state === "training" && run.total ? `${Math.floor((100 * run.step) / run.total)} % ` : ""}${run.name} · Lorakeet studio`;
  numbers(run);
  memory(run);
}

function samples(files) {
  const grid = by("samples").querySelector(".grid");
  by("samples").hidden = files.length === 0;
  if (grid.children.length === files.length) return;
  const base = live.dataset.events.replace(/events$/, "sample/");
  grid.replaceChildren(...files.map((file) => make("figure", {},
    make("img", { src: base + file.split("/").map(encodeURIComponent).join("/"), alt: `Sample ${file}`, loading: "lazy" }),
    make("figcaption", {}, file))));
}

function take(event) {
  const found = JSON.parse(event.data);
  if (found.restarted) records = [];
  began = found.run.since === null ? null : performance.now() - 1000 * Math.max(0, found.now - found.run.since);
  latest = found.run;
  for (const record of found.records) {
    while (records.length && records.at(-1).step > record.step) records.pop(); // it was resumed from an earlier step
    records.push(record);
  }
  show(found.run);
  samples(found.samples);
  const now = `${records.length} ${records.at(-1)?.step} ${found.run.base}`;
  if (now !== seen || found.restarted) curve(found.run);
  seen = now;
  if (found.log !== null) by("log").textContent = found.log;
}

setInterval(() => { if (latest && began !== null) numbers(latest); }, 1000);

let source = null;
let gone = false;
let later = 0;

// A run that is over ends its events; it may be resumed in another tab or a terminal.
async function again() {
  const answer = await fetch(live.dataset.events.replace(/events$/, "state")).catch(() => null);
  if (answer?.ok && (await answer.json()).goes_on) listen();
  else later = setTimeout(again, 3000);
}

function listen() {
  source = new EventSource(live.dataset.events);
  source.addEventListener("run", take);
  source.addEventListener("gone", (event) => {
    gone = true;
    source.close();
    by("said").textContent = JSON.parse(event.data).message;
    by("said").dataset.state = "gone";
  });
  source.addEventListener("over", () => {
    source.close();
    later = setTimeout(again, 3000);
  });
  source.onerror = () => { by("said").dataset.lost = "true"; };
  source.onopen = () => { delete by("said").dataset.lost; };
}

// A browser has six connections to a server: tabs in the background give theirs back.
document.addEventListener("visibilitychange", () => {
  source.close();
  clearTimeout(later);
  if (!document.hidden && !gone) listen();
});
listen();
