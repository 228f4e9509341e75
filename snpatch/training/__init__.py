"""Training of adapter pairs by the paper's recipe.

- `settings`: training options; importable without TRL
- `objectives`: the paper's training data by objective
- `row_filters`: row checks, truncation and dropped-row counts
- `models`: model, tokenizer and adapter, and how they are saved
- `callbacks`: loss monitor and weight decay towards a target
- `record`: output folder, checkpoints and training.json
- `trainer`: `train_sft` and `train_dpo`
"""
