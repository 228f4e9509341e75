"""What the Triton kernel should take on a card, from its tile, its registers and the bytes that it moves.

    expected = START + max(hypot(bytes / copy, warps * INSTRUCTIONS / issued), on_chip / L2, waves * PROGRAM)

Small launches wait for a few dependent loads (PROGRAM), large ones for memory (copy) and, where memory is fast, for the
multiprocessors' schedulers, which overlap in part; or for the L2 (scales and ranks are read again by each tile).
Writes kernels/README.md's table; gpu_check.py compares it with its measurements.
"""

import re
from dataclasses import dataclass
from math import ceil, hypot
from pathlib import Path

import torch

from snpatch.kernels.patched_glu import OPTIONS, TILE, max_registers, programs

REGISTERS = max_registers(torch.bfloat16, clauses=1)  # a thread
MULTIPROCESSORS = 132
REGISTER_FILE = 65536  # of a multiprocessor
COPY_GBS = {"h100": 3000, "h200": 4300}  # device to device, bytes read and written, as measured on such cards
L2_GBS = 5500  # a lead from others' measurements
START_US = 2.0  # a launch inside a graph, and the plan's loads
INSTRUCTIONS = 600  # that a warp runs of a tile that is patched and not observed, counted in the SASS
ISSUED_PER_US = MULTIPROCESSORS * 4 * 1750  # four schedulers, one instruction each a cycle of 1.75 GHz
PROGRAM_US = 1.5  # activations and scales, arithmetic, stores: one after the other
TOKENS, NEURONS = (1, 16, 64, 256, 2048, 8192), (11008, 14336)


@dataclass(frozen=True)
class Predicted:
    """Of one launch. programs and warps: of the whole grid; resident: programs of a multiprocessor at a time;
    bytes_in_flight: loads of activations that those can have under way, of a multiprocessor."""

    programs: int
    warps: int
    resident: int
    bytes_in_flight: int
    floor_us: float
    expected_us: float


def predicted(
    tokens: int, neurons: int, streams: int = 2, bytes_per_element: int = 2, card: str = "h100", has_groups: bool = True
) -> Predicted:
    """A step in which every token is patched, and none observed."""
    n_programs = programs(tokens, neurons, has_groups, TILE)
    n_outputs = programs(tokens, neurons, False, TILE)
    threads = 32 * OPTIONS["num_warps"]
    most = REGISTER_FILE // (REGISTERS * threads)
    resident = min(most, ceil(n_outputs / MULTIPROCESSORS))
    tile = TILE["BLOCK_T"] * TILE["BLOCK_F"]
    activations = tokens * neurons * streams * 3 * bytes_per_element  # two read, one written
    tables = neurons * 4 * (streams + 1)  # scales and ranks
    floor_us = (activations + tables) / COPY_GBS[card] * 1e-3
    on_chip_us = (activations + tables * ceil(tokens / TILE["BLOCK_T"])) / L2_GBS * 1e-3
    waves_us = ceil(n_programs / (most * MULTIPROCESSORS)) * PROGRAM_US
    issue_us = n_outputs * OPTIONS["num_warps"] * INSTRUCTIONS / ISSUED_PER_US
    return Predicted(
        n_programs,
        n_programs * OPTIONS["num_warps"],
        resident,
        resident * tile * streams * 2 * bytes_per_element,
        floor_us,
        START_US + max(hypot(floor_us, issue_us), on_chip_us, waves_us),
    )


def table() -> str:
    """For bfloat16 and both streams."""
    lines = [
        "| tokens x neurons | programs | warps | resident a multiprocessor | bytes in flight there | "
        "floor H100, H200 | expected H100, H200 |",
        "|---|---|---|---|---|---|---|",
    ]
    for neurons in NEURONS:
        for tokens in TOKENS:
            one, other = (predicted(tokens, neurons, card=card) for card in COPY_GBS)
            lines.append(
                f"| {tokens} x {neurons} | {one.programs} | {one.warps} | {one.resident} | "
                f"{one.bytes_in_flight / 1024:.0f} KB | {one.floor_us:.1f}, {other.floor_us:.1f} us | "
                f"{one.expected_us:.1f}, {other.expected_us:.1f} us |"
            )
    return "\n".join(lines)


def filled(text: str) -> str:
    """kernels/README.md with its table made anew."""
    pattern = r"(<!-- table: predicted -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{table()}\n{found[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = Path(__file__).resolve().parent.parent / "kernels" / "README.md"
    readme.write_text(filled(readme.read_text()))
