// The recent jobs as a row of small pictures. Kept elements are updated, not rebuilt, so the focus stays.

import { fill, h, icon } from "../dom.js";
import { hasEnded } from "../job-state.js";
import { t } from "../i18n.js";

/** @typedef {import("../types.js").Job} Job */

/**
 * @typedef {object} Frame
 * @property {HTMLElement} item
 * @property {HTMLButtonElement} button
 * @property {HTMLProgressElement} bar
 * @property {string} drawn  what the button shows now
 */

/** @type {Readonly<Record<import("../types.js").JobStatus, import("../types.js").TextKey>>} */
const WORDS = {
  queued: "strip.queued",
  processing: "strip.processing",
  completed: "strip.completed",
  failed: "strip.failed",
  cancelled: "strip.cancelled",
};

/**
 * @param {ReturnType<typeof import("./pictures.js").createPictures>} pictures
 * @param {(id: string) => void} onPick
 */
export function createFilmstrip(pictures, onPick) {
  const list = h("ul", { class: "frames" });
  const element = h("nav", { class: "strip", "aria-label": t("strip.label"), hidden: true }, list);
  /** @type {Map<string, Frame>} */
  const frames = new Map();

  /** @param {string} id @returns {Frame} */
  function frameFor(id) {
    const bar = h("progress", { max: 100, "aria-hidden": "true" });
    const button = h("button", { type: "button", class: "frame", on: { click: () => onPick(id) } });
    return { item: h("li", {}, button), button, bar, drawn: "" };
  }

  /**
   * @param {Frame} frame
   * @param {Job} job
   */
  function draw(frame, job) {
    const { button, bar } = frame;
    const { prompt } = job.request;
    const count = job.pictures.length;
    const words =
      count > 1
        ? t("strip.several", { prompt, count })
        : job.kind === "video" && job.status === "completed"
          ? t("strip.video", { prompt })
          : t(WORDS[job.status], { prompt, percent: job.percent });
    button.setAttribute("aria-label", words);
    button.title = words;
    if (job.status === "queued") bar.removeAttribute("value");
    else bar.value = job.percent;
    const drawn = `${job.status} ${job.preview?.length ?? 0}`;
    if (drawn === frame.drawn) return;
    frame.drawn = drawn;
    button.dataset.status = job.status;
    fill(button, ...inside(job, bar));
  }

  /**
   * @param {Job} job
   * @param {HTMLProgressElement} bar
   */
  function inside(job, bar) {
    const first = job.pictures[0];
    if (job.status === "completed" && first !== undefined) {
      /** @type {HTMLImageElement} */
      const image = pictures.image(first.thumbnailUrl ?? first.posterUrl ?? first.url, { alt: "", loading: "lazy" }, () =>
        image.replaceWith(icon("picture")),
      );
      const count = job.pictures.length;
      if (job.kind === "video") return [image, h("span", { class: "count" }, icon("play"))];
      return [image, count > 1 && h("span", { class: "count", "aria-hidden": "true" }, String(count))];
    }
    if (job.status === "failed") return [icon("alert"), h("span", { class: "word" }, t("strip.failedWord"))];
    if (job.status === "cancelled")
      return [icon("stop"), h("span", { class: "word" }, t("strip.cancelledWord"))];
    return [job.preview === null ? icon("clock") : h("img", { alt: "", src: job.preview }), bar];
  }

  return {
    element,
    /**
     * @param {Job[]} jobs  newest first
     * @param {string | null} currentId
     */
    show(jobs, currentId) {
      element.hidden = jobs.length === 0;
      const ids = new Set(jobs.map((job) => job.id));
      for (const [id, frame] of frames) {
        if (ids.has(id)) continue;
        frame.item.remove();
        frames.delete(id);
      }
      jobs.forEach((job, index) => {
        const frame = frames.get(job.id) ?? frameFor(job.id);
        frames.set(job.id, frame);
        draw(frame, job);
        if (job.id === currentId) frame.button.setAttribute("aria-current", "true");
        else frame.button.removeAttribute("aria-current");
        if (list.children[index] !== frame.item) list.insertBefore(frame.item, list.children[index] ?? null);
      });
      element.dataset.running = String(jobs.some((job) => !hasEnded(job)));
    },
  };
}
