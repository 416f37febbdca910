// Where a message is written: its text, its files, how hard to think, and how much of the context it takes.

import { countTokens } from "./api.js";
import { usedTokens, withFiles } from "./talk.js";
import { $, compact, count, iconButton, notice, s } from "./dom.js";
import { fileChip } from "./thread.js";

const LARGEST = 32 * 2 ** 20; // bytes of one file
const ROUGHLY = 3.5; // characters per token where the server cannot be asked
const prompt = $("prompt");
let files = [];
let draft = 0; // tokens of what stands in the field
let context = { model: null, length: 0, talk: null };

/** What the meter measures against. */
export function measure(changes) {
  Object.assign(context, changes);
  meter();
}

export function take() {
  const taken = { content: prompt.value.trim(), files };
  if (!taken.content && !files.length) return null;
  prompt.value = "";
  files = [];
  drawFiles();
  fit();
  return taken;
}

/** Puts a message back that could not be sent. */
export const isEmpty = () => !prompt.value && !files.length;

async function tokensOf(text) {
  try {
    return { tokens: await countTokens(context.model, text), exact: true };
  } catch {
    return { tokens: Math.ceil(text.length / ROUGHLY), exact: false };
  }
}

export async function addFiles(list) {
  for (const file of list) {
    const text = file.size <= LARGEST ? await file.text() : "";
    if (!text) notice(file.size ? `${file.name} is larger than 32 MiB; give a part of it.` : `${file.name} is empty.`);
    else if (text.includes("\0") || text.includes("�")) notice(`${file.name} is not text in UTF-8; save it as text first.`);
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
  const drop = (file) => iconButton("close", `Remove ${file.name}`, () => ((files = files.filter((other) => other !== file)), drawFiles(), prompt.focus()));
  $("files").replaceChildren(...files.map((file) => fileChip(file, drop(file))));
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
  clearTimeout(counting);
  counting = setTimeout(async () => {
    const text = prompt.value;
    draft = text ? (await tokensOf(text)).tokens : 0;
    meter();
  }, 400);
});

/** The context as a bar with its number, and as a depth on the sounding line at the side. */
function meter() {
  if (!prompt.value) draft = 0;
  const used = context.talk ? usedTokens(context.talk) : 0;
  const wanted = used + draft + files.reduce((sum, file) => sum + file.tokens, 0);
  const { length } = context;
  const over = length && wanted > length;
  const share = (n) => `${length ? Math.min(100, (100 * n) / length) : 0}%`;
  const text = !length ? count(wanted) : over ? `${compact(wanted - length)} too many` : `${compact(wanted)} / ${compact(length)}`;
  $("meter").classList.toggle("over", over);
  $("meter").setAttribute("aria-valuemax", length || 1);
  $("meter").setAttribute("aria-valuenow", Math.min(wanted, length || 1));
  $("meter").setAttribute("aria-valuetext", `${count(wanted)} of ${count(length)} tokens${over ? ", too many" : ""}`);
  $("meter").title = `${count(wanted)} of ${count(length)} tokens of context`;
  $("meter-text").textContent = text;
  $("meter-used").style.width = share(used);
  $("meter-draft").style.width = share(wanted - used);
  sound(used, wanted, length);
}

/** Depth on a line whose marks are powers of ten: the sea's charts have such scales, for most happens near the top. */
function sound(used, wanted, length) {
  const depth = (n) => (length && n > 10 ? Math.min(100, (100 * Math.log(n / 10)) / Math.log(length / 10)) : 0);
  const marks = [];
  for (let mark = 100; mark < length * 0.8; mark *= 10) marks.push([mark, depth(mark)]);
  if (length) marks.push([length, 100]);
  $("sounding").replaceChildren(
    s("line", { x1: 38, x2: 38, y1: "0%", y2: "100%", class: "rope" }),
    s("line", { x1: 38, x2: 38, y1: "0%", y2: `${depth(wanted)}%`, class: "let-down" }),
    ...marks.flatMap(([n, y]) => [s("line", { x1: 34, x2: 42, y1: `${y}%`, y2: `${y}%`, class: "rope" }), s("text", { x: 28, y: `${y}%`, dy: 3 }, compact(n))]),
    s("circle", { cx: 38, cy: `${depth(used)}%`, r: 4, class: "lamp" }),
    s("circle", { cx: 38, cy: `${depth(wanted)}%`, r: wanted > used ? 6 : 0, class: "goal" }),
  );
}

$("attach").onclick = () => $("picker").click();
$("picker").onchange = async () => {
  await addFiles([...$("picker").files]);
  $("picker").value = "";
};
prompt.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  addFiles([...event.clipboardData.files]);
});
const isFile = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => isFile(event) && (event.preventDefault(), document.body.classList.add("dropping")));
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  document.body.classList.remove("dropping");
  addFiles([...event.dataTransfer.files]);
});
