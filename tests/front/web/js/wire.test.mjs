import assert from "node:assert/strict";
import { test } from "node:test";

import * as wire from "../../../../serve_app/web/js/wire.js";

test("seeds keep all their digits on the way in and out", () => {
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

  assert.deepEqual(event("queued", { position: 3 }), { type: "queued", ahead: 2, step: 0, steps: 0 });
  assert.deepEqual(event("started", { step: 2, steps: 4 }), { type: "started", step: 2, steps: 4 });
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
  const told = {
    id: "night",
    sha256: "ab",
    name: "night",
    family: "flux",
    model: "tiny",
    trigger_words: ["night"],
    description: "",
  };

  assert.deepEqual(wire.lora(told), {
    id: "ab",
    name: "night",
    family: "flux",
    model: "tiny",
    triggerWords: ["night"],
    description: "",
  });
});
