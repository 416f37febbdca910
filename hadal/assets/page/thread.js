// The messages on the screen, and the one that grows.

import { openCalls, path, versions } from "./talk.js";
import { Markdown } from "./markdown.js";
import { highlight } from "./highlight.js";
import { $, copyButton, count, h, icon, iconButton, money, plural, rate, seconds } from "./dom.js";

const NEAR = 80; // pixels from the end within which the view follows the answer
const scroller = $("scroll");
let following = true;
scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  $("to-end").hidden = following;
});
$("to-end").onclick = () => toEnd(true);

export function toEnd(always) {
  if (always) following = true;
  if (following) scroller.scrollTop = scroller.scrollHeight;
}

/** Shows the branch of `talk`; gives the Answer of `live`, the message that grows, if it is among them. */
export function showThread(talk, live, act) {
  const nodes = path(talk);
  const results = new Map(nodes.filter((node) => node.role === "tool").map((node) => [node.call, node]));
  const open = live ? [] : openCalls(talk);
  let growing;
  const views = nodes.filter((node) => node.role !== "tool").map((node) => {
    if (node.role === "user") return userTurn(talk, node, act);
    const answer = new Answer(talk, node, act, { results, open, live: node === live });
    if (node === live) growing = answer;
    return answer.element;
  });
  $("thread").replaceChildren(...views);
  return growing;
}

function actions(talk, node, act, ...buttons) {
  const all = versions(talk, node);
  const at = all.indexOf(node);
  const turn = (step, name, label) => iconButton(name, label, () => act.show(all[at + step]), { disabled: !all[at + step] });
  const switcher = all.length > 1 && h("span", { class: "versions" },
    turn(-1, "left", "Previous version"), `${at + 1} / ${all.length}`, turn(1, "right", "Next version"));
  const remove = iconButton("trash", "Delete from here on", () => act.remove(node));
  return h("div", { class: "actions" }, switcher, buttons, remove);
}

export const fileChip = (file, remove) =>
  h("li", { class: "chip" }, icon("file"), h("span", { class: "name" }, file.name),
    h("span", { class: "quiet" }, file.tokens ? `${file.exact ? "" : "≈ "}${plural(file.tokens, "token")}` : "counting …"), remove);

function userTurn(talk, node, act) {
  const text = h("div", { class: "said", tabindex: node.content.length > 1500 ? 0 : null }, node.content);
  const edit = iconButton("edit", "Edit", () => {
    const field = h("textarea", { "aria-label": "Edit message", value: node.content, rows: Math.min(12, node.content.split("\n").length + 1) });
    const close = () => (form.replaceWith(text), (bar.hidden = false), bar.querySelector("[data-edit]").focus());
    const form = h("form", { class: "edit", onsubmit: (event) => (event.preventDefault(), act.edit(node, field.value)) }, field,
      h("div", { class: "row" }, h("button", { type: "button", onclick: close }, "Cancel"), h("button", { class: "main" }, "Send")));
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") event.stopPropagation(), close();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), form.requestSubmit();
    });
    text.replaceWith(form);
    bar.hidden = true;
    field.focus();
  }, { "data-edit": true });
  const bar = actions(talk, node, act, copyButton(() => node.content), edit);
  const files = node.files?.length && h("ul", { class: "files", "aria-label": "Files" }, node.files.map((file) => fileChip(file)));
  return h("article", { class: "turn user", "aria-label": "You" }, files, node.content && text, bar);
}

/** One answer: thinking, text, calls, what went wrong, what it took. */
export class Answer {
  constructor(talk, node, act, { results = new Map(), open = [], live = false } = {}) {
    Object.assign(this, { talk, node, act, results, open, live, thought: 0, due: 0, waiting: false });
    this.thoughts = h("div", { class: "thoughts", tabindex: 0, role: "region", "aria-label": "Thinking" }, "");
    this.glimpse = h("span", { class: "glimpse", "aria-hidden": "true" });
    this.span = h("span", {});
    this.thinking = h("details", { class: "thinking", hidden: true }, h("summary", {}, icon("right"), this.span, this.glimpse), this.thoughts);
    this.text = h("div", { class: "md" });
    this.calls = h("div", { class: "calls" });
    this.foot = h("div", { class: "foot" });
    this.markdown = new Markdown(this.text);
    this.element = h("article", { class: "turn answer", "aria-label": `Answer of ${node.model ?? "the model"}` }, this.thinking, this.text, this.calls, this.foot);
    this.render();
    if (!live) this.finish();
    else this.tick();
  }

  /** Draws soon; a costly text is drawn less often, so that drawing takes a third of the time at most. */
  update() {
    if (this.waiting) return;
    this.waiting = true;
    const draw = () => {
      const begun = performance.now();
      if (begun < this.due) return requestAnimationFrame(draw);
      this.waiting = false;
      if (!this.live) return;
      this.render();
      toEnd();
      this.due = performance.now() + 2 * (performance.now() - begun);
    };
    requestAnimationFrame(draw);
  }

  render() {
    const { reasoning, content, calls } = this.node;
    if (reasoning) {
      this.thinking.hidden = false;
      this.thoughts.append(reasoning.slice(this.thought));
      this.thought = reasoning.length;
      this.glimpse.textContent = this.live && !content && !calls ? reasoning.slice(-160).replace(/\s+/g, " ") : "";
    }
    this.markdown.update(content);
    if (calls?.length !== this.calls.childElementCount || !this.live) this.calls.replaceChildren(...(calls ?? []).map((call) => this.call(call)));
  }

  /** Renews what runs with the clock while the answer grows. */
  tick() {
    const { node } = this;
    const spent = (Date.now() - node.at) / 1000;
    if (node.reasoning) this.span.textContent = node.times.think >= 0 ? `Thought for ${seconds(node.times.think)}` : `Thinking, ${seconds(spent - node.times.first)}`;
    const pace = node.pace > 0 && `${rate(node.pace)} tokens/s`;
    const reading = spent > 2 ? `Reading, ${seconds(spent)}` : "Reading";
    const doing = node.times.first === undefined ? reading : pace || "Writing";
    this.foot.replaceChildren(h("span", { class: "sonar", "aria-hidden": "true" }), h("span", { class: "quiet" }, doing));
  }

  finish() {
    const { node, talk, act } = this;
    this.live = false;
    this.render();
    if (node.reasoning) this.span.textContent = node.times?.think >= 0 ? `Thought for ${seconds(node.times.think)}` : "Thinking";
    const again = iconButton("again", "Answer again", () => act.again(node));
    this.foot.replaceChildren(
      ...[node.error && this.error(node.error), summary(node) && h("p", { class: "quiet" }, summary(node))].filter(Boolean),
      actions(talk, node, act, node.content && copyButton(() => node.content), again),
    );
  }

  call(call) {
    const result = this.results.get(call.id);
    const name = call.function.name;
    let form;
    if (result) form = h("details", {}, h("summary", {}, icon("right"), "Result"), h("pre", { tabindex: 0 }, result.content));
    else if (this.open.includes(call)) {
      const field = h("textarea", { rows: 2, "data-result": true });
      const send = (event) => (event.preventDefault(), this.act.result(call, field.value));
      form = h("form", { onsubmit: send }, h("label", {}, `Result of ${name}`, field), h("button", { class: "main" }, "Give result"));
    }
    return h("section", { class: "call", "aria-label": `Tool call ${name}` }, h("h3", {}, icon("tool"), name),
      h("pre", { tabindex: 0, "aria-label": "Arguments" }, highlight(pretty(call.function.arguments), "json")), form);
  }

  error({ message, status, until = 0 }) {
    const left = () => Math.ceil((until - Date.now()) / 1000);
    let wanted = false;
    const retry = h("button", { type: "button", class: "main", onclick: () => (left() > 0 ? ((wanted = true), tick()) : this.act.again(this.node)) });
    const tick = () => {
      retry.textContent = left() <= 0 ? "Retry" : wanted ? `Retrying in ${left()} s` : `Retry (in ${left()} s)`;
      if (left() <= 0 && wanted && retry.isConnected) this.act.again(this.node);
      else if (left() > 0) setTimeout(tick, 250);
    };
    tick();
    const enter = status === 401 && h("button", { type: "button", class: "main", onclick: this.act.key }, "Enter a key");
    return h("div", { class: "error", role: "alert" }, icon("alert"), h("p", {}, message[0].toUpperCase() + message.slice(1)), h("div", { class: "row" }, enter, retry));
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text || "{}"), null, 2);
  } catch {
    return text;
  }
}

const ENDS = { length: "cut at the token limit", stopped: "stopped", content_filter: "withheld by the filter" };

/** What an answer took, in one line. */
function summary({ usage, times = {}, finish, tokens, content, reasoning, calls }) {
  const made = usage?.completion_tokens ?? tokens;
  const writing = times.total - times.first;
  const hit = usage?.prompt_cache_hit_tokens;
  return [
    ENDS[finish] ?? (finish && reasoning && !content && !calls && "thought, but gave no answer"),
    made > 0 && `${usage ? "" : "≈ "}${plural(made, "token")}`,
    times.first !== undefined && `first after ${times.first.toFixed(2)} s`,
    made > 1 && writing > 0 && `${rate((made - 1) / writing)} tokens/s`,
    usage && `${hit ? count(hit) : "none"} of ${count(usage.prompt_tokens)} read from cache`,
    usage?.cost && money(usage.cost),
  ].filter(Boolean).join(" · ");
}
