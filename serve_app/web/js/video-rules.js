// What a model allows for videos, turned into what the form offers and sends. Pure; knows no model by name.

import { requestBody } from "./form-rules.js";

/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").VideoLimits} VideoLimits */
/** @typedef {import("./types.js").VideoValues} VideoValues */
/** @typedef {import("./types.js").FormValues} FormValues */

export const MAX_FPS = 60;

/** @type {Readonly<VideoValues>} */
export const NO_VIDEO_VALUES = {
  frames: null,
  fps: null,
  image: null,
  strength: null,
  endPrompt: "",
  endSeed: "",
  zoom: null,
  panX: null,
  panY: null,
};

/** What the view may do, and the values that leave it where it is. */
export const MOVE_RANGES = /** @type {const} */ ({
  zoom: { min: 0.25, max: 4, still: 1 },
  panX: { min: -1, max: 1, still: 0 },
  panY: { min: -1, max: 1, still: 0 },
});

/**
 * The model as the form for videos sees it, so that the form leaves out what no video has; null when it
 * makes none. Sides are even: the colours of a video are stored at half its size.
 *
 * @param {Model} model
 * @returns {Model | null}
 */
export function asVideoModel(model) {
  const { videoLimits, sizes, tasks } = model;
  if (videoLimits === null || !(tasks.includes("t2v") || tasks.includes("i2v"))) return null;
  const multiple = sizes.multiple % 2 === 0 ? sizes.multiple : 2 * sizes.multiple;
  return {
    ...model,
    sizes: {
      ...sizes,
      multiple,
      min: Math.ceil(sizes.min / multiple) * multiple,
      max: Math.floor(sizes.max / multiple) * multiple,
      maxPixels: Math.min(sizes.maxPixels, Math.floor(videoLimits.maxFramePixels / videoLimits.frames.min)),
    },
    maxImages: 1,
    controls: [],
    refiner: null,
  };
}

/** @param {Model} model */
export const takesPicture = (model) => model.tasks.includes("i2v");

/** Whether the view of its videos can move over a picture. @param {Model} model */
export const canMove = (model) => (model.videoLimits?.framewise ?? false) && model.tasks.includes("i2i");

/** Whether no video can be made without one. @param {Model} model */
export const needsPicture = (model) => takesPicture(model) && !model.tasks.includes("t2v");

/**
 * The numbers of frames that may be asked for at a size.
 *
 * @param {VideoLimits} limits
 * @param {number} width
 * @param {number} height
 * @returns {import("./types.js").Range}
 */
export function framesRange(limits, width, height) {
  const { min, max } = limits.frames;
  const pixels = Math.max(1, width * height || 1);
  const most = Math.max(min, onStep(Math.floor(limits.maxFramePixels / pixels), limits, Math.floor));
  const highest = Math.min(max, most);
  return { min, default: Math.min(limits.frames.default, highest), max: highest };
}

/**
 * The number of frames that the model can make nearest to `frames`; null: the default.
 *
 * @param {number | null} frames
 * @param {VideoLimits} limits
 * @param {import("./types.js").Range} range  of framesRange
 */
export function nearestFrames(frames, limits, range) {
  if (frames === null || !Number.isFinite(frames)) return range.default;
  return Math.max(range.min, Math.min(range.max, onStep(frames, limits, Math.round)));
}

/**
 * Numbers of frames are a multiple of `every`, plus 1.
 *
 * @param {number} frames
 * @param {VideoLimits} limits
 * @param {(value: number) => number} round
 */
function onStep(frames, limits, round) {
  return round((frames - 1) / limits.every) * limits.every + 1;
}

/**
 * Whether these frames per second can be asked for.
 *
 * @param {number} fps
 */
export function fpsIsValid(fps) {
  return Number.isInteger(fps) && fps >= 1 && fps <= MAX_FPS;
}

/**
 * How long a video runs, to a hundredth of a second.
 *
 * @param {number} frames
 * @param {number} fps
 */
export function secondsOf(frames, fps) {
  return Math.round((100 * frames) / fps) / 100;
}

/**
 * The JSON of POST generate/video. Only what the model knows is sent.
 *
 * @param {FormValues} form
 * @param {Model} model  of asVideoModel
 */
export function videoBody(form, model) {
  const { videoLimits } = model;
  if (videoLimits === null) throw new Error(`${model.id} makes no videos`);
  const { num_images: _images, previews: _previews, ...shared } = requestBody(form, model);
  const values = form.video ?? NO_VIDEO_VALUES;
  const image = takesPicture(model) ? values.image : null;
  const endPrompt = values.endPrompt.trim();
  const asAv1 = { output_format: "webm", output_codec: "av1" };
  return {
    ...shared,
    ...(form.format === "av1" ? asAv1 : {}),
    num_frames: nearestFrames(values.frames, videoLimits, framesRange(videoLimits, form.width, form.height)),
    fps: values.fps ?? videoLimits.fps,
    ...(image === null ? {} : { image }),
    ...(image !== null && videoLimits.framewise ? { strength: values.strength ?? model.strength } : {}),
    ...(videoLimits.framewise && endPrompt !== "" ? { end_prompt: endPrompt } : {}),
    ...(videoLimits.framewise && values.endSeed !== "" ? { end_seed: values.endSeed } : {}),
    ...(canMove(model) ? moveFields(values) : {}),
  };
}

/** The camera move in the API's fields; without those that do not move. @param {import("./types.js").CameraMove} way */
function moveFields({ zoom, panX, panY }) {
  return {
    ...(zoom === null || zoom === MOVE_RANGES.zoom.still ? {} : { zoom }),
    ...(panX ? { pan_x: panX } : {}),
    ...(panY ? { pan_y: panY } : {}),
  };
}

/**
 * What the form holds of a video after "Use again". A job's record has neither its picture nor its ends: those
 * that stand in the form stay.
 *
 * @param {import("./types.js").JobRequest} request
 * @param {VideoValues | null} held
 * @returns {VideoValues | null}
 */
export function videoValuesOf(request, held) {
  if (request.video === null) return held;
  const { frames, fps, framewise, zoom, panX, panY } = request.video;
  const now = held ?? NO_VIDEO_VALUES;
  const withPicture = request.task === "i2v";
  return {
    frames,
    fps,
    image: withPicture ? now.image : null,
    strength: withPicture ? request.strength : now.strength,
    endPrompt: framewise ? now.endPrompt : "",
    endSeed: framewise ? now.endSeed : "",
    zoom,
    panX,
    panY,
  };
}
