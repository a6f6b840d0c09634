"""Replicate's names of the fields of a request, for errors and warnings."""

NAMES = {
    "num_images": "num_outputs",
    "mask_image": "mask",
    "strength": "prompt_strength",
    "webhook_url": "webhook",
    "edit": "image",
}
