// Answers side by side: filters by outcome and words, and a few rows at first.
const rows = [...document.querySelectorAll(".review")];
const filters = document.querySelector(".filters");
const search = document.getElementById("search");
const more = document.getElementById("more-rows");
const shown = document.getElementById("shown-rows");
let outcome = "";
let most = filters ? Number(filters.dataset.first) : 0;

/** Without case and accents: "critica" finds "Crítica". */
const plain = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();

function apply() {
  const words = plain(search.value).split(/\s+/).filter(Boolean);
  const fitting = rows.filter((row) => (!outcome || row.dataset.outcome === outcome) && words.every((word) => plain(row.textContent).includes(word)));
  const visible = new Set(fitting.slice(0, most));
  for (const row of rows) row.hidden = !visible.has(row);
  more.hidden = fitting.length <= most;
  shown.textContent = fitting.length ? `${visible.size} of ${fitting.length} rows` : words.length ? "No row has these words." : "No such row.";
}

if (filters) {
  filters.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    outcome = button.dataset.outcome;
    for (const other of filters.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
    apply();
  });
  search.addEventListener("input", apply);
  more.addEventListener("click", () => { most += 40; apply(); });
  apply();
}
