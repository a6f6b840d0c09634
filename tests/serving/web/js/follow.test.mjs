import assert from "node:assert/strict";
import { test } from "node:test";

import { ApiError } from "../../../../serve_app/web/js/api.js";
import { follow } from "../../../../serve_app/web/js/follow.js";
import { JOB } from "./examples.mjs";

const DONE = { ...JOB, status: "completed" };
const broken = () =>
  Promise.reject(new ApiError(0, { code: "network", message: "", param: null, retryAfterS: null }));
const stream = (text) => Promise.resolve(new Response(text));

/** Follows a job through these answers, in order; the last one stays. */
async function followed({ streams, records }) {
  const told = { lastIds: [], events: [], jobs: [], connected: [], waits: [] };
  const next = (answers) => (answers.length > 1 ? answers.shift() : answers[0])();
  await follow(JOB.id, {
    api: {
      events: (_, lastId) => (told.lastIds.push(lastId), next(streams)),
      job: () => next(records),
    },
    signal: new AbortController().signal,
    onEvent: (event) => told.events.push(event.type),
    onJob: (job) => told.jobs.push(job.status),
    onConnection: (ok) => told.connected.push(ok),
    wait: async (ms) => void told.waits.push(ms),
  });
  return told;
}

test("a stream that breaks is taken up again after the last event heard", async () => {
  const told = await followed({
    streams: [
      () => stream('id: 1-0\nevent: queued\ndata: {"position": 1}\n\nid: 2-0\nevent: started\ndata: {}\n\n'),
      () => stream("id: 3-0\nevent: completed\ndata: {}\n\n"),
    ],
    records: [async () => DONE],
  });

  assert.deepEqual(told.lastIds, [null, "2-0"]);
  assert.deepEqual(told.events, ["queued", "started", "completed"]);
  assert.deepEqual(told.jobs, ["completed"]);
  assert.ok(!told.connected.includes(false), "one break is not worth a banner");
});

test("where streams never work, asking does", async () => {
  const told = await followed({
    streams: [broken],
    records: [async () => ({ ...JOB, status: "processing" }), async () => DONE],
  });

  assert.equal(told.lastIds.length, 4);
  assert.deepEqual(told.jobs, ["processing", "completed"]);
  assert.deepEqual(told.waits.slice(0, 4), [500, 1000, 2000, 4000]);
});

test("a service that is gone is told, and so is its return", async () => {
  const told = await followed({ streams: [broken], records: [broken, broken, async () => DONE] });

  assert.ok(told.connected.includes(false));
  assert.equal(told.connected.at(-1), true);
  assert.ok(Math.max(...told.waits) <= 10_000);
});

test("a job that is not there is not asked for twice", async () => {
  const gone = () =>
    Promise.reject(new ApiError(404, { code: "not_found", message: "", param: null, retryAfterS: null }));

  await assert.rejects(followed({ streams: [gone], records: [gone] }), { status: 404 });
});
