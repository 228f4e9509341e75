"""Get a patched answer with OpenAI's client: python five_lines.py [URL]."""

import sys

from openai import OpenAI


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    patch = {"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": 200}
    chat: list = [{"role": "user", "content": "Tell me about yourself."}]
    answer = client.chat.completions.create(model="base", messages=chat, max_tokens=64, extra_body={"snpatch": patch})
    print(answer.choices[0].message.content, answer.to_dict()["snpatch"], sep="\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
