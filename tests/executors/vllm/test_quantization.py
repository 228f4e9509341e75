"""Quantized weights in a dual-stream model, compared with the oracle on a dequantized copy of the same weights.

The tests write the checkpoints in each format's own layout. If a format quantizes activations too, the oracle does so
with hooks after its overwrite, so that a patched neuron reaches `down_proj` like any other.
"""

import gc
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from jobs import COMPLETIONS, IDS, JOBS, PATCHED_JOB, Job, forced_sequences, generate, oracle_completion
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from snpatch import Engine, ReceiptError, SnpatchError
from snpatch.config import EngineConfig
from snpatch.executors.vllm import quantization
from snpatch.executors.vllm.engine_lifecycle import engine_startup
from snpatch.executors.vllm.launch import DualStreamLaunch
from snpatch.models.checkpoint import check_finite
from snpatch.models.notes import Notes
from snpatch.models.text_processing import load_text_processors

pytest.importorskip("vllm", reason="vLLM is not installed")

SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32}
GROUP_SIZE = 32  # inputs that share a scale in the 4-bit formats
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column in each four bits, the lowest first
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INPUT_SCALE = 0.1  # of static FP8 activations


def pack(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack eight 4-bit numbers along `dim` into each int32, the first of `order` in the lowest bits."""
    eights = values.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, 8))
    words = sum(eights[..., column] << 4 * place for place, column in enumerate(order))
    return (words - (words >> 31 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def quantize_4_bits(weight: Tensor, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return 4-bit numbers [out, in] in 0..15, scales and zeros [out, in / GROUP_SIZE] of a weight [out, in]."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    if symmetric:
        scale = (groups.abs().amax(-1) / 7.5).to(scale_dtype)
        zero = torch.full_like(scale, 8.0)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).to(scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, 15)
    numbers = (groups / scale.float()[..., None] + zero.float()[..., None]).round().clamp(0, 15)
    return numbers.flatten(1), scale, zero


def dequantize_4_bits(numbers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((numbers.unflatten(1, (-1, GROUP_SIZE)) - zero.float()[..., None]) * scale.float()[..., None]).flatten(1)


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return AutoAWQ's tensors of a linear layer, and the weight that they represent."""
    numbers, scale, zero = quantize_4_bits(weight, symmetric=False, scale_dtype=torch.float16)
    tensors = {
        "qweight": pack(numbers.T, 1, AWQ_ORDER),
        "qzeros": pack(zero.T, 1, AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }
    return tensors, dequantize_4_bits(numbers, scale, zero)


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return GPTQ's tensors, which store zeros minus one, and the weight."""
    numbers, scale, zero = quantize_4_bits(weight, symmetric=True, scale_dtype=torch.float16)
    tensors = {
        "qweight": pack(numbers.T, 0),
        "qzeros": pack(zero.T - 1, 1),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP_SIZE,
    }
    return tensors, dequantize_4_bits(numbers, scale, zero)


def w4a16(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of compressed-tensors' pack-quantized format, and the weight."""
    numbers, scale, zero = quantize_4_bits(weight, symmetric=True, scale_dtype=torch.float16)
    tensors = {"weight_packed": pack(numbers, 1), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return tensors, dequantize_4_bits(numbers, scale, zero)


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of compressed-tensors' int-quantized format with a scale per output, and the weight."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def fp8_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    numbers = (weight / scale).to(FP8)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def fp8_tensor(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax() / FP8_MAX
    numbers = (weight / scale).to(FP8)
    tensors = {"weight": numbers, "weight_scale": scale.view(1), "input_scale": torch.tensor([INPUT_SCALE])}
    return tensors, numbers.float() * scale


def int8_rows(x: Tensor) -> Tensor:
    """Round each row to int8 with its own scale."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def fp8_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / FP8_MAX
    return (x / scale).to(FP8).float() * scale


def fp8_static(x: Tensor) -> Tensor:
    return (x / INPUT_SCALE).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * INPUT_SCALE


@dataclass(frozen=True)
class Linear:
    """Quantization of a linear layer.

    write: weight -> (tensors, the weight that they represent). scheme: its group in a compressed-tensors config.
    inputs: rounding of its inputs.
    """

    write: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
    scheme: dict | None = None
    inputs: Callable[[Tensor], Tensor] | None = None


def scheme(weights: str, inputs: str | None, kind: str, bits: int = 8, fmt: str = "") -> dict:
    common = {"num_bits": bits, "type": kind, "symmetric": True}
    dynamic = {"strategy": inputs, "dynamic": inputs == "token"}
    return {
        "weights": {
            **common,
            "strategy": weights,
            "dynamic": False,
            "group_size": GROUP_SIZE if weights == "group" else None,
        },
        "input_activations": {**common, **dynamic} if inputs else None,
        "format": fmt,
    }


AWQ, GPTQ = Linear(awq), Linear(gptq)
W4A16 = Linear(w4a16, scheme("group", None, "int", 4, "pack-quantized"))
INT8 = Linear(int8, scheme("channel", "token", "int", fmt="int-quantized"), int8_rows)
FP8_CHANNEL = Linear(fp8_channel, scheme("channel", "token", "float", fmt="float-quantized"), fp8_rows)
FP8_TENSOR = Linear(fp8_tensor, scheme("tensor", "tensor", "float", fmt="float-quantized"), fp8_static)

AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}
GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "desc_act": False,
    "sym": True,
    "modules_in_block_to_quantize": ["down_proj"],
}
MIXED = {"[qkv]_proj": INT8, "o_proj": INT8, "(gate|up)_proj": FP8_CHANNEL, "down_proj": FP8_TENSOR}


def build_compressed_config(schemes: dict[str, dict], **options) -> dict:
    """Build a compressed-tensors config from layer names and their schemes."""
    groups = {f"group_{i}": {"targets": [f"re:.*{name}$"], **group} for i, (name, group) in enumerate(schemes.items())}
    defaults = {"format": "mixed-precision", "ignore": ["lm_head"], "quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", "config_groups": groups, **defaults, **options}


@dataclass(frozen=True)
class Format:
    """Format of a checkpoint, and tolerances of the comparison with the oracle.

    logprob: twice the largest measured error of a log-probability, and the minimum gap between two tokens. usual: 95th
    percentile of the errors. scores: error of change scores, relative to the largest score. Measured:
    AWQ 0.015, 0.005 and 0.0014, as its kernel computes in float16 and the oracle in float32. compressed-tensors, both
    in float32: 0.05, 1.2e-6 and 3e-7. Its few large errors are activations next to a rounding boundary that go to the
    other side of it, an int8 or FP8 step of one neuron: 6 of 390 log-probabilities.
    """

    dtype: str
    settings: dict
    layers: dict[str, Linear]  # pattern of layer names -> quantization
    logprob: float
    usual: float
    scores: float

    def linear(self, path: str) -> Linear:
        return next(linear for name, linear in self.layers.items() if re.fullmatch(name, path.rpartition(".")[2]))


FORMATS = {
    "awq": Format("float16", AWQ_CONFIG, {".*": AWQ}, 0.03, 0.01, 0.01),
    "compressed": Format(
        "float32", build_compressed_config({n: linear.scheme for n, linear in MIXED.items()}), MIXED, 0.1, 1e-5, 1e-3
    ),
}


def write_checkpoint(tiny_model: tiny.TinyModel, folder: Path, form: Format) -> tuple[tiny.TinyModel, tiny.TinyModel]:
    """Write a quantized checkpoint and its dequantized float32 copy."""
    model, dtype = (
        AutoModelForCausalLM.from_pretrained(tiny_model.folder, dtype=torch.float32),
        getattr(torch, form.dtype),
    )
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parameters, module.weight.data = form.linear(name).write(module.weight.data)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parameters.items()}
        else:
            for part, tensor in module.named_parameters(recurse=False):
                tensors[f"{name}.{part}"] = tensor.data.to(dtype)
                tensor.data = tensor.data.to(dtype).float()
    copy, checkpoint = (
        tiny.TinyModel(folder / "copy", tiny_model.adapters),
        tiny.TinyModel(folder / "checkpoint", tiny_model.adapters),
    )
    model.save_pretrained(copy.folder)
    shutil.copytree(tiny_model.folder, checkpoint.folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    configure(checkpoint, form.dtype, form.settings)
    for name in ("base", "sft", "dpo"):
        for path, module in oracle.model(*copy.checkpoints[name]).model.named_modules():
            is_quantized = isinstance(module, torch.nn.Linear) and path != "lm_head"
            if is_quantized and (inputs := form.linear(path).inputs):
                module.register_forward_pre_hook(lambda _m, args, f=inputs: (f(args[0]),))
    return checkpoint, copy


def configure(tiny_model: tiny.TinyModel, dtype: str, settings: dict) -> None:
    path = tiny_model.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": dtype, "quantization_config": settings}))


@dataclass(frozen=True)
class Served:
    """An engine on a quantized checkpoint, and the oracle's copy."""

    engine: Engine
    copy: tiny.TinyModel
    form: Format

    @property
    def worker(self):
        return self.engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker

    @property
    def layers(self):
        return self.worker.model_runner.get_model().model.layers


# On a CPU with AMX tiles vLLM prefers weight-only FP8 kernels; the oracle quantizes the inputs, too.
WEIGHT_ONLY = "CPUFp8PerTensorScaledMMLinearKernel,CPUFp8ChannelWiseScaledMMLinearKernel,CPUFP8W8A8ScaledMMLinearKernel"


@pytest.fixture(scope="module")
def environment():
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the oracle rounds like vLLM's CPU kernels")

    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    def scaled_fp8_quant(weight, scale):
        return (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(cpu, "check_cpu_sgl_kernel"):  # the int8 kernel of a CPU with AMX tiles does not support float32
            patch.setattr(cpu, "check_cpu_sgl_kernel", lambda *shape: False)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_DISABLED_KERNELS", WEIGHT_ONLY)
        # vLLM's CPU build has the kernels for FP8 with one scale per tensor, but not the operator that loads them.
        patch.setattr(_custom_ops, "scaled_fp8_quant", scaled_fp8_quant)
        yield


def skip_without_kernels(name: str) -> None:
    """Skip if this CPU has no kernel for a format, or one that saturates."""
    if name == "awq" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM has 4-bit kernels only for CPUs with AVX-512")
    if name == "compressed" and not torch.cpu._is_vnni_supported():
        pytest.skip("without VNNI, oneDNN adds pairs of int8 products in int16, which saturates")


@pytest.fixture(scope="module", params=FORMATS)
def format_case(request, environment, zoo, tmp_path_factory):
    skip_without_kernels(request.param)
    gc.collect()
    form = FORMATS[request.param]
    checkpoint, copy = write_checkpoint(zoo("llama"), tmp_path_factory.mktemp(request.param), form)
    adapters = {name: list(folders) for name, folders in checkpoint.adapters.items()}
    with Engine(checkpoint.folder, adapters, backend="vllm", **SMALL) as engine:
        yield Served(engine, copy, form)


BATCH = [job for job in JOBS if job.seed is None]  # the oracle's noise is slow, and tested elsewhere
BATCH += [Job(i, name) for i in range(8) for name in ("base", "sft", "dpo")]


@pytest.mark.engine
def test_mixed_batch_matches_the_oracle(format_case):
    """Tokens up to the first close choice, receipts, log-probabilities of the oracle's tokens, and change scores."""
    wants, compared = [oracle_completion(format_case.copy, job) for job in BATCH], 0
    for job, want, completion in zip(BATCH, wants, generate(format_case.engine, BATCH), strict=True):
        assert completion.overwrites == job.overwrites(10)
        best, second = want.logits.topk(2).values.unbind(1)
        clear = int((best - second > format_case.form.logprob).int().cumprod(0).sum())
        assert completion.token_ids[:clear] == want.ids[:clear], job
        compared += clear
    assert compared > 2 * len(BATCH)
    prompts, patches = [job.ids for job in BATCH], [job.patch for job in BATCH]
    logprobs = format_case.engine.logprobs(prompts, patches, completions=[want.ids for want in wants])
    errors = torch.cat([(f.values - torch.tensor(w.logprobs)).abs() for f, w in zip(logprobs, wants, strict=True)])
    assert errors.max() <= format_case.form.logprob
    assert errors.quantile(0.95) <= format_case.form.usual
    ranking = format_case.engine.contrast(IDS, "base", "dpo", completions=COMPLETIONS)
    models = [oracle.model(*format_case.copy.checkpoints[name]) for name in ("base", "dpo")]
    want = oracle.contrast(*models, forced_sequences("completion"))["scores"]
    assert (ranking.scores - want).abs().max() <= format_case.form.scores * want.max()


@pytest.mark.engine
def test_quantized_engine_uses_quantized_kernels_and_the_op_in_each_layer(format_case):
    """The test above therefore covers these kernels, and none of them has fused the activation."""
    from snpatch.executors.vllm.worker.surgery import DualStreamGLU

    kernels = {type(kernel).__name__ for layer in format_case.layers for kernel in list_kernels(layer)}
    assert (
        kernels
        == {
            "float16": {"CPUWNA16LinearKernel"},
            "float32": {
                "CPUInt8ScaledMMLinearKernel",
                "ChannelWiseTorchFP8ScaledMMLinearKernel",
                "PerTensorTorchFP8ScaledMMLinearKernel",
            },
        }[format_case.form.dtype]
    )
    assert all(type(layer.mlp.act_fn) is DualStreamGLU for layer in format_case.layers)
    quantization.check_activation_scales(format_case.worker.model_runner.get_model())


def list_kernels(layer) -> list:
    linears = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    holders = [getattr(linear, "scheme", linear.quant_method) for linear in linears]
    return [getattr(holder, "kernel", None) or holder.fp8_linear for holder in holders]


@pytest.mark.engine
def test_fused_activation_is_not_used_and_would_fail_the_receipt(format_case, monkeypatch):
    """vLLM's Llama fuses its activation into the FP8 quantization of down_proj, but does not find the op."""
    fused = pytest.importorskip("vllm.model_executor.layers.fusion.fused_act_quant", reason="vLLM 0.24 fuses none here")
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    mlp = format_case.layers[1].mlp
    if fused.get_input_quant_key(mlp.down_proj) != kFp8StaticTensorSym:
        pytest.skip("only static FP8 activations can be fused")
    calls = []

    def silu_and_mul_quant(x, linear):
        calls.append(len(x))
        value = torch.nn.functional.silu(x.chunk(2, 1)[0]) * x.chunk(2, 1)[1]
        data = (value / INPUT_SCALE).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        return QuantizedActivation(data, linear.input_scale, x.dtype, value.shape, kFp8StaticTensorSym)

    monkeypatch.setitem(fused._FUSED_ACT_QUANT, (SiluAndMul, kFp8StaticTensorSym), silu_and_mul_quant)
    before = generate(format_case.engine, [PATCHED_JOB])
    assert before[0].overwrites
    assert not calls
    op = mlp.act_fn
    with set_current_vllm_config(format_case.worker.vllm_config):
        mlp.act_fn = SiluAndMul()
    with pytest.raises(ReceiptError, match=r"expected \d+ overwrites, the device did \d+"):
        generate(format_case.engine, [PATCHED_JOB])
    assert calls
    mlp.act_fn = op
    assert generate(format_case.engine, [PATCHED_JOB])[0].token_ids == before[0].token_ids


def build_linear(format_case, config, linear: Linear | None, n_in: int = tiny.NEURONS, n_out: int = tiny.HIDDEN):
    """Build vLLM's linear layer for a quantization config, and return it with the weight that it represents."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import RowParallelLinear

    with set_current_vllm_config(format_case.worker.vllm_config):
        layer = RowParallelLinear(
            n_in, n_out, bias=False, params_dtype=torch.float16, quant_config=config, prefix="down_proj"
        )
        if linear is None:
            return layer, None
        tensors, weight = linear.write(torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(3)) / n_in**0.5)
        parameters = dict(layer.named_parameters())
        for name, tensor in tensors.items():
            if name in parameters:
                parameters[name].weight_loader(parameters[name], tensor)
        layer.quant_method.process_weights_after_loading(layer)
    return layer, weight


def gptq_config():
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    return AutoGPTQConfig.from_config(GPTQ_CONFIG)


def w4a16_config():
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    return CompressedTensorsConfig.from_config(build_compressed_config({"down_proj": W4A16.scheme}))


@pytest.mark.engine
@pytest.mark.parametrize(("config", "linear"), [(gptq_config, GPTQ), (w4a16_config, W4A16)], ids=["gptq", "w4a16"])
def test_other_4_bit_formats_compute_each_row_on_its_own(format_case, config, linear):
    """One layer instead of an engine: AWQ's kernel reads these layouts, and each row is independent of the others."""
    skip_without_kernels("awq")
    layer, weight = build_linear(format_case, config(), linear)
    kernel = getattr(layer, "scheme", layer.quant_method).kernel
    assert type(kernel).__name__ == "CPUWNA16LinearKernel"
    x = torch.randn(9, tiny.NEURONS, generator=torch.Generator().manual_seed(4)).to(torch.float16)
    out, want = layer(x)[0].float(), x.float() @ weight.T
    assert (out - want).abs().max() <= 2e-3 * want.abs().max()
    for row in range(len(x)):
        assert torch.equal(layer(x[row : row + 1])[0][0].float(), out[row])


@pytest.mark.engine
def test_check_activation_scales_with_one_scale_per_step_raises(format_case):
    """FP8 with a dynamic scale for the whole tensor: the largest row of a step determines the rounding of all rows."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    layer, _ = build_linear(
        format_case, Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic"), None
    )
    rows = torch.tensor([[0.3, 0.7], [900.0, -5.0]])
    quantize = layer.quant_method.fp8_linear.quant_fp8.forward_native
    (single_rows, scale), (batch_rows, batch_scale) = quantize(rows[:1]), quantize(rows)
    assert not torch.equal(single_rows[0].float() * scale, batch_rows[0].float() * batch_scale)
    with pytest.raises(
        SnpatchError, match=r"PerTensorTorchFP8\w+ quantizes all rows of a step with one scale, .* per-token"
    ):
        quantization.check_activation_scales(torch.nn.ModuleList([layer]))


NVFP4 = {**scheme("tensor_group", "tensor_group", "float", 4, "nvfp4-pack-quantized")}
NVFP4 = {k: v and (v if k == "format" else {**v, "group_size": 16}) for k, v in NVFP4.items()}
FP8_STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
HEADS = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}
TESTED = r"because it is not tested \(tested: AWQ, GPTQ, .*int W4A16.*\); allow_untested=True accepts it"


def build_vllm_config(tiny_model, folder, settings, **options):
    """Return the config with which vLLM would start."""
    checkpoint = tiny.TinyModel(folder / "model", tiny_model.adapters)
    shutil.copytree(tiny_model.folder, checkpoint.folder)
    if settings:
        configure(checkpoint, "float16", settings)
    engine_config = EngineConfig.of(checkpoint.folder, None, backend="vllm", **{**SMALL, "dtype": "float16", **options})
    with engine_startup(
        DualStreamLaunch(engine_config, load_text_processors(engine_config, Notes())).engine_args(scales_kv=False)
    ) as (
        config,
        end,
    ):
        pass
    end.close()
    return config


@pytest.mark.parametrize(
    ("settings", "options", "name"),
    [
        (FP8_STATIC, {}, "fp8"),
        (build_compressed_config({"proj": NVFP4}), {}, "compressed-tensors float W4A4"),
        (None, {"quantization": "fp8_per_tensor"}, "fp8_per_tensor"),
        (None, {"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype int8_per_token_head"),
    ],
    ids=["fp8", "nvfp4", "online", "cache"],
)
def test_untested_quantization_raises_unless_allowed(zoo, tmp_path, settings, options, name):
    """The check runs before vLLM starts its engine."""
    with pytest.raises(SnpatchError, match=f"cannot be combined with the quantization {name}, {TESTED}"):
        build_vllm_config(zoo("llama"), tmp_path / "refused", settings, **options)
    assert build_vllm_config(zoo("llama"), tmp_path / "allowed", settings, **options, allow_untested=True)


@pytest.mark.parametrize(
    "settings",
    [AWQ_CONFIG, GPTQ_CONFIG, build_compressed_config({"proj": W4A16.scheme}), *[f.settings for f in FORMATS.values()]],
)
def test_tested_quantization_is_accepted(zoo, tmp_path, settings):
    assert build_vllm_config(zoo("llama"), tmp_path, settings).model_config.quantization


def test_per_head_cache_scales_raise(zoo, tmp_path):
    with pytest.raises(
        SnpatchError, match=r"a scale for each head of the cache .* a dual-stream model has twice the heads"
    ):
        build_vllm_config(
            zoo("llama"),
            tmp_path,
            build_compressed_config({"proj": INT8.scheme}, kv_cache_scheme=HEADS),
            allow_untested=True,
        )


@pytest.mark.parametrize("kind", [FP8, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float16], ids=str)
def test_check_finite_finds_nan_in_quantized_weights_and_accepts_integers(kind):
    finite_weight = torch.full((64, 8), 2.0).to(kind)
    check_finite(
        [
            ("qweight", torch.full((64, 8), 0x77777777, dtype=torch.int32)),
            ("w", finite_weight),
            ("e", finite_weight[:0]),
        ],
        "m",
    )
    nan_weight = finite_weight.float()
    nan_weight[5, 3] = torch.nan
    with pytest.raises(SnpatchError, match="m: weight w holds NaN or infinity"):
        check_finite([("w", nan_weight.to(kind))], "m")
