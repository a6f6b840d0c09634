import assert from "node:assert/strict";
import { test } from "node:test";

import {
  applyEvent,
  hasEnded,
  merged,
  portions,
  secondsLeft,
} from "../../../../serve_app/web/js/job-state.js";
import { JOB } from "./examples.mjs";

const step = (number) => ({ type: "step", step: number, steps: 10, percent: 10 * number });

test("the times of the steps so far give the time left", () => {
  let job = applyEvent(JOB, { type: "started", step: 0, steps: null, percent: 0 }, 900);
  job = applyEvent(job, step(0), 1000);
  assert.equal(secondsLeft(job), null);

  job = applyEvent(job, step(2), 3000);
  job = applyEvent(job, step(4), 5000);

  assert.equal(job.percent, 40);
  assert.equal(secondsLeft(job), 6);
});

test("a job whose worker died waits again and begins from nothing", () => {
  let job = applyEvent(JOB, step(6), 1000);
  job = applyEvent(job, { type: "preview", data: "AAAA", mediaType: "image/jpeg" }, 1001);

  const again = applyEvent(job, { type: "queued", ahead: 2, step: 0, percent: 0 }, 2000);
  const second = applyEvent(again, step(1), 3000);

  assert.deepEqual([again.status, again.step, again.preview, again.ahead], ["queued", 0, null, 2]);
  assert.equal(secondsLeft(second), null);
});

test("a job that moved to another replica keeps its steps and its last preview", () => {
  let job = applyEvent(JOB, step(6), 1000);
  job = applyEvent(job, { type: "preview", data: "AAAA", mediaType: "image/webp" }, 1001);

  const waiting = applyEvent(job, { type: "queued", ahead: 0, step: 6, percent: 60 }, 2000);
  const again = applyEvent(waiting, { type: "started", step: 6, steps: 10, percent: 60 }, 3000);

  for (const now of [waiting, again])
    assert.deepEqual([now.step, now.percent, now.preview], [6, 60, "data:image/webp;base64,AAAA"]);
  assert.equal(secondsLeft(applyEvent(again, step(6), 3500)), null);
  assert.equal(secondsLeft(applyEvent(applyEvent(again, step(6), 4000), step(8), 6000)), 2);
});

test("a preview is an address an image understands", () => {
  const job = applyEvent(JOB, { type: "preview", data: "AAAA", mediaType: "image/jpeg" }, 0);

  assert.equal(job.preview, "data:image/jpeg;base64,AAAA");
});

test("a record keeps what only the stream reports, and never falls back behind it", () => {
  const known = { ...applyEvent(JOB, step(5), 1000), preview: "data:," };

  const behind = merged({ ...JOB, status: "processing", step: 3, percent: 30 }, known);
  const ended = merged({ ...JOB, status: "completed", percent: 100 }, known);
  const overtaken = merged({ ...JOB, status: "processing" }, ended);

  assert.deepEqual([behind.step, behind.percent, behind.preview], [5, 50, "data:,"]);
  assert.equal(ended.percent, 100);
  assert.ok(hasEnded(overtaken));
});

test("decoding and encoding go on side by side after the last step", () => {
  const denoised = { ...JOB, kind: "video", status: "processing", step: 4, steps: 4, percent: 99 };
  const decode = { type: "stage", stage: "decode", done: 16, total: 32, percent: 99 };

  const decoding = applyEvent(denoised, decode, 0);
  const both = applyEvent(decoding, { ...decode, stage: "encode", done: 8 }, 0);

  assert.deepEqual(portions(denoised), { denoise: 1, decode: 0, encode: 0 });
  assert.deepEqual(portions(decoding), { denoise: 1, decode: 0.5, encode: 0 });
  assert.deepEqual(portions(both), { denoise: 1, decode: 0.5, encode: 0.25 });
  assert.deepEqual(merged({ ...denoised }, both).encode, { done: 8, total: 32 });
});

test("a video that begins anew has decoded nothing", () => {
  const job = { ...JOB, kind: "video", decode: { done: 1, total: 2 }, encode: { done: 1, total: 2 } };

  const again = applyEvent(job, { type: "queued", ahead: 0, step: 0, percent: 0 }, 0);

  assert.deepEqual(portions(again), { denoise: 0, decode: 0, encode: 0 });
});
