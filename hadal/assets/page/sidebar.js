// The list of conversations: search, rename, delete with undo, and a drawer where the window is narrow.

import * as store from "./store.js";
import { $, h, iconButton, notice } from "./dom.js";

const narrow = matchMedia("(max-width: 760px)");
let talks = null; // id -> conversation
let shown = null;

/** Draws the list with `current` marked; `changed` is a conversation that is new or other than before, or null for all. */
export async function list(current = shown, changed) {
  shown = current;
  if (!talks || changed === null) talks = new Map((await store.all()).map((talk) => [talk.id, talk]));
  if (changed) talks.set(changed.id, changed);
  draw();
}

function draw() {
  const wanted = $("search").value.trim().toLowerCase();
  const holds = (talk) => [talk, ...Object.values(talk.nodes)].some((it) => (it.title ?? it.content).toLowerCase().includes(wanted));
  const found = [...talks.values()].filter((talk) => !wanted || holds(talk)).sort((a, b) => b.updated - a.updated);
  const groups = Object.entries(Object.groupBy(found, age));
  const part = ([name, members]) => [name && h("h2", {}, name), h("ul", {}, members.map(entry))];
  const none = h("p", { class: "quiet" }, wanted ? "Nothing found." : "Conversations stay in this browser.");
  $("talks").replaceChildren(...(found.length ? groups.flatMap(part) : [none]));
}

function age({ updated }) {
  const days = (new Date().setHours(0, 0, 0, 0) - new Date(updated).setHours(0, 0, 0, 0)) / 86_400_000;
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 8 ? "Last seven days" : "Earlier";
}

function entry(talk) {
  const link = h("a", { href: `#talk=${talk.id}`, "aria-current": talk.id === shown ? "page" : null, title: talk.title }, talk.title || "Untitled");
  const rename = () => {
    const field = h("input", { "aria-label": "Title", value: talk.title });
    const done = async (keep) => {
      field.onblur = null;
      if (keep && field.value.trim()) await save(talk, { title: field.value.trim() });
      await list();
      $("talks").querySelector(`a[href="#talk=${talk.id}"]`)?.focus();
    };
    field.onblur = () => done(true);
    field.onkeydown = (event) => {
      if (event.key === "Enter" || event.key === "Escape") event.stopPropagation(), done(event.key === "Enter");
    };
    link.replaceWith(field);
    field.select();
  };
  const remove = async () => {
    await store.drop(talk.id);
    talks.delete(talk.id);
    dispatchEvent(new CustomEvent("talk-gone", { detail: talk.id }));
    await list();
    notice("Conversation deleted.", "Undo", async () => (await store.put(talk), list(shown, talk)));
  };
  return h("li", {}, link, iconButton("edit", `Rename ${talk.title}`, rename), iconButton("trash", `Delete ${talk.title}`, remove));
}

async function save(talk, changes) {
  Object.assign(talk, changes);
  dispatchEvent(new CustomEvent("talk-renamed", { detail: talk }));
  await store.put(talk);
}

$("search").addEventListener("input", draw);

export function drawer(open) {
  document.body.classList.toggle("drawer", open);
  $("menu").setAttribute("aria-expanded", open);
  $("side").inert = narrow.matches && !open;
  $("page").inert = narrow.matches && open;
  if (narrow.matches && open) $("new").focus();
}
$("menu").onclick = () => drawer(true);
$("veil").onclick = () => drawer(false);
narrow.addEventListener("change", () => drawer(false));
drawer(false);
