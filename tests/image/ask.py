"""Runs inside the image: one chat question through the official client. Prints one JSON object."""

import json

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=30,
)
print(json.dumps({"model": model, "chat": answer.choices[0].message.content}))
