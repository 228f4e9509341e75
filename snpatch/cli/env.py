"""`snpatch env`: versions, device, and which implementation serves each op."""

import json

from snpatch.cli import options as o


def env(as_json: o.AsJson = False) -> None:
    """Versions, device, and which implementation serves each op."""
    from snpatch.environment import describe

    found = describe()
    if as_json:
        print(json.dumps(found))
        return
    for group, entries in found.items():
        print(group)
        for name, value in entries.items():
            print(f"  {name:20s} {value}")
