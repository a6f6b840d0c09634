// What a model allows for videos, turned into what the form offers and sends. Pure; knows no model by name.

import { requestBody } from "./form-rules.js";

/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").Film} Film */
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
export const WAY = /** @type {const} */ ({
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
  const { film, sizes, tasks } = model;
  if (film === null || !(tasks.includes("t2v") || tasks.includes("i2v"))) return null;
  const multiple = sizes.multiple % 2 === 0 ? sizes.multiple : 2 * sizes.multiple;
  return {
    ...model,
    sizes: {
      ...sizes,
      multiple,
      min: Math.ceil(sizes.min / multiple) * multiple,
      max: Math.floor(sizes.max / multiple) * multiple,
      maxPixels: Math.min(sizes.maxPixels, Math.floor(film.maxFramePixels / film.frames.min)),
    },
    maxImages: 1,
    controls: [],
    refiner: null,
  };
}

/** @param {Model} model */
export const takesPicture = (model) => model.tasks.includes("i2v");

/** Whether the view of its videos can move over a picture. @param {Model} model */
export const canMove = (model) => (model.film?.framewise ?? false) && model.tasks.includes("i2i");

/** Whether no video can be made without one. @param {Model} model */
export const needsPicture = (model) => takesPicture(model) && !model.tasks.includes("t2v");

/**
 * The numbers of frames that may be asked for at a size.
 *
 * @param {Film} film
 * @param {number} width
 * @param {number} height
 * @returns {import("./types.js").Range}
 */
export function framesRange(film, width, height) {
  const { min, max } = film.frames;
  const pixels = Math.max(1, width * height || 1);
  const most = Math.max(min, onStep(Math.floor(film.maxFramePixels / pixels), film, Math.floor));
  const highest = Math.min(max, most);
  return { min, default: Math.min(film.frames.default, highest), max: highest };
}

/**
 * The number of frames nearest to a wish; without one the default.
 *
 * @param {number | null} wish
 * @param {Film} film
 * @param {import("./types.js").Range} range  of framesRange
 */
export function fittedFrames(wish, film, range) {
  if (wish === null || !Number.isFinite(wish)) return range.default;
  return Math.max(range.min, Math.min(range.max, onStep(wish, film, Math.round)));
}

/**
 * Numbers of frames are a multiple of `every`, plus 1.
 *
 * @param {number} frames
 * @param {Film} film
 * @param {(value: number) => number} round
 */
function onStep(frames, film, round) {
  return round((frames - 1) / film.every) * film.every + 1;
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
  const { film } = model;
  if (film === null) throw new Error(`${model.id} makes no videos`);
  const { num_images: _images, previews: _previews, ...shared } = requestBody(form, model);
  const wishes = form.video ?? NO_VIDEO_VALUES;
  const image = takesPicture(model) ? wishes.image : null;
  const endPrompt = wishes.endPrompt.trim();
  const asAv1 = { output_format: "webm", output_codec: "av1" };
  return {
    ...shared,
    ...(form.format === "av1" ? asAv1 : {}),
    num_frames: fittedFrames(wishes.frames, film, framesRange(film, form.width, form.height)),
    fps: wishes.fps ?? film.fps,
    ...(image === null ? {} : { image }),
    ...(image !== null && film.framewise ? { strength: wishes.strength ?? model.strength } : {}),
    ...(film.framewise && endPrompt !== "" ? { end_prompt: endPrompt } : {}),
    ...(film.framewise && wishes.endSeed !== "" ? { end_seed: wishes.endSeed } : {}),
    ...(canMove(model) ? moved(wishes) : {}),
  };
}

/** Where the view goes, in the API's words; what stands still is left out. @param {import("./types.js").Way} way */
function moved({ zoom, panX, panY }) {
  return {
    ...(zoom === null || zoom === WAY.zoom.still ? {} : { zoom }),
    ...(panX ? { pan_x: panX } : {}),
    ...(panY ? { pan_y: panY } : {}),
  };
}

/**
 * What the form holds of a video after "Use again". A job does not tell its picture nor its ends: those
 * that stand in the form stay.
 *
 * @param {import("./types.js").Wish} wish
 * @param {VideoValues | null} held
 * @returns {VideoValues | null}
 */
export function videoValuesOf(wish, held) {
  if (wish.video === null) return held;
  const { frames, fps, framewise, zoom, panX, panY } = wish.video;
  const now = held ?? NO_VIDEO_VALUES;
  const withPicture = wish.task === "i2v";
  return {
    frames,
    fps,
    image: withPicture ? now.image : null,
    strength: withPicture ? wish.strength : now.strength,
    endPrompt: framewise ? now.endPrompt : "",
    endSeed: framewise ? now.endSeed : "",
    zoom,
    panX,
    panY,
  };
}
