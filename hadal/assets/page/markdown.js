// Markdown to elements, block by block. A growing text is read again only from its last block on.

import { copyButton, h } from "./dom.js";
import { highlight } from "./highlight.js";

const DEEPEST = 8; // of quotes and lists within each other; what lies deeper stays text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+)(?=\S)/;
const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const blank = (line) => !line.trim();

/** Blocks of `text` in order: {kind, from, lines} with the offset they start at. */
function blocks(text) {
  const lines = text.split("\n");
  const heads = (n) => lines[n].includes("|") && lines[n + 1]?.includes("|") && DELIMITERS.test(lines[n + 1]);
  const out = [];
  let offset = 0;
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    let end = at + 1;
    let kind = "paragraph";
    const fence = FENCE.exec(line);
    const closes = fence && new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
    const item = ITEM.exec(line);
    if (blank(line)) kind = null;
    else if (fence) {
      kind = "code";
      while (end < lines.length && !closes.test(lines[end])) end++;
      end = Math.min(end + 1, lines.length);
    } else if (HEADING.test(line)) kind = "heading";
    else if (RULE.test(line)) kind = "rule";
    else if (/^ {0,3}>/.test(line)) {
      kind = "quote";
      while (/^ {0,3}>/.test(lines[end] ?? "")) end++;
    } else if (item) {
      kind = "list";
      const ordered = /\d/.test(item[2]);
      const belongs = (next, before) => {
        const marker = ITEM.exec(next);
        const beside = marker && marker[1].length <= item[1].length + 1;
        if (beside) return /\d/.test(marker[2]) === ordered && !RULE.test(next);
        return /^\s{2,}/.test(next) || (!blank(before) && !starts(next));
      };
      for (let next = end; next < lines.length; next++) {
        if (blank(lines[next])) continue;
        if (!belongs(lines[next], lines[next - 1])) break;
        end = next + 1;
      }
    } else if (heads(at)) {
      kind = "table";
      while (lines[end]?.includes("|")) end++;
    } else {
      while (end < lines.length && !blank(lines[end]) && !starts(lines[end]) && !heads(end)) end++;
    }
    const taken = lines.slice(at, end);
    const open = fence && (taken.length < 2 || !closes.test(taken.at(-1)));
    if (kind) out.push({ kind, from: offset, lines: taken, open });
    offset += taken.reduce((sum, each) => sum + each.length + 1, 0);
    at = end;
  }
  return out;
}

const starts = (line) => [FENCE, HEADING, RULE, ITEM, /^ {0,3}>/].some((pattern) => pattern.test(line));

function element({ kind, lines, open }, depth) {
  if (kind === "code") return codeBlock(lines, open);
  if (kind === "rule") return h("hr");
  if (kind === "heading") {
    const [, marks, words] = HEADING.exec(lines[0]);
    return h(`h${Math.min(6, marks.length + 2)}`, inline(words)); // the page has its own h1 and h2
  }
  if (kind === "quote" && depth < DEEPEST) {
    return h("blockquote", elements(lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n"), depth + 1));
  }
  if (kind === "list" && depth < DEEPEST) return list(lines, depth);
  if (kind === "table") return table(lines);
  return h("p", inline(lines.join("\n").trim()));
}

const elements = (text, depth) => blocks(text).map((block) => element(block, depth));

function list(lines, depth) {
  const [, base, mark] = ITEM.exec(lines[0]);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const marker = ITEM.exec(line);
    if (marker && marker[1].length <= base.length + 1) {
      width = Math.min(marker[0].length, marker[1].length + marker[2].length + 4);
      items.push([line.slice(marker[0].length)]);
    } else items.at(-1).push(line.slice(Math.min(width, line.search(/\S|$/))));
  }
  const start = parseInt(mark) > 1 && parseInt(mark);
  return h(
    start || /\d/.test(mark) ? "ol" : "ul",
    { start },
    items.map((item) => {
      const inner = blocks(item.join("\n"));
      const tight = inner[0]?.kind === "paragraph" && !item.some(blank);
      const rest = (tight ? inner.slice(1) : inner).map((block) => element(block, depth + 1));
      return h("li", tight ? inline(inner[0].lines.join("\n").trim()) : [], rest);
    }),
  );
}

function table(lines) {
  const inner = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "");
  const cells = (line) => inner(line).split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
  const aligned = cells(lines[1]).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "center" : "right") : null));
  const head = cells(lines[0]);
  const row = (tag, texts) => h("tr", head.map((_, i) => h(tag, { class: aligned[i] }, inline(texts[i] ?? ""))));
  const body = lines.slice(2).map((line) => row("td", cells(line)));
  const made = h("table", h("thead", row("th", head)), h("tbody", body));
  return h("div.wide", { tabindex: 0, role: "region", "aria-label": "Table" }, made);
}

function codeBlock(lines, open) {
  const text = lines.slice(1, open ? undefined : -1).join("\n");
  const language = FENCE.exec(lines[0])[2].trim();
  const code = h("code", open || !language ? document.createTextNode(text) : highlight(text, language));
  const bar = h("div.code-bar", h("span", language), copyButton(() => code.textContent, "Copy code"));
  return h("figure.code", bar, h("pre", { tabindex: 0, "aria-label": `Code ${language}` }, code));
}

const INLINE = new RegExp(
  [
    /\\([\\`*_~#|<>!-])/, // 1: an escaped character; brackets stay as they are, for formulas are written with them
    /(?<!`)(`+)(?!`)([^]{1,2000}?)(?<!`)\2(?!`)/, // 3: code
    /!?\[([^\]\n]{0,500})\]\(<?([^\s)>]{1,2000})>?(?:\s+"[^"\n]{0,200}")?\)/, // 4, 5: a link; a picture is a link to it
    /\*\*(?=[^\s*])([^]{0,1500}?[^\s])\*\*(?!\*)|(?<!\w)__(?=\S)([^]{0,1500}?\S)__(?!\w)/, // 6, 7: strong
    /\*(?=[^\s*])([^]{0,1000}?[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])([^]{0,1000}?[^\s_])_(?!\w)/, // 8, 9: emphasis
    /~~(?=\S)([^]{0,1000}?\S)~~/, // 10: struck out
    /(https?:\/\/[^\s<>"'`]{1,2000}[^\s<>"'`.,;:!?)\]}*_])/, // 11: a bare address
  ].map((part) => part.source).join("|"),
  "g",
);

/** Nodes of a text without blocks. */
function inline(text) {
  const out = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    out.push(...plain(text.slice(from, found.index)), span(found));
    from = found.index + found[0].length;
  }
  return out.concat(plain(text.slice(from)));
}

function span([all, escaped, , code, label, href, strong, strong2, em, em2, struck, address]) {
  if (escaped) return escaped;
  if (code) return h("code", code.replace(/^ (.+) $/, "$1"));
  if (href) return link(href, label || href, all);
  if (strong ?? strong2) return h("strong", inline(strong ?? strong2));
  if (em ?? em2) return h("em", inline(em ?? em2));
  return struck ? h("s", inline(struck)) : link(address, address, all);
}

const plain = (text) => text.split(/( *\n)/).filter(Boolean).map((part) => (/^ *\n$/.test(part) ? h("br") : part));

function link(href, label, otherwise) {
  const url = URL.canParse(href) && new URL(href); // without a base, so addresses within this page are no links
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return otherwise;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, label);
}

/** Shows a text that grows at its end in `root`. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.seen = ""; // what stands in `root`
    this.from = 0; // where the last block starts, which may still change
    this.last = []; // its element, with the one before it while it is too short to say what it is
    this.code = null; // the text of the last block while it is code without an end
  }

  update(text) {
    if (text === this.seen) return;
    const added = text.slice(this.seen.length);
    this.seen = text;
    if (this.code && !/[`~]/.test(added) && !this.code.data.endsWith("`") && !this.code.data.endsWith("~")) {
      return this.code.appendData(added);
    }
    for (const element of this.last) element.remove();
    const found = blocks(text.slice(this.from));
    const made = found.map((block) => element(block, 0));
    this.root.append(...made);
    const last = found.at(-1);
    if (!last) return void (this.last = []);
    const unsure = text.length - this.from - last.from < 12 && found.length > 1; // "1" may become the list's next item
    const kept = unsure ? 2 : 1;
    this.last = made.slice(-kept);
    this.from += found.at(-kept).from;
    this.code = last.open && last.lines.length > 1 ? made.at(-1).querySelector("pre code").firstChild : null;
  }
}
