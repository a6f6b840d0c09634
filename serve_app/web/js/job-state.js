// What an event does to a job, and what can be read off it. Pure.

/** @typedef {import("./types.js").Job} Job */

/** @param {Pick<Job, "status">} job */
export function hasEnded(job) {
  return job.status === "completed" || job.status === "failed" || job.status === "cancelled";
}

/**
 * The job after an event. `now` in ms, of a clock that never jumps.
 *
 * @param {Job} job
 * @param {import("./types.js").JobEvent} event
 * @param {number} now
 * @returns {Job}
 */
export function applyEvent(job, event, now) {
  switch (event.type) {
    case "queued": // also when a worker stopped; the steps that it saved are not lost
      return { ...job, ...resumed(job, event), status: "queued", ahead: event.ahead };
    case "started": {
      const steps = event.steps ?? job.request.steps;
      return { ...job, ...resumed(job, event), status: "processing", ahead: null, steps };
    }
    case "step": {
      const first = job.firstStepAt === null || event.step <= job.firstStep;
      return {
        ...job,
        status: "processing",
        ahead: null,
        step: event.step,
        steps: event.steps,
        percent: event.percent ?? job.percent,
        firstStep: first ? event.step : job.firstStep,
        firstStepAt: first ? now : job.firstStepAt,
        lastStepAt: now,
      };
    }
    case "stage": {
      const percent = event.percent ?? job.percent;
      const frameProgress = { done: event.done, total: event.total };
      return { ...job, status: "processing", ahead: null, percent, [event.stage]: frameProgress };
    }
    case "preview":
      return { ...job, preview: `data:${event.mediaType};base64,${event.data}` };
    case "failed":
      return { ...job, status: "failed", problem: event.problem };
    case "cancelled":
      return { ...job, status: "cancelled" };
    case "completed":
      return job; // its pictures come with the record, which is asked for next
  }
}

/**
 * Progress of a job that begins after `step` steps; its step times are measured anew.
 *
 * @param {Job} job
 * @param {{ step: number, percent: number | null }} event
 */
function resumed(job, { step, percent: reported }) {
  const percent = reported ?? 0;
  const preview = step > 0 ? job.preview : null;
  const stepTimes = { firstStep: step, firstStepAt: null, lastStepAt: null };
  return { step, percent, preview, decode: null, encode: null, ...stepTimes };
}

/**
 * How far each part of the work on a video is, from 0 to 1.
 *
 * @param {Job} job
 */
export function portions(job) {
  const decoding = job.decode !== null || job.encode !== null;
  return {
    denoise: decoding ? 1 : Math.min(1, job.step / Math.max(1, job.steps)),
    decode: share(job.decode),
    encode: share(job.encode),
  };
}

/** @param {import("./types.js").FrameProgress | null} progress */
function share(progress) {
  return progress === null ? 0 : Math.min(1, progress.done / Math.max(1, progress.total));
}

/**
 * Seconds until the last step, from the step times so far; null before two steps are done.
 *
 * @param {Job} job
 */
export function secondsLeft(job) {
  if (job.firstStepAt === null || job.lastStepAt === null || job.step <= job.firstStep) return null;
  const perStep = (job.lastStepAt - job.firstStepAt) / (job.step - job.firstStep);
  return (perStep * (job.steps - job.step)) / 1000;
}

/**
 * The record just read, keeping what only the event stream reports.
 *
 * @param {Job} record
 * @param {Job | undefined} known
 * @returns {Job}
 */
export function merged(record, known) {
  if (known === undefined) return record;
  if (hasEnded(known) && !hasEnded(record)) return known; // an answer overtaken by a later one
  const { preview, decode, encode, firstStep, firstStepAt, lastStepAt } = known;
  const behind = !hasEnded(record) && record.status === known.status && record.step < known.step;
  const progress = behind ? { step: known.step, steps: known.steps, percent: known.percent } : {};
  return { ...record, preview, decode, encode, firstStep, firstStepAt, lastStepAt, ...progress };
}
