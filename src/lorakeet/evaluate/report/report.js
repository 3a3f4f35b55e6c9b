"use strict";
document.documentElement.classList.add("js");
(function () {
  const rows = Array.from(document.querySelectorAll(".review"));
  const buttons = Array.from(document.querySelectorAll(".filters button"));
  const label = document.querySelector(".filters select");
  const shown = document.querySelector(".filters output");
  let outcome = "";

  function apply() {
    let count = 0;
    for (const row of rows) {
      const keep = (!outcome || row.dataset.outcome === outcome) && (!label || !label.value || row.dataset.label === label.value);
      row.hidden = !keep;
      count += keep ? 1 : 0;
    }
    if (shown) shown.textContent = count + " of " + rows.length + " rows";
  }

  for (const button of buttons) {
    button.addEventListener("click", function () {
      outcome = button.dataset.outcome;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      apply();
    });
  }
  if (label) label.addEventListener("change", apply);

  for (const quote of document.querySelectorAll(".review blockquote")) {
    quote.classList.add("long");
    if (quote.scrollHeight <= quote.clientHeight + 4) { quote.classList.remove("long"); continue; }
    const more = document.createElement("button");
    more.className = "more";
    more.type = "button";
    more.textContent = "Show all";
    more.setAttribute("aria-expanded", "false");
    more.addEventListener("click", function () {
      const open = quote.classList.toggle("open");
      more.setAttribute("aria-expanded", String(open));
      more.textContent = open ? "Show less" : "Show all";
    });
    quote.after(more);
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", function () {
      const code = button.parentElement.querySelector("code");
      const done = function () { button.textContent = "Copied"; };
      const select = function () { getSelection().selectAllChildren(code); };
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select);
      else select();
    });
  }
  apply();
})();
