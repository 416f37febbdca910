// The page: which conversation is shown, what is asked, and what the answers become.

import { APIError, chat, models } from "./api.js";
import * as store from "./store.js";
import * as talks from "./talk.js";
import { isEmpty, measure, take } from "./composer.js";
import { openSettings } from "./settings.js";
import { drawer, list } from "./sidebar.js";
import { watch } from "./status.js";
import { showThread, toEnd } from "./thread.js";
import { $, announce, button, h, notice, plural, sends } from "./dom.js";

const SAVE_EVERY = 2000; // milliseconds, while an answer grows
const runs = new Map(); // conversation id -> {talk, node, stop, view} while an answer grows
let talk = fresh();
let offered = [];
let perToken = 4; // characters per token, as the last answer had it; pieces of a stream are no tokens

function fresh() {
  return talks.create({ ...store.recall("defaults", {}), effort: store.recall("effort", "high") });
}

const model = () => offered.find((it) => it.id === $("model").value) ?? offered[0];

/** Draws the conversation and all that depends on it. */
function draw() {
  const run = runs.get(talk.id);
  const view = showThread(talk, run?.node, act);
  if (run) run.view = view;
  frame();
}

/** Draws what stands around the messages. */
function frame() {
  const run = runs.get(talk.id);
  document.body.classList.toggle("busy", Boolean(run));
  document.body.classList.toggle("blank", talk.leaf === null);
  $("stop").hidden = !run;
  $("send").hidden = Boolean(run);
  entitle(talk.title);
  $("instructed").title = $("instructed").textContent = talks.instructed(talk);
  for (const choice of document.getElementsByName("effort")) choice.checked = choice.value === talk.settings.effort;
  measure({ talk });
}

function entitle(title) {
  $("title").textContent = title;
  document.title = title ? `${title} · Hadal` : "Hadal";
}

async function save(changed = talk) {
  changed.updated = Date.now();
  try {
    await store.put(changed);
    list(talk.id, changed);
  } catch (error) {
    notice(`The browser could not keep this conversation (${error.message}); export it, or delete old ones.`);
  }
}

/** Asks the model for the next message of the branch on the screen and lets it grow. */
async function answer() {
  if (runs.has(talk.id)) return;
  const asked = talk;
  const stop = new AbortController();
  let body;
  try {
    body = talks.request(asked, model()?.id ?? "");
  } catch (error) {
    return notice(`The tools in the settings cannot be read: ${error.message}.`, "Settings", () => configure("tools"));
  }
  const node = talks.add(asked, { role: "assistant", reasoning: "", model: body.model, times: {} });
  const run = { talk: asked, node, stop };
  runs.set(asked.id, run);
  draw();
  toEnd(true);
  announce("The model is answering.");
  await save(asked);
  const clock = setInterval(() => run.view?.tick(), 250);
  await follow(run, body);
  clearInterval(clock);
  runs.delete(asked.id);
  if (talk === asked) {
    run.view.finish(talks.openCalls(talk));
    frame();
    toEnd();
    const lost = document.activeElement === document.body && !matchMedia("(hover: none)").matches;
    ($("thread").querySelector("[data-result]") ?? (lost && $("prompt")))?.focus?.();
  }
  const made = node.usage?.completion_tokens ?? node.tokens ?? 0;
  if (!node.error) announce(`The answer is complete, ${plural(made, "token")}.`);
  if (!run.gone) await save(asked);
}

async function follow(run, body) {
  const { node } = run;
  const begun = performance.now();
  const since = () => (performance.now() - begun) / 1000;
  let saved = begun;
  try {
    for await (const chunk of chat(body, run.stop.signal)) {
      talks.grow(node, chunk);
      const length = node.reasoning.length + node.content.length;
      if (length || node.calls) {
        node.times.first ??= since();
        if (node.reasoning && (node.content || node.calls)) node.times.think ??= since() - node.times.first;
        node.tokens = Math.ceil(length / perToken);
        if (since() > node.times.first + 0.3) node.pace = node.tokens / (since() - node.times.first);
      }
      run.view?.update();
      if (performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        store.put(run.talk).catch(() => {}); // the save at the end tells what is wrong
      }
    }
    const characters = node.reasoning.length + node.content.length;
    if (node.usage && !node.calls) perToken = characters / node.usage.completion_tokens || 4;
  } catch (error) {
    const { name, message, status = 0, wait = 0 } = error;
    const told = error instanceof APIError ? message : `This page failed on the answer: ${message}`;
    if (name === "AbortError") node.finish = "stopped";
    else node.error = { message: told, status, until: Date.now() + wait * 1000 };
    if (node.finish !== "tool_calls") delete node.calls; // a call that broke off asks for nothing
  }
  node.times.total = since();
  if (node.reasoning) node.times.think ??= node.times.total - node.times.first;
  delete node.pace;
}

const act = {
  edit(node, text) {
    if (!text.trim() && !node.files?.length) return;
    talks.add(talk, { role: "user", content: text.trim(), files: node.files }, node.parent);
    answer();
  },
  again(node) {
    if (node.error && !node.content) talks.remove(talk, node);
    talk.leaf = node.parent;
    answer();
  },
  show(node) {
    talks.show(talk, node);
    draw();
    save();
  },
  remove(node) {
    const before = structuredClone(talk);
    talks.remove(talk, node);
    draw();
    save();
    notice("Deleted from here on.", "Undo", () => {
      if (talk.id === before.id) talk = before;
      draw();
      save(before);
    });
  },
  result(call, text) {
    talks.add(talk, { role: "tool", call: call.id, content: text });
    if (!talks.openCalls(talk).length) return answer();
    save();
    $("thread").querySelector("[data-result]").focus();
  },
  key: () => configure("key"),
};

function configure(first) {
  openSettings(talk, () => {
    draw();
    if (talk.leaf) save();
    meet();
    if (talk.nodes[talk.leaf]?.error?.status === 401) act.again(talk.nodes[talk.leaf]);
  }, first);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (runs.has(talk.id)) return;
  const waiting = $("thread").querySelector("[data-result]");
  if (waiting) {
    notice("The model waits for the result of its tool call; give it first.");
    return waiting.focus();
  }
  if (isEmpty()) return;
  talks.add(talk, { role: "user", ...take() });
  history.replaceState(null, "", `#talk=${talk.id}`);
  answer();
});
$("stop").onclick = () => runs.get(talk.id)?.stop.abort();
$("prompt").addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && isEmpty() && !runs.has(talk.id)) {
    event.preventDefault();
    [...$("thread").querySelectorAll("[data-edit]")].at(-1)?.click();
  }
});
$("composer").addEventListener("change", ({ target }) => {
  if (target.name !== "effort") return;
  talk.settings.effort = target.value;
  store.keep("effort", target.value);
  if (talk.leaf) save();
});
$("configure").onclick = $("instructed").onclick = () => configure();
$("new").onclick = () => (location.hash ? (location.hash = "") : begin());
const THEMES = { auto: "as the system", light: "light", dark: "dark" };
function wear(theme) {
  localStorage.setItem("hadal.theme", (document.documentElement.dataset.theme = theme));
  $("theme").title = `Theme: ${THEMES[theme]}`;
}
$("theme").onclick = () => {
  const names = Object.keys(THEMES);
  wear(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
};

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.body.classList.contains("drawer")) {
    drawer(false);
    $("menu").focus();
  } else if (event.key === "Escape" && !$("stop").hidden && !$("settings").open) $("stop").click();
  else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    drawer(true);
    $("search").focus();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    $("new").click();
  }
});
addEventListener("talk-gone", ({ detail }) => {
  const run = runs.get(detail);
  if (run) run.gone = true;
  run?.stop.abort();
  if (detail === talk.id) location.hash = "";
});
addEventListener("talk-renamed", ({ detail }) => {
  for (const it of [talk, runs.get(detail.id)?.talk]) if (it?.id === detail.id) it.title = detail.title;
  if (detail.id === talk.id) entitle(detail.title);
});
addEventListener("talks-read", () => list(talk.id, null));

function begin() {
  talk = fresh();
  draw();
  list(talk.id);
  $("prompt").focus();
}

/** Shows what the address names: the status, a conversation, or a new one. */
async function route() {
  const status = location.hash === "#status";
  watch(status);
  $("chat").hidden = status;
  $("status").hidden = !status;
  $("to-status").setAttribute("aria-current", status ? "page" : "false");
  drawer(false);
  if (status) return entitle("Status"), list("status");
  const id = /^#talk=(\w+)$/.exec(location.hash)?.[1];
  const found = id && (runs.get(id)?.talk ?? (await store.get(id)));
  if (!found) return begin();
  talk = found;
  draw();
  list(talk.id);
  toEnd(true);
}
addEventListener("hashchange", route);

/** Learns which models there are and how much they can hold. */
async function meet() {
  try {
    offered = await models();
    const before = $("model").value;
    $("model").replaceChildren(...offered.map(({ id }) => h("option", { value: id }, id)));
    if (offered.some(({ id }) => id === before)) $("model").value = before;
    choose();
    $("hello").textContent = `${model().id}, with room for ${plural(model().context_length, "token")}.`;
  } catch (error) {
    const remedy = error.status === 401 ? button("Enter a key", act.key, ".main") : button("Try again", meet, ".main");
    $("hello").replaceChildren(error.message, " ", remedy);
  }
}
function choose() {
  measure({ model: model()?.id, length: model()?.context_length ?? 0 });
}
$("model").onchange = choose;

wear(document.documentElement.dataset.theme);
meet();
await route();
