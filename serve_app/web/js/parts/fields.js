// Form fields made of native controls. Each is { element, get, set, ... } and calls `onInput` when a person changes it.

import { fill, h, setVar } from "../dom.js";
import { formatNumber } from "../i18n.js";

/**
 * A slider with its value beside the label.
 *
 * @param {{ id: string, label: string, step: string, onInput: () => void }} options
 */
export function slider({ id, label, step, onInput }) {
  const shown = h("output", { for: id });
  const input = h("input", { id, type: "range", step, on: { input: () => (update(), onInput()) } });
  const update = () => {
    shown.textContent = formatNumber(Number(input.value));
    const [min, max] = [Number(input.min), Number(input.max)];
    setVar(input, "--filled", max > min ? (Number(input.value) - min) / (max - min) : 0);
  };
  return {
    element: h(
      "div",
      { class: "field" },
      h("div", { class: "row spread" }, h("label", { for: id }, label), shown),
      input,
    ),
    get: () => Number(input.value),
    /**
     * @param {number} value
     * @param {{ min: number, max: number }} range
     * @param {number} [every]  between two values, where it depends on the model
     */
    set(value, range, every) {
      if (every !== undefined) input.step = String(every);
      input.min = String(range.min);
      input.max = String(range.max);
      input.value = String(value);
      update();
    },
  };
}

/**
 * @param {{ id: string, label: string, onInput: () => void }} options
 */
export function select({ id, label, onInput }) {
  const input = h("select", { id, on: { change: onInput } });
  return {
    element: h("div", { class: "field" }, h("label", { for: id }, label), input),
    input,
    get: () => input.value,
    /** @param {string} value */
    set(value) {
      input.value = value;
    },
    /** @param {{ value: string, words: string }[]} options */
    offer(options) {
      const { value } = input;
      fill(input, ...options.map((option) => h("option", { value: option.value }, option.words)));
      if (options.some((option) => option.value === value)) input.value = value;
    },
  };
}

/**
 * Radio buttons styled as chips; arrow keys move between them.
 *
 * @param {{ name: string, legend: string, onInput: (value: string) => void, trailing?: Node }} options
 */
export function chips({ name, legend, onInput, trailing }) {
  const row = h("div", { class: "chips" });
  const id = `${name}-legend`;
  /** @type {HTMLInputElement[]} */
  let inputs = [];
  return {
    element: h(
      "div",
      { class: "field", role: "radiogroup", "aria-labelledby": id },
      h("div", { class: "row spread" }, h("span", { class: "label", id }, legend), trailing),
      row,
    ),
    /** @param {{ value: string, content: import("../dom.js").Child[] }[]} options */
    offer(options) {
      inputs = options.map(({ value }) =>
        h("input", { type: "radio", name, value, on: { change: () => onInput(value) } }),
      );
      fill(
        row,
        ...options.map((option, index) => h("label", { class: "chip" }, inputs[index], ...option.content)),
      );
    },
    get: () => inputs.find((input) => input.checked)?.value ?? null,
    /** @param {string | null} value  null: none of them */
    set(value) {
      for (const input of inputs) input.checked = input.value === value;
    },
  };
}

/**
 * An error message under a field; the field is marked as invalid for screen readers.
 *
 * @param {HTMLElement[]} inputs
 * @param {string} id
 */
export function fault(inputs, id) {
  const element = h("div", { class: "fault", id, role: "alert", hidden: true });
  return {
    element,
    shown: () => !element.hidden,
    /** @param {(Node | string)[] | null} content  null: nothing is wrong */
    show(content) {
      element.hidden = content === null;
      fill(element, ...(content ?? []));
      for (const input of inputs) {
        if (content === null) {
          input.removeAttribute("aria-invalid");
          input.removeAttribute("aria-describedby");
        } else {
          input.setAttribute("aria-invalid", "true");
          input.setAttribute("aria-describedby", id);
        }
      }
    },
  };
}
