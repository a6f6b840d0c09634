import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { beforeEach, test } from "node:test";

import { all } from "./fake-dom.mjs";

const WEB = new URL("../../../../serve_app/web/", import.meta.url);

const { useTexts } = await import(new URL("js/i18n.js", WEB));
const { createStages } = await import(new URL("js/parts/stages.js", WEB));
const { createVideoFields } = await import(new URL("js/parts/video-fields.js", WEB));
const { NO_VIDEO_VALUES } = await import(new URL("js/video-rules.js", WEB));
const { FRAMEWISE, JOB, WAN } = await import("./examples.mjs");

useTexts("en", JSON.parse(readFileSync(new URL("locales/en.json", WEB), "utf8")));

let inputs = 0;
let fields;
beforeEach(() => {
  inputs = 0;
  fields = createVideoFields({ onInput: () => (inputs += 1) });
  fields.setSize(64, 64);
});

function type(control, value, ...events) {
  control.value = value;
  for (const event of events) control.listeners[event]({});
}

test("a video model shows how long, and neither a picture nor an end it cannot take", () => {
  fields.set(WAN, { ...NO_VIDEO_VALUES });

  assert.deepEqual([fields.start.hidden, fields.end.hidden], [true, true]);
  assert.deepEqual([fields.controls.num_frames.value, fields.controls.num_frames.step], ["17", "4"]);
  assert.deepEqual([fields.controls.seconds.value, fields.controls.fps.value], ["2.13", "8"]);
});

test("seconds move the frames to the nearest number, and frames the seconds", () => {
  fields.set(WAN, { ...NO_VIDEO_VALUES });

  type(fields.controls.seconds, "4", "input", "change");
  assert.deepEqual([fields.controls.num_frames.value, fields.controls.seconds.value], ["33", "4.13"]);

  type(fields.controls.num_frames, "9", "input");
  assert.equal(fields.controls.seconds.value, "1.13");
  assert.equal(fields.get().frames, 9);
  assert.equal(inputs, 2);
});

test("a larger size allows fewer frames, and the chosen number returns with the smaller one", () => {
  fields.set(WAN, { ...NO_VIDEO_VALUES, frames: 129 });

  fields.setSize(128, 128);
  assert.equal(fields.controls.num_frames.value, "29");

  fields.setSize(64, 64);
  assert.equal(fields.controls.num_frames.value, "129");
});

test("frames a second that cannot be are marked, and their seconds are not guessed", () => {
  fields.set(WAN, { ...NO_VIDEO_VALUES });

  type(fields.controls.fps, "7.5", "input");

  assert.equal(fields.controls.fps.attributes["aria-invalid"], "true");
  assert.equal(fields.controls.seconds.value, "2.13");
});

test("a picture that was chosen is held, shown, and taken away again", async () => {
  fields.set(FRAMEWISE, { ...NO_VIDEO_VALUES });
  const input = fields.controls.image;

  input.files = [{ type: "image/png", size: 10 }];
  input.listeners.change();
  await new Promise(setImmediate);

  assert.equal(fields.get().image, "data:image/png;base64,AAAA");
  assert.equal(fields.start.querySelector("img").src, "data:image/png;base64,AAAA");
  fields.start.querySelector("button").listeners.click();
  assert.equal(fields.get().image, null);
});

test("a file that is no picture is refused in words", async () => {
  fields.set(FRAMEWISE, { ...NO_VIDEO_VALUES });
  const input = fields.controls.image;

  input.files = [{ type: "text/plain", size: 10 }];
  input.listeners.change();
  await new Promise(setImmediate);

  assert.equal(input.attributes["aria-invalid"], "true");
  assert.equal(fields.get().image, null);
});

test("a model that needs a picture is not sent off without one", () => {
  fields.set({ ...WAN, tasks: ["i2v"] }, { ...NO_VIDEO_VALUES });

  fields.check();

  assert.equal(fields.controls.image.attributes["aria-invalid"], "true");
});

test("the end of a frame-wise video is read as it was written", () => {
  fields.set(FRAMEWISE, { ...NO_VIDEO_VALUES, endPrompt: "a blue fox", endSeed: "9" });

  assert.equal(fields.end.hidden, false);
  assert.deepEqual([fields.get().endPrompt, fields.get().endSeed], ["a blue fox", "9"]);
  type(fields.controls.end_seed, "nine", "input");
  assert.equal(fields.controls.end_seed.attributes["aria-invalid"], "true");
});

test("the view of a frame-wise video moves as its sliders are set", () => {
  fields.set(FRAMEWISE, { ...NO_VIDEO_VALUES, panY: 0.5 });
  const { zoom, pan_x: right, pan_y: down } = fields.controls;

  assert.deepEqual([zoom.value, right.value, down.value], ["1", "0", "0.5"]);
  type(zoom, "2", "input");
  const { zoom: nearer, panX, panY } = fields.get();
  assert.deepEqual([nearer, panX, panY], [2, null, 0.5]);
});

test("each part of the work has its own bar", () => {
  const stages = createStages();

  stages.show({ ...JOB, kind: "video", step: 4, steps: 4, decode: { done: 8, total: 16 } });

  const bars = all(stages.element).filter((element) => element.tag === "progress");
  assert.deepEqual(
    bars.map((bar) => [bar.attributes["aria-label"], bar.value]),
    [
      ["Denoise", 1],
      ["Decode", 0.5],
      ["Encode", 0],
    ],
  );
});
