"""The usual way of dynamic patching, done well: two transformers models, hooks on down_proj, a static batch.

Both models have a KV cache. The donor runs first and its hook stores the step's activations; the recipient's hook
overwrites the selected neurons. Indices are built once, and only the chosen tokens are copied to the host.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


class Hooked:
    """A recipient and a donor with hooks.

    neurons: [n, 2], (layer, neuron) to copy from the donor into the recipient. A folder without weights gives random
    ones, drawn on the device; speed does not depend on their values.
    """

    def __init__(
        self, folder: Path, recipient: list[Path], donor: list[Path], neurons: torch.Tensor, device: str
    ) -> None:
        self.models = [_model(folder, device) for _ in range(2)]
        self.device, self.donor_values = device, {}
        for role, (model, adapters) in enumerate(zip(self.models, (donor, recipient), strict=True)):
            for index, layer in enumerate(model.model.layers):
                key = f"base_model.model.model.layers.{index}.mlp.down_proj.ia3_l"
                scale = torch.ones(model.config.intermediate_size)
                for adapter in adapters:
                    scale = scale * load_file(adapter / "adapter_model.safetensors")[key][0]
                indices = neurons[neurons[:, 0] == index, 1].to(device)
                hook = self._hook(role, index, scale.to(device, torch.bfloat16), indices)
                layer.mlp.down_proj.register_forward_pre_hook(hook)

    def _hook(self, role: int, layer: int, scale: torch.Tensor, indices: torch.Tensor):
        def store(_module, inputs):
            value = inputs[0] * scale
            self.donor_values[layer] = value[..., indices]
            return (value,)

        def overwrite(_module, inputs):
            value = inputs[0] * scale
            value[..., indices] = self.donor_values[layer]
            return (value,)

        return overwrite if role else store

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Generate greedily; the batch runs until its longest completion is done. Prompts have one length."""
        ids = torch.tensor(prompts, device=self.device)
        caches, steps = [DynamicCache(), DynamicCache()], []
        for _ in range(max(lengths)):
            for model, cache in zip(self.models, caches, strict=True):
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            steps.append(ids)
        completions = torch.cat(steps, dim=1).tolist()
        return [completion[:n] for completion, n in zip(completions, lengths, strict=True)]


def _model(folder: Path, device: str):
    if any(folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()
