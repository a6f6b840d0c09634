// A finished job on the stage: its pictures, what made them, and what to do with them.

import { fill, h, icon, setVar } from "../dom.js";
import { formatNumber, t } from "../i18n.js";
import { fileName, isVideo } from "./pictures.js";

/** @typedef {import("../types.js").Job} Job */

/**
 * @param {Job} job
 * @param {{ pictures: ReturnType<typeof import("./pictures.js").createPictures>,
 *           onAgain: (job: Job, seed: string) => void, onSaved: (count: number) => void }} services
 */
export function createResult(job, { pictures, onAgain, onSaved }) {
  const files = job.pictures;
  let picked = 0;
  const facts = h("p", { class: "facts" });
  const frames = files.map((file, index) => {
    const alt =
      files.length === 1
        ? t("picture.alt", { prompt: job.request.prompt })
        : t("picture.altOf", { prompt: job.request.prompt, number: index + 1, count: files.length });
    const showsVideo = isVideo(file);
    const gone = () => fill(frame, icon("picture"), h("span", {}, t(showsVideo ? "video.gone" : "picture.gone")));
    const size = { width: file.width, height: file.height };
    const image = showsVideo
      ? pictures.video(file.url, file.posterUrl, { "aria-label": alt, ...size }, gone)
      : pictures.image(file.url, { alt, ...size }, gone);
    const frame =
      files.length === 1
        ? h("div", { class: "picture" }, image)
        : h("button", { type: "button", class: "picture", on: { click: () => pick(index) } }, image);
    return frame;
  });

  /** @param {number} index */
  function pick(index) {
    picked = index;
    frames.forEach(
      (frame, at) => frame.matches("button") && frame.setAttribute("aria-pressed", String(at === index)),
    );
    const file = files[index];
    if (file === undefined) return;
    const video = job.request.video;
    const texts = [
      job.generationS === null ? "" : t("done.time", { seconds: formatNumber(job.generationS) }),
      t("size.value", { width: file.width, height: file.height }),
      video === null ? "" : t("video.length", { frames: video.frames, seconds: video.seconds, fps: video.fps }),
      t("done.steps", { count: job.request.steps }),
      t("done.seed", { seed: file.seed }),
    ];
    fill(facts, ...texts.filter((text) => text !== "").map((text) => h("span", {}, text)));
  }
  pick(0);

  /** @param {import("../types.js").Picture[]} chosen */
  async function save(chosen) {
    for (const file of chosen) await pictures.save(file.url, fileName(job.id, file));
    onSaved(chosen.length);
  }
  const savePicked = () => void save(files.slice(picked, picked + 1));

  const sheetUrl = files[0]?.sheetUrl ?? null;
  const sheet = sheetUrl !== null && button("picture", t("video.sheet"), showSheet);
  let fetched = false;
  const sheetPlace = h("div", { class: "sheet", hidden: true });

  /** The frames are fetched on the first click; a second click hides them. */
  function showSheet() {
    if (sheetUrl === null) return;
    sheetPlace.hidden = !sheetPlace.hidden;
    if (sheet) sheet.setAttribute("aria-expanded", String(!sheetPlace.hidden));
    if (fetched) return;
    fetched = true;
    const gone = () => fill(sheetPlace, h("p", {}, t("video.gone")));
    fill(sheetPlace, pictures.image(sheetUrl, { alt: t("video.sheetAlt") }, gone));
  }

  const columns = Math.ceil(Math.sqrt(files.length)) || 1;
  const rows = Math.ceil(files.length / columns) || 1;

  return {
    above: area(h("div", { class: "canvas" }, ...frames), files[0] ?? job.request, columns, rows),
    below: [
      h("p", { class: "caption" }, job.request.prompt),
      h(
        "div",
        { class: "row spread under" },
        facts,
        h(
          "div",
          { class: "row actions" },
          button("save", t("done.save"), savePicked),
          files.length > 1 && button("save-all", t("done.saveAll"), () => void save(files)),
          sheet,
          button("again", t("done.again"), () => onAgain(job, files[picked]?.seed ?? job.request.seed)),
        ),
      ),
      sheetPlace,
    ],
    save: savePicked,
  };
}

/**
 * The container of a canvas of this shape; layout.css makes it as large as the stage allows.
 *
 * @param {HTMLElement} canvas
 * @param {{ width: number, height: number }} size  of one picture
 * @param {number} columns
 * @param {number} rows
 */
export function area(canvas, size, columns = 1, rows = 1) {
  const element = h("div", { class: "area" }, canvas);
  setVar(element, "--columns", columns);
  setVar(element, "--ratio", (columns * size.width) / (rows * size.height));
  // small pictures are shown larger, up to 512 px on the longer side: a stamp on a wide stage reads as a fault
  const scale = Math.max(1, 512 / Math.max(size.width, size.height));
  setVar(element, "--natural", `${Math.round(columns * size.width * scale)}px`);
  return element;
}

/**
 * @param {string} name
 * @param {string} words
 * @param {() => void} run
 */
export function button(name, words, run) {
  return h(
    "button",
    { type: "button", class: "plain", on: { click: run } },
    icon(name),
    h("span", {}, words),
  );
}
