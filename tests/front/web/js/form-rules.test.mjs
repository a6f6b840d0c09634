import assert from "node:assert/strict";
import { test } from "node:test";

import * as rules from "../../../../serve_app/web/js/form-rules.js";
import { FLUX, FORM, SDXL, TINY } from "./examples.mjs";

test("every shape is a size the model allows, near its default area", () => {
  for (const { sizes } of [FLUX, SDXL, TINY]) {
    for (const { name, width, height, across, down } of rules.shapes(sizes)) {
      assert.equal(rules.sizeFault(width, height, sizes), null, name);
      assert.ok(Math.abs((width * height) / (sizes.width * sizes.height) - 1) < 0.15, name);
      assert.ok(Math.abs(width / height / (across / down) - 1) < 0.12, name);
    }
  }
});

test("a coarse grid offers no size twice", () => {
  const sizes = { ...TINY.sizes, multiple: 64 };

  const offered = rules.shapes(sizes).map(({ width, height }) => `${width}x${height}`);

  assert.equal(new Set(offered).size, offered.length);
});

test("a size off the grid is told with the nearest right one", () => {
  const fault = rules.sizeFault(1000, 1024, FLUX.sizes);

  assert.equal(fault.text.key, "size.offGrid");
  assert.deepEqual(fault.fix, { width: 1008, height: 1024 });
});

test("what is too large or too long is told, and the fix fits", () => {
  const tooMany = rules.sizeFault(2048, 2064 - 16, { ...FLUX.sizes, maxPixels: 1_048_576 });
  const tooLong = rules.sizeFault(2048, 256, FLUX.sizes);

  assert.equal(tooMany.text.key, "size.tooMany");
  assert.equal(
    rules.sizeFault(tooMany.fix.width, tooMany.fix.height, { ...FLUX.sizes, maxPixels: 1_048_576 }),
    null,
  );
  assert.equal(tooLong.text.key, "size.tooLong");
  assert.equal(rules.sizeFault(tooLong.fix.width, tooLong.fix.height, FLUX.sizes), null);
});

test("an empty or broken side is never sent", () => {
  for (const side of [0, NaN, -16, 1024.5]) assert.notEqual(rules.sizeFault(side, 1024, FLUX.sizes), null);
});

test("a fixed number of steps is noticed before sending, and that number is sent", () => {
  const form = { ...FORM, model: FLUX.id, steps: 30 };

  assert.deepEqual(rules.stepsNotice(FLUX, 30), {
    key: "notice.stepsOverridden",
    params: { family: "FLUX", steps: 4, asked: 30 },
  });
  assert.equal(rules.stepsNotice(FLUX, null).key, "notice.fixedSteps");
  assert.equal(rules.stepsNotice(SDXL, 30), null);
  assert.equal(rules.requestBody(form, FLUX).num_inference_steps, 4);
});

test("only what the model understands is sent", () => {
  const form = { ...FORM, guidance: 7, scheduler: "euler", seed: "5" };

  const toFlux = rules.requestBody(form, FLUX);
  const toSdxl = rules.requestBody(form, SDXL);

  assert.deepEqual(Object.keys(toFlux).sort(), [
    "height",
    "model",
    "num_images",
    "num_inference_steps",
    "output_format",
    "prompt",
    "seed",
    "width",
  ]);
  assert.equal(toSdxl.negative_prompt, "snow");
  assert.equal(toSdxl.guidance_scale, 7);
  assert.equal(toSdxl.scheduler, "euler");
  assert.equal(toSdxl.prompt, "a red fox");
});

test("without a wish the model's defaults are sent, and the seed is left to the service", () => {
  const body = rules.requestBody(FORM, SDXL);

  assert.equal(body.num_inference_steps, 30);
  assert.equal(body.guidance_scale, 5);
  assert.ok(!("seed" in body) && !("scheduler" in body));
});

test("another model keeps the shape, not the number of pixels", () => {
  const wide = rules.shapes(SDXL.sizes).find(({ name }) => name === "16:9");
  const form = { ...FORM, width: wide.width, height: wide.height, images: 4, scheduler: "euler" };

  const changed = rules.changedModel(form, SDXL, { ...TINY, maxImages: 2 });

  const { width, height } = rules.shapes(TINY.sizes).find(({ name }) => name === "16:9");
  assert.deepEqual([changed.width, changed.height], [width, height]);
  assert.equal(changed.images, 2);
  assert.equal(changed.scheduler, "auto");
});

test("a seed is empty or a whole number of 63 bits", () => {
  for (const seed of ["", "0", "9223372036854775807"]) assert.ok(rules.seedIsValid(seed), seed);
  for (const seed of ["-1", "1.5", "1e3", "seed", "9223372036854775808"])
    assert.ok(!rules.seedIsValid(seed), seed);
});

test("after running out of memory there is a smaller size, until there is none", () => {
  assert.deepEqual(rules.smaller(1024, 1024, FLUX.sizes), { width: 512, height: 512 });
  assert.equal(rules.smaller(256, 256, FLUX.sizes), null);
});
