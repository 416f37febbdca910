#!/bin/sh
# curl alone: a chat, a gap filled in code, Anthropic's Messages, and a batch from upload to results.
#
# sh examples/curl.sh
set -eu
URL="${HADAL_URL:-http://127.0.0.1:8000}" KEY="${HADAL_KEY:-none}"
post() { curl -sS --fail-with-body -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" "$@"; echo; }
field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" | head -n 1; }

echo "chat:"
post "$URL/v1/chat/completions" -H "x-hadal-cost: usd" -d '{"model": "deepseek-v4-flash", "max_tokens": 60,
  "thinking": {"type": "disabled"}, "messages": [{"role": "user", "content": "Who are you?"}]}'

echo "chat as a stream:"
post -N "$URL/v1/chat/completions" -d '{"model": "deepseek-v4-flash", "max_tokens": 20, "stream": true,
  "reasoning_effort": "low", "messages": [{"role": "user", "content": "Say hello."}]}'

echo "fill in the middle:"
post "$URL/beta/completions" -d '{"model": "deepseek-v4-flash", "max_tokens": 30,
  "prompt": "def add(a, b):\n    return", "suffix": "\n\nprint(add(1, 2))"}'

echo "messages:"
post "$URL/anthropic/v1/messages" -d '{"model": "claude-sonnet-4-5", "max_tokens": 60,
  "thinking": {"type": "disabled"}, "messages": [{"role": "user", "content": "Say hello."}]}'

echo "batch:"
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
for n in 1 2 3; do
    printf '{"custom_id": "sum-%s", "method": "POST", "url": "/v1/chat/completions", "body": {' "$n"
    printf '"model": "deepseek-v4-flash", "max_tokens": 30, "thinking": {"type": "disabled"}, '
    printf '"messages": [{"role": "user", "content": "What is %s + 1?"}]}}\n' "$n"
done > "$lines"
file=$(curl -sS -H "Authorization: Bearer $KEY" -F purpose=batch -F "file=@$lines" "$URL/v1/files" | field id)
batch=$(post "$URL/v1/batches" -d "{\"input_file_id\": \"$file\", \"endpoint\": \"/v1/chat/completions\",
  \"completion_window\": \"24h\"}" | field id)
output=""
for _ in $(seq 120); do
    output=$(curl -sS -H "Authorization: Bearer $KEY" "$URL/v1/batches/$batch" | field output_file_id)
    [ -n "$output" ] && break
    sleep 1
done
curl -sS -H "Authorization: Bearer $KEY" "$URL/v1/files/$output/content"
