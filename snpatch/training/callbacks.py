"""What goes along with TRL's training steps: a look at each loss, and weight decay towards something else than 0.

Why decay is moved after the step and not written as an own optimizer: AdamW has multiplied each weight by
1 - lr * decay, so that adding lr * decay * target makes that a pull towards the target, exactly.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import TrainerCallback

from snpatch.errors import SnpatchError

TOLERANCE = 1e-3  # of a first loss; a batch in bfloat16 may round otherwise than its reference
Watch = Callable[[int, int, Mapping[str, float]], None]  # (step, of how many, what was logged)


class LossMonitor(TrainerCallback):
    """Tells of every step, and ends the run at the first one that is not a number.

    first: what the first step's loss must be, as DPO's is log 2 where policy and reference are one model.
    """

    def __init__(self, watch: Watch | None, first: float | None = None) -> None:
        self._watch, self._first = watch, first

    def on_log(self, args, state, control, logs, **kwargs) -> None:  # the signature is transformers'
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                what = "the loss" if name == "loss" else "the gradient"
                raise SnpatchError(
                    f"training: {what} is {logs[name]} at step {state.global_step}: lower the learning rate, or look "
                    "for broken rows; nothing was saved after the last checkpoint"
                )
        is_first = "loss" in logs and state.global_step == 1 and self._first is not None
        if is_first and abs(float(logs["loss"]) - self._first) > TOLERANCE:
            raise SnpatchError(
                f"training: the first step's loss is {logs['loss']}, not {self._first:.4f}: the reference is not the "
                "model that training starts from (is this version of TRL or PEFT supported?)"
            )
        if "loss" in logs and state.is_world_process_zero and self._watch:
            self._watch(state.global_step, state.max_steps, logs)


class WeightDecayTowards(TrainerCallback):
    """Turns AdamW's decay towards 0 into one towards a target. targets: trained parameter -> its own shape."""

    def __init__(self, targets: Mapping[torch.nn.Parameter, Tensor]) -> None:
        self._targets = targets

    def on_train_begin(self, args, state, control, optimizer, **kwargs) -> None:  # the signature is transformers'
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds torch's own
        if not isinstance(optimizer, torch.optim.AdamW):
            raise SnpatchError(f"weight_decay_target = 1 is for torch's AdamW, got {type(optimizer).__name__}")
        if strangers := len(self._targets) - sum(
            p in self._targets for g in optimizer.param_groups for p in g["params"]
        ):
            raise SnpatchError(f"weight_decay_target = 1: {strangers} trained vectors are not the optimizer's own")
        self._targets = {parameter: target.to(parameter.device) for parameter, target in self._targets.items()}
        optimizer.register_step_post_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._targets and parameter.grad is not None:
                    parameter.add_(self._targets[parameter], alpha=group["lr"] * group["weight_decay"])
