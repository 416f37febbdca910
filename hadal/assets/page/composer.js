// Where a message is written: its text, its files, and how much of the context it takes.

import { countTokens } from "./api.js";
import { roughly, usedTokens, withFiles } from "./talk.js";
import { $, compact, count, iconButton, notice, s } from "./dom.js";
import { fileChip } from "./thread.js";

const LARGEST = 32 * 2 ** 20; // bytes of one file
const prompt = $("prompt");
const context = { model: null, length: 0, talk: null };
let files = [];
let draft = 0; // tokens of what stands in the field

/** What the meter measures against. */
export function measure(changes) {
  Object.assign(context, changes);
  meter();
}

export const isEmpty = () => !prompt.value.trim() && !files.length;

/** The message, which leaves the field. */
export function take() {
  const taken = { content: prompt.value.trim(), files, drafted: draft };
  prompt.value = "";
  files = [];
  drawFiles();
  fit();
  return taken;
}

async function tokensOf(text) {
  try {
    return { tokens: await countTokens(context.model, text), exact: true };
  } catch {
    return { tokens: roughly(text), exact: false };
  }
}

async function addFiles(list) {
  for (const file of list) {
    const text = file.size <= LARGEST ? await file.text() : "";
    if (!text) notice(file.size ? `${file.name} is larger than 32 MiB; give a part of it.` : `${file.name} is empty.`);
    else if (/[\0\uFFFD]/.test(text)) notice(`${file.name} is not text in UTF-8; save it as text first.`);
    else {
      const added = { name: file.name, text, tokens: 0 };
      files.push(added);
      drawFiles();
      Object.assign(added, await tokensOf(withFiles({ files: [added], content: "" })));
      drawFiles();
    }
  }
  prompt.focus();
}

function drawFiles() {
  const drop = (file) => () => {
    files = files.filter((other) => other !== file);
    drawFiles();
    prompt.focus();
  };
  const chips = files.map((file) => fileChip(file, iconButton("close", `Remove ${file.name}`, drop(file))));
  $("files").replaceChildren(...chips);
  $("files").hidden = !files.length;
  meter();
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

let counting;
prompt.addEventListener("input", () => {
  fit();
  draft = 0; // an old count says nothing about the new text
  clearTimeout(counting);
  counting = setTimeout(async () => {
    draft = prompt.value ? (await tokensOf(prompt.value)).tokens : 0;
    meter();
  }, 400);
});

/** The context as a bar with its number, and as a depth on the sounding line at the side. */
function meter() {
  if (!prompt.value) draft = 0;
  const { length, talk } = context;
  const used = talk ? usedTokens(talk) : 0;
  const wanted = used + draft + files.reduce((sum, file) => sum + file.tokens, 0);
  const over = length > 0 && wanted > length;
  const share = (n) => `${length ? Math.min(100, (100 * n) / length) : 0}%`;
  const told = `${count(wanted)} of ${count(length)} tokens${over ? ", too many" : ""}`;
  const now = { valuemax: length || 1, valuenow: Math.min(wanted, length || 1), valuetext: told };
  for (const [name, value] of Object.entries(now)) $("meter").setAttribute(`aria-${name}`, value);
  $("meter").classList.toggle("over", over);
  $("meter").title = told;
  const short = over ? `${compact(wanted - length)} too many` : `${compact(wanted)} / ${compact(length)}`;
  $("meter-text").textContent = short;
  $("meter-used").style.width = share(used);
  $("meter-draft").style.width = share(wanted - used);
  sound(used, wanted, length);
}

/** Depth on a line whose marks are powers of ten, as most happens near the top. */
function sound(used, wanted, length) {
  const depth = (n) => `${length && n > 10 ? Math.min(100, (100 * Math.log(n / 10)) / Math.log(length / 10)) : 0}%`;
  const marks = [100, 1e3, 1e4, 1e5, 1e6].filter((mark) => mark < length * 0.8).concat(length || []);
  const line = (kind, from, to, reach = 0) => s(`line.${kind}`, { x1: 38 - reach, x2: 38 + reach, y1: from, y2: to });
  $("sounding").replaceChildren(
    line("rope", "0%", "100%"),
    line("let-down", "0%", depth(wanted)),
    ...marks.map((n) => line("rope", depth(n), depth(n), 4)),
    ...marks.map((n) => s("text", { x: 28, y: depth(n), dy: 3 }, compact(n))),
    s("circle.lamp", { cx: 38, cy: depth(used), r: 4 }),
    s("circle.goal", { cx: 38, cy: depth(wanted), r: wanted > used ? 6 : 0 }),
  );
}

$("attach").onclick = () => $("picker").click();
$("picker").onchange = async () => {
  await addFiles([...$("picker").files]);
  $("picker").value = "";
};
function receive(event, held) {
  if (!held?.files.length) return;
  event.preventDefault();
  addFiles([...held.files]);
}
const hover = (on) => document.body.classList.toggle("dropping", on);
prompt.addEventListener("paste", (event) => receive(event, event.clipboardData));
addEventListener("drop", (event) => (hover(false), receive(event, event.dataTransfer)));
addEventListener("dragleave", (event) => event.relatedTarget || hover(false));
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  hover(true);
});
