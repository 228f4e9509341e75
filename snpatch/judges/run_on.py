"""Cut of a completion where its model continues with the next user turn.

Why before judging: a base model often does not stop after its answer and invents another question and answer. A judge
would score the last invented turn, or all of them, and not the answer to the prompt.
"""

import re

NEXT_USER_TURN = re.compile(
    r"<[|｜](?i:user)[|｜]>"  # Tulu, Zephyr, Phi-3, DeepSeek
    r"|<\|im_start\|>user\b|<\|start_header_id\|>user<\|end_header_id\|>|<start_of_turn>user\b|<(?:human|user)>:"
    r"|\[INST\]|BEGINNING OF CONVERSATION:|GPT4 Correct User:|(?:^|\n)### ?(?:Human|User|Instruction):"
    r"|(?:^|\n\n)Human:|(?:^|\n)USER:|\sUSER:(?=[\s\S]*\sASSISTANT:)"
)
"""The user marks of common chat formats. The ordinary words Human and User are marks only where a format writes them:
`Human:` after a blank line (hh-rlhf), `USER:` on a new line or before an `ASSISTANT:` (Vicuna, Beavertails)."""


def cut_run_on(completion: str) -> str:
    """Return a completion up to the first mark of a next user turn; all of it if there is none."""
    match = NEXT_USER_TURN.search(completion)
    return completion if match is None else completion[: match.start()]
