// What the server does now and did in the last quarter of an hour, drawn from its own account.

import { status } from "./api.js";
import { $, bytes, compact, count, h, money, percent, plural, rate, s, seconds } from "./dom.js";

const EVERY = 2000; // milliseconds
const SPAN = 900; // seconds that the curves show
const WIDTH = 600;
const HEIGHT = 120;
let turn = 0; // of watching: a view that was left ends with its turn

/** Starts or stops the view. */
export async function watch(on) {
  for (const mine = ++turn; on && mine === turn; await new Promise((wake) => setTimeout(wake, EVERY))) {
    let wrong = "";
    try {
      if (!document.hidden) draw(await status());
    } catch (error) {
      wrong = error.message;
    }
    $("status-error").textContent = wrong;
    $("status-error").hidden = !wrong;
  }
}

function draw(it) {
  const { cache = {}, spend = {}, history = [], running = 0 } = it;
  const facts = [it.model, it.version && `Hadal ${it.version}`, it.uptime_s >= 0 && `up for ${seconds(it.uptime_s)}`];
  $("status-facts").textContent = facts.filter(Boolean).join(" · ");
  const queue = [`${plural(it.waiting ?? 0, "request")} waiting`, it.max_concurrent && `room for ${it.max_concurrent}`];
  const speed = [
    it.prefill_tokens_per_second >= 0 && `reading ${rate(it.prefill_tokens_per_second)} tokens/s`,
    it.draft_acceptance >= 0 && it.draft_acceptance !== null && `${percent(it.draft_acceptance)} of drafts kept`,
  ];
  const held = cache.total_bytes && `${bytes(cache.used_bytes)} of ${bytes(cache.total_bytes)} in use`;
  const fill = bar(cache.total_bytes ? cache.used_bytes / cache.total_bytes : 0, "Cache memory in use");
  const hits = curve(history, "hit_rate", "Share of prompt tokens found in the cache", percent, 1);
  const pace = curve(history, "tokens_per_second", "Tokens per second", rate);
  const sum = [`${money(spend.total)} in all`, spend.price_list && `prices: ${spend.price_list}`];
  $("tiles").replaceChildren(
    tile("Queue", count(running), "running", queue, queueChart(history)),
    tile("Throughput", rate(it.tokens_per_second ?? 0), "tokens/s written", speed, pace),
    tile("Spend", money(spend.today), "today", sum, dayChart(spend.by_day ?? [])),
    tile("Cache", percent(cache.hit_rate ?? 0), "of prompt tokens found", [held], fill, hits, reasons(cache.reasons)),
  );
}

function tile(name, figure, unit, notes, ...pictures) {
  const head = [h("h2", name), h("p.figure", h("strong", figure), ` ${unit}`)];
  return h("section.tile", { "aria-label": name }, head, h("p.quiet", notes.filter(Boolean).join(" · ")), pictures);
}

function picture(label, shapes, ...below) {
  const frame = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label };
  const axis = h("div.axis.quiet", { "aria-hidden": "true" }, below.map((word) => h("span", word)));
  return [s("svg.chart", frame, shapes), axis];
}

const nothing = (text) => h("p.chart.empty.quiet", text);
const top = (history, ...names) => Math.max(0, ...history.flatMap((at) => names.map((name) => at[name] ?? 0)));

/** A series as a line with the water under it, down to `base`; `y` maps a value to the picture. */
function area(history, name, base, y, kind) {
  const end = history.at(-1).t;
  const x = (at) => (WIDTH * (1 - (end - at.t) / SPAN)).toFixed(1);
  const points = history.map((at) => `${x(at)},${y(at[name] ?? 0).toFixed(1)}`).join(" ");
  const filled = `${x(history[0])},${base} ${points} ${WIDTH},${base}`;
  return [s(`polygon.area.${kind}`, { points: filled }), s(`polyline.line.${kind}`, { points })];
}

function curve(history, name, label, said, most = top(history, name)) {
  if (history.length < 2) return nothing("Nothing to draw yet.");
  const y = (value) => HEIGHT - 2 - (HEIGHT - 6) * Math.min(1, value / (most || 1));
  const line = area(history, name, HEIGHT, y, "up");
  const [now, high] = [history.at(-1)[name] ?? 0, top(history, name)].map(said);
  const told = `${label} in the last 15 minutes: now ${now}, at most ${high}.`;
  return picture(told, line, "15 min ago", `top ${said(most)}`, "now");
}

/** Running requests rise above the water line, waiting ones hang below it. */
function queueChart(history) {
  if (history.length < 2) return nothing("Nothing to draw yet.");
  const high = Math.max(1, top(history, "running", "waiting"));
  const surface = HEIGHT / 2;
  const y = (sign) => (n) => surface - (sign * (surface - 4) * n) / high;
  const water = s("line.surface", { x1: 0, x2: WIDTH, y1: surface, y2: surface });
  const most = `${count(top(history, "running"))} running and ${count(top(history, "waiting"))} waiting`;
  const told = `Requests in the last 15 minutes: at most ${most}.`;
  const waiting = area(history, "waiting", surface, y(-1), "down");
  const active = area(history, "running", surface, y(1), "up");
  return picture(told, [waiting, active, water], "15 min ago", "▲ running  ▼ waiting", "now");
}

function dayChart(days) {
  if (!days.length) return nothing("Nothing spent yet.");
  const shown = days.slice(-30);
  const high = Math.max(...shown.map((day) => Number(day.cost)));
  const step = WIDTH / Math.max(7, shown.length);
  const bars = shown.map(({ day, cost, hit = 0, miss = 0, output = 0 }, i) => {
    const height = Math.max(2, (HEIGHT - 4) * (Number(cost) / high || 0));
    const told = `${day}: ${money(cost)}; ${compact(hit)} cached, ${compact(miss)} read, ${compact(output)} written`;
    return s("rect.day", { x: (i + 0.15) * step, y: HEIGHT - height, width: step * 0.7, height }, s("title", told));
  });
  const told = `Spend by day: ${shown.map((day) => `${day.day} ${money(day.cost)}`).join(", ")}`;
  return picture(told, bars, shown[0].day, `top ${money(high)}`, shown.length > 1 && shown.at(-1).day);
}

function bar(part, label) {
  const frame = { viewBox: "0 0 100 1", preserveAspectRatio: "none", role: "img" };
  const rects = [s("rect.rail", { width: 100, height: 1 }), s("rect.part", { width: 100 * part, height: 1 })];
  return s("svg.bar", { ...frame, "aria-label": `${label}: ${percent(part)}` }, rects);
}

/** Why prompts were not found, the most frequent reason first. */
function reasons(counted = {}) {
  const sorted = Object.entries(counted).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]).slice(0, 6);
  const row = ([name, n]) =>
    h("li", h("span", name.replaceAll("_", " ")), bar(n / sorted[0][1], name), h("span.quiet", compact(n)));
  return sorted.length > 0 && [h("h3.quiet", "Why others were not found"), h("ul.reasons", sorted.map(row))];
}
