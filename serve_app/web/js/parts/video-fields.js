// The fields only videos have: the picture to begin with, how long it runs, and, of a frame-wise one, where it
// ends and how its view moves.

import { fill, h, icon, setText } from "../dom.js";
import { isFixed, pictureFault, seedIsValid } from "../form-rules.js";
import { translate, t } from "../i18n.js";
import {
  MAX_FPS,
  MOVE_RANGES,
  canMove,
  nearestFrames,
  fpsIsValid,
  framesRange,
  needsPicture,
  secondsOf,
  takesPicture,
} from "../video-rules.js";
import { fault, slider } from "./fields.js";
import { createPictureDrop, dataAddress } from "./picture-drop.js";

/** @typedef {import("../types.js").Model} Model */
/** @typedef {import("../types.js").VideoValues} VideoValues */

/** @param {{ onInput: () => void }} options */
export function createVideoFields({ onInput }) {
  /** @type {Model | null} */
  let model = null;
  let size = { width: 0, height: 0 };
  // What the person has chosen; null: the model's default counts.
  let framesChosen = /** @type {number | null} */ (null);
  let fpsChosen = /** @type {number | null} */ (null);
  let strengthChosen = /** @type {number | null} */ (null);
  let image = /** @type {string | null} */ (null);
  let chosenMove = /** @type {import("../types.js").CameraMove} */ ({ zoom: null, panX: null, panY: null });

  // ---- the picture it begins with ----
  const { input: pictureInput, drop } = createPictureDrop({
    id: "start-picture",
    words: t("start.add"),
    multiple: false,
    onFiles: (files) => void take(files),
  });
  const pictureProblem = fault([pictureInput], "start-picture-fault");
  const shown = h("div", { class: "start-picture" });
  const strength = slider({
    id: "strength",
    label: t("start.strength"),
    step: "0.05",
    onInput: () => ((strengthChosen = strength.get()), onInput()),
  });
  const start = h(
    "div",
    { class: "field", role: "group", "aria-labelledby": "start-label" },
    h("span", { class: "label", id: "start-label" }, t("start.label")),
    shown,
    pictureInput,
    drop,
    pictureProblem.element,
    strength.element,
  );

  /** @param {File[]} files */
  async function take([file]) {
    if (file === undefined) return;
    const wrong = pictureFault(file, 0);
    pictureProblem.show(wrong === null ? null : [translate(wrong)]);
    if (wrong !== null) return;
    image = await dataAddress(file);
    showPicture();
    onInput();
  }

  function removePicture() {
    image = null;
    showPicture();
    pictureInput.focus();
    onInput();
  }

  function showPicture() {
    drop.hidden = image !== null;
    shown.hidden = image === null;
    strength.element.hidden = image === null || !model?.videoLimits?.framewise;
    if (image === null) {
      fill(shown);
      return;
    }
    const words = t("start.remove");
    fill(
      shown,
      h("img", { src: image, alt: t("start.alt"), width: 72, height: 72 }),
      h(
        "button",
        { type: "button", class: "quiet", "aria-label": words, title: words, on: { click: removePicture } },
        icon("close"),
      ),
    );
  }

  // ---- how long ----
  const frames = slider({
    id: "frames",
    label: t("frames.label"),
    step: "1",
    onInput: () => ((framesChosen = frames.get()), showSeconds(), onInput()),
  });
  const seconds = h("input", {
    id: "seconds",
    type: "number",
    inputmode: "decimal",
    min: 0,
    step: "any",
    on: {
      input: () => (secondsTyped(), onInput()),
      change: showSeconds, // what was typed, as it can be made
    },
  });
  const fps = h("input", {
    id: "fps",
    type: "number",
    inputmode: "numeric",
    min: 1,
    max: MAX_FPS,
    step: 1,
    on: {
      input() {
        fpsChosen = Number(fps.value);
        checkFps();
        showSeconds();
        onInput();
      },
    },
  });
  const fpsFault = fault([fps], "fps-fault");

  /** The seconds set the number of frames. */
  function secondsTyped() {
    const asked = Number(seconds.value);
    if (!(asked > 0) || !fpsIsValid(fpsNow())) return;
    framesChosen = asked * fpsNow();
    showFrames();
  }

  function fpsNow() {
    return fpsChosen ?? model?.videoLimits?.fps ?? 0;
  }

  function checkFps() {
    fpsFault.show(fpsIsValid(fpsNow()) ? null : [t("fps.wrong", { max: MAX_FPS })]);
  }

  function showFrames() {
    const videoLimits = model?.videoLimits;
    if (!videoLimits) return;
    const range = framesRange(videoLimits, size.width, size.height);
    frames.element.hidden = isFixed(range);
    frames.set(nearestFrames(framesChosen, videoLimits, range), range, videoLimits.every);
  }

  function showSeconds() {
    const now = fpsNow();
    if (fpsIsValid(now)) seconds.value = String(secondsOf(frames.get(), now));
  }

  const length = h(
    "div",
    { class: "group" },
    frames.element,
    h(
      "div",
      { class: "pair" },
      h("div", { class: "field" }, h("label", { for: "seconds" }, t("seconds.label")), seconds),
      h("div", { class: "field" }, h("label", { for: "fps" }, t("fps.label")), fps),
    ),
    fpsFault.element,
  );

  // ---- where a frame-wise video ends ----
  const endPrompt = h("textarea", {
    id: "end-prompt",
    rows: 2,
    placeholder: t("end.promptHint"),
    spellcheck: "true",
    on: { input: onInput },
  });
  const endSeed = h("input", {
    id: "end-seed",
    inputmode: "numeric",
    autocomplete: "off",
    maxlength: 19,
    on: { input: () => (checkEndSeed(), onInput()) },
  });
  const endSeedFault = fault([endSeed], "end-seed-fault");
  const endSeedWords = h("p", { class: "small" }, t("end.seedHint"));
  /** @param {keyof typeof MOVE_RANGES} name @param {string} id @param {string} label */
  const moveField = (name, id, label) => {
    const field = slider({
      id,
      label,
      step: "0.05",
      onInput: () => ((chosenMove = { ...chosenMove, [name]: field.get() }), onInput()),
    });
    return field;
  };
  const way = {
    zoom: moveField("zoom", "zoom", t("move.zoom")),
    panX: moveField("panX", "pan-x", t("move.panX")),
    panY: moveField("panY", "pan-y", t("move.panY")),
  };
  const wayFields = h(
    "div",
    { class: "group" },
    way.zoom.element,
    h("div", { class: "pair" }, way.panX.element, way.panY.element),
    h("p", { class: "small" }, t("move.hint")),
  );
  const end = h(
    "div",
    { class: "group" },
    h("div", { class: "field" }, h("label", { for: "end-prompt" }, t("end.prompt")), endPrompt),
    h("div", { class: "field" }, h("label", { for: "end-seed" }, t("end.seed")), endSeed, endSeedWords),
    endSeedFault.element,
    wayFields,
  );

  function checkEndSeed() {
    const wrong = model?.videoLimits?.framewise && !seedIsValid(endSeed.value.trim());
    endSeedFault.show(wrong ? [t("seed.wrong")] : null);
  }

  return {
    start,
    end,
    length,
    /** The control of each field of the API. */
    controls: {
      image: pictureInput,
      strength: element(strength.element),
      num_frames: element(frames.element),
      seconds,
      fps,
      end_prompt: endPrompt,
      end_seed: endSeed,
      zoom: element(way.zoom.element),
      pan_x: element(way.panX.element),
      pan_y: element(way.panY.element),
    },
    /** @returns {VideoValues} */
    get: () => ({
      frames: framesChosen,
      fps: fpsChosen,
      image,
      strength: strengthChosen,
      endPrompt: endPrompt.value,
      endSeed: endSeed.value.trim(),
      ...chosenMove,
    }),
    /**
     * @param {Model} chosen
     * @param {VideoValues} values
     */
    set(chosen, values) {
      model = chosen;
      ({ frames: framesChosen, fps: fpsChosen, strength: strengthChosen, image } = values);
      if (endPrompt.value !== values.endPrompt) endPrompt.value = values.endPrompt;
      endSeed.value = values.endSeed;
      endPrompt.maxLength = chosen.maxPromptChars;
      const framewise = chosen.videoLimits?.framewise ?? false;
      start.hidden = !takesPicture(chosen);
      end.hidden = !framewise;
      chosenMove = { zoom: values.zoom, panX: values.panX, panY: values.panY };
      wayFields.hidden = !canMove(chosen);
      for (const name of /** @type {const} */ (["zoom", "panX", "panY"]))
        way[name].set(chosenMove[name] ?? MOVE_RANGES[name].still, MOVE_RANGES[name]);
      strength.set(strengthChosen ?? chosen.strength, { min: 0, max: 1 });
      fps.value = String(fpsNow());
      setText(drop.querySelector("span") ?? drop, t(needsPicture(chosen) ? "start.addNeeded" : "start.add"));
      pictureProblem.show(null);
      checkFps();
      checkEndSeed();
      showPicture();
      showFrames();
      showSeconds();
    },
    /** A larger picture allows fewer frames. @param {number} width @param {number} height */
    setSize(width, height) {
      size = { width, height };
      showFrames();
      showSeconds();
    },
    /** Marks what cannot be sent. */
    check() {
      checkFps();
      checkEndSeed();
      if (model !== null && needsPicture(model) && image === null)
        pictureProblem.show([t("start.needed")]);
    },
  };
}

/** The control inside a field. @param {HTMLElement} field */
function element(field) {
  return field.querySelector("input") ?? field;
}
