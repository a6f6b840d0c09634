import assert from "node:assert/strict";
import { test } from "node:test";

import * as rules from "../../../../serve_app/web/js/form-rules.js";
import { FLUX, FORM, INK, JOB, SDXL, TINY } from "./examples.mjs";

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

test("a size off the grid is reported with the nearest right one", () => {
  const fault = rules.sizeFault(1000, 1024, FLUX.sizes);

  assert.equal(fault.text.key, "size.offGrid");
  assert.deepEqual(fault.fix, { width: 1008, height: 1024 });
});

test("what is too large or too long is reported with a fix that is allowed", () => {
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
    "previews",
    "prompt",
    "seed",
    "width",
  ]);
  assert.equal(toSdxl.negative_prompt, "snow");
  assert.equal(toSdxl.guidance_scale, 7);
  assert.equal(toSdxl.scheduler, "euler");
  assert.equal(toSdxl.prompt, "a red fox");
});

test("without a request the model's defaults are sent, and the seed is left to the service", () => {
  const body = rules.requestBody(FORM, SDXL);

  assert.equal(body.num_inference_steps, 30);
  assert.equal(body.guidance_scale, 5);
  assert.ok(!("seed" in body) && !("scheduler" in body));
});

test("control pictures and the refiner go to models that know them", () => {
  const pictures = [
    { image: "data:image/png;base64,AAAA", type: "canny", weight: 0.5 },
    { image: "data:image/png;base64,BBBB", type: "depth", weight: 1 },
    { image: "data:image/png;base64,CCCC", type: "pose", weight: 1 },
  ];
  const form = { ...FORM, controls: pictures, refiner: true };

  const toSdxl = rules.requestBody(form, SDXL);
  const toFlux = rules.requestBody(form, FLUX);

  assert.deepEqual(toSdxl.controls, [pictures[0], { ...pictures[1], is_map: true }]);
  assert.equal(toSdxl.refiner, true);
  assert.ok(!("controls" in toFlux) && !("refiner" in toFlux));
  assert.ok(!("refiner" in rules.requestBody({ ...form, refiner: false }, SDXL)));
});

test("another model keeps the control pictures and the switch for when the first is chosen again", () => {
  const form = { ...FORM, controls: [{ image: "data:,", type: "canny", weight: 1 }], refiner: true };

  const changed = rules.changedModel(form, SDXL, FLUX);

  assert.deepEqual([changed.controls, changed.refiner], [form.controls, true]);
});

test("a job with control pictures is asked for again with those in the form, one without with none", () => {
  const pictures = [{ image: "data:,", type: "canny", weight: 1 }];

  assert.deepEqual(rules.formOf({ ...JOB.request, controls: 1 }, "7", pictures).controls, pictures);
  assert.deepEqual(rules.formOf({ ...JOB.request, controls: 0 }, "7", pictures).controls, []);
});

test("a file that cannot be a control picture is refused with the reason", () => {
  const fault = (file, count = 0) =>
    rules.pictureFault({ type: "image/png", size: 1000, ...file }, count)?.key ?? null;

  assert.equal(fault({}), null);
  assert.equal(fault({ type: "image/gif" }), "control.notPicture");
  assert.equal(fault({ size: 21 * 2 ** 20 }), "control.tooLarge");
  assert.equal(fault({}, 4), "control.tooMany");
});

test("four previews are requested", () => {
  assert.equal(rules.requestBody(FORM, SDXL).previews, 4);
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

test("only LoRAs of the model's family, or made for it, are offered", () => {
  const own = { ...INK, id: "2", model: "sdxl" };
  const others = { ...INK, id: "3", model: "another" };
  const unknown = { ...INK, id: "4", family: "unknown" };
  const alike = { ...INK, id: "5", family: "sd" }; // names do not tell SD and SDXL apart
  const all = [INK, own, others, unknown, alike];

  assert.deepEqual(
    rules.fittingLoras(all, SDXL).map(({ id }) => id),
    [INK.id, "2", "4", "5"],
  );
  assert.deepEqual(
    rules.fittingLoras(all, { ...SDXL, family: "flux" }).map(({ id }) => id),
    ["4"],
  );
  assert.deepEqual(rules.fittingLoras(all, FLUX), []);
});

test("LoRAs are sent by id and weight, as many as the model takes", () => {
  const loras = ["1", "2", "3"].map((id) => ({ id, name: id, weight: 0.5 }));

  const sent = rules.requestBody({ ...FORM, loras }, SDXL);

  assert.deepEqual(sent.loras, [
    { id: "1", weight: 0.5 },
    { id: "2", weight: 0.5 },
  ]);
  assert.equal("loras" in rules.requestBody({ ...FORM, loras }, FLUX), false);
  assert.equal("loras" in rules.requestBody(FORM, SDXL), false);
});

test("LoRAs stay with models of their family and come back with a job", () => {
  const loras = [{ id: "1", name: "ink", weight: -1 }];

  assert.deepEqual(rules.changedModel({ ...FORM, loras }, SDXL, { ...SDXL, id: "other" }).loras, loras);
  assert.deepEqual(rules.changedModel({ ...FORM, loras }, SDXL, { ...FLUX, maxLoras: 4 }).loras, []);
  assert.deepEqual(rules.formOf({ ...JOB.request, loras }, "7", []).loras, loras);
});

test("a trigger word is added to the prompt once", () => {
  assert.equal(rules.withWord("", "inky"), "inky");
  assert.equal(rules.withWord("a fox", "inky"), "a fox, inky");
  assert.equal(rules.withWord("a fox, ", "inky"), "a fox, inky");
  assert.equal(rules.withWord("an Inky fox", "inky"), "an Inky fox");
});
