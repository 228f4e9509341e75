"""Callbacks of TRL's trainers: a loss monitor, and weight decay towards a target other than 0.

`WeightDecayTowards` acts after the optimizer step instead of replacing the optimizer: AdamW has multiplied each weight
by 1 - lr * decay, so adding lr * decay * target makes that a pull towards the target, exactly.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import TrainerCallback

from snpatch.errors import SnpatchError

FIRST_LOSS_TOLERANCE = 1e-3  # bfloat16 may round a batch and its reference differently
StepCallback = Callable[[int, int, Mapping[str, float]], None]
"""Called as `callback(step, total_steps, logs)` after each optimizer step."""


class LossMonitor(TrainerCallback):
    """Callback that reports each step and stops training at the first loss or gradient norm that is not finite.

    Args:
        on_step: Called after each logged step in the main process.
        first_loss: Expected loss of step 1; DPO's is log 2 if policy and reference are the same model.
    """

    def __init__(self, on_step: StepCallback | None, first_loss: float | None = None) -> None:
        self._on_step, self._first_loss = on_step, first_loss

    # transformers always gives `logs` and `optimizer`; the base class has them in **kwargs.
    def on_log(self, args, state, control, logs, **kwargs) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Check the logged loss and gradient norm, then pass the logs to `on_step`.

        Only logs that have a loss are passed, in the main process.

        Raises:
            SnpatchError: Loss or gradient norm is not finite, or step 1 has another loss than `first_loss`.
        """
        for name, subject in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if name in logs and not math.isfinite(float(logs[name])):
                raise SnpatchError(
                    f"training: expected a finite {subject}, got {logs[name]} at step {state.global_step}. Lower the "
                    "learning rate, or look for broken rows; nothing was saved after the last checkpoint"
                )
        if "loss" not in logs:
            return
        if state.global_step == 1 and self._first_loss is not None:
            self._check_first_loss(float(logs["loss"]), self._first_loss)
        if state.is_world_process_zero and self._on_step:
            self._on_step(state.global_step, state.max_steps, logs)

    @staticmethod
    def _check_first_loss(loss: float, expected: float) -> None:
        if abs(loss - expected) > FIRST_LOSS_TOLERANCE:
            raise SnpatchError(
                f"training: expected a loss of {expected:.4f} at step 1, got {loss}. The reference is not the "
                "model that training starts from; check that this version of TRL and PEFT is supported"
            )


class WeightDecayTowards(TrainerCallback):
    """Callback that makes AdamW's weight decay pull each trained parameter towards its target.

    Args:
        targets: Target of each trained parameter, of the parameter's shape.
    """

    def __init__(self, targets: Mapping[torch.nn.Parameter, Tensor]) -> None:
        self._targets = targets

    def on_train_begin(  # pyright: ignore[reportIncompatibleMethodOverride]  # as on_log
        self, args, state, control, optimizer, **kwargs
    ) -> None:
        """Move each target to its parameter's device, and register the pull to run after each optimizer step.

        Raises:
            SnpatchError: The optimizer is not torch's AdamW, or lacks a parameter that has a target.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps torch's optimizer
        if not isinstance(optimizer, torch.optim.AdamW):
            raise SnpatchError(f"weight_decay_target: expected torch's AdamW, got {type(optimizer).__name__}")
        optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if missing := sum(parameter not in optimized for parameter in self._targets):
            raise SnpatchError(
                f"weight_decay_target: expected all trained vectors in the optimizer, {missing} are missing"
            )
        self._targets = {parameter: target.to(parameter.device) for parameter, target in self._targets.items()}
        optimizer.register_step_post_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._targets and parameter.grad is not None:
                    parameter.add_(self._targets[parameter], alpha=group["lr"] * group["weight_decay"])
