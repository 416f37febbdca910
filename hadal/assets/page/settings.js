// The settings of a conversation, the key, and conversations as files.

import { key } from "./api.js";
import * as store from "./store.js";
import { BLANK, isTalk, readTools } from "./talk.js";
import { $, h, notice, plural } from "./dom.js";

const dialog = $("settings");
const form = dialog.querySelector("form");
const fields = form.elements;
const NAMES = Object.keys(BLANK).filter((name) => name !== "effort");

/** Opens the dialog on `talk`; `done` is called once what it says has been taken over. */
export function openSettings(talk, done, first = "system") {
  for (const name of NAMES) fields[name].value = talk.settings[name];
  fields.key.value = key.get();
  fields.remember.checked = key.remembered;
  fields.always.checked = false;
  form.onsubmit = () => {
    for (const name of NAMES) talk.settings[name] = fields[name].value;
    if (fields.always.checked) store.keep("defaults", talk.settings);
    key.set(fields.key.value.trim(), fields.remember.checked);
    done();
  };
  dialog.showModal();
  fields[first].focus();
}

fields.tools.addEventListener("input", () => {
  let wrong = "";
  try {
    if (fields.tools.value.trim()) readTools(fields.tools.value);
  } catch (error) {
    wrong = `These are no tools: ${error.message}.`;
  }
  fields.tools.setCustomValidity(wrong);
  $("tools-wrong").textContent = wrong;
});

$("cancel").onclick = () => dialog.close();

$("export").onclick = async () => {
  const talks = await store.all();
  const text = JSON.stringify({ format: "hadal-1", talks });
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: `hadal-conversations-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  notice(`${plural(talks.length, "conversation")} written to a file.`);
};

$("import").onclick = () => $("import-file").click();
$("import-file").onchange = async ({ target }) => {
  try {
    const { talks } = JSON.parse(await target.files[0].text());
    const good = talks.filter(isTalk);
    for (const talk of good) await store.put({ ...talk, settings: { ...BLANK, ...talk.settings } });
    const bad = talks.length - good.length;
    notice(`${plural(good.length, "conversation")} read${bad ? `, ${bad} left out that this page cannot show` : ""}.`);
    dispatchEvent(new Event("talks-read"));
  } catch {
    notice("This file holds no conversations; choose one that was exported here.");
  }
  target.value = "";
};
