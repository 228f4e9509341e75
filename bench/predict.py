"""Prediction of the Triton kernel's time on a card, from its tile, its registers and the bytes that it moves.

    expected = START + max(hypot(bytes / copy, warps * INSTRUCTIONS / issued), on_chip / L2, waves * PROGRAM)

Small launches wait for a few dependent loads (PROGRAM). Large ones wait for memory (copy) and, if memory is fast, for
the multiprocessors' schedulers, which overlap in part; or for the L2 cache (each tile reads scales and ranks again).
Writes kernels/README.md's table; gpu_check.py compares it with its measurements.
"""

import re
from dataclasses import dataclass
from math import ceil, hypot
from pathlib import Path

import torch

from snpatch.kernels.patched_glu import OPTIONS, TILE, max_registers, num_programs

REGISTERS = max_registers(torch.bfloat16, interventions=1)  # per thread
MULTIPROCESSORS = 132
REGISTER_FILE = 65536  # per multiprocessor
COPY_GBS = {"h100": 3000, "h200": 4300}  # device to device, bytes read and written, measured on such cards
L2_GBS = 5500  # from others' measurements, not checked here
START_US = 2.0  # a launch inside a graph, and the plan's loads
INSTRUCTIONS = 600  # per warp of a tile that is patched and not observed, counted in the SASS
ISSUED_PER_US = MULTIPROCESSORS * 4 * 1750  # four schedulers, each one instruction per cycle, 1.75 GHz
PROGRAM_US = 1.5  # activations and scales, arithmetic and stores, one after another
TOKENS, NEURONS = (1, 16, 64, 256, 2048, 8192), (11008, 14336)


@dataclass(frozen=True)
class Prediction:
    """Prediction for one launch.

    programs, warps: of the whole grid. resident: programs on a multiprocessor at a time. bytes_in_flight: loads of
    activations that those can have outstanding, per multiprocessor.
    """

    programs: int
    warps: int
    resident: int
    bytes_in_flight: int
    floor_us: float
    expected_us: float


def predict(
    tokens: int, neurons: int, streams: int = 2, bytes_per_element: int = 2, card: str = "h100", has_groups: bool = True
) -> Prediction:
    """Predict a step in which every token is patched and none is observed."""
    n_programs = num_programs(tokens, neurons, has_groups, TILE)
    n_outputs = num_programs(tokens, neurons, False, TILE)
    threads = 32 * OPTIONS["num_warps"]
    max_resident = REGISTER_FILE // (REGISTERS * threads)
    resident = min(max_resident, ceil(n_outputs / MULTIPROCESSORS))
    tile = TILE["BLOCK_T"] * TILE["BLOCK_F"]
    activations = tokens * neurons * streams * 3 * bytes_per_element  # two read, one written
    tables = neurons * 4 * (streams + 1)  # scales and ranks
    floor_us = (activations + tables) / COPY_GBS[card] * 1e-3
    on_chip_us = (activations + tables * ceil(tokens / TILE["BLOCK_T"])) / L2_GBS * 1e-3
    waves_us = ceil(n_programs / (max_resident * MULTIPROCESSORS)) * PROGRAM_US
    issue_us = n_outputs * OPTIONS["num_warps"] * INSTRUCTIONS / ISSUED_PER_US
    return Prediction(
        n_programs,
        n_programs * OPTIONS["num_warps"],
        resident,
        resident * tile * streams * 2 * bytes_per_element,
        floor_us,
        START_US + max(hypot(floor_us, issue_us), on_chip_us, waves_us),
    )


def table() -> str:
    """Return the table for bfloat16 and both streams."""
    lines = [
        "| tokens x neurons | programs | warps | resident per multiprocessor | bytes in flight there | "
        "floor H100, H200 | expected H100, H200 |",
        "|---|---|---|---|---|---|---|",
    ]
    for neurons in NEURONS:
        for tokens in TOKENS:
            h100, h200 = (predict(tokens, neurons, card=card) for card in COPY_GBS)
            lines.append(
                f"| {tokens} x {neurons} | {h100.programs} | {h100.warps} | {h100.resident} | "
                f"{h100.bytes_in_flight / 1024:.0f} KB | {h100.floor_us:.1f}, {h200.floor_us:.1f} us | "
                f"{h100.expected_us:.1f}, {h200.expected_us:.1f} us |"
            )
    return "\n".join(lines)


def fill_table(text: str) -> str:
    """Return kernels/README.md with its table computed again."""
    pattern = r"(<!-- table: predicted -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{table()}\n{match[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = Path(__file__).resolve().parent.parent / "kernels" / "README.md"
    readme.write_text(fill_table(readme.read_text()))
