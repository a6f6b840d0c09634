// Short words: seen for a moment, and heard by those who do not see them.

import { h, setText } from "../dom.js";

const SHOWN_MS = 3_500;

export function createToast() {
  const bubble = h("div", { class: "toast", "aria-hidden": "true" });
  const live = h("div", { class: "visually-hidden", role: "status", "aria-live": "polite" });
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;

  /** Only heard. @param {string} words */
  function announce(words) {
    setText(live, words);
  }

  return {
    element: h("div", {}, bubble, live),
    announce,
    /** Seen and heard. @param {string} words */
    show(words) {
      announce(words);
      setText(bubble, words);
      bubble.classList.add("shown");
      clearTimeout(timer);
      timer = setTimeout(() => bubble.classList.remove("shown"), SHOWN_MS);
    },
  };
}
