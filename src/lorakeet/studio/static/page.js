// What every page does: copy buttons, light and dark, and what is being prepared goes along to the next screen.

/** The token that every request that changes something repeats. */
export const csrf = document.querySelector('meta[name="csrf"]').content;

/** Sends a form to the studio and returns its JSON; an error has the studio's own message. */
export async function post(path, fields = {}) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/x-www-form-urlencoded", "x-csrf": csrf, accept: "application/json" },
    body: new URLSearchParams(fields),
  });
  const kind = response.headers.get("content-type") || "";
  const found = kind.startsWith("application/json") ? await response.json() : { message: await response.text() };
  if (!response.ok) throw new Error(found.message || `The studio answered ${response.status}.`);
  return found;
}

const TURNING = /[\x1b\u202a-\u202e\u2066-\u2069]/g; // as the templates write them: they would turn the order of what follows

/** A text as a page shows it. */
export function shown(text) {
  return text.replace(TURNING, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** Writes the texts in `node` as a page shows them. */
function mend(node) {
  const texts = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  for (let text = node.nodeType === Node.TEXT_NODE ? node : texts.nextNode(); text; text = texts.nextNode()) {
    const mended = shown(text.data);
    if (mended !== text.data) text.data = mended;
  }
}

new MutationObserver((changes) => { for (const { target, addedNodes, type } of changes) for (const node of type === "characterData" ? [target] : addedNodes) mend(node); })
  .observe(document.documentElement, { subtree: true, childList: true, characterData: true }); // whichever script draws them

/** A new element; `attributes` of null are left out, `children` are elements or texts, never HTML. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) element.setAttribute(key, ["title", "alt", "aria-label"].includes(key) ? shown(String(value)) : value);
  element.append(...children);
  return element;
}

const STOPS = "a[href], button, input, select, textarea, summary, [tabindex]";

/** Draws what is in `place` anew by `draw`; who is in it with the keyboard stays at the stop of the same name in the same part. */
export function keepingFocus(place, draw) {
  const at = place.contains(document.activeElement) ? document.activeElement : null;
  const part = at?.closest("article")?.id;
  const named = (one) => `${one.tagName} ${one.getAttribute("aria-label") || one.textContent}`;
  const name = at && named(at);
  draw();
  if (at && !at.isConnected) [...place.querySelectorAll(STOPS)].find((one) => one.closest("article")?.id === part && named(one) === name)?.focus({ preventScroll: true });
}

function copyOf(button) {
  const code = button.closest(".cmd, .file").querySelector("code");
  const done = () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
  const select = () => getSelection().selectAllChildren(code);
  if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select);
  else select();
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  document.cookie = `lorakeet-theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=strict`;
}

document.documentElement.classList.add("js");
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-draft]"); // what is being prepared goes with the user to the next screen
  if (link && document.querySelector("nav a[aria-current][data-draft]")) link.search = location.search;
  const button = event.target.closest("button");
  if (!button) return;
  if (button.classList.contains("copy")) copyOf(button);
  if (button.hasAttribute("data-theme-button")) switchTheme();
});

const sent = new WeakMap(); // when each form was sent: the second click of a double one sends nothing
document.addEventListener("submit", (event) => {
  if (event.defaultPrevented || event.target.method !== "post") return;
  if (Date.now() - (sent.get(event.target) || 0) < 1500) event.preventDefault();
  else sent.set(event.target, Date.now());
});

const menu = document.querySelector(".top nav"); // one line on narrow screens, where it can be moved
const current = menu && menu.querySelector("[aria-current]");
if (current) menu.scrollLeft = current.offsetLeft - menu.offsetLeft - (menu.clientWidth - current.clientWidth) / 2;
