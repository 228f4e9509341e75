"""The paper in one command: train or reuse the pairs, rank, run every experiment, and compare with the paper.

- `preset`: presets and their TOML files
- `inputs`: content hashes of everything that steps read
- `steps`: steps that run once
- `launching`: training commands and their processes
- `pipeline`: the steps of a preset and the experiment config that they make
- `ability`: general ability by lm-evaluation-harness
- `cost_model`, `run_plan`: estimates and the table of `--dry-run`
- `paper`, `paper_comparison`: the paper's numbers, next to the measured ones
- `markdown_report`: report.md, report.json, reproduction.csv
"""
