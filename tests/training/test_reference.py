"""DPO's reference equals the SFT model of an engine, and engines stack the saved adapter on it."""

import json

import pytest
import torch
import toys
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file
from toys import (
    KEYS,
    LAYERS,
    MESSAGES,
    NEURONS,
    PAIRS,
    dpo_settings,
    encode,
    load_model,
    load_vectors,
    log_probs,
    settings,
)

from snpatch import Engine, Sampling
from snpatch.errors import SnpatchError
from snpatch.training import models, trainer
from snpatch.training.trainer import train_dpo, train_sft

ONES = [torch.ones(NEURONS)] * LAYERS


toy = pytest.fixture(scope="module")(toys.toy)


@pytest.fixture(scope="module")
def with_keys(toy, tmp_path_factory):
    """Return an IA3 adapter of plain PEFT on keys, values and neurons."""
    folder = tmp_path_factory.mktemp("keys") / "sft"
    modules = ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=["down_proj"])
    model = get_peft_model(load_model(toy.base), config)
    draw = torch.Generator().manual_seed(1)
    for name, vector in model.named_parameters():
        if "ia3_l" in name:
            vector.data = 1 + 0.3 * torch.randn(vector.shape, generator=draw)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def built(monkeypatch):
    """Return a function that returns the trainer of `train_dpo(...)` before its first step."""

    def build(*arguments):
        trainers = []
        monkeypatch.setattr(trainer, "_run", lambda dpo_trainer, *_: trainers.append(dpo_trainer))
        train_dpo(*arguments)
        return trainers[0]

    return build


@pytest.fixture
def final_scales(monkeypatch):
    """List with the IA3 vectors of each training before they are saved: adapter -> saved name -> vector."""
    scales, save = [], models.save

    def spy(model, *arguments):
        scales.append(
            {
                adapter: {f"{name}.ia3_l": v.detach().clone() for name, v in models.ia3_scales(model, adapter).items()}
                for adapter in (models.TRAINED, models.REFERENCE)
            }
        )
        save(model, *arguments)

    monkeypatch.setattr(models, "save", spy)
    return scales


def policy_and_reference(trainer):
    """Return log-probabilities of all chosen, then all rejected answers, as in DPO's loss at step 1."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    trainer.model.train()
    with torch.no_grad():
        policy = trainer.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
    chosen_log_probs, rejected_log_probs = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    return policy, torch.cat([chosen_log_probs, rejected_log_probs])


def answers():
    """Yield (prompt ids, answer ids with EOS) of all chosen, then all rejected answers."""
    for answer in ("chosen", "rejected"):
        for pair in PAIRS:
            prompt, _ = encode(pair["prompt"], add_generation_prompt=True)
            yield prompt, encode([*pair["prompt"], *pair[answer]])[0][len(prompt) :]


def engine_log_probs(engine, model):
    """Return an engine's log-probabilities of `answers`, per token."""
    prompts, completions = zip(*answers(), strict=True)
    return [result.values for result in engine.logprobs(prompts, model, completions=completions)]


def model_log_probs(model):
    """Return the log-probabilities of `answers` from a model's forward pass, per token."""
    with torch.no_grad():
        return [log_probs(model, prompt + answer)[len(prompt) - 1 :] for prompt, answer in answers()]


def sums(log_probs_by_answer):
    return torch.stack([values.sum() for values in log_probs_by_answer])


def open_engine(base, **models):
    return Engine(base, backend="transformers", template="tulu", dtype="float32", **models)


# ---- Reference model

STARTS = {  # method of DPO, method of SFT, engine arguments for the SFT model
    "ia3 on ia3": ("ia3", "ia3", lambda folder: {"adapters": {"sft": folder}}),
    "ia3 with keys and values": ("ia3", "keys", lambda folder: {"adapters": {"sft": folder}}),
    "lora on lora": ("lora", "lora", lambda folder: {"models": {"sft": {"lora": str(folder)}}}),
    "ia3 on lora": ("ia3", "lora", lambda folder: {"models": {"sft": {"lora": str(folder)}}}),
    "ia3 on a checkpoint": ("ia3", "full", lambda folder: {"models": {"sft": str(folder)}}),
    "lora on a checkpoint": ("lora", "full", lambda folder: {"models": {"sft": str(folder)}}),
    "all weights": ("full", "full", lambda folder: {"models": {"sft": str(folder)}}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", STARTS)
def test_policy_and_reference_start_as_served_sft_model_bit_for_bit(toy, with_keys, built, tmp_path, start, dtype):
    method, on, engine_arguments = STARTS[start]
    sft = with_keys if on == "keys" else toy.sft(on)
    where = (sft, None) if on == "full" else (toy.base, sft)
    policy, reference = policy_and_reference(built(*where, PAIRS, tmp_path, dpo_settings(method, dtype=dtype)))
    assert torch.equal(policy, reference)
    base = sums(model_log_probs(load_model(toy.base)))
    assert (policy.float() - base).abs().median() > 0.5, "the base model would pass, too"
    if dtype == "float32":
        with open_engine(toy.base, **engine_arguments(sft)) as engine:
            torch.testing.assert_close(reference, sums(engine_log_probs(engine, "sft")), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "on"), [("ia3", "ia3"), ("lora", "lora"), ("ia3", "lora"), ("lora", "full")])
def test_adapters_are_float32_on_weights_in_bfloat16(toy, built, tmp_path, method, on):
    where = (toy.sft("full"), None) if on == "full" else (toy.base, toy.sft(on))
    config = dpo_settings(method, dtype="bfloat16", epochs=1)
    model = built(*where, PAIRS, tmp_path / "built", config).model
    adapter = {name: p for name, p in model.named_parameters() if "ia3_" in name or "lora_" in name}
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in adapter} == {torch.bfloat16}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in adapter if ".ref" not in n}
    if method == on:
        tensors = load_file(toy.sft(on) / "adapter_model.safetensors")
        for copy in ("default", "ref"):
            for name, p in adapter.items():
                key = name.replace(f".{copy}", "")
                if key != name:
                    assert torch.equal(p.data, tensors[key]), f"{name} was rounded, or belongs to another adapter"


@pytest.mark.parametrize("is_on", [True, False])
def test_gradient_checkpointing_option_reaches_the_trainer(toy, built, tmp_path, is_on):
    trainer = built(toy.base, toy.sft(), PAIRS, tmp_path, dpo_settings(gradient_checkpointing=is_on))
    assert trainer.args.gradient_checkpointing is is_on
    policy, reference = policy_and_reference(trainer)
    assert torch.equal(policy, reference)


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_adapter_on_bfloat16_weights_is_saved_in_float32(toy, tmp_path, method):
    config = settings(method, dtype="bfloat16", epochs=1)
    train_sft(toy.base, MESSAGES, tmp_path / "sft", config)
    train_dpo(toy.base, tmp_path / "sft", PAIRS, tmp_path / "dpo", dpo_settings(method, dtype="bfloat16", epochs=1))
    for out in ("sft", "dpo"):
        tensors = load_file(tmp_path / out / "adapter_model.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)


def test_trl_reference_of_ia3_is_the_base_model_and_first_loss_detects_it(toy, built, tmp_path, monkeypatch):
    """If this fails, TRL copies IA3 as it copies LoRA, and freeze_reference can be removed."""
    monkeypatch.setattr(models, "freeze_reference", lambda model, sft_scales: None)
    with pytest.raises(
        SnpatchError, match=r"expected a loss of 0\.6931 at step 1, got .* The reference is not the model"
    ):
        train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "run", dpo_settings())
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    trainer = built(toy.base, toy.sft(), PAIRS, tmp_path / "built", dpo_settings())
    policy, reference = policy_and_reference(trainer)
    torch.testing.assert_close(reference, sums(model_log_probs(load_model(toy.base))), rtol=0, atol=1e-4)
    assert (policy - reference).abs().max() > 1


def test_reference_does_not_change_in_training(toy, final_scales, tmp_path):
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path, dpo_settings(weight_decay=0.5))
    for key, first in load_file(toy.sft() / "adapter_model.safetensors").items():
        assert torch.equal(final_scales[0][models.REFERENCE][key], first)
        assert (final_scales[0][models.TRAINED][key] != first).all()


# ---- Saved adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on", ["ia3", "keys"])
def test_saved_factor_times_sft_is_the_trained_scale(toy, with_keys, final_scales, tmp_path, on, dtype):
    sft = toy.sft() if on == "ia3" else with_keys
    figures = train_dpo(toy.base, sft, PAIRS, tmp_path, dpo_settings(dtype=dtype))
    assert figures["first_loss"] == pytest.approx(0.6931472, abs=1e-6)
    factors, firsts = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, sft))
    products = final_scales[0][models.TRAINED]
    assert factors.keys() == firsts.keys() == products.keys()
    assert len(products) == LAYERS * (1 if on == "ia3" else 3)
    for key, product in products.items():
        ulp = torch.nextafter(product.abs(), torch.tensor(torch.inf)) - product.abs()
        assert ((factors[key] * firsts[key] - product).abs() <= ulp).all()
        assert (factors[key] - 1).abs().max() > 0.05


def test_as_published_starts_at_ones_on_merged_weights(toy, built, tmp_path):
    """In bfloat16 those weights are rounded, and so are not what is served."""
    config = dpo_settings(as_published=True, dtype="bfloat16")
    trainer = built(toy.base, toy.sft(), PAIRS, tmp_path, config)
    assert all((vector == 1).all() for vector in models.ia3_scales(trainer.model).values())
    assert models.ia3_scales(trainer.model, "ref") == {}
    base_model = load_model(toy.base).to(torch.bfloat16)
    layers = trainer.model.base_model.model.model.layers
    for layer, plain_layer, first in zip(layers, base_model.model.layers, load_vectors(toy.sft()), strict=True):
        exact = plain_layer.mlp.down_proj.weight.float() * first
        merged = layer.mlp.down_proj.base_layer.weight
        assert torch.equal(merged, exact.bfloat16())
        assert not torch.equal(merged.float(), exact)
    policy, reference = policy_and_reference(trainer)
    assert torch.equal(policy, reference)
    default_policy, _ = policy_and_reference(
        built(toy.base, toy.sft(), PAIRS, tmp_path / "other", dpo_settings(dtype="bfloat16"))
    )
    assert not torch.equal(policy, default_policy)


def test_as_published_saves_the_trained_vector(toy, final_scales, tmp_path):
    config = dpo_settings(as_published=True, batch_size=8, epochs=3, weight_decay=0.5)
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "out", config)
    vectors = load_vectors(tmp_path / "out")
    assert all(
        torch.equal(vector, final_scales[0][models.TRAINED][key].flatten())
        for key, vector in zip(KEYS, vectors, strict=True)
    )
    model = load_model(toy.base)
    for layer, first in zip(model.model.layers, load_vectors(toy.sft()), strict=True):
        layer.mlp.down_proj.weight.data *= first
    with torch.no_grad():
        loss = toys.build_dpo_loss(toys.compute_margins(model))
    zeros = [torch.zeros(NEURONS)] * LAYERS
    want, _ = toys.train_scales(model, ONES, loss, steps=3, rate=0.1, decay=0.5, target=zeros)
    torch.testing.assert_close(vectors, want, rtol=0, atol=1e-4)
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "own", dpo_settings(batch_size=8, epochs=3, weight_decay=0.5))
    assert max((a - b).abs().max() for a, b in zip(vectors, load_vectors(tmp_path / "own"), strict=True)) > 0.01


# ---- Engine against plain PEFT and transformers


@pytest.mark.parametrize("on", ["ia3", "keys"])
def test_engine_and_peft_agree_on_an_adapter(toy, with_keys, on):
    """The adapter is trained here, or made by plain PEFT."""
    folder = toy.sft() if on == "ia3" else with_keys
    peft_log_probs = model_log_probs(PeftModel.from_pretrained(load_model(toy.base), folder).eval())
    with open_engine(toy.base, adapters={"sft": folder}) as engine:
        for engine_values, peft_values, base_values in zip(
            engine_log_probs(engine, "sft"), peft_log_probs, engine_log_probs(engine, "base"), strict=True
        ):
            torch.testing.assert_close(engine_values, peft_values, rtol=1e-6, atol=1e-6)
            assert (engine_values - base_values).abs().max() > 0.05


def test_engine_and_peft_agree_on_stacked_adapters(toy, tmp_path):
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path, dpo_settings())
    model = PeftModel.from_pretrained(load_model(toy.base), toy.sft(), adapter_name="sft").eval()
    model.load_adapter(tmp_path, adapter_name="dpo")
    model.base_model.set_adapter(["sft", "dpo"], inference_mode=True)
    peft_log_probs = model_log_probs(model)
    with open_engine(toy.base, adapters={"sft": toy.sft(), "dpo": [toy.sft(), tmp_path]}) as engine:
        for engine_values, peft_values, sft_values in zip(
            engine_log_probs(engine, "dpo"), peft_log_probs, engine_log_probs(engine, "sft"), strict=True
        ):
            torch.testing.assert_close(engine_values, peft_values, rtol=1e-6, atol=1e-6)
            assert (engine_values - sft_values).abs().max() > 0.05


@pytest.mark.parametrize("method", ["lora", "full", "ia3 on lora"])
def test_engine_runs_trained_secondary_weights(toy, tmp_path, method):
    """Compare log-probabilities and completions with plain PEFT or transformers."""
    method, _, on = method.partition(" on ")
    sft, start = (None, toy.sft("full")) if method == "full" else (toy.sft("lora"), toy.base)
    train_dpo(start, sft, PAIRS, tmp_path, dpo_settings(method))
    if method == "full":
        source, model = str(tmp_path), load_model(tmp_path)
    elif on:
        source = {"lora": str(sft), "adapters": str(tmp_path)}
        model = PeftModel.from_pretrained(load_model(toy.base), sft).merge_and_unload()
        model = PeftModel.from_pretrained(model, tmp_path).eval()
    else:
        source, model = {"lora": str(tmp_path)}, PeftModel.from_pretrained(load_model(toy.base), tmp_path).eval()
    with open_engine(toy.base, models={"dpo": source}) as engine:
        for engine_values, peft_values, base_values in zip(
            engine_log_probs(engine, "dpo"), model_log_probs(model), engine_log_probs(engine, "base"), strict=True
        ):
            torch.testing.assert_close(engine_values, peft_values, rtol=0, atol=1e-5)
            assert (engine_values - base_values).abs().max() > 0.05
        chats = [pair["prompt"] for pair in PAIRS]
        completions = engine.generate(chats, "dpo", Sampling(max_tokens=6))
        assert len({tuple(text.token_ids) for text in completions}) > 1
        for chat, text in zip(chats, completions, strict=True):
            assert text.prompt_ids == encode(chat, add_generation_prompt=True)[0]
            assert text.token_ids == _greedy(model, text.prompt_ids, 6)


def _greedy(model, ids, max_tokens):
    """Return a plain model's greedy completion, without a cache."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < start + max_tokens and ids[-1] != toys.EOS:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_engine_uses_the_template_saved_with_the_adapter(toy):
    """The base's tokenizer has no template; the adapter's folder contains Tulu's."""
    assert json.loads((toy.base / "tokenizer_config.json").read_text()).get("chat_template") is None
    with Engine(toy.base, {"sft": toy.sft()}, backend="transformers") as engine:
        assert engine.encode([PAIRS[3]["prompt"]], "sft") == [encode(PAIRS[3]["prompt"], add_generation_prompt=True)[0]]
    assert list(load_file(toy.sft() / "adapter_model.safetensors")) == KEYS
