"""The op: its plan, its definition in plain PyTorch, and which implementation serves a call."""
