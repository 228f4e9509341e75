"""`snpatch env`: print versions, device and implementations of ops."""

import json

from snpatch.cli import options as o


def env(as_json: o.AsJson = False) -> None:
    """Print versions, device, and the implementation that serves each op."""
    from snpatch.op import ops
    from snpatch.utils.environment import describe_environment

    groups = describe_environment(ops.implementations())
    if as_json:
        o.echo(json.dumps(groups))
        return
    for group, entries in groups.items():
        o.echo(group)
        for name, value in entries.items():
            o.echo(f"  {name:20s} {value}")
