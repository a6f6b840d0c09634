"""Which parts of a pipeline are in a checkpoint, by names of tensors, and what cannot be read from one."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from deployments.checkpoint_format.header import CheckpointHeader, refusal

DENOISER = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
LORA = ("lora_unet_", "lora_te", "lora_transformer_", "lora_prior_")
# of training, or of the noise schedule, which the pipeline's own configuration has
LEFT_OUT = (
    "model_ema.",
    "alphas_cumprod",
    "betas",
    "log_one_minus_alphas_cumprod",
    "posterior_",
    "sqrt_",
    "denoiser.",
    "logvar",
    "edm_",
    "v_pred",
    "ztsnr",
    "loss.",
)
PREFIXES = (DENOISER, *VAE, *TEXT_ENCODERS, *LEFT_OUT)
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors by which trainers say so
MAX_NAMES = 3  # in a message


def check_readable(header: CheckpointHeader) -> None:
    """Raises ModelFailed for what is no model, and for weights in a form that would be read wrongly."""
    names = header.tensors
    if any(name.startswith(LORA) or ".lora_" in name or ".hada_w" in name for name in names):
        raise refusal(
            header.path, "it is a LoRA", "register it with POST /api/loras, or name it in a request"
        )
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.")) for name in names):
        raise refusal(header.path, "it is a ControlNet", "name a folder of diffusers in controls of a card")
    scaled = next((name for name in names if name.endswith((".scale_weight", "scaled_fp8"))), None)
    if scaled is not None:
        cause = f"its weights are fp8 with scales of their own ({scaled}), which would be left out"
        raise refusal(header.path, cause, "use its file in bf16 or fp16, or a GGUF file")
    packed = next(
        (name for name in names if ".quant_state." in name or name.endswith((".qweight", ".wscales"))), None
    )
    if packed is not None:
        cause = f"its weights are quantised by another library ({packed})"
        raise refusal(header.path, cause, "use its file in bf16 or fp16, or a GGUF file")


def has_vae(names: Collection[str]) -> bool:
    """Whether the weights of a VAE are in the file."""
    return any(name.startswith(VAE) for name in names)


def has_text_encoders(names: Collection[str]) -> bool:
    """Whether those of text encoders are."""
    return any(name.startswith(TEXT_ENCODERS) for name in names)


def has_denoiser(names: Collection[str]) -> bool:
    """Whether those of a UNet or transformer are: under their own prefix, or alone without any."""
    return any(name.startswith(DENOISER) for name in names) or not any(
        name.startswith(PREFIXES) for name in names
    )


def strange_names(names: Collection[str]) -> Iterator[str]:
    """Tensors beside those of the known parts, in a file whose parts have prefixes."""
    if any(name.startswith(DENOISER) for name in names):
        yield from (name for name in names if not name.startswith(PREFIXES))
