"""DPO's reference is the SFT model as an engine serves it, and what is saved is what engines stack on it."""

import json

import pytest
import torch
import toys
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file
from toys import KEYS, LAYERS, MESSAGES, NEURONS, PAIRS, dpo_settings, encode, log_probs, plain, settings, vectors

from snpatch import Engine, Sampling
from snpatch.errors import SnpatchError
from snpatch.training import models, trainer
from snpatch.training.trainer import train_dpo, train_sft

ONES = [torch.ones(NEURONS)] * LAYERS


toy = pytest.fixture(scope="module")(toys.toy)


@pytest.fixture(scope="module")
def with_keys(toy, tmp_path_factory):
    """An IA3 adapter that plain PEFT made, on keys, values and neurons."""
    folder = tmp_path_factory.mktemp("keys") / "sft"
    modules = ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=["down_proj"])
    model = get_peft_model(plain(toy.base), config)
    draw = torch.Generator().manual_seed(1)
    for name, vector in model.named_parameters():
        if "ia3_l" in name:
            vector.data = 1 + 0.3 * torch.randn(vector.shape, generator=draw)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def built(monkeypatch):
    """built(...): the trainer that train_dpo makes of these arguments, before its first step."""

    def get(*arguments):
        held = []
        monkeypatch.setattr(trainer, "_run", lambda trainer, *_: held.append(trainer))
        train_dpo(*arguments)
        return held[0]

    return get


@pytest.fixture
def ended(monkeypatch):
    """Fills with what each training ends with, before it is saved: adapter -> its IA3 vectors by their saved names."""
    seen, save = [], models.save

    def spy(network, *arguments):
        seen.append(
            {
                adapter: {f"{name}.ia3_l": v.detach().clone() for name, v in models.scales(network, adapter).items()}
                for adapter in (models.TRAINED, models.REFERENCE)
            }
        )
        save(network, *arguments)

    monkeypatch.setattr(models, "save", spy)
    return seen


def policy_and_reference(trainer):
    """The log-probabilities of all chosen, then all rejected answers, as DPO's loss has them at the first step."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(rows)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    trainer.model.train()
    with torch.no_grad():
        policy = trainer.model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    return policy, torch.cat([chosen, rejected])


def answers():
    """(prompt's ids, answer's ids with EOS) of all chosen, then all rejected answers."""
    for answer in ("chosen", "rejected"):
        for pair in PAIRS:
            prompt, _ = encode(pair["prompt"], speaks=True)
            yield prompt, encode([*pair["prompt"], *pair[answer]])[0][len(prompt) :]


def served(engine, model):
    """What an engine gives for the same, per token."""
    prompts, completions = zip(*answers(), strict=True)
    return [found.values for found in engine.logprobs(prompts, model, completions=completions)]


def read(model):
    """What a model's own forward pass gives for the same, per token."""
    with torch.no_grad():
        return [log_probs(model, prompt + answer)[len(prompt) - 1 :] for prompt, answer in answers()]


def sums(found):
    return torch.stack([values.sum() for values in found])


def engine_of(base, **models):
    return Engine(base, backend="transformers", template="tulu", dtype="float32", **models)


# ---- the reference

STARTS = {  # method of DPO, what SFT is, how an engine is told of it
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
def test_policy_and_reference_begin_as_the_served_sft_model_bit_for_bit(toy, with_keys, built, tmp_path, start, dtype):
    method, on, told = STARTS[start]
    sft = with_keys if on == "keys" else toy.sft(on)
    where = (sft, None) if on == "full" else (toy.base, sft)
    policy, reference = policy_and_reference(built(*where, PAIRS, tmp_path, dpo_settings(method, dtype=dtype)))
    assert torch.equal(policy, reference)
    base = sums(read(plain(toy.base)))
    assert (policy.float() - base).abs().median() > 0.5, "the base model would pass as well"
    if dtype == "float32":
        with engine_of(toy.base, **told(sft)) as engine:
            torch.testing.assert_close(reference, sums(served(engine, "sft")), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "on"), [("ia3", "ia3"), ("lora", "lora"), ("ia3", "lora"), ("lora", "full")])
def test_adapters_are_float32_on_weights_in_bfloat16(toy, built, tmp_path, method, on):
    where = (toy.sft("full"), None) if on == "full" else (toy.base, toy.sft(on))
    given = dpo_settings(method, dtype="bfloat16", epochs=1)
    model = built(*where, PAIRS, tmp_path / "built", given).model
    own = {name: p for name, p in model.named_parameters() if "ia3_" in name or "lora_" in name}
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in own} == {torch.bfloat16}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in own if ".ref" not in n}
    if method == on:
        tensors = load_file(toy.sft(on) / "adapter_model.safetensors")
        for adapter in ("default", "ref"):
            for name, p in own.items():
                key = name.replace(f".{adapter}", "")
                if key != name:
                    assert torch.equal(p.data, tensors[key]), f"{name} was rounded, or is another adapter's"


@pytest.mark.parametrize("is_on", [True, False])
def test_activations_are_computed_again_if_asked(toy, built, tmp_path, is_on):
    trainer = built(toy.base, toy.sft(), PAIRS, tmp_path, dpo_settings(gradient_checkpointing=is_on))
    assert trainer.args.gradient_checkpointing is is_on
    policy, reference = policy_and_reference(trainer)
    assert torch.equal(policy, reference)


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_what_is_saved_of_weights_in_bfloat16_is_float32(toy, tmp_path, method):
    given = settings(method, dtype="bfloat16", epochs=1)
    train_sft(toy.base, MESSAGES, tmp_path / "sft", given)
    train_dpo(toy.base, tmp_path / "sft", PAIRS, tmp_path / "dpo", dpo_settings(method, dtype="bfloat16", epochs=1))
    for out in ("sft", "dpo"):
        tensors = load_file(tmp_path / out / "adapter_model.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)


def test_trls_own_copy_of_an_ia3_adapter_is_the_base_model_and_the_first_loss_tells(toy, built, tmp_path, monkeypatch):
    """Where this fails, TRL copies IA3 as it copies LoRA, and freeze_reference may go."""
    monkeypatch.setattr(models, "freeze_reference", lambda network, start: None)
    with pytest.raises(SnpatchError, match=r"the first step's loss is .*, not 0.6931: the reference is not the model"):
        train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "run", dpo_settings())
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    trainer = built(toy.base, toy.sft(), PAIRS, tmp_path / "built", dpo_settings())
    policy, reference = policy_and_reference(trainer)
    torch.testing.assert_close(reference, sums(read(plain(toy.base))), rtol=0, atol=1e-4)
    assert (policy - reference).abs().max() > 1


def test_the_reference_stays_what_it_was(toy, ended, tmp_path):
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path, dpo_settings(weight_decay=0.5))
    for key, first in load_file(toy.sft() / "adapter_model.safetensors").items():
        assert torch.equal(ended[0][models.REFERENCE][key], first)
        assert (ended[0][models.TRAINED][key] != first).all()


# ---- what is saved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on", ["ia3", "keys"])
def test_sft_times_what_is_saved_is_what_was_trained(toy, with_keys, ended, tmp_path, on, dtype):
    sft = toy.sft() if on == "ia3" else with_keys
    figures = train_dpo(toy.base, sft, PAIRS, tmp_path, dpo_settings(dtype=dtype))
    assert figures["first_loss"] == pytest.approx(0.6931472, abs=1e-6)
    factors, firsts = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, sft))
    products = ended[0][models.TRAINED]
    assert factors.keys() == firsts.keys() == products.keys()
    assert len(products) == LAYERS * (1 if on == "ia3" else 3)
    for key, product in products.items():
        ulp = torch.nextafter(product.abs(), torch.tensor(torch.inf)) - product.abs()
        assert ((factors[key] * firsts[key] - product).abs() <= ulp).all()
        assert (factors[key] - 1).abs().max() > 0.05


def test_as_published_starts_at_ones_on_merged_weights(toy, built, tmp_path):
    """In bfloat16 those weights are rounded, and so are not what is served."""
    given = dpo_settings(as_published=True, dtype="bfloat16")
    trainer = built(toy.base, toy.sft(), PAIRS, tmp_path, given)
    assert all((vector == 1).all() for vector in models.scales(trainer.model).values())
    assert models.scales(trainer.model, "ref") == {}
    own = plain(toy.base).to(torch.bfloat16)
    layers = trainer.model.base_model.model.model.layers
    for layer, plain_layer, first in zip(layers, own.model.layers, vectors(toy.sft()), strict=True):
        exact = plain_layer.mlp.down_proj.weight.float() * first
        merged = layer.mlp.down_proj.base_layer.weight
        assert torch.equal(merged, exact.bfloat16())
        assert not torch.equal(merged.float(), exact)
    policy, reference = policy_and_reference(trainer)
    assert torch.equal(policy, reference)
    other, _ = policy_and_reference(
        built(toy.base, toy.sft(), PAIRS, tmp_path / "other", dpo_settings(dtype="bfloat16"))
    )
    assert not torch.equal(policy, other)


def test_as_published_saves_the_vector_that_was_trained(toy, ended, tmp_path):
    given = dpo_settings(as_published=True, batch_size=8, epochs=3, weight_decay=0.5)
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "out", given)
    got = vectors(tmp_path / "out")
    assert all(torch.equal(ours, ended[0][models.TRAINED][key].flatten()) for key, ours in zip(KEYS, got, strict=True))
    model = plain(toy.base)
    for layer, first in zip(model.model.layers, vectors(toy.sft()), strict=True):
        layer.mlp.down_proj.weight.data *= first
    with torch.no_grad():
        loss = toys.dpo_loss(toys.margins(model))
    zeros = [torch.zeros(NEURONS)] * LAYERS
    want, _ = toys.descend(model, ONES, loss, steps=3, rate=0.1, decay=0.5, target=zeros)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "own", dpo_settings(batch_size=8, epochs=3, weight_decay=0.5))
    assert max((a - b).abs().max() for a, b in zip(got, vectors(tmp_path / "own"), strict=True)) > 0.01


# ---- plain PEFT, transformers and the engine read alike


@pytest.mark.parametrize("on", ["ia3", "keys"])
def test_peft_and_the_engine_read_an_adapter_alike(toy, with_keys, on):
    """One that was trained here, and one that plain PEFT made."""
    folder = toy.sft() if on == "ia3" else with_keys
    theirs = read(PeftModel.from_pretrained(plain(toy.base), folder).eval())
    with engine_of(toy.base, adapters={"sft": folder}) as engine:
        for ours, other, base in zip(served(engine, "sft"), theirs, served(engine, "base"), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
            assert (ours - base).abs().max() > 0.05


def test_the_stack_is_one_for_peft_and_the_engine(toy, tmp_path):
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path, dpo_settings())
    model = PeftModel.from_pretrained(plain(toy.base), toy.sft(), adapter_name="sft").eval()
    model.load_adapter(tmp_path, adapter_name="dpo")
    model.base_model.set_adapter(["sft", "dpo"], inference_mode=True)
    theirs = read(model)
    with engine_of(toy.base, adapters={"sft": toy.sft(), "dpo": [toy.sft(), tmp_path]}) as engine:
        for ours, other, sft in zip(served(engine, "dpo"), theirs, served(engine, "sft"), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
            assert (ours - sft).abs().max() > 0.05


@pytest.mark.parametrize("method", ["lora", "full", "ia3 on lora"])
def test_the_second_model_of_an_engine_is_what_was_trained(toy, tmp_path, method):
    """Log-probabilities and texts, against plain PEFT or transformers."""
    method, _, on = method.partition(" on ")
    sft, start = (None, toy.sft("full")) if method == "full" else (toy.sft("lora"), toy.base)
    train_dpo(start, sft, PAIRS, tmp_path, dpo_settings(method))
    if method == "full":
        told, model = str(tmp_path), plain(tmp_path)
    elif on:
        told = {"lora": str(sft), "adapters": str(tmp_path)}
        model = PeftModel.from_pretrained(plain(toy.base), sft).merge_and_unload()
        model = PeftModel.from_pretrained(model, tmp_path).eval()
    else:
        told, model = {"lora": str(tmp_path)}, PeftModel.from_pretrained(plain(toy.base), tmp_path).eval()
    with engine_of(toy.base, models={"dpo": told}) as engine:
        for ours, other, base in zip(served(engine, "dpo"), read(model), served(engine, "base"), strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
            assert (ours - base).abs().max() > 0.05
        chats = [pair["prompt"] for pair in PAIRS]
        texts = engine.generate(chats, "dpo", Sampling(max_tokens=6))
        assert len({tuple(text.token_ids) for text in texts}) > 1
        for chat, text in zip(chats, texts, strict=True):
            assert text.prompt_ids == encode(chat, speaks=True)[0]
            assert text.token_ids == _greedy(model, text.prompt_ids, 6)


def _greedy(model, ids, most):
    """Greedy text of a plain model, without a cache."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < start + most and ids[-1] != toys.EOS:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_an_engine_knows_the_template_that_adapters_were_trained_with(toy):
    """The base's tokenizer has none; the adapter's folder names Tulu's."""
    assert json.loads((toy.base / "tokenizer_config.json").read_text()).get("chat_template") is None
    with Engine(toy.base, {"sft": toy.sft()}, backend="transformers") as engine:
        assert engine.encode([PAIRS[3]["prompt"]], "sft") == [encode(PAIRS[3]["prompt"], speaks=True)[0]]
    assert list(load_file(toy.sft() / "adapter_model.safetensors")) == KEYS
