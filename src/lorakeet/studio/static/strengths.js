// Samples of one prompt: a slider between the strengths of the adapter, and a page that waits for its samples.
import "./compare.js"; // waits in the same way

const slider = document.getElementById("strength");
if (slider) {
  const all = [...document.querySelectorAll("#all li")];
  const show = () => {
    const one = all[Number(slider.value)];
    document.getElementById("chosen").src = one.querySelector("img").src;
    document.getElementById("chosen").alt = `With the adapter at strength ${one.dataset.strength}`;
    document.getElementById("caption").textContent = `adapter × ${one.dataset.strength}`;
    document.getElementById("shown").textContent = one.dataset.strength;
    slider.setAttribute("aria-valuetext", one.dataset.strength);
  };
  slider.addEventListener("input", show);
  show();
}
