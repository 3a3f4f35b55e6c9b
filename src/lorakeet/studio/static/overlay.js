// Held-out curves of several runs over each other.
import { lineChart, short } from "./svg.js";

const place = document.getElementById("curves");
const curves = JSON.parse(place.dataset.curves);
const series = curves.map((one, index) => ({ name: one.name, kind: `line-${index + 1}`, points: one.points, dots: true }));
const says = curves.map((one) => `${one.name} ends at ${short(one.points.at(-1)?.y)}`).join("; ");
place.replaceChildren(lineChart({ name: "Held-out loss by step", says, series }));
