import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { formatNumber, preferredLanguage, t, useTexts } from "../../../../serve_app/web/js/i18n.js";
import { matching } from "../../../../serve_app/web/js/keys.js";
import { fileName } from "../../../../serve_app/web/js/parts/pictures.js";
import { remedy, titleOf } from "../../../../serve_app/web/js/parts/remedy.js";
import { pageName } from "../../../../serve_app/web/js/router.js";
import { signal } from "../../../../serve_app/web/js/signal.js";
import { FLUX } from "./examples.mjs";

useTexts(
  "en",
  JSON.parse(readFileSync(new URL("../../../../serve_app/web/locales/en.json", import.meta.url), "utf8")),
);

test("a signal calls a listener now and after each change, until it unsubscribes", () => {
  const received = [];
  const count = signal(1);
  const stop = count.subscribe((value) => received.push(value));

  count.set(2);
  count.set(2);
  stop();
  count.set(3);

  assert.deepEqual(received, [1, 2]);
});

test("words are counted and filled in", () => {
  assert.equal(t("queued.ahead", { count: 1 }), "1 ahead of you");
  assert.equal(t("done.saved", { count: 1 }), "Saved");
  assert.equal(t("done.saved", { count: 4 }), "4 pictures saved");
  assert.equal(
    t("notice.stepsOverridden", { family: "FLUX", steps: 4, asked: 30 }),
    "FLUX requires exactly 4 steps. Overriding 30 → 4",
  );
  assert.equal(formatNumber(2.999), "3");
  assert.throws(() => t("queued.ahead", {}), /count/);
});

test("the language is the first of the person's that we speak", () => {
  assert.equal(preferredLanguage(["xx-XX", "en-GB"]), "en");
  assert.equal(preferredLanguage([]), "en");
});

const KEYS = [
  { key: "Enter", command: true, run: () => true },
  { key: "Escape", run: () => true },
  { key: "?", run: () => true },
];
const press = (key, more = {}) => ({ key, ctrlKey: false, metaKey: false, altKey: false, ...more });

test("single-key shortcuts rest while typing or when switched off", () => {
  const free = { typing: false, single: true };

  assert.equal(matching(press("?"), KEYS, free)?.key, "?");
  assert.equal(matching(press("?"), KEYS, { typing: true, single: true }), undefined);
  assert.equal(matching(press("?"), KEYS, { typing: false, single: false }), undefined);
  assert.equal(matching(press("Escape"), KEYS, { typing: true, single: false })?.key, "Escape");
  assert.equal(matching(press("Enter", { metaKey: true }), KEYS, free)?.key, "Enter");
  assert.equal(matching(press("Enter"), KEYS, free), undefined);
});

test("each error has its own suggested fix", () => {
  const suggestion = (code, more = {}) =>
    remedy(
      { code, message: "", param: null, retryAfterS: null, ...more },
      { width: 1024, height: 1024 },
      FLUX.sizes,
      (param) => param === "seed",
    );

  assert.deepEqual(suggestion("out_of_memory"), { kind: "smaller", width: 512, height: 512 });
  assert.deepEqual(suggestion("unauthorized"), { kind: "key" });
  assert.deepEqual(suggestion("rate_limited", { retryAfterS: 2.5 }), { kind: "wait", seconds: 3 });
  assert.deepEqual(suggestion("overloaded"), { kind: "again" });
  assert.deepEqual(suggestion("bad_request", { param: "seed" }), { kind: "field", param: "seed" });
  assert.deepEqual(suggestion("bad_request", { param: "strength" }), { kind: "none" });
  assert.deepEqual(suggestion("something_new"), { kind: "again" });
  assert.equal(titleOf("something_new"), "error.internal");
});

test("the address names the page; an unknown one is the first page", () => {
  assert.equal(pageName("#/create"), "create");
  assert.equal(pageName("#/constructor"), "create");
  assert.equal(pageName(""), "create");
});

test("a saved file is named after its job", () => {
  assert.equal(fileName("ab", { index: 1, mediaType: "image/jpeg" }), "weft-ab-1.jpg");
});
