// The jobs this page knows: sends them, follows the one on the stage, keeps the others fresh.

import { ApiError } from "./api.js";
import { follow } from "./follow.js";
import { applyEvent, hasEnded, merged } from "./job-state.js";
import { signal } from "./signal.js";

const KEPT = 24; // jobs in the filmstrip
const REFRESH_MS = 2_000; // of running jobs that are not on the stage

/** @typedef {import("./types.js").Job} Job */

/**
 * @typedef {object} Refusal  a request that never became a job
 * @property {import("./types.js").Problem} problem
 * @property {object} body
 */

/**
 * @param {import("./types.js").Api} api
 * @param {import("./types.js").Kind} kind  what is asked for here; the history holds all kinds
 */
export function createJobStore(api, kind) {
  /** @type {import("./types.js").Signal<Job[]>} newest first */
  const jobs = signal(/** @type {Job[]} */ ([]));
  /** @type {import("./types.js").Signal<string | null>} the job on the stage */
  const currentId = signal(/** @type {string | null} */ (null));
  /** @type {import("./types.js").Signal<Refusal | null>} */
  const refusal = signal(/** @type {Refusal | null} */ (null));
  const sending = signal(false);
  const connected = signal(true);
  let following = new AbortController();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let refresher;

  /** @param {string | null} id */
  const find = (id) => jobs.get().find((job) => job.id === id);

  /** @param {Job} job */
  function put(job) {
    const known = jobs.get();
    const index = known.findIndex((other) => other.id === job.id);
    jobs.set(index < 0 ? [job, ...known].slice(0, KEPT) : known.with(index, job));
  }

  /** @param {string} id */
  function drop(id) {
    jobs.set(jobs.get().filter((job) => job.id !== id));
    if (currentId.get() === id) select(newest());
  }

  /** The newest job of this store's kind. */
  function newest() {
    return jobs.get().find((job) => job.kind === kind)?.id ?? null;
  }

  /** Shows a job on the stage and, while it runs, follows it. @param {string | null} id */
  function select(id) {
    following.abort();
    following = new AbortController();
    connected.set(true);
    refusal.set(null);
    currentId.set(id);
    const job = find(id);
    if (job !== undefined && !hasEnded(job)) void stayWith(job.id, following.signal);
    scheduleRefresh();
  }

  /**
   * @param {string} id
   * @param {AbortSignal} abort
   */
  async function stayWith(id, abort) {
    try {
      await follow(id, {
        api,
        signal: abort,
        onConnection: (ok) => connected.set(ok),
        onJob: (record) => put(merged(record, find(id))),
        onEvent(event) {
          const job = find(id);
          if (job !== undefined) put(applyEvent(job, event, performance.now()));
        },
      });
    } catch (error) {
      if (abort.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 404) drop(id);
      else refusal.set({ problem: error.problem, body: {} });
    }
  }

  /** Reads the newest jobs; the one on the stage stays, however many are newer. */
  async function load() {
    const listed = await api.jobs(KEPT);
    const fresh = listed.map((record) => merged(record, find(record.id)));
    const shown = find(currentId.get());
    const pushedOut = shown !== undefined && !fresh.some((job) => job.id === shown.id);
    jobs.set(pushedOut ? [...fresh, shown] : fresh);
  }

  /** Adds the newest job of this store's kind, where newer ones of the other kind hide it. */
  async function loadNewest() {
    const [record] = await api.jobs(1, kind);
    if (record !== undefined && find(record.id) === undefined) jobs.set([...jobs.get(), record]);
  }

  /** The person was faster than the history. */
  const busy = () => sending.get() || refusal.get() !== null || currentId.get() !== null;

  function scheduleRefresh() {
    clearTimeout(refresher);
    if (!jobs.get().some((job) => !hasEnded(job) && job.id !== currentId.get())) return;
    refresher = setTimeout(async () => {
      await load().catch(() => undefined); // the next round tries again
      scheduleRefresh();
    }, REFRESH_MS);
  }

  return {
    jobs,
    currentId,
    refusal,
    sending,
    connected,
    select,
    current: () => find(currentId.get()),

    /** Reads the history and shows its newest job: one that runs is picked up again. */
    async open() {
      await load();
      if (!busy() && newest() === null) await loadNewest();
      if (!busy()) select(newest());
    },

    /** Sends a request; true when it became a job. @param {object} body */
    async submit(body) {
      sending.set(true);
      refusal.set(null);
      try {
        const { id, warnings } = await api.generate(body, kind);
        const record = await api.job(id);
        put({ ...record, warnings: record.warnings.length > 0 ? record.warnings : warnings });
        select(id);
        return true;
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        refusal.set({ problem: error.problem, body });
        return false;
      } finally {
        sending.set(false);
      }
    },

    /** Cancels the job on the stage; its event stream reports when it has ended. */
    async cancel() {
      const job = find(currentId.get());
      if (job === undefined || hasEnded(job)) return;
      try {
        await api.cancel(job.id);
      } catch (error) {
        // 404, 409: it ended meanwhile, which its event stream will report
        if (!(error instanceof ApiError)) throw error;
        if (error.status !== 404 && error.status !== 409) refusal.set({ problem: error.problem, body: {} });
      }
    },

    close() {
      following.abort();
      clearTimeout(refresher);
    },
  };
}

/** @typedef {ReturnType<typeof createJobStore>} JobStore */
