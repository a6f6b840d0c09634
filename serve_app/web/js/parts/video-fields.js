// The fields only videos have: the picture to begin with, how long it runs, and, of a frame-wise one, where it
// ends and how its view moves.

import { fill, h, icon, setText } from "../dom.js";
import { isFixed, pictureFault, seedIsValid } from "../form-rules.js";
import { say, t } from "../i18n.js";
import {
  MAX_FPS,
  WAY,
  canMove,
  fittedFrames,
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
  let framesWish = /** @type {number | null} */ (null);
  let fpsWish = /** @type {number | null} */ (null);
  let strengthWish = /** @type {number | null} */ (null);
  let image = /** @type {string | null} */ (null);
  let wayWish = /** @type {import("../types.js").Way} */ ({ zoom: null, panX: null, panY: null });

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
    onInput: () => ((strengthWish = strength.get()), onInput()),
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
    pictureProblem.show(wrong === null ? null : [say(wrong)]);
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
    strength.element.hidden = image === null || !model?.film?.framewise;
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
    onInput: () => ((framesWish = frames.get()), showSeconds(), onInput()),
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
        fpsWish = Number(fps.value);
        checkFps();
        showSeconds();
        onInput();
      },
    },
  });
  const fpsFault = fault([fps], "fps-fault");

  /** The seconds are another way to say the frames. */
  function secondsTyped() {
    const asked = Number(seconds.value);
    if (!(asked > 0) || !fpsIsValid(fpsNow())) return;
    framesWish = asked * fpsNow();
    showFrames();
  }

  function fpsNow() {
    return fpsWish ?? model?.film?.fps ?? 0;
  }

  function checkFps() {
    fpsFault.show(fpsIsValid(fpsNow()) ? null : [t("fps.wrong", { max: MAX_FPS })]);
  }

  function showFrames() {
    const film = model?.film;
    if (!film) return;
    const range = framesRange(film, size.width, size.height);
    frames.element.hidden = isFixed(range);
    frames.set(fittedFrames(framesWish, film, range), range, film.every);
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
  /** @param {keyof typeof WAY} name @param {string} id @param {string} label */
  const wayField = (name, id, label) => {
    const field = slider({
      id,
      label,
      step: "0.05",
      onInput: () => ((wayWish = { ...wayWish, [name]: field.get() }), onInput()),
    });
    return field;
  };
  const way = {
    zoom: wayField("zoom", "zoom", t("way.zoom")),
    panX: wayField("panX", "pan-x", t("way.panX")),
    panY: wayField("panY", "pan-y", t("way.panY")),
  };
  const wayFields = h(
    "div",
    { class: "group" },
    way.zoom.element,
    h("div", { class: "pair" }, way.panX.element, way.panY.element),
    h("p", { class: "small" }, t("way.hint")),
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
    const wrong = model?.film?.framewise && !seedIsValid(endSeed.value.trim());
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
      frames: framesWish,
      fps: fpsWish,
      image,
      strength: strengthWish,
      endPrompt: endPrompt.value,
      endSeed: endSeed.value.trim(),
      ...wayWish,
    }),
    /**
     * @param {Model} chosen
     * @param {VideoValues} values
     */
    set(chosen, values) {
      model = chosen;
      ({ frames: framesWish, fps: fpsWish, strength: strengthWish, image } = values);
      if (endPrompt.value !== values.endPrompt) endPrompt.value = values.endPrompt;
      endSeed.value = values.endSeed;
      endPrompt.maxLength = chosen.maxPromptChars;
      const framewise = chosen.film?.framewise ?? false;
      start.hidden = !takesPicture(chosen);
      end.hidden = !framewise;
      wayWish = { zoom: values.zoom, panX: values.panX, panY: values.panY };
      wayFields.hidden = !canMove(chosen);
      for (const name of /** @type {const} */ (["zoom", "panX", "panY"]))
        way[name].set(wayWish[name] ?? WAY[name].still, WAY[name]);
      strength.set(strengthWish ?? chosen.strength, { min: 0, max: 1 });
      fps.value = String(fpsNow());
      setText(drop.querySelector("span") ?? drop, t(needsPicture(chosen) ? "start.addNeeded" : "start.add"));
      pictureProblem.show(null);
      checkFps();
      checkEndSeed();
      showPicture();
      showFrames();
      showSeconds();
    },
    /** A larger picture leaves room for fewer frames. @param {number} width @param {number} height */
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
