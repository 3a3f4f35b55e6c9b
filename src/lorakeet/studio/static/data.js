// The rows of a run as it would read them. Texts of rows are only ever put in as text.
import { Answers, by, filledOf, offer, rememberFile, remedyButtons, say, sayProblems, setFields, showSame, takeFile } from "./answers.js";
import { make, shown } from "./page.js";
import { duration, short, svg, tableOf } from "./svg.js";

const form = document.getElementById("data");
const SECTIONS = ["seen", "columns", "split", "lengths", "leaks", "album"];
const answers = new Answers(form, ask, problems);
let later = 0;
let doing = "";
let head = null;

function filled() {
  return filledOf(form);
}

const MEANT = { "": "not read", "data.text_column": "the text", "data.label_column": "its label", "data.group_column": "its group" };
const READ = { prompt: "data.text_column", text: "data.text_column", label: "data.label_column" };

/** The menu in a column's head: what the column is. Other shapes than of texts and labels are known by their names. */
function meaning(column) {
  const word = (head.used || {})[column];
  const named = Object.keys(MEANT).find((path) => path && filled()[path] === shown(column));
  if (word && !READ[word] && !named) return make("span", { class: "pill better" }, word);
  const now = named || READ[word] || "";
  const options = Object.entries(MEANT).map(([path, says]) => make("option", { value: path, selected: path === now ? "" : null }, says));
  const select = make("select", { "aria-label": `What the column ${column} is`, class: "short" }, ...options);
  select.addEventListener("change", () => {
    const settings = Object.fromEntries(Object.keys(MEANT).filter((path) => path && filled()[path] === shown(column)).map((path) => [path, ""]));
    if (select.value) settings[select.value] = column;
    setFields(form, settings);
    ask();
  });
  return select;
}

function records() {
  const { columns, rows } = head.first;
  const used = head.used || {};
  const cell = (column, text) => make("td", { class: used[column] ? "wrap" : "wrap soft" }, text);
  by("records").replaceChildren(
    make("caption", {}, "The first records, as they are in the file"),
    make("thead", {}, make("tr", {}, ...columns.map((column) => make("th", { scope: "col" }, column, meaning(column))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.cells.map((text, place) => cell(columns[place], text))))),
  );
}

const SHAPES = { text: "texts to continue: the model learns to write all of them", classification: "texts with a label: the model learns to name the label" };

function actions(remedies) {
  return remedies.length ? [make("p", { class: "actions" }, ...remedyButtons(form, remedies, ask))] : [];
}

function guess(remedies, says) {
  by("guess").replaceChildren(...(remedies.length ? [make("div", { class: "warning" }, make("p", {}, says), ...actions(remedies))] : []));
}

/** Few of many, and a button that shows the others. */
function few(place, elements, most, word) {
  const hidden = elements.slice(most);
  const button = make("button", { type: "button" }, `Show ${word.startsWith("of ") ? "" : "all "}${elements.length} ${word}`);
  button.addEventListener("click", () => { button.replaceWith(...hidden); });
  by(place).replaceChildren(...elements.slice(0, most), ...(hidden.length ? [button] : []));
}

const draw = {
  sheets(part) {
    by("sheets").hidden = part.sheets.length < 2;
    const select = make("select", { id: "sheet" }, ...part.sheets.map(([name, path]) => make("option", { value: path, selected: name === part.chosen ? "" : null }, name)));
    select.addEventListener("change", () => { setFields(form, { "data.train": select.value }); ask(); });
    by("sheets").replaceChildren(make("label", { for: "sheet" }, "Sheet of the workbook"), " ", select);
  },
  first(part) { head = { first: part }; records(); by("shape").textContent = ""; },
  columns(part) {
    head.used = part.used;
    records();
    by("shape").textContent = `Read as ${SHAPES[part.shape] || `${part.shape} rows`}.`;
    guess(part.remedies, part.says);
  },
  split(part) {
    const { training } = part.counts;
    say(`${short(training)} rows to train on, ${short(part.measured)} to measure on.`, part.leaks ? "none" : "fits");
    by("next").hidden = false;
    rememberFile(form);
    by("split-bar").replaceChildren(shares(part.counts));
    by("labels").replaceChildren(...(part.labels.length ? [bars(`Labels of the training rows${part.all_labels > part.labels.length ? `: the ${part.labels.length} most frequent; ${short(part.all_labels - part.labels.length)} more are not shown` : ""}`, part.labels)] : []), ...actions(part.merges));
    by("notes").replaceChildren(...part.notes.map((note) => make("div", { class: "warning" }, make("p", { class: "message" }, note.words), ...actions(note.remedies))));
    by("leaks").hidden = false;
    const fate = part.dropped ? `${short(part.dropped)} of these rows are left out.` : "None is left out.";
    by("leaks-says").textContent = part.leaks ? `${short(part.leaks)} pairs of rows stand on both sides of the split, so the measure would repeat what was trained. ${fate}` : "No held-out row is among the training rows.";
    if (part.repeats) by("leaks-says").append(` ${short(part.repeats)} ${part.repeats === 1 ? "row repeats another" : "rows repeat others"} on the same side; ${part.repeated}.`);
    by("near-copies").replaceChildren(part.near.says, ...actions(part.near.remedies));
    if (part.contradicted) by("leaks-says").append(" ", make("b", {}, `${short(part.contradicted)} ${part.contradicted === 1 ? "text has" : "texts have"} different labels in two rows: see which is right.`));
    by("method").textContent = part.method;
    few("pairs", part.pairs.map(pair), 3, part.all > part.pairs.length ? `of ${short(part.all)} pairs` : "pairs");
  },
  tokens(part) {
    by("seen").hidden = false;
    by("seen-rows").replaceChildren(...part.rows.map((row) => {
      const pieces = row.pieces.map(([text, trained]) => (trained ? make("mark", {}, text) : text));
      const counts = `${row.source}: ${short(row.tokens)} tokens, ${short(row.trained)} of them trained${row.cut ? "; shortened" : ""}`;
      return make("figure", { class: "seen" }, make("pre", { tabindex: "0", role: "group", "aria-label": `Row ${row.source}` }, ...pieces), make("figcaption", {}, counts));
    }));
  },
  lengths(part) {
    by("lengths").hidden = false;
    const what = { truncate: "shortened", drop: "left out", refuse: "refused" }[part.too_long];
    const some = part.counted < part.rows ? ` Counted on ${short(part.counted)} of ${short(part.rows)} rows.` : "";
    by("lengths-says").textContent = `Half of the rows have at most ${short(part.median)} tokens, the longest ${short(part.longest)}. ${part.longer ? `${short(part.longer)} ${part.longer === 1 ? "is" : "are"} longer than the limit of ${short(part.limit)}, and ${part.longer === 1 ? "is" : "are"} ${what}.` : `All are within the limit of ${short(part.limit)}.`}${some}`;
    by("histogram").replaceChildren(histogram(part));
  },
  album(part) {
    const total = Object.values(part.counts).reduce((sum, count) => sum + count, 0);
    say(`${short(part.counts.training)} ${part.called} to train on, ${short(total - part.counts.training)} to measure on.`, part.alike.length ? "none" : "fits");
    by("split").hidden = false;
    by("split-bar").replaceChildren(shares(part.counts));
    by("labels").replaceChildren(bars("Sizes that are trained (buckets)", part.buckets));
    by("notes").replaceChildren(...part.remarks.map((line) => make("p", { class: "warning" }, line)));
    by("leaks").hidden = false;
    by("leaks-says").textContent = part.alike.length ? `${short(part.alike.length)} training ${part.called} show the same as one that is held out.` : `None of the held-out ${part.called} is among those of the training.`;
    by("next").hidden = false;
    by("pairs").replaceChildren(...part.alike.map((one) => make("div", { class: "pair" }, make("p", {}, make("b", {}, `${one.train} and ${one.evaluated}`), ` ${one.words}: ${one.action}.`))));
    by("album").hidden = false;
    by("album-title").textContent = part.called;
    by("buckets").textContent = part.shown < total ? `The first ${part.shown} of ${short(total)}.` : "";
    by("album-grid").replaceChildren(...part.shown_rows.map((one) => make("figure", {}, make("img", { src: one.thumb, alt: one.caption, loading: "lazy" }), make("figcaption", {}, make("b", {}, one.source), ` ${one.caption} `, make("span", { class: "soft" }, `${one.part}; ${one.size}`)))));
  },
};

function shares(counts) {
  const all = Object.values(counts).reduce((sum, count) => sum + count, 0) || 1;
  const shown = Object.entries(counts).filter(([, count]) => count);
  const drawing = svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", class: "stack small", role: "img", "aria-label": shown.map(([part, count]) => `${part} ${count}`).join(", ") });
  let place = 0;
  shown.forEach(([, count], number) => {
    drawing.append(svg("rect", { x: place, y: 0, width: Math.max(0.3, (100 * count) / all - 0.15), height: 8, class: ["k0", "k2", "k1"][number] }));
    place += (100 * count) / all;
  });
  const words = { training: "trained on", "held-out": "held out: never trained, used to choose the best state and to measure", test: "test, used once at the end" };
  const names = make("ul", { class: "stack-names" }, ...shown.map(([part, count], number) => make("li", {}, make("span", { class: `hue ${["k0", "k2", "k1"][number]}` }), words[part] || part, make("b", {}, short(count)))));
  return make("figure", { class: "plotted" }, drawing, names);
}

function bars(name, pairs) {
  const most = Math.max(...pairs.map(([, count]) => count));
  const line = ([label, count]) => make("tr", {}, make("th", { scope: "row" }, label), make("td", {}, svg("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", class: "bar-chart", "aria-hidden": "true" }, svg("rect", { width: (100 * count) / most, height: 6, class: "fill" }))), make("td", { class: "n" }, short(count)));
  return make("table", { class: "bars" }, make("caption", {}, name), make("tbody", {}, ...pairs.map(line)));
}

function histogram({ bars: all, limit }) {
  const width = 800, height = 240, left = 10, bottom = 34, top = 22;
  const high = Math.max(all.at(-1)[1], Math.min(limit, all.at(-1)[1] * 2));
  const most = Math.max(...all.map((bar) => bar[2]));
  const x = (value) => left + ((width - 2 * left) * value) / high;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `Rows by their number of tokens; the cut is at ${limit}` });
  for (const [from, to, count] of all) {
    const tall = ((height - bottom - top) * count) / most;
    drawing.append(svg("rect", { x: x(from - 1) + 1, width: Math.max(1, x(to) - x(from - 1) - 2), y: height - bottom - tall, height: tall, class: from > limit ? "fill over" : "fill" }, svg("title", {}, `${from} to ${to} tokens: ${count} rows`)));
  }
  const each = Math.ceil(all.length / 8);
  all.forEach((bar, place) => { if (place % each === each - 1) drawing.append(svg("text", { x: x(bar[1]), y: height - 14, class: "label middle" }, short(bar[1]))); });
  drawing.append(svg("text", { x: width - left, y: height - 1, class: "label end" }, "tokens of a row"));
  if (limit <= high) {
    drawing.append(svg("line", { x1: x(limit), x2: x(limit), y1: 4, y2: height - bottom, class: "cut" }));
    drawing.append(svg("text", { x: x(limit) + (x(limit) > width / 2 ? -6 : 6), y: 14, class: `label ${x(limit) > width / 2 ? "end" : ""}` }, `cut at ${short(limit)}`));
  }
  const points = all.map(([, to, count]) => ({ x: to, y: count }));
  return make("figure", { class: "plotted" }, drawing, tableOf({ name: "Rows by length", across: "tokens up to", series: [{ name: "rows", points }] }));
}

function pair(one) {
  const side = (row) => make("blockquote", {}, make("b", {}, `${row.part}, ${row.source}`), make("span", {}, row.text));
  return make("div", { class: one.leak ? "pair leak" : "pair" }, make("p", {}, make("span", { class: one.leak ? "pill worse" : "pill none" }, one.leak ? "leak" : "repeat"), ` ${one.kind}; ${one.fate}.`), ...one.rows.map(side));
}

function problems(list, remedies) {
  sayProblems(list, head ? "These rows cannot be used yet." : "The file cannot be read like this.", "too-large", remedyButtons(form, remedies, ask));
  if (list.length) by("next").hidden = true;
}

function ask() {
  clearTimeout(later);
  answers.stop();
  problems([]);
  const fields = filled();
  const query = new URLSearchParams(fields);
  const own = document.querySelector(`[data-kind="${CSS.escape(fields.kind ?? "")}"]`); // what a kind shows in place of columns
  history.replaceState(null, "", `/data?${query}`);
  by("go-on").href = `/run?${query}`;
  by("to-fit").href = `/fit?${query}`;
  by("next").hidden = true; // until the rows can be used
  by("guess").replaceChildren();
  by("columns-part").hidden = own !== null;
  for (const part of document.querySelectorAll("[data-kind]")) part.hidden = part !== own;
  for (const id of SECTIONS) by(id).hidden = true;
  by("same").hidden = true;
  by("sheets").hidden = true;
  head = null;
  if (!fields["data.train"]) return;
  by("sentence").textContent = "Reads the rows …";
  delete by("sentence").dataset.state;
  doing = "Reads the first rows";
  const shown = {
    same(found) { showSame(found); by("same").hidden = !found.command; },
    say(found) { doing = found.say; },
    part(part) {
      draw[part.part](part);
      const section = { first: "columns", columns: "columns", split: "split" }[part.part];
      if (section) by(section).hidden = false;
    },
    done() { if (!filled()["model.path"] && !own) by("sentence").append(make("span", { class: "soft" }, " Choose a model, and it is shown how the rows become its tokens.")); },
  };
  answers.open(`/data/events?${query}`, shown, (seconds) => `${doing}, for ${duration(seconds)}`);
}

offer(form, ask);
takeFile(form, ask);
form.addEventListener("input", () => { clearTimeout(later); later = setTimeout(ask, 400); });
ask();
