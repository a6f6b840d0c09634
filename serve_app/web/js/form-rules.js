// What a model allows, turned into what the form offers and sends. Pure; knows no model by name.

/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").Sizes} Sizes */
/** @typedef {import("./types.js").FormValues} FormValues */
/** @typedef {import("./types.js").Text} Text */

/** @type {ReadonlyArray<readonly [number, number]>} */
const RATIOS = [
  [1, 1],
  [3, 2],
  [2, 3],
  [16, 9],
  [9, 16],
];

/** The model as the form for pictures sees it; null when it makes none from words. @param {Model} model */
export function asPictureModel(model) {
  return model.tasks.includes("t2i") ? model : null;
}

/** @param {import("./types.js").Range} range */
export function isFixed(range) {
  return range.min === range.max;
}

/**
 * The shapes offered as chips: each ratio at the model's default area, on its grid.
 *
 * @param {Sizes} sizes
 */
export function shapes(sizes) {
  const area = Math.min(sizes.width * sizes.height, sizes.maxPixels);
  const offered = RATIOS.map(([across, down]) => ({
    name: `${across}:${down}`,
    across,
    down,
    ...nearestSize(Math.sqrt((area * across) / down), Math.sqrt((area * down) / across), sizes),
  }));
  // on a coarse grid two ratios may come out as the same size: the first one stays
  return offered.filter(
    (shape, index) =>
      offered.findIndex((other) => other.width === shape.width && other.height === shape.height) === index,
  );
}

/**
 * The size nearest to the one given that the model allows.
 *
 * @param {number} width
 * @param {number} height
 * @param {Sizes} sizes
 */
export function nearestSize(width, height, sizes) {
  let [w, h] = [onGrid(width, sizes), onGrid(height, sizes)];
  const longest = Math.floor((sizes.maxAspect * Math.min(w, h)) / sizes.multiple) * sizes.multiple;
  [w, h] = [Math.min(w, longest), Math.min(h, longest)];
  if (w * h > sizes.maxPixels) {
    const scale = Math.sqrt(sizes.maxPixels / (w * h));
    [w, h] = [onGrid(w * scale, sizes), onGrid(h * scale, sizes)];
  }
  while (w * h > sizes.maxPixels) {
    if (w >= h) w -= sizes.multiple;
    else h -= sizes.multiple;
  }
  return { width: w, height: h };
}

/**
 * @param {number} side
 * @param {Sizes} sizes
 */
function onGrid(side, sizes) {
  const snapped = Math.round(side / sizes.multiple) * sizes.multiple;
  return Math.max(sizes.min, Math.min(sizes.max, snapped));
}

/**
 * What is wrong with a size, in words, with the nearest right one; null when it is allowed.
 *
 * @param {number} width
 * @param {number} height
 * @param {Sizes} sizes
 * @returns {import("./types.js").SizeFault | null}
 */
export function sizeFault(width, height, sizes) {
  const fix = nearestSize(width || sizes.width, height || sizes.height, sizes);
  for (const side of [width, height]) {
    if (!Number.isInteger(side) || side < sizes.min || side > sizes.max || side % sizes.multiple !== 0) {
      const { min, max, multiple } = sizes;
      return { text: { key: "size.offGrid", params: { min, max, multiple } }, fix };
    }
  }
  if (width * height > sizes.maxPixels) {
    const megapixels = (sizes.maxPixels / 1e6).toPrecision(2);
    return { text: { key: "size.tooMany", params: { megapixels } }, fix };
  }
  if (Math.max(width, height) > sizes.maxAspect * Math.min(width, height)) {
    return { text: { key: "size.tooLong", params: { ratio: sizes.maxAspect } }, fix };
  }
  return null;
}

/**
 * A seed is empty or a whole number of at most 63 bits.
 *
 * @param {string} seed
 */
export function seedIsValid(seed) {
  return seed === "" || (/^\d{1,19}$/.test(seed) && BigInt(seed) < 2n ** 63n);
}

/**
 * The notice of a model that runs one number of steps only; the same words the server warns with.
 *
 * @param {Model} model
 * @param {number | null} asked  what the person had chosen, maybe with another model
 * @returns {Text | null}
 */
export function stepsNotice(model, asked) {
  if (!isFixed(model.steps)) return null;
  const family = model.family.replaceAll("_", " ").toUpperCase();
  const steps = model.steps.default;
  return asked === null || asked === steps
    ? { key: "notice.fixedSteps", params: { family, steps } }
    : { key: "notice.stepsOverridden", params: { family, steps, asked } };
}

/**
 * The value limited to the range; null: the default.
 *
 * @param {number | null} value
 * @param {import("./types.js").Range} range
 */
export function within(value, range) {
  return value === null ? range.default : Math.max(range.min, Math.min(range.max, value));
}

const PREVIEWS = 4; // preview images during denoising
export const MAX_CONTROLS = 4;
export const MAX_WEIGHT = 2;
export const PICTURE_TYPES = ["image/png", "image/jpeg", "image/webp"];
const MAX_PICTURE_BYTES = 20 * 2 ** 20;

/**
 * Why a file cannot be one more control picture; null when it can.
 *
 * @param {{ type: string, size: number }} file
 * @param {number} count  of control pictures there are
 * @returns {Text | null}
 */
export function pictureFault(file, count) {
  if (count >= MAX_CONTROLS) return { key: "control.tooMany", params: { count: MAX_CONTROLS } };
  if (!PICTURE_TYPES.includes(file.type)) return { key: "control.notPicture" };
  if (file.size > MAX_PICTURE_BYTES)
    return { key: "control.tooLarge", params: { mebibytes: MAX_PICTURE_BYTES / 2 ** 20 } };
  return null;
}

/**
 * The control pictures that the model takes, as they are sent.
 *
 * @param {import("./types.js").ControlPicture[]} controls
 * @param {Model} model
 */
function controlsBody(controls, model) {
  return controls.flatMap(({ image, type, weight }) => {
    const kind = model.controls.find((known) => known.type === type);
    if (kind === undefined) return [];
    return [{ image, type, weight, ...(kind.plainPictures ? {} : { is_map: true }) }];
  });
}

export const MAX_LORA_WEIGHT = 2;

/** Families that the names in a LoRA file may not tell apart; the service compares the layers. */
const SAME_NAMES = [
  ["sd", "sdxl"],
  ["flux", "hunyuan_video"],
];

/**
 * The LoRAs that may be used with the model.
 *
 * @param {import("./types.js").Lora[]} loras
 * @param {Model} model
 */
export function fittingLoras(loras, model) {
  if (model.maxLoras === 0) return [];
  return loras.filter(
    (lora) =>
      (lora.model === null || lora.model === model.id) &&
      (lora.family === "unknown" ||
        lora.family === model.family ||
        SAME_NAMES.some((names) => names.includes(lora.family) && names.includes(model.family))),
  );
}

/**
 * The prompt with a trigger word at its end, unless it is there already.
 *
 * @param {string} prompt
 * @param {string} word
 */
export function withWord(prompt, word) {
  const plain = prompt.trim();
  if (plain.toLowerCase().includes(word.toLowerCase())) return prompt;
  if (plain === "") return word;
  return `${plain.replace(/,$/, "")}, ${word}`;
}

/**
 * The JSON of POST generate/image. Only what the model knows is sent.
 *
 * @param {FormValues} form
 * @param {Model} model
 */
export function requestBody(form, model) {
  const controls = controlsBody(form.controls, model);
  return {
    model: model.id,
    prompt: form.prompt.trim(),
    ...(model.negativePrompt && form.negativePrompt.trim() !== ""
      ? { negative_prompt: form.negativePrompt.trim() }
      : {}),
    width: form.width,
    height: form.height,
    num_inference_steps: within(form.steps, model.steps),
    ...(isFixed(model.guidance) ? {} : { guidance_scale: within(form.guidance, model.guidance) }),
    ...(form.seed === "" ? {} : { seed: form.seed }),
    num_images: Math.min(form.images, model.maxImages),
    ...(form.scheduler === "auto" || !model.schedulers.includes(form.scheduler)
      ? {}
      : { scheduler: form.scheduler }),
    output_format: form.format,
    previews: PREVIEWS,
    ...(controls.length > 0 ? { controls } : {}),
    ...(form.loras.length > 0 && model.maxLoras > 0
      ? { loras: form.loras.slice(0, model.maxLoras).map(({ id, weight }) => ({ id, weight })) }
      : {}),
    ...(form.refiner && model.refiner !== null ? { refiner: true } : {}),
  };
}

/**
 * The form for another model: its defaults, with what the person had chosen where the model allows it.
 *
 * @param {FormValues} form
 * @param {Model} from  the model the form was filled for
 * @param {Model} to
 * @returns {FormValues}
 */
export function changedModel(form, from, to) {
  const shape = shapes(from.sizes).find((s) => s.width === form.width && s.height === form.height);
  const same = shapes(to.sizes).find((s) => s.name === shape?.name);
  const wasDefault = form.width === from.sizes.width && form.height === from.sizes.height;
  const size = wasDefault
    ? { width: to.sizes.width, height: to.sizes.height }
    : (same ?? nearestSize(form.width, form.height, to.sizes));
  return {
    ...form,
    model: to.id,
    width: size.width,
    height: size.height,
    images: Math.min(form.images, to.maxImages),
    loras: from.family === to.family ? form.loras.slice(0, to.maxLoras) : [],
    scheduler: to.schedulers.includes(form.scheduler) ? form.scheduler : "auto",
  };
}

/**
 * A form that asks for a job's picture again.
 *
 * @param {import("./types.js").JobRequest} request
 * @param {string} seed  of the picture wanted
 * @param {import("./types.js").ControlPicture[]} controls  of the form: a job's record does not contain them
 * @returns {FormValues}
 */
export function formOf(request, seed, controls) {
  return {
    model: request.model,
    prompt: request.prompt,
    negativePrompt: request.negativePrompt,
    width: request.width,
    height: request.height,
    steps: request.steps,
    guidance: request.guidance,
    seed,
    images: request.images,
    format: request.format,
    scheduler: request.scheduler,
    controls: request.controls > 0 ? controls : [],
    loras: request.loras,
    refiner: request.refiner,
    video: null,
  };
}

/**
 * Whether the form would make something else of a job's settings: it began from pictures that neither the job's
 * record nor the form holds.
 *
 * @param {import("./types.js").JobRequest} request
 * @param {FormValues} form  as `formOf` gives it
 */
export function lacksPictures(request, form) {
  if (request.controls > form.controls.length) return true;
  if (request.task === "i2v") return form.video === null || form.video.image === null;
  return request.task === "i2i" || request.task === "inpaint";
}

/**
 * The next smaller size to try after running out of memory; null when there is none.
 *
 * @param {number} width
 * @param {number} height
 * @param {Sizes} sizes
 */
export function smaller(width, height, sizes) {
  const half = nearestSize(width / 2, height / 2, sizes);
  return half.width * half.height < width * height ? half : null;
}
