// Staying with a job until it ends: its event stream, again after a break, at last by asking.

import { ApiError } from "./api.js";
import { readEvents } from "./sse.js";
import { hasEnded } from "./job-state.js";
import { jobEvent } from "./wire.js";

const STREAM_TRIES = 4; // breaks in a row before we stop streaming and ask instead
const SILENCE_MS = 45_000; // the server sends a comment every 15 s; silence means a dead line
const POLL_MS = 2_000;

/**
 * @typedef {object} Follower
 * @property {import("./types.js").Api} api
 * @property {AbortSignal} signal
 * @property {(event: import("./types.js").JobEvent) => void} onEvent
 * @property {(job: import("./types.js").Job) => void} onJob       the job's own record
 * @property {(connected: boolean) => void} onConnection
 * @property {(ms: number) => Promise<void>} [wait]
 */

/**
 * Returns when the job has ended (after `onJob` with its final record) or the signal aborts.
 * Throws ApiError when asking again cannot help: no such job, not allowed.
 *
 * @param {string} id
 * @param {Follower} follower
 */
export async function follow(id, follower) {
  const { api, signal, onJob, onConnection } = follower;
  const wait = follower.wait ?? ((ms) => sleep(ms, signal));
  /** @type {string | null} */
  let lastId = null;
  let breaks = 0;
  while (!signal.aborted) {
    const streaming = breaks < STREAM_TRIES;
    try {
      if (streaming) {
        const ended = await stream(id, lastId, follower, (eventId) => {
          lastId = eventId || lastId;
          breaks = 0;
          onConnection(true);
        });
        if (!ended) throw new Error("the stream stopped before the job did");
      }
      const job = await api.job(id);
      onConnection(true);
      onJob(job);
      if (hasEnded(job)) return;
      if (streaming) throw new Error("the record is behind the stream");
      breaks = STREAM_TRIES;
      await wait(POLL_MS);
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && !error.transient) throw error;
      breaks += 1;
      if (breaks > 1) onConnection(false); // one break is everyday life
      await wait(Math.min(500 * 2 ** (breaks - 1), 10_000));
    }
  }
}

/**
 * True when the stream reported the job's end.
 *
 * @param {string} id
 * @param {string | null} lastId
 * @param {Follower} follower
 * @param {(eventId: string) => void} onAlive
 */
async function stream(id, lastId, { api, signal, onEvent }, onAlive) {
  const line = new AbortController();
  const hangUp = () => line.abort();
  signal.addEventListener("abort", hangUp);
  let alarm = setTimeout(hangUp, SILENCE_MS);
  try {
    const response = await api.events(id, lastId, line.signal);
    const onActivity = () => {
      clearTimeout(alarm);
      alarm = setTimeout(hangUp, SILENCE_MS);
    };
    for await (const raw of readEvents(response, onActivity)) {
      if (signal.aborted) return false;
      onAlive(raw.id);
      const event = jobEvent(raw);
      if (event === null) continue; // a kind of event newer than this page
      onEvent(event);
      if (["completed", "failed", "cancelled"].includes(event.type)) return true;
    }
    return false;
  } finally {
    clearTimeout(alarm);
    signal.removeEventListener("abort", hangUp);
    line.abort();
  }
}

/**
 * @param {number} ms
 * @param {AbortSignal} signal
 * @returns {Promise<void>}
 */
function sleep(ms, signal) {
  return new Promise((resolve) => {
    const finish = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", finish);
      resolve();
    };
    const timer = setTimeout(finish, ms);
    signal.addEventListener("abort", finish);
  });
}
