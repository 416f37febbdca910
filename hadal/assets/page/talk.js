// A conversation is a tree of messages; `leaf` names the end of the branch on the screen.

import { newId } from "./dom.js";

export const BLANK = { system: "", temperature: "", top_p: "", max_tokens: "", seed: "", tools: "", effort: "high" };
const PER_TOKEN = 3.5; // characters, where nobody counted
const ROLES = ["user", "assistant", "tool"];

export function create(settings) {
  return { id: newId(), title: "", updated: Date.now(), leaf: null, nodes: {}, settings: { ...BLANK, ...settings } };
}

/** The messages on the screen, from the first to the leaf. */
export function path(talk) {
  const out = [];
  for (let node = talk.nodes[talk.leaf]; node; node = talk.nodes[node.parent]) out.unshift(node);
  return out;
}

export function add(talk, fields, parent = talk.leaf) {
  const node = { id: newId(), parent, at: Date.now(), content: "", ...fields };
  talk.nodes[node.id] = node;
  talk.leaf = node.id;
  talk.title ||= titleOf(node);
  return node;
}

const titleOf = (node) => (node.content || node.files?.[0]?.name || "").trim().split("\n")[0].slice(0, 80);

const children = (talk, id) => Object.values(talk.nodes).filter((node) => node.parent === id);

/** The versions of a message, itself among them, in the order they were made. */
export const versions = (talk, node) => children(talk, node.parent);

/** Makes `node` and the newest of what follows it the branch on the screen. */
export function show(talk, node) {
  for (let next = node; next; next = children(talk, next.id).at(-1)) talk.leaf = next.id;
}

/** Takes out `node` with all that follows it; another version of it is shown where there is one. */
export function remove(talk, node) {
  const doomed = [node];
  for (const next of doomed) {
    doomed.push(...children(talk, next.id));
    delete talk.nodes[next.id];
  }
  const left = children(talk, node.parent).at(-1);
  if (left) show(talk, left);
  else talk.leaf = node.parent;
}

/** Calls at the end of the branch that have no result yet. */
export function openCalls(talk) {
  const nodes = path(talk);
  const asked = nodes.findLast((node) => node.role !== "tool");
  const answered = new Set(nodes.filter((node) => node.role === "tool").map((node) => node.call));
  return asked?.calls?.filter((call) => !answered.has(call.id)) ?? [];
}

// Documents stand before the question, so that a second question about them finds them in the prefix cache.
export function withFiles(node) {
  const files = (node.files ?? []).map(
    (file) => `[file name]: ${file.name}\n[file content begin]\n${file.text}\n[file content end]\n`,
  );
  return files.join("") + node.content;
}

function message(node) {
  if (node.role === "user") return { role: "user", content: withFiles(node) };
  if (node.role === "tool") return { role: "tool", tool_call_id: node.call, content: node.content };
  const { content, reasoning, calls } = node;
  if (!content && !reasoning && !calls?.length) return null; // an answer that failed before it began
  const out = { role: "assistant", content };
  if (reasoning) out.reasoning_content = reasoning;
  if (calls?.length) out.tool_calls = calls;
  return out;
}

/** The body of the request for the next message. */
export function request(talk, model) {
  const { system, effort, tools, ...sampling } = talk.settings;
  const messages = path(talk).map(message).filter(Boolean);
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const body = { model, messages, thinking: { type: effort === "off" ? "disabled" : "enabled" } };
  if (effort !== "off") body.reasoning_effort = effort;
  for (const [name, value] of Object.entries(sampling)) if (value !== "") body[name] = Number(value);
  if (tools.trim()) body.tools = readTools(tools);
  return body;
}

/** Tools as the API takes them, from a list of tools or of bare functions; throws with what is wrong. */
export function readTools(text) {
  const list = [JSON.parse(text)].flat();
  return list.map((tool) => {
    const it = tool?.function ? tool : { type: "function", function: tool };
    if (typeof it.function?.name !== "string") throw new Error("each tool needs a name");
    return it;
  });
}

/** Folds a chunk of the stream into the message that grows. */
export function grow(node, chunk) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  node.reasoning += delta.reasoning_content ?? "";
  node.content += delta.content ?? "";
  for (const { index, id, function: made } of delta.tool_calls ?? []) {
    const call = ((node.calls ??= [])[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += made?.name ?? "";
    call.function.arguments += made?.arguments ?? "";
  }
  node.finish = choice?.finish_reason ?? node.finish;
  node.usage = chunk.usage ?? node.usage;
}

export const roughly = (text) => Math.ceil(text.length / PER_TOKEN);

/** Tokens of the branch: as the server counted them last, less the thinking, which leaves with the next question, and
 * an estimate of what no answer counted. */
export function usedTokens(talk) {
  const { system, tools } = talk.settings;
  const nodes = path(talk);
  const last = nodes.findLastIndex((node) => node.usage);
  const usage = nodes[last]?.usage;
  const thought = tools.trim() ? 0 : usage?.completion_tokens_details?.reasoning_tokens ?? 0;
  const files = (node) => (node.files ?? []).reduce((sum, file) => sum + (file.tokens || roughly(file.text)), 0);
  return nodes.slice(last + 1).reduce(
    (sum, node) => sum + files(node) + (node.drafted || roughly(node.content)),
    usage ? usage.prompt_tokens + usage.completion_tokens - thought : roughly(system + tools),
  );
}

/** What a conversation has settings for, in words. */
export function instructed({ settings: { system, effort, tools, ...sampling } }) {
  const drawn = Object.values(sampling).join("");
  return [system.trim() && "instructed", tools.trim() && "tools", drawn && "settings"].filter(Boolean).join(" · ");
}

/** Whether something read from a file is a conversation that this page can show. */
export function isTalk(it) {
  const text = (...values) => values.every((value) => typeof value === "string");
  const isCall = (call) => text(call?.id, call?.function?.name, call?.function?.arguments);
  const seen = new Set([null]); // a parent stands before its children, so there is no circle
  const isNode = ([id, node]) =>
    node?.id === id && seen.has(node.parent) && seen.add(id) && ROLES.includes(node.role) && text(node.content) &&
    (node.role !== "assistant" || (text(node.reasoning) && node.times instanceof Object)) &&
    text(node.error?.message ?? "") && (node.calls ?? []).every(isCall) &&
    (node.files ?? []).every((file) => text(file?.name, file?.text));
  return (
    text(it?.id, it?.title) && Number.isFinite(it.updated) && it.nodes instanceof Object &&
    Object.entries(it.nodes).every(isNode) && seen.has(it.leaf)
  );
}
