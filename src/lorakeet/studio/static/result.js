// Answers side by side: filters by outcome and words, and a few rows at first.
const rows = [...document.querySelectorAll(".review")];
const filters = document.querySelector(".filters");
const search = document.getElementById("search");
const more = document.getElementById("more-rows");
const shown = document.getElementById("shown-rows");
let outcome = "";
let most = filters ? Number(filters.dataset.first) : 0;

function apply() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fitting = rows.filter((row) => (!outcome || row.dataset.outcome === outcome) && words.every((word) => row.textContent.toLowerCase().includes(word)));
  const visible = new Set(fitting.slice(0, most));
  for (const row of rows) row.hidden = !visible.has(row);
  more.hidden = fitting.length <= most;
  shown.textContent = `${visible.size} of ${fitting.length} rows`;
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
