import os

# Models are tiny here: threads that wait for one another spin, and take ten times as long beside another process.
os.environ["OMP_NUM_THREADS"] = "1"
for name, value in {
    "TRITON_INTERPRET": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import tiny  # noqa: E402
from commands import prompts, ranking  # noqa: E402, F401


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """zoo(architecture): its tiny.Made (folder, adapters), made once a session."""
    made = {}

    def get(architecture: str, **options) -> tiny.Made:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = tiny.make(architecture, tmp_path_factory.mktemp(architecture), **options)
        return made[key]

    return get
