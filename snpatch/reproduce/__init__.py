"""The paper in one command: train or reuse the pairs, rank, run every experiment, and compare with the paper.

- `preset`: presets and their TOML files
- `inputs`: content hashes of everything that steps read
- `steps`: steps that run once
- `launching`: training commands and their processes
- `pipeline`: the steps of a preset and the experiment config that they make
- `cost_model`, `plan`: estimates and the table of `--dry-run`
- `paper`, `comparison`: the paper's numbers, next to the measured ones
- `report`: report.md, report.json, reproduction.csv
"""
