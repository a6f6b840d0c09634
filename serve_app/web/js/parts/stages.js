// The parts of the work on a video, each with its own bar: the last two overlap.

import { h } from "../dom.js";
import { t } from "../i18n.js";
import { portions } from "../job-state.js";

/** @type {Readonly<Record<keyof ReturnType<typeof portions>, import("../types.js").TextKey>>} */
const NAMES = { denoise: "stage.denoise", decode: "stage.decode", encode: "stage.encode" };

export function createStages() {
  const rows = Object.entries(NAMES).map(([name, key]) => {
    const bar = h("progress", { max: 1, "aria-label": t(key) });
    return { name, bar, item: h("li", {}, h("span", { "aria-hidden": "true" }, t(key)), bar) };
  });
  return {
    element: h("ol", { class: "stages" }, ...rows.map((row) => row.item)),
    /** @param {import("../types.js").Job} job */
    show(job) {
      const parts = portions(job);
      for (const { name, bar, item } of rows) {
        const part = parts[/** @type {keyof typeof parts} */ (name)];
        bar.value = part;
        item.dataset.part = part >= 1 ? "done" : part > 0 ? "busy" : "waiting";
      }
    },
  };
}
