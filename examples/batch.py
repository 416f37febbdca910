"""A batch: requests uploaded as a file, answered when nobody else asks, fetched together; it outlives a restart.

pip install openai && python examples/batch.py
"""

from __future__ import annotations

import json
import os
import time

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
REVIEWS = ["The lamp is lovely.", "It broke on the first day.", "It came in a box.", "Never again!", "My cat likes it."]
FORM = {
    "type": "object",
    "properties": {"mood": {"type": "string", "enum": ["good", "bad", "neither"]}},
    "required": ["mood"],
    "additionalProperties": False,
}


def request(number: int, review: str) -> str:
    body = {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Judge the review."}, {"role": "user", "content": review}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "judgement", "schema": FORM}},
        "thinking": {"type": "disabled"},
        "max_tokens": 300,
    }
    return json.dumps({"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})


def main() -> None:
    lines = "\n".join(request(number, review) for number, review in enumerate(REVIEWS))
    upload = client.files.create(file=("reviews.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "example"}
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    print(batch.status, batch.request_counts)
    assert batch.output_file_id is not None
    for line in client.files.content(batch.output_file_id).text.splitlines():
        row = json.loads(line)
        answer = json.loads(row["response"]["body"]["choices"][0]["message"]["content"])
        print(f"{answer['mood']:8} {REVIEWS[int(row['custom_id'])]}")
    for name in (upload.id, batch.output_file_id):
        client.files.delete(name)


if __name__ == "__main__":
    main()
