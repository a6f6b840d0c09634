// The recent jobs as a row of small pictures. Kept elements are updated, not rebuilt, so the focus stays.

import { fill, h, icon } from "../dom.js";
import { hasEnded } from "../job-state.js";
import { t } from "../i18n.js";

/** @typedef {import("../types.js").Job} Job */
/** @typedef {import("../job-store.js").Entry} Entry */

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
 * @param {(key: string) => void} onPick
 */
export function createFilmstrip(pictures, onPick) {
  const list = h("ul", { class: "frames" });
  const element = h("nav", { class: "strip", "aria-label": t("strip.label"), hidden: true }, list);
  /** @type {Map<string, Frame>} */
  const frames = new Map();

  /** @param {string} key @returns {Frame} */
  function frameFor(key) {
    const bar = h("progress", { max: 100, "aria-hidden": "true" });
    const button = h("button", { type: "button", class: "frame", on: { click: () => onPick(key) } });
    return { item: h("li", {}, button), button, bar, drawn: "" };
  }

  /**
   * @param {Frame} frame
   * @param {Entry} entry
   */
  function draw(frame, { job, outgoing, unseen }) {
    const { button, bar } = frame;
    const refused = outgoing?.problem != null;
    const said = job !== null ? wordsOf(job) : outgoing === null ? "" : wordsOfRequest(outgoing);
    const words = unseen ? t("strip.unseen", { words: said }) : said;
    button.setAttribute("aria-label", words);
    button.title = words;
    button.dataset.unseen = String(unseen);
    if (job === null || job.status === "queued") bar.removeAttribute("value");
    else bar.value = job.percent;
    const status = job?.status ?? (refused ? "failed" : "sending");
    const drawn = `${status} ${job?.preview?.length ?? 0}`;
    if (drawn === frame.drawn) return;
    frame.drawn = drawn;
    button.dataset.status = status;
    if (job !== null) fill(button, ...inside(job, bar));
    else if (refused) fill(button, icon("alert"), h("span", { class: "word" }, t("strip.failedWord")));
    else fill(button, icon("clock"), bar);
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
     * @param {Entry[]} entries  newest first
     * @param {string | null} currentKey
     */
    show(entries, currentKey) {
      element.hidden = entries.length === 0;
      const keys = new Set(entries.map((entry) => entry.key));
      for (const [key, frame] of frames) {
        if (keys.has(key)) continue;
        frame.item.remove();
        frames.delete(key);
      }
      entries.forEach((entry, index) => {
        const frame = frames.get(entry.key) ?? frameFor(entry.key);
        frames.set(entry.key, frame);
        draw(frame, entry);
        if (entry.key === currentKey) frame.button.setAttribute("aria-current", "true");
        else frame.button.removeAttribute("aria-current");
        if (list.children[index] !== frame.item) list.insertBefore(frame.item, list.children[index] ?? null);
      });
      element.dataset.running = String(entries.some(({ job }) => job !== null && !hasEnded(job)));
    },
  };
}

/** @param {Job} job */
function wordsOf(job) {
  const { prompt } = job.request;
  const count = job.pictures.length;
  if (count > 1) return t("strip.several", { prompt, count });
  if (job.kind === "video" && job.status === "completed") return t("strip.video", { prompt });
  return t(WORDS[job.status], { prompt, percent: job.percent });
}

/** @param {import("../outgoing.js").Outgoing} outgoing */
function wordsOfRequest({ form: { prompt }, problem }) {
  return t(problem === null ? "strip.sending" : "strip.refused", { prompt });
}
