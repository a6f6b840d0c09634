// The API's JSON, turned into the page's own shapes. The only file that knows the wire's field names.

/** @typedef {import("./types.js").Job} Job */
/** @typedef {Record<string, any>} Json */

/**
 * JSON with seeds as strings of digits: they have 63 bits, a JS number keeps 53.
 * Inside a JSON string every quote is escaped, so `"seed":` is always a key, and `"end_seed":` too.
 *
 * @param {string} text
 */
export function parse(text) {
  return JSON.parse(text.replace(/("(?:end_)?seed"\s*:\s*)(\d+)/g, '$1"$2"'));
}

/**
 * The way back: string seeds become JSON numbers, every digit kept.
 *
 * @param {object} body
 */
export function stringify(body) {
  return JSON.stringify(body).replace(/("(?:end_)?seed":)"(\d+)"/g, "$1$2");
}

/**
 * @param {Json} json
 * @returns {import("./types.js").Model}
 */
export function model(json) {
  const { sizes, licence } = json;
  return {
    id: json.id,
    name: json.name,
    family: json.family,
    description: json.description,
    tasks: json.tasks,
    steps: json.steps,
    guidance: json.guidance,
    sizes: {
      width: sizes.width,
      height: sizes.height,
      multiple: sizes.multiple,
      min: sizes.min,
      max: sizes.max,
      maxPixels: sizes.max_pixels,
      maxAspect: sizes.max_aspect,
    },
    videoLimits: json.videos ? videoLimits(json.videos) : null,
    strength: json.strength,
    negativePrompt: json.negative_prompt,
    maxImages: json.max_images,
    maxPromptChars: json.max_prompt_chars,
    schedulers: json.schedulers,
    controls: json.controls.map((/** @type {Json} */ control) => ({
      type: control.type,
      plainPictures: control.plain_pictures,
    })),
    maxLoras: json.max_loras ?? 0,
    refiner: json.refiner,
    licence: {
      name: licence.name,
      url: licence.url,
      attribution: licence.attribution,
      commercial: licence.commercial,
    },
    state: json.state,
  };
}

/**
 * @param {Json} json
 * @returns {import("./types.js").VideoLimits}
 */
function videoLimits(json) {
  return {
    frames: { min: json.min_frames, default: json.num_frames, max: json.max_frames },
    every: json.every,
    fps: json.fps,
    maxFramePixels: json.max_frame_pixels,
    framewise: json.framewise,
  };
}

/**
 * @param {Json} json
 * @returns {import("./types.js").Lora}
 */
export function lora(json) {
  return {
    id: json.sha256,
    name: json.name,
    family: json.family,
    model: json.model,
    triggerWords: json.trigger_words,
    description: json.description,
  };
}

/**
 * @param {Json} json
 * @returns {Job}
 */
export function job(json) {
  const { request } = json;
  return {
    id: json.id,
    kind: json.kind,
    status: json.status,
    ahead: ahead(json.position),
    step: json.step,
    steps: json.steps,
    percent: json.percent,
    cancelRequested: json.cancel_requested,
    request: {
      model: request.model,
      task: request.task,
      prompt: request.prompt,
      negativePrompt: request.negative_prompt,
      width: request.width,
      height: request.height,
      steps: request.num_inference_steps,
      guidance: request.guidance_scale,
      seed: request.seed,
      images: request.num_images,
      format: request.video ? formatOf(request.video) : request.output_format,
      scheduler: request.scheduler,
      loras: (request.loras ?? []).map((/** @type {Json} */ used) => ({
        id: used.sha256,
        name: used.name,
        weight: used.weight,
      })),
      controls: (request.controls ?? []).length,
      refiner: (request.refiner ?? null) !== null,
      strength: request.strength ?? null,
      video: request.video ? jobVideo(request.video) : null,
    },
    pictures: json.artifacts.map(picture),
    warnings: json.warnings,
    problem: json.error ? problem(json.error) : null,
    createdAt: json.created_at,
    generationS: json.generation_s,
    preview: null,
    decode: null,
    encode: null,
    firstStep: 0,
    firstStepAt: null,
    lastStepAt: null,
  };
}

/** The video of a request. @param {Json} json */
function jobVideo(json) {
  return {
    frames: json.num_frames,
    fps: json.fps,
    seconds: json.seconds,
    framewise: json.framewise,
    zoom: json.zoom ?? null,
    panX: json.pan_x ?? null,
    panY: json.pan_y ?? null,
  };
}

/** As the form names it: a WebM with AV1 is a choice of its own. @param {Json} json */
function formatOf(json) {
  return json.codec === "av1" ? "av1" : json.format;
}

/**
 * @param {Json} json
 * @returns {Job[]} newest first, pictures and videos
 */
export function jobs(json) {
  return json.jobs.map(job);
}

/**
 * @param {Json} json
 * @returns {import("./types.js").Picture}
 */
function picture(json) {
  return {
    index: json.index,
    url: belowApi(json.url),
    thumbnailUrl: json.thumbnail_url && belowApi(json.thumbnail_url),
    posterUrl: json.poster_url ? belowApi(json.poster_url) : null,
    sheetUrl: json.spritesheet_url ? belowApi(json.spritesheet_url) : null,
    width: json.width,
    height: json.height,
    seed: json.seed,
    mediaType: json.media_type,
  };
}

/**
 * Jobs before this one, from its position in the queue: 1 is the next to be begun.
 *
 * @param {number | null} position
 */
function ahead(position) {
  return position === null ? null : Math.max(0, position - 1);
}

/**
 * A link of ours, relative to the API: a proxy may have put a prefix in front that the server does not
 * know. Links to elsewhere (a signed one of the store) stay as they are.
 *
 * @param {string} url
 */
function belowApi(url) {
  return url.replace(/^\/(?:[^?#]*\/)?api\//, "");
}

/**
 * An error body, or the error of a job.
 *
 * @param {Json} json
 * @param {number | null} [retryAfterS]
 * @returns {import("./types.js").Problem}
 */
export function problem(json, retryAfterS = null) {
  return {
    code: json.kind,
    message: json.message,
    param: json.param ?? null,
    retryAfterS,
  };
}

/**
 * What an event of the stream says; null for a kind this page does not know.
 *
 * @param {import("./types.js").SseEvent} raw
 * @returns {import("./types.js").JobEvent | null}
 */
export function jobEvent(raw) {
  const data = parse(raw.data);
  switch (raw.type) {
    case "queued":
      return {
        type: "queued",
        ahead: ahead(data.position),
        step: data.step ?? 0,
        percent: data.percent ?? null,
      };
    case "started":
      return {
        type: "started",
        step: data.step ?? 0,
        steps: data.steps ?? null,
        percent: data.percent ?? null,
      };
    case "step":
      return { type: "step", step: data.step, steps: data.steps, percent: data.percent ?? null };
    case "preview":
      return { type: "preview", data: data.data, mediaType: data.media_type };
    case "stage":
      if (data.stage !== "decode" && data.stage !== "encode") return null;
      return {
        type: "stage",
        stage: data.stage,
        done: data.done,
        total: data.total,
        percent: data.percent ?? null,
      };
    case "failed":
      return { type: "failed", problem: problem(data.error ?? data) };
    case "completed":
    case "cancelled":
      return { type: raw.type };
    default:
      return null;
  }
}
