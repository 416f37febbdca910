// The list of conversations: search, rename, delete with undo, and a drawer where the window is narrow.

import * as store from "./store.js";
import { $, h, iconButton, notice } from "./dom.js";

const narrow = matchMedia("(max-width: 760px)");
const tell = (name, detail) => dispatchEvent(new CustomEvent(name, { detail }));
let talks = null; // id -> conversation
let shown = null;

/** Draws the list with `current` marked; `changed` is a conversation that is new or changed, or null for all. */
export async function list(current = shown, changed) {
  shown = current;
  if (!talks || changed === null) talks = new Map((await store.all()).map((talk) => [talk.id, talk]));
  if (changed) talks.set(changed.id, changed);
  draw();
}

function draw() {
  const wanted = $("search").value.trim().toLowerCase();
  const has = (text) => text.toLowerCase().includes(wanted);
  const holds = (talk) => has(talk.title) || Object.values(talk.nodes).some((node) => has(node.content));
  const found = [...talks.values()].filter((talk) => !wanted || holds(talk)).sort((a, b) => b.updated - a.updated);
  const groups = Object.entries(Object.groupBy(found, age));
  const none = h("p.quiet", wanted ? "Nothing found." : "Conversations stay in this browser.");
  const parts = groups.flatMap(([name, members]) => [h("h2", name), h("ul", members.map(entry))]);
  $("talks").replaceChildren(...(found.length ? parts : [none]));
}

function age({ updated }) {
  const days = (new Date().setHours(0, 0, 0, 0) - new Date(updated).setHours(0, 0, 0, 0)) / 86_400_000;
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 8 ? "Last seven days" : "Earlier";
}

function entry(talk) {
  const { id, title } = talk;
  const current = id === shown && "page";
  const link = h("a", { href: `#talk=${id}`, "aria-current": current, title }, title || "Untitled");
  const rename = () => {
    const field = h("input", { "aria-label": "Title", value: title });
    const done = async (keep) => {
      field.onblur = null;
      if (keep && field.value.trim()) {
        talk.title = field.value.trim();
        tell("talk-renamed", talk);
        await store.put(talk);
      }
      draw();
      $("talks").querySelector(`a[href="#talk=${id}"]`)?.focus();
    };
    field.onblur = () => done(true);
    field.onkeydown = (event) => {
      if (event.key === "Enter" || event.key === "Escape") event.stopPropagation(), done(event.key === "Enter");
    };
    link.replaceWith(field);
    field.select();
  };
  const remove = async () => {
    await store.drop(id);
    talks.delete(id);
    tell("talk-gone", id);
    draw();
    notice("Conversation deleted.", "Undo", async () => (await store.put(talk), list(shown, talk)));
  };
  return h("li", link, iconButton("edit", `Rename ${title}`, rename), iconButton("trash", `Delete ${title}`, remove));
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
