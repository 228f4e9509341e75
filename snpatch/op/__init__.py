"""The op: its plan, its definition in plain PyTorch, and the dispatch to C++ and Triton."""
