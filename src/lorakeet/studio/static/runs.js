// The table of runs: a filter, what can be done with the chosen ones, and the runs that were still being read.
const table = document.querySelector("table.runs");
const filter = document.getElementById("filter");

function rows() { return [...document.querySelectorAll("table.runs tbody tr")]; }

function apply() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const row of rows()) {
    row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    count += row.hidden ? 0 : 1;
  }
  const left = Number(table.dataset.left);
  document.getElementById("shown").textContent = `${count} of ${rows().length} runs` + (left ? `; ${left} more are being read` : "");
}

function choice() {
  const count = document.querySelectorAll('input[name="name"]:checked').length;
  const overlay = document.getElementById("overlay");
  const compare = document.getElementById("compare");
  overlay.disabled = count < 1;
  compare.disabled = count !== 2;
  document.getElementById("choice").textContent = count < 1 ? "Choose runs in the table: one or more for curves, two to compare." : count !== 2 ? "Choose exactly two to compare them." : "";
}

async function refresh() {
  const open = table.tBodies[0].contains(document.activeElement) || document.querySelector("details.change[open]") || document.querySelector('input[name="name"]:checked');
  if (!open) {
    const answer = await fetch("/runs");
    const other = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("table.runs");
    if (other) {
      table.tBodies[0].replaceWith(other.tBodies[0]);
      table.dataset.left = other.dataset.left;
      apply();
    }
  }
  plan();
}

function plan() {
  const busy = rows().some((row) => row.querySelector(".pill.live"));
  if (Number(table.dataset.left)) setTimeout(refresh, 50);
  else if (busy) setTimeout(refresh, 3000);
}

if (table) {
  filter.addEventListener("input", apply);
  document.addEventListener("change", choice);
  apply();
  choice();
  plan();
}
