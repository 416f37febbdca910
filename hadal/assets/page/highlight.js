// Four kinds of words in code, told apart well enough for reading in any language.

import { h } from "./dom.js";

const KEYWORDS = new Set(
  `abstract and as assert async await break case catch class const continue def default defer del do done elif else
  end enum esac except export extends extern false False fi final finally fn for from func function go if impl
  implements import in interface is lambda let loop match mod module mut new nil none None not null or package
  pass private protected pub public raise return select self Self static struct super switch then this throw
  trait true True try type typeof undefined union unsafe until use using var void where while with yield SELECT
  FROM WHERE JOIN LEFT ON AND OR NOT GROUP BY ORDER INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE LIMIT`
    .split(/\s+/),
);
const HASH = /^(py(thon)?|(ba|z)?sh|shell|console|ya?ml|toml|rb|ruby|r|perl|make(file)?|dockerfile|ini|elixir|julia)$/i;
const DASH = /^(sql|lua|haskell|hs|ada|elm)$/i;
const STRING = /"""[^]*?"""|'''[^]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`/;
const LONGEST = 60_000; // longer code is shown without colours

/** Nodes of `code`, with spans of class string, comment, number and keyword. */
export function highlight(code, language) {
  if (code.length > LONGEST || /^(te?xt|plain|output|diff|markdown|md)$/i.test(language)) return [code];
  const comment = HASH.test(language) ? /#.*/ : DASH.test(language) ? /--.*/ : /\/\/.*|\/\*[^]*?\*\/|<!--[^]*?-->/;
  const token = new RegExp(`(${comment.source})|(${STRING.source})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`, "g");
  const out = [];
  let from = 0;
  for (const found of code.matchAll(token)) {
    const [all, note, string, number, word] = found;
    const kind = note ? "comment" : string ? "string" : number ? "number" : KEYWORDS.has(word) && "keyword";
    if (!kind) continue;
    out.push(code.slice(from, found.index), h(`span.${kind}`, all));
    from = found.index + all.length;
  }
  return [...out, code.slice(from)];
}
