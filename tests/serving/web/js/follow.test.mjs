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
  const seen = { lastIds: [], events: [], jobs: [], connected: [], waits: [] };
  const next = (answers) => (answers.length > 1 ? answers.shift() : answers[0])();
  await follow(JOB.id, {
    api: {
      events: (_, lastId) => (seen.lastIds.push(lastId), next(streams)),
      job: () => next(records),
    },
    signal: new AbortController().signal,
    onEvent: (event) => seen.events.push(event.type),
    onJob: (job) => seen.jobs.push(job.status),
    onConnection: (ok) => seen.connected.push(ok),
    wait: async (ms) => void seen.waits.push(ms),
  });
  return seen;
}

test("a stream that breaks is taken up again after the last event received", async () => {
  const seen = await followed({
    streams: [
      () => stream('id: 1-0\nevent: queued\ndata: {"position": 1}\n\nid: 2-0\nevent: started\ndata: {}\n\n'),
      () => stream("id: 3-0\nevent: completed\ndata: {}\n\n"),
    ],
    records: [async () => DONE],
  });

  assert.deepEqual(seen.lastIds, [null, "2-0"]);
  assert.deepEqual(seen.events, ["queued", "started", "completed"]);
  assert.deepEqual(seen.jobs, ["completed"]);
  assert.ok(!seen.connected.includes(false), "one break is not worth a banner");
});

test("where streams never work, asking does", async () => {
  const seen = await followed({
    streams: [broken],
    records: [async () => ({ ...JOB, status: "processing" }), async () => DONE],
  });

  assert.equal(seen.lastIds.length, 4);
  assert.deepEqual(seen.jobs, ["processing", "completed"]);
  assert.deepEqual(seen.waits.slice(0, 4), [500, 1000, 2000, 4000]);
});

test("an unreachable service is reported, and so is its return", async () => {
  const seen = await followed({ streams: [broken], records: [broken, broken, async () => DONE] });

  assert.ok(seen.connected.includes(false));
  assert.equal(seen.connected.at(-1), true);
  assert.ok(Math.max(...seen.waits) <= 10_000);
});

test("a job that is not there is not asked for twice", async () => {
  const gone = () =>
    Promise.reject(new ApiError(404, { code: "not_found", message: "", param: null, retryAfterS: null }));

  await assert.rejects(followed({ streams: [gone], records: [gone] }), { status: 404 });
});
