"""`snpatch env`: versions, device, and which implementation serves each op."""

import json

from snpatch.cli import options as o


def env(as_json: o.AsJson = False) -> None:
    """Versions, device, and which implementation serves each op."""
    from snpatch.op import ops
    from snpatch.utils.environment import describe_environment

    found = describe_environment(ops.implementations())
    if as_json:
        o.tell(json.dumps(found))
        return
    for group, entries in found.items():
        o.tell(group)
        for name, value in entries.items():
            o.tell(f"  {name:20s} {value}")
