"""What a request brings along (prompts, pictures to refine, control pictures, LoRAs) against a card
(pure)."""

from __future__ import annotations

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, TooLarge
from deployments.protocol.request import MAX_CONTROLS, Control, Edit, GenerationRequest, ResolvedEdit

MASK_OPTIONS = ("paste_back", "feather", "only_masked", "only_masked_padding")


def check_inputs(request: GenerationRequest, card: ModelCard) -> None:
    """Raises BadRequest for the first input that this model cannot take. Pictures are not looked at."""
    _check_refine(request)
    _check_edit(request.edit)
    _check_references(request, card)
    _check_prompts(request, card)
    _check_controls(request, card)
    if request.loras:
        check_lora_count(len(request.loras), card)


def check_lora_count(count: int, card: ModelCard, param: str = "loras") -> None:
    """Raises BadRequest unless the model takes so many LoRAs (at least one) in one request."""
    if not card.lora_limit:
        raise BadRequest(f"{card.id} takes no LoRA; leave it out", param=param)
    if count > card.lora_limit:
        raise BadRequest(
            f"there are {count} LoRAs; {card.id} takes at most {card.lora_limit} at once", param=param
        )


def control_field(request: GenerationRequest, index: int) -> str:
    """The name of a control picture in messages, as the API dialects name it."""
    return "control_image" if len(request.controls) == 1 else f"controls.{index}.image"


def reference_field(request: GenerationRequest, index: int) -> str:
    """The name of a reference picture in messages, as the API dialects name it."""
    return "reference_images" if len(request.references) == 1 else f"reference_images.{index}"


def mask_field(edit: Edit) -> str:
    """The field that makes an edit one of a part of the picture only."""
    if edit.mask_image is not None:
        return "mask_image"
    return "grow" if edit.grow is not None else "mask_channel"


def _check_edit(edit: Edit | None) -> None:
    """Raises BadRequest for options of a mask without one, and for those that exclude each other."""
    if edit is None:
        return
    if edit.only_masked and not edit.paste_back:
        raise BadRequest(
            "only_masked puts the new area back into the picture, which paste_back: false forbids; "
            "leave one of them out",
            param="only_masked",
        )
    idle = () if edit.is_masked or isinstance(edit, ResolvedEdit) else MASK_OPTIONS
    for name in idle:
        if name in edit.model_fields_set:
            raise BadRequest(f"{name} needs a mask; send mask_image or grow too", param=name)


def _check_references(request: GenerationRequest, card: ModelCard) -> None:
    """Raises BadRequest for more pictures than the model takes, and for what an edit by reference has not."""
    count, limits = len(request.references), card.references
    if not count:
        return
    others = {
        "image": request.edit is not None,
        "controls": bool(request.controls),
        "video": request.video is not None,
    }
    for name, given in others.items():
        if given:
            raise BadRequest(
                f"reference_images and {name} exclude each other: an edit by reference pictures follows its "
                f"prompt alone; leave {name} out",
                param=name,
            )
    if limits is not None and count > limits.max:
        raise BadRequest(
            f"there are {count} reference pictures; {card.id} takes at most {limits.max}",
            param="reference_images",
        )


def check_reference_size(
    request: GenerationRequest, index: int, size: tuple[int, int], card: ModelCard
) -> None:
    """Raises TooLarge for a reference picture of more pixels than the card allows, BadRequest for one that is
    too long."""
    limits, field = card.references, reference_field(request, index)
    if limits is None:
        return
    width, height = size
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"{field} is {width}x{height}, {width * height / 1e6:.2f} megapixels; {card.id} takes at most "
            f"{limits.max_pixels / 1e6:.2f} for each: send a smaller one",
            param=field,
        )
    if max(size) > limits.max_aspect * min(size):
        raise BadRequest(
            f"{field} is {width}x{height}; {card.id} takes pictures of at most {limits.max_aspect:g} to 1: "
            "crop it",
            param=field,
        )


def _check_refine(request: GenerationRequest) -> None:
    if not request.refine:
        return
    if request.edit is None:
        raise BadRequest("refine needs a picture; send image too", param="image")
    if request.edit.is_masked:
        field = mask_field(request.edit)
        raise BadRequest(f"refine works on the whole picture; leave {field} out", param=field)
    if request.controls:
        raise BadRequest("refine follows the given picture; leave control pictures out", param="controls")


def _check_prompts(request: GenerationRequest, card: ModelCard) -> None:
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > card.max_prompt_chars:
            raise BadRequest(
                f"{field} has {len(text)} characters; {card.id} takes at most {card.max_prompt_chars}",
                param=field,
            )
    if not request.prompt.strip():
        raise BadRequest("prompt is empty; describe the picture", param="prompt")
    if request.num_images > card.max_images:
        raise BadRequest(
            f"num_images is {request.num_images}; {card.id} makes at most {card.max_images} at once",
            param="num_images",
        )


def _check_controls(request: GenerationRequest, card: ModelCard) -> None:
    if len(request.controls) > MAX_CONTROLS:
        raise BadRequest(
            f"there are {len(request.controls)} control pictures; at most {MAX_CONTROLS}", param="controls"
        )
    for control in request.controls:
        if control.type not in card.controls:
            supported = f"it takes {', '.join(card.controls)}" if card.controls else "it takes none"
            raise BadRequest(
                f"{card.id} takes no control picture of type {control.type}; {supported}",
                param="control_type",
            )
        if control.start >= control.end:
            raise BadRequest(
                f"control starts at {control.start:g} and ends at {control.end:g} of the steps; "
                "start must be below end",
                param="control_start",
            )
        _check_control_map(control, card)


def _check_control_map(control: Control, card: ModelCard) -> None:
    """Canny edges need no model; depth and pose of a plain picture need a preprocessor on the card."""
    if control.type == "canny" or control.is_map or card.controls[control.type].preprocessor is not None:
        return
    raise BadRequest(
        f"{card.id} cannot find the {control.type} in a plain picture; send a {control.type} map "
        "and say is_map: true",
        param="control_image",
    )
