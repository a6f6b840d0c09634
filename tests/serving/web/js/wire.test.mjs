import assert from "node:assert/strict";
import { test } from "node:test";

import * as wire from "../../../../serve_app/web/js/wire.js";

test("seeds keep all their digits in both directions", () => {
  const prompt = 'say "seed": 12345678901234567890';
  const text = `{"seed":9223372036854775807,"prompt":${JSON.stringify(prompt)}}`;

  const parsed = wire.parse(text);

  assert.deepEqual(parsed, { seed: "9223372036854775807", prompt });
  assert.equal(wire.stringify(parsed), text);
});

test("links of ours are read below the API, wherever a proxy put it", () => {
  const picture = { index: 0, thumbnail_url: null, width: 1, height: 1, seed: "1", media_type: "image/png" };
  const job = (url) =>
    wire.job({
      id: "1",
      status: "completed",
      position: null,
      step: 1,
      steps: 1,
      percent: 100,
      cancel_requested: false,
      request: {},
      artifacts: [{ ...picture, url }],
      warnings: [],
      error: null,
      created_at: 0,
      generation_s: 1,
    }).pictures[0].url;

  assert.equal(job("/api/results/1/0.png"), "results/1/0.png");
  assert.equal(job("/below/here/api/results/1/0.png"), "results/1/0.png");
  assert.equal(job("https://store.example/api/x?sig=1"), "https://store.example/api/x?sig=1");
});

test("events become what happened, and unknown ones nothing", () => {
  const event = (type, data) => wire.jobEvent({ id: "1", type, data: JSON.stringify(data) });

  const queued = { type: "queued", ahead: 2, step: 0, percent: 0 };
  assert.deepEqual(event("queued", { position: 3, step: 0, steps: 0, percent: 0 }), queued);
  const started = { type: "started", step: 2, steps: 4, percent: 50 };
  assert.deepEqual(event("started", { step: 2, steps: 4, percent: 50 }), started);
  assert.deepEqual(event("preview", { step: 1, media_type: "image/webp", data: "AAAA" }), {
    type: "preview",
    data: "AAAA",
    mediaType: "image/webp",
  });
  assert.deepEqual(event("step", { step: 1, steps: 4, percent: 25 }), {
    type: "step",
    step: 1,
    steps: 4,
    percent: 25,
  });
  assert.deepEqual(
    event("failed", { error: { kind: "out_of_memory", message: "no", param: null } }).problem.code,
    "out_of_memory",
  );
  assert.deepEqual(event("cancelled", {}), { type: "cancelled" });
  assert.equal(event("brand_new", {}), null);
});

test("a LoRA is known by its digest, in the list as in a job", () => {
  const json = {
    id: "night",
    sha256: "ab",
    name: "night",
    family: "flux",
    model: "tiny",
    trigger_words: ["night"],
    description: "",
  };

  assert.deepEqual(wire.lora(json), {
    id: "ab",
    name: "night",
    family: "flux",
    model: "tiny",
    triggerWords: ["night"],
    description: "",
  });
});

test("the seed at the end keeps its digits too", () => {
  const text = '{"seed":9223372036854775807,"end_seed":9223372036854775806}';

  assert.equal(wire.stringify(wire.parse(text)), text);
  assert.equal(wire.parse(text).end_seed, "9223372036854775806");
});

test("a video stands in the list with its length, its file and its first frame", () => {
  const request = {
    task: "t2v",
    output_format: "png",
    video: { num_frames: 17, fps: 8, seconds: 2.125, format: "webm", framewise: false, codec: null, pan_x: 0.5 },
  };
  const file = {
    index: 0,
    url: "/api/results/1/0.webm",
    thumbnail_url: "/api/results/1/0/thumbnail",
    poster_url: "/api/results/1/0/poster",
    spritesheet_url: "/api/results/1/0/spritesheet",
    width: 64,
    height: 64,
    seed: "1",
    media_type: "video/webm",
  };
  const listed = { id: "1", kind: "video", status: "completed", position: null, request, artifacts: [file] };

  const [video] = wire.jobs({ jobs: [listed] });

  assert.equal(video.kind, "video");
  assert.equal(video.request.format, "webm");
  const move = { zoom: null, panX: 0.5, panY: null };
  assert.deepEqual(video.request.video, { frames: 17, fps: 8, seconds: 2.125, framewise: false, ...move });
  const { url, posterUrl, sheetUrl } = video.pictures[0];
  assert.deepEqual([url, posterUrl, sheetUrl], ["results/1/0.webm", "results/1/0/poster", "results/1/0/spritesheet"]);

  request.video.codec = "av1";
  assert.equal(wire.jobs({ jobs: [listed] })[0].request.format, "av1");
});

test("decoding and encoding are reported in frames; unknown stages of a later service are ignored", () => {
  const event = (data) => wire.jobEvent({ id: "1", type: "stage", data: JSON.stringify(data) });

  assert.deepEqual(event({ stage: "decode", done: 8, total: 17, percent: 99 }), {
    type: "stage",
    stage: "decode",
    done: 8,
    total: 17,
    percent: 99,
  });
  assert.equal(event({ stage: "upload", done: 1, total: 2 }), null);
});

test("a model lists which videos it makes, or null", () => {
  const json = { sizes: {}, licence: {}, controls: [], tasks: [], strength: 0.8 };
  const videos = { num_frames: 17, fps: 8, min_frames: 1, max_frames: 129, every: 4, max_frame_pixels: 528384 };

  assert.equal(wire.model({ ...json, videos: null }).videoLimits, null);
  assert.deepEqual(wire.model({ ...json, videos: { ...videos, framewise: true } }).videoLimits, {
    frames: { min: 1, default: 17, max: 129 },
    every: 4,
    fps: 8,
    maxFramePixels: 528384,
    framewise: true,
  });
});
