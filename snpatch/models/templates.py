import hashlib

from snpatch.errors import SnpatchError

Chat = list[dict[str, str]]


def tulu(chat):
    roles = {message.get("role") for message in chat}
    if not roles <= {"system", "user", "assistant"}:
        raise SnpatchError(f"the Tulu template knows system, user and assistant, got {sorted(map(str, roles))}")
    turns = "".join(f"<|{message['role']}|>\n{message['content'].strip()}\n" for message in chat)
    return f"{turns}<|assistant|>\n"


class Template:
    def __init__(self, name, tokenizer):
        self.name, self.tokenizer = name, tokenizer
        self.digest = hashlib.sha256(f"{name} {tokenizer.chat_template}".encode()).hexdigest()[:16]

    def ids(self, chat):
        if self.name == "tulu":
            return list(self.tokenizer(tulu(chat))["input_ids"])
        return list(self.tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"])


def open_template(template, model, tokenizer, folders):
    if template == "tokenizer" and not tokenizer.chat_template:
        raise SnpatchError(f"{model}: its tokenizer has no chat template; use template='tulu'")
    return Template("tulu" if template == "tulu" or not tokenizer.chat_template else "tokenizer", tokenizer)
