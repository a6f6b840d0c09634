// The control images: each with its type and weight. Shown when the model has ControlNets.

import { fill, h, icon } from "../dom.js";
import { MAX_CONTROLS, MAX_WEIGHT, pictureFault } from "../form-rules.js";
import { translate, t } from "../i18n.js";
import { fault, select, slider } from "./fields.js";
import { createPictureDrop, dataAddress } from "./picture-drop.js";

/** @typedef {import("../types.js").ControlPicture} ControlPicture */
/** @typedef {import("../types.js").ControlKind} ControlKind */

/** @type {Readonly<Record<string, import("../types.js").TextKey>>} */
const KINDS = { canny: "control.canny", depth: "control.depth", pose: "control.pose" };

/** @param {string} type */
function nameOf(type) {
  const key = KINDS[type];
  return key === undefined ? type : t(key);
}

/** @param {{ onInput: () => void }} options */
export function createControlPictures({ onInput }) {
  /** @type {ControlKind[]} */
  let kinds = [];
  /** @type {ReturnType<typeof createRow>[]} */
  let rows = [];
  let made = 0; // rows ever: their ids never repeat

  const list = h("ul", { class: "control-rows" });
  const { input, drop } = createPictureDrop({
    id: "controls",
    words: t("control.add"),
    multiple: true,
    onFiles: (files) => void take(files),
  });
  const problem = fault([input], "controls-fault");
  const element = h(
    "div",
    { class: "field", role: "group", "aria-labelledby": "controls-label" },
    h("span", { class: "label", id: "controls-label" }, t("control.label")),
    list,
    input,
    drop,
    problem.element,
  );

  /** Adds the files as control pictures; shows an error for a file that cannot be one. @param {File[]} files */
  async function take(files) {
    problem.show(null);
    for (const file of files) {
      const wrong = pictureFault(file, rows.length);
      if (wrong !== null) {
        problem.show([translate(wrong)]);
        break;
      }
      add({ image: await dataAddress(file), type: kinds[0]?.type ?? "", weight: 1 });
    }
    render();
    onInput();
  }

  /** @param {ControlPicture} picture */
  function add(picture) {
    made += 1;
    const row = createRow(made, picture, onInput, () => {
      rows = rows.filter((other) => other !== row);
      problem.show(null);
      render();
      input.focus();
      onInput();
    });
    row.offer(kinds);
    rows.push(row);
  }

  function render() {
    fill(list, ...rows.map((row) => row.element));
    list.hidden = rows.length === 0;
    drop.hidden = rows.length >= MAX_CONTROLS;
  }
  render();

  return {
    element,
    input,
    get: () => rows.map((row) => row.get()),
    /** @param {ControlPicture[]} pictures */
    set(pictures) {
      rows = [];
      for (const picture of pictures) add(picture);
      problem.show(null);
      render();
    },
    /** Shows the section when the model takes such pictures. @param {ControlKind[]} offered */
    offer(offered) {
      kinds = offered;
      element.hidden = kinds.length === 0;
      for (const row of rows) row.offer(kinds);
    },
  };
}

/**
 * @param {number} number
 * @param {ControlPicture} picture
 * @param {() => void} onInput
 * @param {() => void} onRemove
 */
function createRow(number, picture, onInput, onRemove) {
  let { type } = picture;
  const kind = select({
    id: `control-type-${number}`,
    label: t("control.type"),
    onInput: () => ((type = kind.get()), onInput()),
  });
  const weight = slider({ id: `control-weight-${number}`, label: t("control.weight"), step: "0.05", onInput });
  weight.set(picture.weight, { min: 0, max: MAX_WEIGHT });
  const remove = h(
    "button",
    {
      type: "button",
      class: "quiet",
      "aria-label": t("control.remove"),
      title: t("control.remove"),
      on: { click: onRemove },
    },
    icon("close"),
  );
  return {
    element: h(
      "li",
      { class: "control-row" },
      h("img", { src: picture.image, alt: t("control.alt"), width: 72, height: 72 }),
      h("div", { class: "group" }, kind.element, weight.element),
      remove,
    ),
    /** @returns {ControlPicture} */
    get: () => ({ image: picture.image, type, weight: weight.get() }),
    /** @param {ControlKind[]} kinds */
    offer(kinds) {
      kind.offer(
        kinds.map((each) => ({
          value: each.type,
          words: each.plainPictures ? nameOf(each.type) : t("control.map", { kind: nameOf(each.type) }),
        })),
      );
      if (kinds.some((each) => each.type === type)) kind.set(type);
      else if (kinds.length > 0) type = kind.get();
    },
  };
}
