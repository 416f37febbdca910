// Small helpers for elements, words and numbers. No text ever becomes markup: elements are made, never parsed.

/** An element; `on…` keys are listeners, `value` is a property, and null or false leaves an attribute out. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function s(tag, props = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(el, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else if (key === "value") el.value = value;
    else el.setAttribute(key, value === true ? "" : value);
  }
  el.append(...children.flat(Infinity).filter(Boolean));
  return el;
}

export const $ = (id) => document.getElementById(id);

export const icon = (name) => s("svg", { class: "icon", "aria-hidden": "true" }, s("use", { href: `#i-${name}` }));

/** A button that shows an icon alone; its name is its tooltip, too. */
export function iconButton(name, label, onclick, props = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

export const newId = () => `m${Date.now().toString(36)}${Math.random().toString(36).slice(2, 10)}`;

const whole = new Intl.NumberFormat("en");
export const count = (n) => whole.format(Math.round(n));
export const compact = (n) => new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(n);
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
export const percent = (part) => `${(part * 100).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
export const rate = (n) => (n >= 100 ? count(n) : n.toFixed(1));

/** Small sums keep the digits that say something. */
export function money(usd) {
  const n = Number(usd) || 0;
  return n > 0 && n < 1e-4 ? "< $0.0001" : `$${n.toFixed(n === 0 || n >= 1 ? 2 : 4)}`;
}

export function seconds(n) {
  if (n < 60) return `${n.toFixed(n < 10 ? 1 : 0)} s`;
  if (n < 3600) return `${Math.floor(n / 60)} min ${Math.floor(n % 60)} s`;
  return n < 86400 ? `${Math.floor(n / 3600)} h ${Math.floor((n % 3600) / 60)} min` : plural(Math.floor(n / 86400), "day");
}

export function bytes(n) {
  const power = n < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(n) / 10));
  return `${(n / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = h("textarea", { value: text, class: "sr" }); // plain http on another machine has no clipboard API
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Tells a screen reader something that the eye sees by itself. */
export function announce(text) {
  $("live").textContent = "";
  requestAnimationFrame(() => ($("live").textContent = text));
}

let hiding;
/** A short message at the foot of the window, with an action such as Undo where there is one. */
export function notice(text, label, action) {
  clearTimeout(hiding);
  const close = () => $("notice").replaceChildren();
  const button = label && h("button", { type: "button", onclick: () => (close(), action()) }, label);
  $("notice").replaceChildren(h("span", {}, text), button || "");
  hiding = setTimeout(close, label ? 8000 : 5000);
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
