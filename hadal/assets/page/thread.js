// The messages on the screen, and the one that grows.

import { openCalls, path, versions } from "./talk.js";
import { Markdown } from "./markdown.js";
import { highlight } from "./highlight.js";
import { $, button, copyButton, count, h, icon, iconButton, money, plural, rate, seconds, sends } from "./dom.js";

const LEAST = 0.2; // seconds of writing below which a rate would say nothing
const NEAR = 80; // pixels from the end within which the view follows the answer
const scroller = $("scroll");
let following = true;
scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  $("to-end").hidden = following;
});
$("to-end").onclick = () => toEnd(true);

export function toEnd(always) {
  following ||= always;
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
    const answer = new Answer(talk, node, act, results, open, node === live);
    if (node === live) growing = answer;
    return answer.element;
  });
  $("thread").replaceChildren(...views);
  return growing;
}

function actions(talk, node, act, ...buttons) {
  const all = versions(talk, node);
  const at = all.indexOf(node);
  const to = (other, name, label) => iconButton(name, label, () => act.show(other), { disabled: !other });
  const [before, after] = [to(all[at - 1], "left", "Previous version"), to(all[at + 1], "right", "Next version")];
  const remove = iconButton("trash", "Delete from here on", () => act.remove(node));
  const switcher = all.length > 1 && h("span.versions", before, `${at + 1} / ${all.length}`, after);
  return h("div.actions", switcher, buttons, remove);
}

export function fileChip(file, remove) {
  const size = file.tokens ? `${file.exact ? "" : "≈ "}${plural(file.tokens, "token")}` : "counting …";
  return h("li.chip", icon("file"), h("span.name", file.name), h("span.quiet", size), remove);
}

function userTurn(talk, node, act) {
  const text = h("div.said", { tabindex: node.content.length > 1500 ? 0 : null }, node.content);
  const edit = iconButton("edit", "Edit", () => {
    const form = editor(node, act, () => (form.replaceWith(text), (bar.hidden = false), edit.focus()));
    bar.hidden = true;
    if (node.content) text.replaceWith(form);
    else bar.before(form);
    form.querySelector("textarea").focus();
  }, { "data-edit": true });
  const bar = actions(talk, node, act, copyButton(() => node.content), edit);
  const chips = node.files?.map((file) => fileChip(file)) ?? [];
  const files = chips.length > 0 && h("ul.files", { "aria-label": "Files" }, chips);
  return h("article.turn.user", { "aria-label": "You" }, files, node.content && text, bar);
}

function editor(node, act, close) {
  const rows = Math.min(12, node.content.split("\n").length + 1);
  const field = h("textarea", { "aria-label": "Edit message", value: node.content, rows });
  const onsubmit = (event) => (event.preventDefault(), act.edit(node, field.value));
  const onkeydown = (event) => {
    if (event.key === "Escape") event.stopPropagation(), close();
    if (sends(event)) event.preventDefault(), act.edit(node, field.value);
  };
  const buttons = h("div.row", button("Cancel", close), h("button.main", "Send"));
  return h("form.edit", { onsubmit, onkeydown }, field, buttons);
}

/** One answer: thinking, text, calls, what went wrong, what it took. */
class Answer {
  constructor(talk, node, act, results, open, live) {
    Object.assign(this, { talk, node, act, results, open: [], live, thought: 0, due: 0, waiting: false });
    this.thoughts = h("div.thoughts", { tabindex: 0, role: "region", "aria-label": "Thinking" });
    this.glimpse = h("span.glimpse", { "aria-hidden": "true" });
    this.span = h("span");
    const summary = h("summary", icon("right"), this.span, this.glimpse);
    this.thinking = h("details.thinking", { hidden: true }, summary, this.thoughts);
    this.text = h("div.md");
    this.calls = h("div");
    this.foot = h("div.foot");
    this.markdown = new Markdown(this.text);
    const parts = [this.thinking, this.text, this.calls, this.foot];
    this.element = h("article.turn.answer", { "aria-label": `Answer of ${node.model ?? "the model"}` }, parts);
    if (!live) return void this.finish(open);
    this.render();
    this.tick();
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
    const { reasoning, content, calls = [] } = this.node;
    this.thinking.hidden = !reasoning;
    this.thoughts.append(reasoning.slice(this.thought));
    this.thought = reasoning.length;
    const thinks = this.live && !content && !calls.length;
    this.glimpse.textContent = thinks ? reasoning.slice(-160).replace(/\s+/g, " ") : "";
    this.markdown.update(content);
    this.calls.replaceChildren(...calls.map((call) => this.call(call)));
  }

  /** Renews what runs with the clock while the answer grows. */
  tick() {
    const { at, times, pace } = this.node;
    const spent = (Date.now() - at) / 1000;
    this.span.textContent = thoughtFor(times) ?? `Thinking, ${seconds(spent - times.first)}`;
    const reading = spent > 2 ? `Reading, ${seconds(spent)}` : "Reading";
    const doing = times.first === undefined ? reading : pace > 0 ? `${rate(pace)} tokens/s` : "Writing";
    this.foot.replaceChildren(h("span.sonar", { "aria-hidden": "true" }), h("span.quiet", doing));
  }

  /** Puts what an answer took in the place of what runs; `open` are the calls that wait for a result. */
  finish(open) {
    const { node, act } = this;
    Object.assign(this, { live: false, open });
    this.render();
    this.span.textContent = thoughtFor(node.times) ?? "Thinking";
    const again = iconButton("again", "Answer again", () => act.again(node));
    const bar = actions(this.talk, node, act, node.content && copyButton(() => node.content), !node.error && again);
    this.foot.replaceChildren(node.error ? this.error(node.error) : "", h("p.quiet", summary(node)), bar);
  }

  call(call) {
    const { name } = call.function;
    const field = h("textarea", { rows: 2, "data-result": true });
    const onsubmit = (event) => {
      event.preventDefault();
      this.results.set(call.id, { content: field.value });
      section.replaceWith(this.call(call)); // alone, so that what is written for other calls stays
      this.act.result(call, field.value);
    };
    const result = this.results.get(call.id);
    const below = result
      ? h("details", h("summary", icon("right"), "Result"), h("pre", { tabindex: 0 }, result.content))
      : this.open.includes(call) &&
        h("form", { onsubmit }, h("label", `Result of ${name}`, field), h("button.main", "Give result"));
    const given = highlight(pretty(call.function.arguments), "json");
    const shown = h("pre", { tabindex: 0, "aria-label": "Arguments" }, given);
    const title = h("h3", icon("tool"), name);
    const section = h("section.call", { "aria-label": `Tool call ${name}` }, title, shown, below);
    return section;
  }

  error({ message, status, until }) {
    const left = () => Math.ceil((until - Date.now()) / 1000);
    let wanted = false;
    const tick = () => {
      retry.textContent = left() <= 0 ? "Retry" : wanted ? `Retrying in ${left()} s` : `Retry (in ${left()} s)`;
      if (left() > 0) setTimeout(tick, 250);
      else if (wanted && retry.isConnected) this.act.again(this.node);
    };
    const retry = button("", () => ((wanted = true), tick()), ".main");
    tick();
    const enter = status === 401 && button("Enter a key", this.act.key, ".main");
    const said = h("p", message.charAt(0).toUpperCase() + message.slice(1));
    return h("div.error", { role: "alert" }, icon("alert"), said, h("div.row", enter, retry));
  }
}

const thoughtFor = (times) => (times.think >= 0 ? `Thought for ${seconds(times.think)}` : null);

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text || "{}"), null, 2);
  } catch {
    return text;
  }
}

const ENDS = { length: "cut at the token limit", stopped: "stopped", content_filter: "withheld by the filter" };

/** What an answer took, in one line. */
function summary({ usage, times, finish, tokens, content, reasoning, calls }) {
  const made = usage?.completion_tokens ?? tokens;
  const hit = usage?.prompt_cache_hit_tokens;
  const writing = times.total - times.first;
  return [
    ENDS[finish] ?? (finish && reasoning && !content && !calls && "thought, but gave no answer"),
    made > 0 && `${usage ? "" : "≈ "}${plural(made, "token")}`,
    times.first >= 0 && `first after ${times.first.toFixed(2)} s`,
    made > 1 && writing > LEAST && `${rate((made - 1) / writing)} tokens/s`,
    usage && `${hit ? count(hit) : "none"} of ${count(usage.prompt_tokens)} read from cache`,
    usage?.cost && money(usage.cost),
  ].filter(Boolean).join(" · ");
}
