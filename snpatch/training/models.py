"""The model that is trained with its tokenizer and adapter, and how the adapter is saved.

DPO's IA3 scales start as SFT's own: as one adapter on unchanged weights, the policy and TRL's frozen copy of it are the
SFT model as an engine serves it. Merged into the weights, the scales would be rounded, which gives another model. The
saved adapter is DPO's own factor, the quotient, because engines stack the two: SFT * DPO.
"""

import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from snpatch.errors import SnpatchError
from snpatch.models.adapters import load_adapters
from snpatch.models.checkpoint import read_generation_config
from snpatch.models.clock import uses_clock
from snpatch.models.geometry import build_geometry
from snpatch.models.hub import resolve_model_folder
from snpatch.models.lora import merge_loras
from snpatch.models.peft_files import read_adapter_config
from snpatch.models.pretrained import load_network, load_pretrained, wrap_loader_errors
from snpatch.models.templates import TEMPLATE_FILE, TULU, ChatTemplate, read_adapter_template
from snpatch.training.settings import DpoSettings, TrainSettings

TRAINED, REFERENCE = "default", "ref"  # PEFT's name of the first adapter, and TRL's of its frozen copy
BOS = "{{ bos_token }}"  # Tulu's template begins with it
COMPARED_VALUES = 2**16  # values of each parameter that are compared to detect a change


def load_tokenizer(model: str | Path, settings: TrainSettings) -> tuple[PreTrainedTokenizerBase, ChatTemplate]:
    """Return the tokenizer with the chat template of training, and the engine's template of the same name."""
    tokenizer = load_pretrained(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    template = ChatTemplate(settings.template, tokenizer)
    if settings.template == "tulu":
        tokenizer.chat_template = _tulu_with_bos(tokenizer, template)
    elif uses_clock(template.source):
        tokenizer.chat_template = template.source
    return tokenizer, template


def check_template(sft: Path | None, template: ChatTemplate) -> None:
    """Raise if the SFT adapter was trained with another chat template."""
    if sft is not None and read_adapter_template(sft) not in (None, template.source):
        raise SnpatchError(
            f"{sft}: expected an adapter trained with template = {template.name}, got another chat template. Train SFT "
            "and DPO with the same template"
        )


def _tulu_with_bos(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    """Return Tulu's template with the BOS prefix that gives the engine's token ids.

    An engine's tokenizer adds BOS to the text, but training tokenizes a text that contains it. Some tokenizers
    (Llama-2's) treat the text after BOS as the beginning only if a space follows BOS.
    """
    chat, bare = [{"role": "user", "content": "a"}], TULU.removeprefix(BOS)
    for prefix in (BOS, "", f"{BOS} "):
        encoded: Any = tokenizer.apply_chat_template(chat, chat_template=prefix + bare, add_generation_prompt=True)
        if list(encoded["input_ids"]) == template.encode(chat):
            return prefix + bare
    return TULU  # check_prompt_ids rejects the first prompt


def load_model(model: str | Path, settings: TrainSettings, on_gpu: bool) -> PreTrainedModel:
    """Load the model.

    Frozen weights have the settings' dtype, weights that are trained themselves float32.
    """
    dtype = settings.dtype
    if settings.method == "full":
        dtype = "float32"
    elif dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    return load_network(AutoModelForCausalLM, model, dtype=getattr(torch, dtype))


def new_adapter_config(settings: TrainSettings) -> PeftConfig | None:
    """Return the config of an adapter that starts without effect; None for full fine-tuning."""
    if settings.method == "ia3":
        return IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    if settings.method == "lora":
        rank, targets = settings.lora_rank, list(settings.lora_targets)
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    return None


def prepare_dpo_model(
    model: PreTrainedModel, sft: Path | None, settings: DpoSettings
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """Return the model that DPO starts from, and the config of an adapter that TRL still has to add.

    An IA3 or LoRA on an SFT adapter of its own kind continues that adapter. Anything else gets a new adapter on the
    model, into which an SFT LoRA is merged as engines merge it.
    """
    if sft is None:
        return model, new_adapter_config(settings)
    kind = read_adapter_config(sft, "IA3", "LORA")["peft_type"].lower()
    if settings.method == "full":
        raise SnpatchError(
            f"{sft}: expected no SFT adapter with method = full, which trains checkpoints. Pass the SFT checkpoint as "
            "model"
        )
    if kind == "ia3" and settings.method == "lora":
        raise SnpatchError(
            f"{sft}: expected a LoRA as SFT adapter with method = lora, got IA3. Use method = ia3, or a checkpoint"
        )
    # The engines' loaders raise for what PEFT ignores: missing and unexpected tensors, and unknown fields.
    if kind == "ia3":
        geometry = build_geometry(model.config, "auto")
        load_adapters(sft, geometry.n_layers, geometry.widths)
    else:
        weights = merge_loras(((name, weight.detach()) for name, weight in model.named_parameters()), [sft])
        if settings.method == "ia3":
            model.load_state_dict(dict(weights), strict=False)  # named_parameters yields tied weights once
            return model, new_adapter_config(settings)
        for _ in weights:  # merged one by one for the checks alone
            pass
    with wrap_loader_errors(sft, "PeftModel"):
        with_sft = PeftModel.from_pretrained(model, str(sft), is_trainable=True)
    if not (kind == "ia3" and settings.as_published):
        _check_nonzero(sft, ia3_scales(with_sft) if kind == "ia3" else {})
        return with_sft, None
    return cast(PreTrainedModel, with_sft.merge_and_unload()), new_adapter_config(settings)


def ia3_scales(model: nn.Module, adapter: str = TRAINED) -> dict[str, nn.Parameter]:
    """Return the IA3 vectors of an adapter by module name; empty without IA3."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    vectors = {name: getattr(module, "ia3_l", {}) for name, module in layers}
    return {name: by_adapter[adapter] for name, by_adapter in vectors.items() if adapter in by_adapter}


def freeze_reference(model: nn.Module, sft_scales: dict[str, Tensor]) -> None:
    """Set TRL's frozen copy of the adapter to the SFT scales.

    TRL copies parameters whose names contain `.default.`. IA3's names end with `.default`, so TRL leaves their copy at
    1, which is the base model.
    """
    copies = ia3_scales(model, REFERENCE)
    if sft_scales and copies.keys() != sft_scales.keys():
        raise SnpatchError("training: TRL made no frozen copy of the SFT adapter; this version of TRL is not supported")
    with torch.no_grad():
        for name, copy in copies.items():
            copy.copy_(sft_scales[name])
            copy.requires_grad_(False)


def trainable_snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the first values of each trainable parameter, by name, for `assert_trained`."""
    return {
        name: parameter.detach().flatten()[:COMPARED_VALUES].clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_trained(model: nn.Module, before: dict[str, Tensor], dtype: torch.dtype) -> tuple[list[str], float]:
    """Return the names of unchanged parameters and the fraction of changed values.

    dtype: of the saved weights. Values are compared after rounding to it, which may undo small steps.

    Raises:
        SnpatchError: Nothing changed.
    """
    after = trainable_snapshot(model)
    is_changed = {name: values.to(dtype) != after[name].to(dtype) for name, values in before.items()}
    unchanged = [name for name, mask in is_changed.items() if not mask.any()]
    if len(unchanged) == len(before):
        rounded = "" if dtype == torch.float32 else f" after rounding to {dtype}"
        raise SnpatchError(
            f"training: expected changed weights, but no trained value changed{rounded}. Check the learning rate and "
            "the rows"
        )
    total = sum(mask.numel() for mask in is_changed.values())
    return unchanged, sum(int(mask.sum()) for mask in is_changed.values()) / total


def saved_dtype(model: nn.Module, source: str | Path) -> torch.dtype:
    """Return the dtype that weights are saved in: the base's for a checkpoint, float32 for an adapter."""
    if isinstance(model, PeftModel):
        return torch.float32
    # transformers has replaced the name in config.json by a dtype.
    return cast(torch.dtype | None, load_pretrained(AutoConfig, source).dtype) or torch.float32


def save(
    model: PreTrainedModel | PeftModel,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    sft_scales: dict[str, Tensor],
    source: str | Path,
) -> None:
    """Save the adapter in PEFT's format, or the checkpoint, with the chat template for prompts.

    A checkpoint's tokenizer gets training's template, which contains BOS where the tokenizer adds it.

    Args:
        model: Trained model.
        out: Output folder.
        tokenizer: Tokenizer from `load_tokenizer`.
        template: ChatTemplate from `load_tokenizer`.
        sft_scales: Scales that DPO's are divided by; empty if there are none.
        source: Folder or name of the base model.
    """
    chat_template = template.source
    if not isinstance(model, PeftModel):
        chat_template = cast(str, tokenizer.chat_template)
        _restore_configs(model, source)
        model.to(saved_dtype(model, source))  # pyright: ignore[reportArgumentType]  # its decorator hides `self`
        model.save_pretrained(str(out))
        load_pretrained(AutoTokenizer, source).save_pretrained(str(out))
    else:
        _divide_scales(ia3_scales(model), sft_scales)
        model.save_pretrained(str(out), selected_adapters=[TRAINED])
    (out / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


@torch.no_grad()
def _divide_scales(scales: dict[str, nn.Parameter], sft_scales: dict[str, Tensor]) -> None:
    """Divide the trained scales by SFT's; raise if a quotient is not finite."""
    for name, scale in scales.items():
        if name in sft_scales:
            scale.div_(sft_scales[name].to(scale.device))
        broken = (~torch.isfinite(scale.flatten())).nonzero()
        if len(broken):
            neuron = _describe_neuron(name, int(broken[0]))
            raise SnpatchError(
                f"training: expected finite scales, the scale of {neuron} is not finite and cannot be saved"
            )


def _restore_configs(model: PreTrainedModel, source: str | Path) -> None:
    """Undo trainers' changes of the model's configs: the disabled cache and the padding of training."""
    config = load_pretrained(AutoConfig, source)
    for name in ("use_cache", "pad_token_id"):
        setattr(model.config, name, getattr(config, name, None))
    generation_config = read_generation_config(resolve_model_folder(source))
    model.generation_config = generation_config or GenerationConfig.from_model_config(config)


def _describe_neuron(module: str, index: int) -> str:
    layer = re.search(r"layers\.(\d+).*down_proj$", module)
    return f"layer {layer[1]}, neuron {index}" if layer else f"{module}, {index}"


def _check_nonzero(sft: Path, scales: dict[str, nn.Parameter]) -> None:
    """Raise for an SFT scale of 0, because no DPO factor can change it."""
    for module, scale in scales.items():
        zeros = (scale.detach().flatten() == 0).nonzero()
        if len(zeros):
            neuron = _describe_neuron(module, int(zeros[0]))
            raise SnpatchError(
                f"{sft}: expected nonzero SFT scales, the scale of {neuron} is 0 (and {len(zeros) - 1} more of that "
                "layer), so DPO's own factor does not exist there. Train SFT again with another seed or "
                "weight_decay_target = 1"
            )
