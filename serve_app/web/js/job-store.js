// The jobs of the whole page: sends them, follows the one that is looked at, keeps the others fresh.

import { ApiError } from "./api.js";
import { follow } from "./follow.js";
import { applyEvent, hasEnded, merged } from "./job-state.js";
import { createOutgoing } from "./outgoing.js";
import { signal } from "./signal.js";

const KEPT = 24; // jobs of a kind in the filmstrip; those that run and those on a stage are kept beside them
const REFRESH_MS = 2_000; // of running jobs that are not on the stage

/** @typedef {import("./types.js").Job} Job */
/** @typedef {import("./types.js").Kind} Kind */

/**
 * What a stage or a frame shows: a job, or a request that is none yet.
 * @typedef {object} Entry
 * @property {string} key  stays the same when the request becomes a job
 * @property {Job | null} job
 * @property {import("./outgoing.js").Outgoing | null} outgoing
 * @property {boolean} unseen  it ended while something else was looked at
 */

/** @param {import("./types.js").Api} api */
export function createJobStore(api) {
  /** @type {import("./types.js").Signal<Job[]>} of all kinds, newest first */
  const jobs = signal(/** @type {Job[]} */ ([]));
  const outgoing = createOutgoing(api, accepted);
  /** @type {Readonly<Record<Kind, import("./types.js").Signal<string | null>>>} keys of what the stages show */
  const shown = {
    image: signal(/** @type {string | null} */ (null)),
    video: signal(/** @type {string | null} */ (null)),
  };
  /** @type {import("./types.js").Signal<ReadonlySet<string>>} ids of jobs that ended unseen */
  const unseen = signal(/** @type {ReadonlySet<string>} */ (new Set()));
  /** @type {import("./types.js").Signal<import("./types.js").Problem | null>} of following the shown job */
  const problem = signal(/** @type {import("./types.js").Problem | null} */ (null));
  const connected = signal(true);
  /** @type {Map<string, string>} from a job's id to the key it was sent with */
  const keys = new Map();
  /** @type {Kind | null} the kind that is looked at */
  let active = null;
  let following = new AbortController();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let refresher;

  /** @param {string} id */
  const find = (id) => jobs.get().find((job) => job.id === id);
  /** @param {Job} job */
  const keyOf = (job) => keys.get(job.id) ?? job.id;
  /** @param {Kind} kind */
  const current = (kind) => jobs.get().find((job) => keyOf(job) === shown[kind].get());
  /** @param {Job} job */
  const onStage = (job) => keyOf(job) === shown[job.kind].get();
  /** @param {Job} job */
  const lookedAt = (job) => job.kind === active && onStage(job);

  /** Sets the jobs: the newest of each kind, those that run, those on a stage. @param {Job[]} next */
  function replace(next) {
    const count = { image: 0, video: 0 };
    const known = jobs.get();
    const kept = next.filter((job) => (count[job.kind] += 1) <= KEPT || !hasEnded(job) || onStage(job));
    for (const job of kept) {
      const before = known.find((other) => other.id === job.id);
      if (before !== undefined && !hasEnded(before) && hasEnded(job) && !lookedAt(job)) {
        unseen.set(new Set([...unseen.get(), job.id]));
      }
    }
    jobs.set(kept);
  }

  /** @param {Job} job */
  function put(job) {
    const known = jobs.get();
    const index = known.findIndex((other) => other.id === job.id);
    replace(index < 0 ? [job, ...known] : known.with(index, job));
  }

  /** @param {Job} job */
  function drop(job) {
    jobs.set(jobs.get().filter((other) => other.id !== job.id));
    if (onStage(job)) show(job.kind, newest(job.kind));
  }

  /** @param {Kind} kind */
  function newest(kind) {
    const job = jobs.get().find((each) => each.kind === kind);
    return job === undefined ? null : keyOf(job);
  }

  /** @param {import("./outgoing.js").Outgoing} entry @param {Job} job */
  function accepted(entry, job) {
    keys.set(job.id, entry.key);
    put(merged(job, find(job.id)));
    if (lookedAt(job)) followShown();
    else scheduleRefresh();
  }

  /** @param {Kind} kind @param {string | null} key */
  function show(kind, key) {
    problem.set(null);
    shown[kind].set(key);
    if (kind === active) followShown();
  }

  /** Follows what is looked at while it runs, and marks it as seen. */
  function followShown() {
    following.abort();
    following = new AbortController();
    connected.set(true);
    const job = active === null ? undefined : current(active);
    if (job !== undefined && unseen.get().has(job.id)) {
      unseen.set(new Set([...unseen.get()].filter((id) => id !== job.id)));
    }
    if (job !== undefined && !hasEnded(job)) void stayWith(job, following.signal);
    scheduleRefresh();
  }

  /**
   * @param {Job} job
   * @param {AbortSignal} abort
   */
  async function stayWith(job, abort) {
    try {
      await follow(job.id, {
        api,
        signal: abort,
        onConnection: (ok) => connected.set(ok),
        onJob: (record) => put(merged(record, find(job.id))),
        onEvent(event) {
          const known = find(job.id);
          if (known !== undefined) put(applyEvent(known, event, performance.now()));
        },
      });
    } catch (error) {
      if (abort.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 404) drop(job);
      else problem.set(error.problem);
    }
  }

  /**
   * Reads the newest jobs of a kind; those that run or are shown stay, however many are newer.
   * Gives back the ids that it read.
   *
   * @param {Kind} kind
   */
  async function load(kind) {
    const listed = await api.jobs(KEPT, kind);
    const ids = new Set(listed.map((record) => record.id));
    const oldest = listed.length < KEPT ? 0 : (listed.at(-1)?.createdAt ?? 0);
    /** @param {Job} job */
    const stays = (job) => job.kind !== kind || !hasEnded(job) || onStage(job) || job.createdAt < oldest;
    const others = jobs.get().filter((job) => !ids.has(job.id) && stays(job)); // the rest was deleted elsewhere
    const fresh = listed.map((record) => merged(record, find(record.id)));
    replace([...fresh, ...others].sort((one, other) => other.createdAt - one.createdAt));
    return ids;
  }

  /** Reads again what runs and is not followed. @param {Job} job */
  async function refresh(job) {
    try {
      put(merged(await api.job(job.id), find(job.id)));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) drop(job); // else: the next round tries again
    }
  }

  const unfollowed = () => jobs.get().filter((job) => !hasEnded(job) && !lookedAt(job));

  function scheduleRefresh() {
    clearTimeout(refresher);
    if (unfollowed().length === 0) return;
    refresher = setTimeout(async () => {
      /** @type {Set<string>} */
      const none = new Set();
      const read = active === null ? none : await load(active).catch(() => none); // the next round tries again
      await Promise.all(unfollowed().filter((job) => !read.has(job.id)).map(refresh));
      scheduleRefresh();
    }, REFRESH_MS);
  }

  return {
    jobs,
    outgoing: outgoing.entries,
    unsent: outgoing.unsent,
    unseen,
    shown,
    problem,
    connected,
    current,
    /** The request on the stage that is no job yet. @param {Kind} kind */
    currentOutgoing: (kind) => outgoing.find(shown[kind].get() ?? ""),
    select: show,

    /** The frames of a kind, newest first. @param {Kind} kind @returns {Entry[]} */
    entries(kind) {
      const ofKind = jobs.get().filter((job) => job.kind === kind);
      const made = ofKind.map((job) => ({
        key: keyOf(job),
        job,
        outgoing: null,
        unseen: unseen.get().has(job.id),
      }));
      const known = new Set(made.map((entry) => entry.key));
      const asked = outgoing.entries.get().filter((entry) => entry.kind === kind && !known.has(entry.key));
      const sent = asked.map((entry) => ({ key: entry.key, job: null, outgoing: entry, unseen: false }));
      return [...sent.reverse(), ...made];
    },

    /** How many jobs of a kind ended unseen. @param {Kind} kind */
    unseenOf: (kind) => jobs.get().filter((job) => job.kind === kind && unseen.get().has(job.id)).length,

    /** A kind is looked at from now on: its history is read, what runs is picked up again. @param {Kind} kind */
    async open(kind) {
      active = kind;
      followShown();
      await load(kind);
      if (shown[kind].get() === null) show(kind, newest(kind));
      else if (active === kind) followShown();
    },

    /** A kind is not looked at any more. @param {Kind} kind */
    leave(kind) {
      if (active !== kind) return;
      active = null;
      followShown();
    },

    /**
     * Puts a request on the stage and sends it after those before it.
     *
     * @param {Kind} kind
     * @param {object} body
     * @param {import("./types.js").FormValues} form
     */
    submit(kind, body, form) {
      show(kind, outgoing.add(kind, body, form));
    },

    retry: outgoing.retry,

    /** Forgets a refused request. @param {Kind} kind @param {string} key */
    dismiss(kind, key) {
      outgoing.remove(key);
      if (shown[kind].get() === key) show(kind, newest(kind));
    },

    /** Cancels the job on the stage; its event stream reports when it has ended. @param {Kind} kind */
    async cancel(kind) {
      const job = current(kind);
      if (job === undefined || hasEnded(job)) return;
      try {
        await api.cancel(job.id);
      } catch (error) {
        // 404, 409: it ended meanwhile, which its event stream will report
        if (!(error instanceof ApiError)) throw error;
        if (error.status !== 404 && error.status !== 409) problem.set(error.problem);
      }
    },
  };
}

/** @typedef {ReturnType<typeof createJobStore>} JobStore */
