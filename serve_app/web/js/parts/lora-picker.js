// The LoRAs of a request: each with its weight and its trigger words. Shown when the model takes any.

import { ApiError } from "../api.js";
import { fill, h, icon } from "../dom.js";
import { MAX_LORA_WEIGHT } from "../form-rules.js";
import { t } from "../i18n.js";
import { fault, slider } from "./fields.js";

/** @typedef {import("../types.js").Lora} Lora */
/** @typedef {import("../types.js").LoraChoice} LoraChoice */

/**
 * @param {{
 *   onInput: () => void,
 *   onWord: (word: string) => void,
 *   upload: (file: File) => Promise<Lora>,
 * }} options  onWord: a trigger word was picked. upload: registers the file and offers it
 */
export function createLoraPicker({ onInput, onWord, upload }) {
  /** @type {Lora[]} */
  let offered = [];
  let most = 0;
  /** @type {ReturnType<typeof createRow>[]} */
  let rows = [];
  let made = 0; // rows ever: their ids never repeat

  const list = h("ul", { class: "control-rows" });
  const input = h("select", {
    id: "loras",
    "aria-label": t("lora.choose"),
    on: {
      change() {
        const lora = offered.find((known) => known.id === input.value);
        input.value = "";
        if (lora !== undefined) choose(lora);
      },
    },
  });
  const file = h("input", {
    id: "lora-file",
    type: "file",
    class: "visually-hidden",
    accept: ".safetensors",
    on: {
      change() {
        const chosen = file.files?.[0];
        file.value = ""; // the same file may be chosen again
        if (chosen !== undefined) void take(chosen);
      },
    },
  });
  const words = h("span", {}, t("lora.upload"));
  const fileLabel = h("label", { class: "upload", for: "lora-file" }, words);
  const problem = fault([input], "loras-fault");
  const element = h(
    "div",
    { class: "field", role: "group", "aria-labelledby": "loras-label" },
    h("span", { class: "label", id: "loras-label" }, t("lora.label")),
    list,
    input,
    file,
    fileLabel,
    problem.element,
  );

  /** @param {File} chosen */
  async function take(chosen) {
    problem.show(null);
    file.disabled = true;
    words.textContent = t("lora.uploading", { name: chosen.name });
    try {
      choose(await upload(chosen));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      problem.show([error.problem.message || t("error.network")]);
    } finally {
      file.disabled = false;
      words.textContent = t("lora.upload");
    }
  }

  /** @param {Lora} lora */
  function choose(lora) {
    problem.show(null);
    if (rows.length >= most) problem.show([t("lora.tooMany", { count: most })]);
    else add({ id: lora.id, name: lora.name, weight: 1 });
    render();
    onInput();
  }

  /** @param {LoraChoice} choice */
  function add(choice) {
    made += 1;
    const row = createRow(made, choice, onInput, () => {
      rows = rows.filter((other) => other !== row);
      problem.show(null);
      render();
      input.focus();
      onInput();
    });
    rows.push(row);
  }

  function render() {
    for (const row of rows) row.setTriggerWords(offered.find(({ id }) => id === row.get().id)?.triggerWords ?? [], onWord);
    fill(list, ...rows.map((row) => row.element));
    list.hidden = rows.length === 0;
    const chosen = new Set(rows.map((row) => row.get().id));
    const free = offered.filter(({ id }) => !chosen.has(id));
    fill(
      input,
      h("option", { value: "" }, t("lora.choose")),
      ...free.map(({ id, name, description }) =>
        h("option", { value: id }, description === "" ? name : `${name}: ${description}`),
      ),
    );
    input.value = "";
    input.hidden = free.length === 0 || rows.length >= most;
    fileLabel.hidden = rows.length >= most;
    element.hidden = most === 0;
  }
  render();

  return {
    element,
    input,
    get: () => rows.map((row) => row.get()),
    /** @param {LoraChoice[]} choices */
    set(choices) {
      rows = [];
      for (const choice of choices.slice(0, most)) add(choice);
      problem.show(null);
      render();
    },
    /** Shows the section when the model takes LoRAs. @param {Lora[]} loras @param {number} count  at most */
    offer(loras, count) {
      offered = loras;
      most = count;
      render();
    },
  };
}

/**
 * @param {number} number
 * @param {LoraChoice} choice
 * @param {() => void} onInput
 * @param {() => void} onRemove
 */
function createRow(number, choice, onInput, onRemove) {
  const { name } = choice;
  const weight = slider({
    id: `lora-weight-${number}`,
    label: t("lora.weight", { name }),
    step: "0.05",
    onInput,
  });
  weight.set(choice.weight, { min: -MAX_LORA_WEIGHT, max: MAX_LORA_WEIGHT });
  const chips = h("div", { class: "chips" });
  const remove = h(
    "button",
    {
      type: "button",
      class: "quiet",
      "aria-label": t("lora.remove", { name }),
      title: t("lora.remove", { name }),
      on: { click: onRemove },
    },
    icon("close"),
  );
  return {
    element: h("li", { class: "lora-row" }, h("div", { class: "group" }, weight.element, chips), remove),
    /** @returns {LoraChoice} */
    get: () => ({ id: choice.id, name, weight: weight.get() }),
    /** @param {string[]} triggerWords @param {(word: string) => void} onWord */
    setTriggerWords(triggerWords, onWord) {
      chips.hidden = triggerWords.length === 0;
      fill(
        chips,
        ...triggerWords.map((word) => {
          const label = t("lora.word", { word });
          return h(
            "button",
            { type: "button", class: "link", "aria-label": label, title: label, on: { click: () => onWord(word) } },
            word,
          );
        }),
      );
    },
  };
}
