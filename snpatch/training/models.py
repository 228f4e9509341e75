"""The network that is trained: a model, its tokenizer, and the adapter on it; and how the adapter is saved.

Why DPO's IA3 scales begin as SFT's own: as one adapter on untouched weights the policy, and TRL's frozen copy of it,
are the SFT model as an engine serves it. Merged into the weights they would be rounded, another model than the served
one. What is saved is DPO's own factor, the quotient: engines stack the two, SFT * DPO.
"""

import re
from pathlib import Path

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
from snpatch.models.clock import uses_clock
from snpatch.models.fingerprint import local_snapshot
from snpatch.models.lora import merge_loras
from snpatch.models.peft_files import read_adapter_config
from snpatch.models.pretrained import load_pretrained, wrap_loader_errors
from snpatch.models.templates import TEMPLATE_FILE, TULU, ChatTemplate, read_adapter_template
from snpatch.training.settings import DpoSettings, TrainSettings

TRAINED, REFERENCE = "default", "ref"  # PEFT's name of the first adapter, and TRL's of its frozen copy
BOS = "{{ bos_token }}"  # what Tulu's template begins with
SEEN = 2**16  # numbers of each parameter that are compared to see whether it moved


def open_tokenizer(model: str | Path, settings: TrainSettings) -> tuple[PreTrainedTokenizerBase, ChatTemplate]:
    """The tokenizer with the template that training reads chats by, and the engine's of the same name."""
    tokenizer = load_pretrained(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    template = ChatTemplate(settings.template, tokenizer)
    if settings.template == "tulu":
        tokenizer.chat_template = _tulu_as_one_text(tokenizer, template)
    elif uses_clock(template.source):
        tokenizer.chat_template = template.source
    return tokenizer, template


def check_template(sft: Path | None, template: ChatTemplate) -> None:
    """Raise an error for an SFT adapter that was trained with another template than DPO is to read by."""
    if sft is not None and read_adapter_template(sft) not in (None, template.source):
        raise SnpatchError(
            f"{sft}: it was trained with another chat template than template = {template.name}: train both with one"
        )


def _tulu_as_one_text(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    """Tulu's template with what has to stand before it, so that the whole text gives the ids that an engine reads.

    An engine's tokenizer adds BOS to the text; training tokenizes a text that holds it, and some tokenizers (Llama-2's)
    read what follows a BOS as the text's beginning only behind a space.
    """
    chat, bare = [{"role": "user", "content": "a"}], TULU.removeprefix(BOS)
    for before in (BOS, "", f"{BOS} "):
        ids = tokenizer.apply_chat_template(chat, chat_template=before + bare, add_generation_prompt=True)["input_ids"]
        if list(ids) == template.encode(chat):
            return before + bare
    return TULU  # it is refused with the first prompt, by its ids


def open_network(model: str | Path, settings: TrainSettings, on_gpu: bool) -> PreTrainedModel:
    """The model. Frozen weights have the settings' type; weights that are trained themselves are float32."""
    wanted = settings.dtype
    if settings.method == "full":
        wanted = "float32"
    elif wanted == "auto":
        wanted = "bfloat16" if on_gpu else "float32"
    return load_pretrained(AutoModelForCausalLM, model, dtype=getattr(torch, wanted))


def fresh_adapter(settings: TrainSettings) -> PeftConfig | None:
    """The config of an adapter that begins as no change; None where all weights are trained."""
    if settings.method == "ia3":
        return IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    if settings.method == "lora":
        rank, targets = settings.lora_rank, list(settings.lora_targets)
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    return None


def on_sft(network: PreTrainedModel, sft: Path | None, settings: DpoSettings) -> tuple[nn.Module, PeftConfig | None]:
    """The network that DPO starts from, and the config of an adapter that it still needs.

    An IA3 or LoRA on an SFT adapter of its own kind goes on from that adapter; anything else begins anew on the model,
    into which an SFT LoRA is merged as engines merge it.
    """
    if sft is None:
        return network, fresh_adapter(settings)
    kind = read_adapter_config(sft, "IA3", "LORA")["peft_type"].lower()
    if settings.method == "full":
        raise SnpatchError(f"{sft}: method = full trains whole checkpoints: give the SFT checkpoint as the model")
    if kind == "ia3" and settings.method == "lora":
        raise SnpatchError(f"{sft}: no LoRA can be trained on an IA3 adapter: use method = ia3, or a checkpoint")
    if kind == "lora" and settings.method == "ia3":
        network.load_state_dict(
            dict(merge_loras(network.named_parameters(), [sft])), strict=False
        )  # tied weights come once
        return network, fresh_adapter(settings)
    with wrap_loader_errors(sft, "PeftModel"):
        on_top = PeftModel.from_pretrained(network, str(sft), is_trainable=True)
    if not (kind == "ia3" and settings.as_published):
        _check_divisible(sft, scales(on_top) if kind == "ia3" else {})
        return on_top, None
    return on_top.merge_and_unload(), fresh_adapter(settings)


def scales(network: nn.Module, adapter: str = TRAINED) -> dict[str, nn.Parameter]:
    """IA3's vectors of an adapter by their module's name; none where there is no IA3."""
    tuned = ((name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))
    return {name: module.ia3_l[adapter] for name, module in tuned if adapter in getattr(module, "ia3_l", {})}


def freeze_reference(network: nn.Module, start: dict[str, Tensor]) -> None:
    """Make TRL's frozen copy what it is meant to be.

    TRL copies parameters that have `.default.` in their names; IA3's end in it, so that its copy stays at 1: the base
    model. start: the SFT scales.
    """
    copies = scales(network, REFERENCE)
    if start and copies.keys() != start.keys():
        raise SnpatchError("TRL made no frozen copy of the SFT adapter: this version of it is not supported")
    with torch.no_grad():
        for name, copy in copies.items():
            copy.copy_(start[name])
            copy.requires_grad_(False)


def moving(network: nn.Module) -> dict[str, Tensor]:
    """What is trained, or the first part of it, to be compared with later: name -> numbers."""
    return {n: p.detach().flatten()[:SEEN].clone() for n, p in network.named_parameters() if p.requires_grad}


def check_moved(network: nn.Module, before: dict[str, Tensor], kept: torch.dtype) -> tuple[list[str], float]:
    """The names of what did not change, and the share of the numbers that did; an error if nothing did.

    kept: the type in which they are saved: whole weights are rounded to it, and small steps may be lost.
    """
    after = moving(network)
    other = {name: numbers.to(kept) != after[name].to(kept) for name, numbers in before.items()}
    still = [name for name, changed in other.items() if not changed.any()]
    if len(still) == len(before):
        rounded = "" if kept == torch.float32 else f", rounded to {kept} as it is saved,"
        raise SnpatchError(
            f"training: nothing that was trained{rounded} has moved: look at the learning rate and the rows"
        )
    total = sum(changed.numel() for changed in other.values())
    return still, sum(int(changed.sum()) for changed in other.values()) / total


def kept_dtype(network: nn.Module, model: str | Path) -> torch.dtype:
    """The type in which what is trained is saved: a checkpoint's is the base's, an adapter's float32."""
    if isinstance(network, PeftModel):
        return torch.float32
    return load_pretrained(AutoConfig, model).dtype or torch.float32


def save(
    network: nn.Module,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    start: dict[str, Tensor],
    model: str | Path,
) -> None:
    """Save what was trained, in PEFT's format or as a checkpoint, with the template that prompts are to be made with.

    tokenizer, template: of `open_tokenizer`; a checkpoint's tokenizer gets training's own, which has BOS where the
    tokenizer puts it. start: SFT scales that DPO's are divided by.
    """
    source = template.source
    if not isinstance(network, PeftModel):
        source = tokenizer.chat_template
        _restore_configs(network, model)
        network.to(kept_dtype(network, model)).save_pretrained(str(out))
        load_pretrained(AutoTokenizer, model).save_pretrained(str(out))
    else:
        with torch.no_grad():
            for name, scale in scales(network).items():
                if name in start:
                    scale.div_(start[name].to(scale.device))
                broken = (~torch.isfinite(scale.flatten())).nonzero()
                if len(broken):
                    where = _place(name, int(broken[0]))
                    raise SnpatchError(f"training: the scale of {where} is not finite; it cannot be saved")
        network.save_pretrained(str(out), selected_adapters=[TRAINED])
    (out / TEMPLATE_FILE).write_text(source, encoding="utf-8")


def _restore_configs(network: PreTrainedModel, model: str | Path) -> None:
    """Take back what trainers set in a model's configs: its cache is switched off, its padding is training's."""
    config = load_pretrained(AutoConfig, model)
    for name in ("use_cache", "pad_token_id"):
        setattr(network.config, name, getattr(config, name, None))
    try:
        network.generation_config = GenerationConfig.from_pretrained(local_snapshot(model))
    except OSError:  # it has none
        network.generation_config = GenerationConfig.from_model_config(config)


def _place(module: str, index: int) -> str:
    """A number of an IA3 vector, for people."""
    layer = re.search(r"layers\.(\d+).*down_proj$", module)
    return f"layer {layer[1]}, neuron {index}" if layer else f"{module}, {index}"


def _check_divisible(sft: Path, vectors: dict[str, nn.Parameter]) -> None:
    """An error that names the first neuron that no factor can bring back."""
    for module, vector in vectors.items():
        zeros = (vector.detach().flatten() == 0).nonzero()
        if len(zeros):
            where = _place(module, int(zeros[0]))
            raise SnpatchError(
                f"{sft}: the SFT scale of {where} is exactly 0 (and {len(zeros) - 1} more of that layer): DPO's own "
                "factor does not exist there; train SFT again with another seed or weight_decay_target = 1"
            )
