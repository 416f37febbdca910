// What the server does now and did in the last quarter of an hour, drawn from its own account.

import { status } from "./api.js";
import { $, bytes, compact, count, h, money, percent, plural, rate, s, seconds } from "./dom.js";

const EVERY = 2000; // milliseconds
const SPAN = 900; // seconds that the curves show
const WIDTH = 600;
const HEIGHT = 120;
let timer;

/** Starts or stops the view. */
export function watch(on) {
  clearTimeout(timer);
  if (on) poll();
}

async function poll() {
  try {
    if (!document.hidden) draw(await status());
    $("status-error").hidden = true;
  } catch (error) {
    $("status-error").textContent = error.message;
    $("status-error").hidden = false;
  }
  timer = setTimeout(poll, EVERY);
}

function draw(it) {
  const { cache = {}, spend = {} } = it;
  const history = it.history ?? [];
  const facts = [it.model, it.version && `Hadal ${it.version}`, it.uptime_s >= 0 && `up for ${seconds(it.uptime_s)}`];
  $("status-facts").textContent = facts.filter(Boolean).join(" · ");
  const queue = [plural(it.waiting ?? 0, "request") + " waiting", it.max_concurrent && `room for ${it.max_concurrent}`];
  const speed = [
    it.prefill_tokens_per_second >= 0 && `reading ${rate(it.prefill_tokens_per_second)} tokens/s`,
    typeof it.draft_acceptance === "number" && `${percent(it.draft_acceptance)} of drafts kept`,
  ];
  const fill = cache.total_bytes ? cache.used_bytes / cache.total_bytes : 0;
  const held = cache.total_bytes && `${bytes(cache.used_bytes)} of ${bytes(cache.total_bytes)} in use`;
  const days = spend.by_day ?? [];
  const sum = [`${money(spend.total)} in all`, spend.price_list && `prices: ${spend.price_list}`];
  const running = it.running ?? 0;
  $("tiles").replaceChildren(
    tile("Queue", running, plural(running, "running").replace(/s$/, "").replace(/^\S+ /, ""), queue, queueChart(history)),
    tile("Throughput", rate(it.tokens_per_second ?? 0), "tokens/s written", speed, curve(history, "tokens_per_second", "Tokens per second")),
    tile("Spend", money(spend.today), "today", sum, dayChart(days)),
    tile("Cache", typeof cache.hit_rate === "number" ? percent(cache.hit_rate) : "–", "of prompt tokens found", [held],
      bar(fill, "Cache memory in use"), curve(history, "hit_rate", "Share of prompt tokens found in the cache", 1), reasons(cache.reasons ?? {})),
  );
}

const tile = (name, figure, unit, notes, ...pictures) =>
  h("section", { class: "tile", "aria-label": name }, h("h2", {}, name), h("p", { class: "figure" }, h("strong", {}, String(figure)), ` ${unit}`),
    h("p", { class: "quiet" }, notes.filter(Boolean).join(" · ")), pictures);

function picture(label, ...shapes) {
  return s("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...shapes);
}

const axis = (...words) => h("div", { class: "axis quiet", "aria-hidden": "true" }, words.map((word) => h("span", {}, word)));

/** Points of a series as "x,y x,y"; `y` maps a value to the picture. */
function points(history, name, y) {
  const end = history.at(-1).t;
  return history.map((at) => `${(WIDTH * (1 - (end - at.t) / SPAN)).toFixed(1)},${y(at[name] ?? 0).toFixed(1)}`);
}

function area(line, base, kind) {
  const [first, last] = [line[0], line.at(-1)].map((point) => point.split(",")[0]);
  return [s("polygon", { class: `area ${kind}`, points: `${first},${base} ${line.join(" ")} ${last},${base}` }), s("polyline", { class: `line ${kind}`, points: line.join(" ") })];
}

const top = (history, ...names) => Math.max(1e-9, ...history.flatMap((at) => names.map((name) => at[name] ?? 0)));

function curve(history, name, label, most) {
  if (history.length < 2) return h("p", { class: "chart empty quiet" }, "Nothing to draw yet.");
  const high = most ?? top(history, name);
  const said = most ? percent : rate;
  const line = points(history, name, (value) => HEIGHT - 2 - (HEIGHT - 6) * Math.min(1, value / high));
  const told = `${label} in the last 15 minutes: now ${said(history.at(-1)[name] ?? 0)}, at most ${said(top(history, name))}.`;
  return [picture(told, area(line, HEIGHT, "up")), axis("15 min ago", `top ${said(high < 1e-6 ? 0 : high)}`, "now")];
}

/** Running requests rise above the water line, waiting ones hang below it. */
function queueChart(history) {
  if (history.length < 2) return h("p", { class: "chart empty quiet" }, "Nothing to draw yet.");
  const high = Math.max(1, top(history, "running", "waiting"));
  const surface = HEIGHT / 2;
  const y = (sign) => (value) => surface - (sign * (surface - 4) * value) / high;
  const told = `Requests in the last 15 minutes: at most ${count(top(history, "running"))} running and ${count(top(history, "waiting"))} waiting.`;
  const shapes = [area(points(history, "waiting", y(-1)), surface, "down"), area(points(history, "running", y(1)), surface, "up")];
  const surfaceLine = s("line", { class: "surface", x1: 0, x2: WIDTH, y1: surface, y2: surface });
  return [picture(told, ...shapes, surfaceLine), axis("15 min ago", "▲ running  ▼ waiting", "now")];
}

function dayChart(days) {
  if (!days.length) return h("p", { class: "chart empty quiet" }, "Nothing spent yet.");
  const shown = days.slice(-30);
  const high = Math.max(1e-12, ...shown.map((day) => Number(day.cost)));
  const step = WIDTH / Math.max(7, shown.length);
  const bars = shown.map((day, i) => {
    const tall = Math.max(2, (HEIGHT - 4) * (Number(day.cost) / high));
    const told = `${day.day}: ${money(day.cost)}; ${compact(day.hit ?? 0)} cached, ${compact(day.miss ?? 0)} read, ${compact(day.output ?? 0)} written tokens`;
    return s("rect", { class: "day", x: i * step + step * 0.15, y: HEIGHT - tall, width: step * 0.7, height: tall }, s("title", {}, told));
  });
  const told = `Spend by day: ${shown.map((day) => `${day.day} ${money(day.cost)}`).join(", ")}`;
  return [picture(told, ...bars), axis(shown[0].day, `top ${money(high)}`, shown.length > 1 && shown.at(-1).day)];
}

const bar = (part, label) =>
  s("svg", { class: "bar-chart", viewBox: "0 0 100 1", preserveAspectRatio: "none", role: "img", "aria-label": `${label}: ${percent(part)}` },
    s("rect", { class: "rail", width: 100, height: 1 }), s("rect", { class: "part", width: 100 * part, height: 1 }));

/** Why prompts were not found, the most frequent reason first. */
function reasons(counted) {
  const sorted = Object.entries(counted).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]);
  if (!sorted.length) return null;
  const high = sorted[0][1];
  const row = ([name, n]) => h("li", {}, h("span", {}, name.replaceAll("_", " ")), bar(n / high, name), h("span", { class: "quiet" }, compact(n)));
  return [h("p", { class: "quiet" }, "Why the others were not found"), h("ul", { class: "reasons" }, sorted.slice(0, 6).map(row))];
}
