"""Get a patched answer with OpenAI's client: python five_lines.py [URL]."""

import sys

from openai import OpenAI

client = OpenAI(base_url=f"{(sys.argv[1:] or ['http://127.0.0.1:8000'])[0]}/v1", api_key="none")
patch = {"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": 200}
chat: list = [{"role": "user", "content": "Tell me about yourself."}]
answer = client.chat.completions.create(model="base", messages=chat, max_tokens=64, extra_body={"snpatch": patch})
print(answer.choices[0].message.content, answer.to_dict()["snpatch"], sep="\n")
