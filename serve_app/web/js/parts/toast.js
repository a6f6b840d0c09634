// Short notices: shown for a moment, and announced to screen readers.

import { h, setText } from "../dom.js";

const SHOWN_MS = 3_500;

export function createToast() {
  const bubble = h("div", { class: "toast", "aria-hidden": "true" });
  const live = h("div", { class: "visually-hidden", role: "status", "aria-live": "polite" });
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;

  /** For screen readers only. @param {string} words */
  function announce(words) {
    setText(live, words);
  }

  return {
    element: h("div", {}, bubble, live),
    announce,
    /** Shown and announced. @param {string} words */
    show(words) {
      announce(words);
      setText(bubble, words);
      bubble.classList.add("shown");
      clearTimeout(timer);
      timer = setTimeout(() => bubble.classList.remove("shown"), SHOWN_MS);
    },
  };
}
