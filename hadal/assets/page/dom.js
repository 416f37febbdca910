// Small helpers for elements, words and numbers. No text ever becomes markup: elements are made, never parsed.

import { PATHS } from "./icons.js";

const SVG = "http://www.w3.org/2000/svg";

/** h("p.quiet", {id}, …children): `on…` are listeners, `value` is a property, null and false are left out. */
export const h = (spec, ...rest) => make((tag) => document.createElement(tag), spec, rest);
export const s = (spec, ...rest) => make((tag) => document.createElementNS(SVG, tag), spec, rest);

function make(create, spec, rest) {
  const [tag, ...classes] = spec.split(".");
  const el = create(tag);
  const props = rest[0]?.constructor === Object ? rest.shift() : {};
  for (const [key, value] of Object.entries(classes.length ? { class: classes.join(" "), ...props } : props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else if (key === "value") el.value = value;
    else el.setAttribute(key, value === true ? "" : value);
  }
  el.append(...rest.flat(Infinity).filter(Boolean));
  return el;
}

export const $ = (id) => document.getElementById(id);

export const icon = (name) =>
  s("svg.icon", { viewBox: "0 0 24 24", "aria-hidden": "true" }, s("path", { d: PATHS[name] }));

/** A button with an icon alone; its name is its tooltip, too. */
export const iconButton = (name, label, onclick, props) =>
  h("button.icon-button", { type: "button", "aria-label": label, title: label, onclick, ...props }, icon(name));
export const button = (label, onclick, kind = "") => h(`button${kind}`, { type: "button", onclick }, label);

for (const el of document.querySelectorAll("[data-icon]")) el.prepend(icon(el.dataset.icon));

/** Whether a key sends the message; on glass, Enter starts a line. */
export const sends = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(hover: none)").matches;

export const newId = () => `m${Date.now().toString(36)}${Math.random().toString(36).slice(2, 10)}`;

export const count = new Intl.NumberFormat("en", { maximumFractionDigits: 0 }).format;
export const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format;
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
export const percent = (part) => `${(part * 100).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
export const rate = (n) => (n >= 100 || !n ? count(n) : n.toFixed(1));

/** Small sums keep the digits that say something. */
export function money(usd) {
  const n = Number(usd) || 0;
  return n > 0 && n < 1e-4 ? "< $0.0001" : `$${n.toFixed(n === 0 || n >= 1 ? 2 : 4)}`;
}

export function seconds(n) {
  const parts = (big, unit, small, rest) => `${Math.floor(n / big)} ${unit} ${Math.floor((n % big) / small)} ${rest}`;
  if (n < 60) return n < 0.1 ? "< 0.1 s" : `${n.toFixed(n < 10 ? 1 : 0)} s`;
  return n < 3600 ? parts(60, "min", 1, "s") : n < 86400 ? parts(3600, "h", 60, "min") : parts(86400, "d", 3600, "h");
}

export function bytes(n) {
  const power = n < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(n) / 10));
  return `${(n / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = h("textarea.sr", { value: text }); // plain http on another machine has no clipboard API
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** A button that copies what `text()` gives and shows for a moment that it did. */
export function copyButton(text, label = "Copy") {
  const made = iconButton("copy", label, async () => {
    await copy(text());
    announce("Copied");
    made.replaceChildren(icon("check"));
    setTimeout(() => made.replaceChildren(icon("copy")), 1500);
  });
  return made;
}

/** Tells a screen reader something that the eye sees by itself. */
export function announce(text) {
  $("live").textContent = "";
  requestAnimationFrame(() => ($("live").textContent = text));
}

let hiding;
/** A short message at the foot of the window, with an action such as Undo where there is one. */
export function notice(text, label, action) {
  const close = () => $("notice").replaceChildren();
  clearTimeout(hiding);
  hiding = setTimeout(close, label ? 8000 : 5000);
  $("notice").replaceChildren(h("span", text), label ? button(label, () => (close(), action())) : "");
}
