"""What the tensor names and the metadata of a LoRA file say: network type, key style, model family,
trigger words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed does not list it
from typing import Literal

LoraNetwork = Literal[
    "lora", "glora", "oft", "ia3", "vera", "hra", "fourier", "full", "norm", "bias", "embedding", "control",
    "other",
]  # fmt: skip
KeyStyle = Literal["diffusers", "peft", "kohya", "xlabs", "bfl", "other"]
LoraFamily = Literal["flux", "sdxl", "sd", "wan", "hunyuan_video", "ltx", "unknown"]

# fragments of tensor names by network type ("$": end of the name); the first type with a match is the file's
_NETWORKS: dict[LoraNetwork, tuple[str, ...]] = {
    "glora": (".a1.weight$", ".b1.weight$"),
    "oft": (".oft_R", ".oft_blocks", ".oft_diag", ".boft_"),
    "ia3": (".ia3_l", ".on_input$"),
    "vera": (".vera_lambda_",),
    "hra": (".hra_u",),
    "fourier": (".fourierft_",),
    "norm": (".w_norm$", ".b_norm$"),
    "full": (".diff$", ".diff_m$"),
    "bias": (".diff_b$", ".lora_A.bias$", ".lora_B.bias$", ".lora_up.bias$"),
    "embedding": ("bundle_emb.", "lora_embedding_"),
    "control": ("query_norm.scale", "key_norm.scale", "lora_controlnet"),
    "lora": (".lora_A", ".lora_B", "lora_down", "lora_up", "_lora.down", ".lora.down", "_lora1.", "_lora2.",
             "_lora.up", "lora_linear_layer", "_lora.weight"),
}  # fmt: skip
REMEDY = "train or extract it as a plain LoRA, without these tensors"
UNSUPPORTED: dict[LoraNetwork, str] = {  # reasons for header.refusal
    "glora": "it is a GLoRA, which multiplies the weights themselves",
    "oft": "it is an OFT or BOFT, which rotates the weights themselves",
    "ia3": "it is an IA3, which rescales activations",
    "vera": "it is a VeRA, whose factors are not all in the file",
    "hra": "it is an HRA, which reflects the weights themselves",
    "fourier": "it is a FourierFT, whose change of a layer has no low rank",
    "norm": "it changes norms (w_norm, b_norm) too",
    "full": "it holds whole differences of layers (.diff)",
    "bias": "it changes biases too",
    "embedding": "it contains text embeddings",
    "control": "it is a Control LoRA, which changes the model's input and norms (use a ControlNet)",
}
_ARCHITECTURES: tuple[tuple[str, LoraFamily], ...] = (  # fragments of what trainers write into the metadata
    ("flux", "flux"),
    ("hunyuan", "hunyuan_video"),
    ("wan", "wan"),
    ("ltx", "ltx"),
    ("xl", "sdxl"),
    ("stable-diffusion-v1", "sd"),
    ("sd_v1", "sd"),
)
_UNET_SECOND_BLOCK = r"attentions[._]\d+[._]transformer_blocks[._][1-9]"  # SDXL's; SD has one block each
_FAMILY_KEYS: tuple[tuple[str, LoraFamily], ...] = (  # patterns over all tensor names; the first match counts
    (r"\.img_attn_qkv|token_refiner|img_mlp[._]fc1|(img|txt)_mod[._]linear", "hunyuan_video"),
    (r"single_transformer_blocks|double_blocks|single_blocks", "flux"),
    (r"(^|[ .]|lora_unet_)blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)", "wan"),
    (r"(^|[ ]|transformer\.|model\.)transformer_blocks\.\d+\.attn[12]\.", "ltx"),
    (rf"lora_te2_|text_encoder_2\.|{_UNET_SECOND_BLOCK}|lora_unet_(in|out)put_blocks", "sdxl"),
    (r"unet[._]|(down|up)_blocks", "sd"),
)
_TAG_COUNT = re.compile(r"\s*:\s*(\d{1,9})\b")
_MAX_TRIGGER_WORDS = 8  # of a phrase
_MAX_FREQUENT_TAGS = 3
_MAX_WORD_CHARS = 100
_MAX_PHRASE_CHARS = 2_000


def network_type(keys: Iterable[str]) -> LoraNetwork:
    """The kind of network that these tensor names belong to; "other" where nothing says LoRA."""
    names = [f"{key}$" for key in keys]
    for network, fragments in _NETWORKS.items():
        if any(fragment in name for name in names for fragment in fragments):
            return network
    return "other"


def key_style(keys: Iterable[str]) -> KeyStyle:
    """The tool whose naming scheme the tensor names follow."""
    names = list(keys)

    def any_contains(*fragments: str) -> bool:
        return any(fragment in name for name in names for fragment in fragments)

    if any_contains("processor.qkv_lora", "processor.proj_lora"):
        return "xlabs"
    if any(name.startswith(("lora_unet_", "lora_te")) for name in names):
        return "kohya"
    if any_contains("double_blocks.", "diffusion_model."):
        return "bfl"
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    if any_contains(".lora_A", ".lora.down", "_lora.down", "lora_linear_layer"):
        return "diffusers"
    return "other"


def model_family(keys: Iterable[str], metadata: Mapping[str, str]) -> LoraFamily:
    """A guess of the model family: by what the trainer wrote into the metadata, else by the tensor names."""
    written = " ".join(
        metadata.get(name, "") for name in ("modelspec.architecture", "ss_base_model_version")
    ).lower()
    for fragment, family in _ARCHITECTURES:
        if fragment in written:
            return family
    text = " ".join(keys)
    for pattern, family in _FAMILY_KEYS:
        if re.search(pattern, text):
            return family
    return "unknown"


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words that activate the LoRA: modelspec's phrase (at most eight words or phrases), else the
    three most frequent tags of the training captions."""
    phrase = metadata.get("modelspec.trigger_phrase") or metadata.get("ss_trigger_words")
    if phrase:
        words = [word.strip()[:_MAX_WORD_CHARS] for word in phrase[:_MAX_PHRASE_CHARS].split(",")]
        return tuple([word for word in words if word][:_MAX_TRIGGER_WORDS])
    counts: Counter[str] = Counter()
    for tag, count in _tag_counts(metadata.get("ss_tag_frequency", "")):
        counts[tag.strip()[:_MAX_WORD_CHARS]] += count
    return tuple(tag for tag, _ in counts.most_common(_MAX_FREQUENT_TAGS))


def _tag_counts(text: str) -> Iterator[tuple[str, int]]:
    """Tags and their counts in kohya's {"folder": {"tag": count}}.

    One by one: to read megabytes as one JSON value would stop all other threads for its time.
    """
    at = text.find('"')
    while at >= 0:
        try:
            tag, at = scanstring(text, at + 1, False)
        except ValueError:
            return
        count = _TAG_COUNT.match(text, at)
        if count is not None:
            yield tag, int(count[1])
        at = text.find('"', at)
