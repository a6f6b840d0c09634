import assert from "node:assert/strict";
import { test } from "node:test";

import { fileName, isVideo } from "../../../../serve_app/web/js/parts/pictures.js";
import * as rules from "../../../../serve_app/web/js/video-rules.js";
import { FLUX, FORM, FRAMEWISE, JOB, SDXL, WAN } from "./examples.mjs";

const VALUES = { ...rules.NO_VIDEO_VALUES };
const VIDEO_FORM = { ...FORM, model: "wan", width: 64, height: 64, format: "mp4", video: VALUES };
const START = "data:image/png;base64,AAAA";

test("models that make no videos are not offered", () => {
  assert.equal(rules.asVideoModel(FLUX), null);
  assert.equal(rules.asVideoModel({ ...WAN, tasks: ["t2i"] }), null);
  assert.equal(rules.asVideoModel(WAN).id, "wan");
});

test("the form for videos asks for nothing that only pictures have", () => {
  const seen = rules.asVideoModel({ ...FRAMEWISE, controls: SDXL.controls, refiner: "refiner" });

  assert.deepEqual([seen.maxImages, seen.controls, seen.refiner], [1, [], null]);
});

test("sides of a video are even, and one frame of every offered size is allowed", () => {
  const odd = { ...WAN, sizes: { ...WAN.sizes, multiple: 3, min: 65, max: 128, maxPixels: 1e9 } };

  const { sizes } = rules.asVideoModel(odd);

  assert.deepEqual([sizes.multiple, sizes.min, sizes.max], [6, 66, 126]);
  assert.equal(sizes.maxPixels, WAN.videoLimits.maxFramePixels);
});

test("a larger video has fewer frames, on the model's own numbers", () => {
  assert.deepEqual(rules.framesRange(WAN.videoLimits, 64, 64), { min: 1, default: 17, max: 129 });
  assert.deepEqual(rules.framesRange(WAN.videoLimits, 128, 128), { min: 1, default: 17, max: 29 });
  assert.deepEqual(rules.framesRange(WAN.videoLimits, 512, 256), { min: 1, default: 1, max: 1 });
});

test("a number of frames becomes the nearest that the model can make", () => {
  const range = rules.framesRange(WAN.videoLimits, 64, 64);
  const nearest = (frames) => rules.nearestFrames(frames, WAN.videoLimits, range);

  assert.deepEqual([null, 1, 18, 20, 9.6, 1000, NaN].map(nearest), [17, 1, 17, 21, 9, 129, 17]);
});

test("frames a second are a whole number the encoder takes", () => {
  assert.deepEqual([1, 60, 0, 61, 7.5, NaN].map(rules.fpsIsValid), [true, true, false, false, false, false]);
});

test("the length in seconds is shown to the hundredth", () => {
  assert.equal(rules.secondsOf(17, 8), 2.13);
});

test("what is sent for a video is what its address takes, and no field of pictures", () => {
  const body = rules.videoBody({ ...VIDEO_FORM, seed: "5", guidance: 3 }, rules.asVideoModel(WAN));

  assert.deepEqual(body, {
    model: "wan",
    prompt: "a red fox",
    negative_prompt: "snow",
    width: 64,
    height: 64,
    num_inference_steps: 30,
    guidance_scale: 3,
    seed: "5",
    output_format: "mp4",
    num_frames: 17,
    fps: 8,
  });
});

test("frames chosen at another size are still allowed when they are sent", () => {
  const form = { ...VIDEO_FORM, width: 128, height: 128, video: { ...VALUES, frames: 129, fps: 24 } };

  const body = rules.videoBody(form, rules.asVideoModel(WAN));

  assert.deepEqual([body.num_frames, body.fps], [29, 24]);
});

test("a picture to begin with and an end go only to models that take them", () => {
  const video = { ...VALUES, image: START, endPrompt: " a blue fox ", endSeed: "9", strength: 0.5 };
  const form = { ...VIDEO_FORM, video };
  const starting = { ...WAN, tasks: ["t2v", "i2v"] };

  const toFramewise = rules.videoBody(form, rules.asVideoModel(FRAMEWISE));
  const toStarting = rules.videoBody(form, rules.asVideoModel(starting));
  const toWan = rules.videoBody(form, rules.asVideoModel(WAN));

  const ends = ({ image, strength, end_prompt, end_seed }) => [image, strength, end_prompt, end_seed];
  assert.deepEqual(ends(toFramewise), [START, 0.5, "a blue fox", "9"]);
  assert.deepEqual(ends(toStarting), [START, undefined, undefined, undefined]);
  assert.deepEqual(ends(toWan), [undefined, undefined, undefined, undefined]);
});

test("camera moves are sent to models that can generate one picture from another", () => {
  const form = { ...VIDEO_FORM, video: { ...VALUES, zoom: 2, panX: 0, panY: -0.5 } };
  const sent = (model) => {
    const { zoom, pan_x, pan_y } = rules.videoBody(form, rules.asVideoModel(model));
    return [zoom, pan_x, pan_y];
  };

  assert.deepEqual(sent(FRAMEWISE), [2, undefined, -0.5]);
  assert.deepEqual(sent({ ...FRAMEWISE, tasks: ["t2i", "t2v"] }), [undefined, undefined, undefined]);
  assert.deepEqual(sent(WAN), [undefined, undefined, undefined]);
});

test("AV1 is WebM with another codec", () => {
  const body = rules.videoBody({ ...VIDEO_FORM, format: "av1" }, rules.asVideoModel(WAN));

  assert.deepEqual([body.output_format, body.output_codec], ["webm", "av1"]);
});

test("a frame-wise video that begins with a picture differs from it as far as the model allows", () => {
  const form = { ...VIDEO_FORM, video: { ...VALUES, image: START } };

  assert.equal(rules.videoBody(form, rules.asVideoModel(FRAMEWISE)).strength, FRAMEWISE.strength);
});

test("only a model without text-to-video needs a picture", () => {
  assert.equal(rules.needsPicture({ ...WAN, tasks: ["i2v"] }), true);
  assert.equal(rules.needsPicture(FRAMEWISE), false);
  assert.equal(rules.needsPicture(WAN), false);
});

test("a video asked for again has its length, and the ends that stand in the form", () => {
  const held = { ...VALUES, frames: 5, image: START, endPrompt: "a blue fox", endSeed: "9" };
  const move = { zoom: 2, panX: null, panY: -0.5 };
  const video = { frames: 21, fps: 12, seconds: 1.75, framewise: true, ...move };

  const withPicture = rules.videoValuesOf({ ...JOB.request, task: "i2v", strength: 0.4, video }, held);
  const fromWords = rules.videoValuesOf(
    { ...JOB.request, task: "t2v", video: { ...video, framewise: false } },
    held,
  );

  assert.deepEqual(withPicture, {
    frames: 21,
    fps: 12,
    image: START,
    strength: 0.4,
    endPrompt: "a blue fox",
    endSeed: "9",
    ...move,
  });
  assert.deepEqual([fromWords.image, fromWords.endPrompt, fromWords.endSeed], [null, "", ""]);
  assert.equal(rules.videoValuesOf(JOB.request, held), held);
});

test("a saved video is named after its job, with the ending of its format", () => {
  const file = { index: 0, mediaType: "video/webm" };

  assert.equal(fileName("abc", file), "weft-abc-0.webm");
  assert.equal(isVideo(file), true);
  assert.equal(isVideo({ ...file, mediaType: "image/webp" }), false);
});
