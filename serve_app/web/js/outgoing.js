// Requests on their way to the service: sent one after the other, in the order they were made.

import { ApiError } from "./api.js";
import { signal } from "./signal.js";

/**
 * A request that is not a job yet.
 * @typedef {object} Outgoing
 * @property {string} key  also its Idempotency-Key: sent twice, it is one job
 * @property {import("./types.js").Kind} kind
 * @property {object} body
 * @property {import("./types.js").FormValues} form  that it was made from
 * @property {import("./types.js").Problem | null} problem  why it was refused; null: it waits or is being sent
 */

/**
 * @param {import("./types.js").Api} api
 * @param {(entry: Outgoing, job: import("./types.js").Job) => void} onJob  a request became a job
 */
export function createOutgoing(api, onJob) {
  /** @type {import("./types.js").Signal<Outgoing[]>} oldest first */
  const entries = signal(/** @type {Outgoing[]} */ ([]));
  let draining = false;

  /** @param {string} key */
  const find = (key) => entries.get().find((entry) => entry.key === key);

  /** @param {string} key */
  const remove = (key) => entries.set(entries.get().filter((entry) => entry.key !== key));

  /**
   * @param {string} key
   * @param {import("./types.js").Problem | null} problem
   */
  const mark = (key, problem) =>
    entries.set(entries.get().map((entry) => (entry.key === key ? { ...entry, problem } : entry)));

  async function drain() {
    if (draining) return;
    draining = true;
    try {
      for (let next = waiting(); next !== undefined; next = waiting()) await send(next);
    } finally {
      draining = false;
    }
  }

  const waiting = () => entries.get().find((entry) => entry.problem === null);

  /** @param {Outgoing} entry */
  async function send(entry) {
    try {
      const { id, warnings } = await api.generate(entry.body, entry.kind, entry.key);
      const record = await api.job(id);
      onJob(entry, { ...record, warnings: record.warnings.length > 0 ? record.warnings : warnings });
      remove(entry.key);
    } catch (error) {
      if (!(error instanceof ApiError)) {
        mark(entry.key, { code: "internal", message: String(error), param: null, retryAfterS: null });
        throw error;
      }
      mark(entry.key, error.problem);
    }
  }

  return {
    entries,
    find,
    remove,
    /** Whether closing the page now would lose a request. */
    unsent: () => waiting() !== undefined,

    /**
     * The key of the new request.
     *
     * @param {import("./types.js").Kind} kind
     * @param {object} body
     * @param {import("./types.js").FormValues} form
     */
    add(kind, body, form) {
      const key = newKey();
      entries.set([...entries.get(), { key, kind, body, form, problem: null }]);
      void drain();
      return key;
    },

    /** Sends a refused request once more. @param {string} key */
    retry(key) {
      mark(key, null);
      void drain();
    },
  };
}

/** Not randomUUID: browsers have that with https only. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
