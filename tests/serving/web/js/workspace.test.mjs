import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { beforeEach, test } from "node:test";

import { FRAMEWISE, JOB, SDXL, WAN } from "./examples.mjs";
import { FakeElement, all } from "./fake-dom.mjs";

const WEB = new URL("../../../../serve_app/web/", import.meta.url);

const storage = () => {
  const kept = new Map();
  return {
    getItem: (name) => kept.get(name) ?? null,
    setItem: (name, value) => void kept.set(name, value),
    removeItem: (name) => void kept.delete(name),
  };
};
globalThis.localStorage = storage();
globalThis.sessionStorage = storage();
globalThis.location = { hash: "" };
globalThis.ResizeObserver = class {
  observe() {}
  disconnect() {}
};
globalThis.HTMLElement = FakeElement;
Object.assign(document, { documentElement: new FakeElement("html"), addEventListener() {} });

const { useTexts } = await import(new URL("js/i18n.js", WEB));
const { createJobStore } = await import(new URL("js/job-store.js", WEB));
const create = await import(new URL("js/pages/create.js", WEB));
const video = await import(new URL("js/pages/video.js", WEB));

useTexts("en", JSON.parse(readFileSync(new URL("locales/en.json", WEB), "utf8")));

const SIZE = { width: 64, height: 64 };
const REQUEST = { ...JOB.request, ...SIZE, model: "wan", task: "t2v", prompt: "a valley", format: "mp4" };
const VIDEO = { frames: 21, fps: 8, seconds: 2.63, framewise: false };
const FILE = {
  index: 0,
  url: "results/1/0.mp4",
  posterUrl: "results/1/0/poster",
  sheetUrl: "results/1/0/spritesheet",
  mediaType: "video/mp4",
};
const DONE = {
  ...JOB,
  kind: "video",
  status: "completed",
  request: { ...REQUEST, video: VIDEO },
  pictures: [{ ...FILE, thumbnailUrl: null, width: 64, height: 64, seed: "7" }],
};

let root;
let sent;
beforeEach(() => {
  root = new FakeElement("main");
  sent = [];
  location.hash = "";
  sessionStorage.removeItem("weft.draft");
  sessionStorage.removeItem("weft.draft.video");
});

/** The page over a service with these jobs, once it has read them. */
async function open(page, jobs) {
  const api = {
    models: async () => [SDXL, WAN, FRAMEWISE],
    loras: async () => [],
    jobs: async (limit, kind) => jobs.filter((job) => job.kind === kind).slice(0, limit),
    async generate(body, kind) {
      sent.push([kind, body]);
      return { id: DONE.id, status: "queued", warnings: [] };
    },
    job: async () => DONE,
  };
  const pictures = {
    image: (url) => Object.assign(new FakeElement("img"), { src: url }),
    video(url, posterUrl) {
      return Object.assign(new FakeElement("video"), { src: url, poster: posterUrl });
    },
  };
  const toast = { show() {}, announce() {} };
  const leave = page.mount(root, { api, pictures, toast, dialogs: {}, jobStore: createJobStore(api) });
  await settled();
  return leave;
}

const settled = async () => {
  for (let round = 0; round < 20; round += 1) await new Promise(setImmediate);
};
const find = (id) => all(root).find((element) => element.id === id);
const words = (tag) =>
  all(root)
    .filter((element) => element.tag === tag)
    .map((element) => element.children.filter((child) => typeof child === "string").join(""));
const press = (label) =>
  all(root)
    .find((element) => element.tag === "button" && all(element).some((part) => part.children[0] === label))
    .listeners.click({});

test("the page Video asks for a video and shows it with its first frame", async () => {
  const leave = await open(video, []);
  assert.ok(words("h2").includes("What should the video show?"));
  find("prompt").value = "a valley";

  all(root)
    .find((element) => element.tag === "form")
    .listeners.submit({ preventDefault() {} });
  await settled();

  assert.deepEqual(
    sent.map(([kind, body]) => [kind, body.model, body.num_frames, body.output_format]),
    [["video", "wan", 17, "mp4"]],
  );
  const player = all(root).find((element) => element.tag === "video");
  assert.deepEqual([player.src, player.poster], [FILE.url, FILE.posterUrl]);
  leave();
});

test("the frames of a video are fetched when they are asked for, and hidden again", async () => {
  const leave = await open(video, [DONE]);
  const sheets = () => all(root).filter((element) => element.src === FILE.sheetUrl);
  assert.equal(sheets().length, 0);

  press("Frames at a glance");
  const container = all(root).find((element) => element.children[0] === sheets()[0]);
  assert.equal(container.hidden, false);
  press("Frames at a glance");

  assert.deepEqual([container.hidden, sheets().length], [true, 1]);
  leave();
});

test("each page begins with the newest job of its own kind", async () => {
  (await open(create, [DONE]))();
  assert.ok(words("h2").includes("What should the picture show?"));

  (await open(video, [DONE]))();
  assert.ok(all(root).some((element) => element.tag === "video"));
});

test("each page's strip holds its own kind, and use again fills its form", async () => {
  (await open(create, [DONE]))();
  assert.ok(!all(root).some((element) => element.attributes["aria-label"] === "Video: a valley"));

  const leave = await open(video, [DONE]);
  press("Use again");

  const draft = JSON.parse(sessionStorage.getItem("weft.draft.video"));
  assert.deepEqual([draft.prompt, draft.seed, draft.video.frames], ["a valley", "7", 21]);
  leave();
});
