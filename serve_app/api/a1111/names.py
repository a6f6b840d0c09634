"""A1111's names of the fields of a request, for errors and warnings."""

NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images": "batch_size",
    "image": "init_images",
    "edit": "init_images",
    "mask_image": "mask",
    "strength": "denoising_strength",
    "feather": "mask_blur",
    "only_masked": "inpaint_full_res",
    "only_masked_padding": "inpaint_full_res_padding",
    "control_image": "alwayson_scripts.controlnet",
    "control_type": "alwayson_scripts.controlnet",
    "control_start": "alwayson_scripts.controlnet",
    "controls": "alwayson_scripts.controlnet",
    "scheduler": "sampler_name",
    "model": "sd_model_checkpoint",
    "loras": "prompt",
    "fit": "resize_mode",
    "refiner": "refiner_checkpoint",
}
